"""How good is a model, and how sure are we: pass@1, pass@k, consensus, their intervals, and one model against another.

A benchmark is a sample of problems, and each problem is answered n times. The unit that is independent is the problem,
not the answer: eight answers to one problem say less than one answer to each of eight. So pass@1 is the mean over
problems of the mean over samples, and the 95 % interval is about the mean over *all problems like these* ("clustered by
problem": Miller 2024, "Adding error bars to evals", arXiv:2411.00640).

Benchmarks are small (30 problems) and scores are often near 0 or 1. There the usual mean ± 1.96 standard errors, and a
percentile bootstrap too, collapse: 30 of 30 would be "100 % ± 0". Wilson's score interval (Wilson 1927, JASA 22:209;
compared by Newcombe 1998, Statistics in Medicine 17:857) does not, but it wants independent trials. We give it as many
as the data are worth, as survey statisticians do (Korn & Graubard 1998): problems / deff, where the design effect

    deff = (Σ (xᵢ - p)² + c) / (P p (1 - p) + c)        xᵢ: the share of problem i's samples that are right; P problems

is 1 when every problem is always or never solved (and so with one sample a problem: plain Wilson), and near 1/n when
problems are alike. c = 1/8 pulls it towards 1, the careful side, where few successes or failures were seen: without it,
30 problems of true score 5 % were covered 87 % of the time, with it 96-97 %. It was chosen by simulation (30 to 500
problems, true scores 0.05 to 0.97, 1 to 64 samples, beta-spread difficulty; tools/coverage.py, docs/statistics.md).

pass@k is the chance that one of k samples is right, without bias from n ≥ k of them (Chen et al. 2021,
arXiv:2107.03374): 1 - C(n - c, k) / C(n, k) for c right ones. It is undefined for n < k, and refused: drawn with
replacement it would be biased, and divided by k it would be wrong. cons@k lets the k samples vote (Wang et al. 2022,
arXiv:2203.11171): who gave no answer does not vote, and where several answers have the most votes the problem counts as
the share of them that is right, which is what breaking ties at random would give in the mean.

Two models that answered the same problems are compared problem by problem. The interval of the difference is Newcombe's
(1998, Statistics in Medicine 17:2635, method 10): Wilson's intervals of both, joined by the correlation between the
models across problems, less a continuity correction, so that two models that agree everywhere are not "± 0" apart.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, median
from typing import Any, Literal

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
CAUTION = 0.125  # c of the docstring, in units of p(1 - p): half a problem at p = 1/2


@dataclass(frozen=True)
class Sample:
    """One graded answer. Tokens are the answering model's; `reasoning_tokens` is 0 where it did not think. vote: which
    of the problem's different answers it is (votes.py), None where it marked none."""

    problem: str
    verdict: Literal["correct", "wrong", "unverifiable"]
    answered: bool
    truncated: bool
    completion_tokens: int | None  # None: a server that does not say
    reasoning_tokens: int
    vote: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval, all in [0, 1]; `effective` is the number of independent trials it is worth."""

    value: float
    low: float
    high: float
    effective: float


def wilson(share: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share of `trials` independent trials (which need not be a whole number)."""
    assert 0 <= share <= 1 and trials > 0, (share, trials)
    spread = z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # min, max: rounding at 0 and 1


def design_effect(shares: Sequence[float], floor: float) -> float:
    """How much less (≤ 1) a problem's mean varies than one all-or-nothing answer would; never under `floor`."""
    if len(shares) == 1:
        return 1.0  # one problem says nothing of how problems differ
    p = fmean(shares)
    observed = sum((x - p) ** 2 for x in shares)
    return min(1.0, max(floor, (observed + CAUTION) / (len(shares) * p * (1 - p) + CAUTION)))


def pass_at_1(correct: Sequence[Sequence[bool]]) -> Estimate:
    """The mean over problems of the mean over samples, with its interval clustered by problem.

    correct: for each problem, whether each of its samples is right. Problems may have different numbers of samples
    (each problem still counts once); a problem without any is refused: leaving it out would change the benchmark.
    """
    if not correct or not all(correct):
        raise ValueError("pass@1 needs at least one problem, and at least one sample of every problem")
    shares = [fmean(samples) for samples in correct]
    floor = fmean(1 / len(samples) for samples in correct)  # problems all alike: every sample is a trial of its own
    return _estimate(shares, floor)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int, samples: int | None = None) -> Estimate:
    """The mean over problems of the unbiased chance that one of k samples is right. pass_at_k(c, 1) is pass_at_1(c).

    samples: how many each problem should have; ValueError when one has not, and when one has fewer than k.
    """
    if not correct or k < 1:
        raise ValueError(f"pass@{k} needs at least one problem, and k at least 1")
    drawn = {len(of_one) for of_one in correct}
    if samples is not None and drawn != {samples}:
        raise ValueError(f"pass@{k} was asked of {samples} samples a problem; there are {_range(drawn)}")
    if min(drawn) < k:
        raise ValueError(f"pass@{k} needs {k} samples of every problem; there are {_range(drawn)}")
    if k == 1:
        return pass_at_1(correct)
    shares = [1 - comb(len(of_one) - sum(of_one), k) / comb(len(of_one), k) for of_one in correct]
    return _estimate(shares, fmean(k / len(of_one) for of_one in correct))


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _estimate(shares: Sequence[float], floor: float) -> Estimate:
    p = fmean(shares)
    effective = len(shares) / design_effect(shares, floor)
    return Estimate(p, *wilson(p, effective), effective)


@dataclass(frozen=True)
class Vote:
    """answer: which of the problem's different answers a sample gave, None for no answer. correct: whether it is right;
    the same for all samples of one answer."""

    answer: int | None
    correct: bool


@dataclass(frozen=True)
class Consensus:
    """ties: problems in which a right and a wrong answer shared the most votes. silent: problems without a vote."""

    estimate: Estimate
    ties: int
    silent: int


def consensus(votes: Sequence[Sequence[Vote]]) -> Consensus:
    """cons@k of problems with k votes each. ValueError for no problem, or one without samples."""
    if not votes or not all(votes):
        raise ValueError("cons@k needs at least one problem, and at least one sample of every problem")
    shares, ties, silent = [], 0, 0
    for of_one in votes:
        counts = Counter(vote.answer for vote in of_one if vote.answer is not None)
        right = {vote.answer for vote in of_one if vote.correct}
        most = max(counts.values(), default=0)
        leaders = [answer for answer, count in counts.items() if count == most]
        share = fmean(answer in right for answer in leaders) if leaders else 0.0
        shares.append(share)
        ties += 0 < share < 1
        silent += not leaders
    return Consensus(_estimate(shares, 1.0), ties, silent)


@dataclass(frozen=True)
class Difference:
    """The first model's score less the second's, with its 95 % interval; problems in which the first was right more
    often (gained) or less often (lost); p: of a sign test between those two, exact and two-sided."""

    value: float
    low: float
    high: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    p: float


def compare(first: Mapping[str, Sequence[bool]], second: Mapping[str, Sequence[bool]]) -> Difference:
    """Two models on the same problems: for each, whether its samples were right. ValueError if the problems differ."""
    if first.keys() != second.keys() or not first:
        raise ValueError("two models can only be compared on the same problems")
    names = list(first)
    a, b = ([fmean(of_model[name]) for name in names] for of_model in (first, second))
    one, two = pass_at_1([first[name] for name in names]), pass_at_1([second[name] for name in names])
    together = sum((x - one.value) * (y - two.value) for x, y in zip(a, b, strict=True))
    apart = sqrt(sum((x - one.value) ** 2 for x in a) * sum((y - two.value) ** 2 for y in b))
    corrected = max(together - 0.5, 0.0) if together > 0 else together
    correlation = corrected / apart if apart else 0.0

    def reach(x: float, y: float) -> float:
        return sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    value = one.value - two.value
    low = value - reach(one.value - one.low, two.high - two.value)
    high = value + reach(one.high - one.value, two.value - two.low)
    gained = tuple(name for name, x, y in zip(names, a, b, strict=True) if x > y)
    lost = tuple(name for name, x, y in zip(names, a, b, strict=True) if x < y)
    return Difference(value, max(low, -1.0), min(high, 1.0), gained, lost, sign_test(len(gained), len(lost)))


def sign_test(more: int, fewer: int) -> float:
    """The chance of a split at least as uneven, were both sides equally likely."""
    n, least = more + fewer, min(more, fewer)
    return min(1.0, 2 * sum(comb(n, i) for i in range(least + 1)) / 2**n)


def summarise(samples: Iterable[Sample]) -> dict[str, Any]:
    """The scores of one model on one benchmark, as `scores.json` has them. Rates are shares of all samples."""
    samples = list(samples)
    problems: dict[str, list[Sample]] = {}
    for sample in samples:
        problems.setdefault(sample.problem, []).append(sample)
    correct = [[sample.verdict == "correct" for sample in of_one] for of_one in problems.values()]
    estimate = pass_at_1(correct)
    reasoning = [sample.reasoning_tokens for sample in samples]
    completion = [sample.completion_tokens for sample in samples if sample.completion_tokens is not None]
    return {
        "problems": len(problems),
        "samples": len(samples),
        "correct": sum(sample.verdict == "correct" for sample in samples),
        "pass@1": _interval(estimate),
        "effective_trials": estimate.effective,
        **_of_several(correct, list(problems.values())),
        "truncated_rate": fmean(sample.truncated for sample in samples),
        "no_answer_rate": fmean(not sample.answered for sample in samples),
        "unverifiable_rate": fmean(sample.verdict == "unverifiable" for sample in samples),
        "mean_completion_tokens": fmean(completion) if completion else None,
        "median_completion_tokens": median(completion) if completion else None,
        "mean_reasoning_tokens": fmean(reasoning),
        "median_reasoning_tokens": median(reasoning),
    }


def _of_several(correct: Sequence[Sequence[bool]], samples: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """pass@k and cons@k of problems that have the same number of samples, more than one."""
    counts = {len(of_one) for of_one in correct}
    n = counts.pop()
    if counts or n < 2:
        return {"pass@k": {}, "cons@k": {}}
    of_k = {k: pass_at_k(correct, k) for k in sorted({n, *(2**i for i in range(1, n.bit_length()) if 2**i < n)})}
    made = consensus([[Vote(one.vote, one.verdict == "correct") for one in of_one] for of_one in samples])
    return {
        "pass@k": {str(k): _interval(estimate) for k, estimate in of_k.items()},
        "cons@k": {str(n): _interval(made.estimate) | {"ties": made.ties, "silent": made.silent}},
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
