"""How good is a model, and how sure are we: pass@1, pass@k, consensus, their intervals, and one model against another.

A benchmark is a sample of problems, and each problem is answered n times. The unit that is independent is the problem,
not the answer: eight answers to one problem say less than one answer to each of eight. So pass@1 is the mean over
problems of the mean over samples, and the 95 % interval is about the mean over *all problems like these* ("clustered by
problem": Miller 2024, "Adding error bars to evals", arXiv:2411.00640).

Benchmarks are small (30 problems) and scores are often near 0 or 1. There the usual mean ± 1.96 standard errors, and a
percentile bootstrap too, collapse: 30 of 30 would be "100 % ± 0". Wilson's score interval (Wilson 1927, JASA 22:209;
compared by Newcombe 1998, Statistics in Medicine 17:857) does not, but it assumes independent trials. We give it as
many as the data are worth, as survey statisticians do (Korn & Graubard 1998): problems / deff, where the design effect

    deff = (Σ (xᵢ - p)² + c) / (P p (1 - p) + c)        xᵢ: the share of problem i's samples that are right; P problems

is 1 when every problem is always or never solved (and so with one sample a problem: plain Wilson), and near 1/n when
problems are alike. c = 1/8 pulls it towards 1, the careful side, where few successes or failures were seen: without it,
the interval covered a true score of 5 % on 30 problems 87 % of the time, with it 96-97 %. It was chosen by simulation
(30 to 500 problems, true scores 0.05 to 0.97, 1 to 64 samples, beta-spread difficulty; tools/coverage.py,
docs/statistics.md).

pass@k is the chance that one of k samples is right, without bias from n ≥ k of them (Chen et al. 2021,
arXiv:2107.03374): 1 - C(n - c, k) / C(n, k) for c right ones. It is undefined for n < k, and refused: drawn with
replacement it would be biased, and divided by k it would be wrong. cons@k lets the k samples vote (Wang et al. 2022,
arXiv:2203.11171): a sample without an answer does not vote, and where several answers have the most votes the problem
counts as the share of them that is right, which is the expected value of breaking ties at random.

Two models that answered the same problems are compared problem by problem. The interval of the difference is Newcombe's
(1998, Statistics in Medicine 17:2635, method 10): Wilson's intervals of both, joined by the correlation between the
models across problems, less a continuity correction, so that two models that agree everywhere are not "± 0" apart.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, median
from typing import Literal

from distill.artefacts import ConsensusScore, InstructionScores, Interval

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
CAUTION = 0.125  # c of the docstring, in units of p(1 - p): half a problem at p = 1/2


@dataclass(frozen=True)
class Followed:
    """Whether a response follows each instruction of its prompt, as it stands (strict) and in a variant (loose)."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True)
class Sample:
    """One graded answer. Tokens are the answering model's; `reasoning_tokens` is 0 without reasoning. vote: the number
    of its class among the problem's answers (`distill.grading.votes`), None where no answer is marked. followed: of
    instructions."""

    problem: str
    verdict: Literal["correct", "wrong", "unverifiable"]
    answered: bool
    truncated: bool
    completion_tokens: int | None  # None: the server does not count them
    reasoning_tokens: int
    vote: int | None = None
    followed: Followed | None = None


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval, all in [0, 1]; `effective` is the number of independent trials it is worth."""

    value: float
    low: float
    high: float
    effective: float


def wilson(share: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share of `trials` independent trials (which need not be a whole number)."""
    assert 0 <= share <= 1 and trials > 0, (share, trials)
    spread = z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # min, max: rounding at 0 and 1


def design_effect(shares: Sequence[float], floor: float) -> float:
    """How much less (≤ 1) a problem's mean varies than one all-or-nothing answer would; never under `floor`."""
    if len(shares) == 1:
        return 1.0  # one problem says nothing about how problems differ
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

    samples: how many each problem should have. Errors: ValueError when a problem has another number, or fewer than k.
    """
    if not correct or k < 1:
        raise ValueError(f"pass@{k} needs at least one problem, and k at least 1")
    drawn = {len(of_problem) for of_problem in correct}
    if samples is not None and drawn != {samples}:
        raise ValueError(f"pass@{k} was asked of {samples} samples a problem; there are {_range(drawn)}")
    if min(drawn) < k:
        raise ValueError(f"pass@{k} needs {k} samples of every problem; there are {_range(drawn)}")
    if k == 1:
        return pass_at_1(correct)
    shares = [1 - comb(len(row) - sum(row), k) / comb(len(row), k) for row in correct]
    return _estimate(shares, fmean(k / len(row) for row in correct))


def share_of_parts(parts: Sequence[Sequence[bool]]) -> Estimate:
    """The share of all parts that are true, clustered by problem. parts: of each problem, at least one.

    The share is a ratio, Σ yᵢ / Σ nᵢ for yᵢ true parts among the nᵢ of problem i, so its design effect is that of a
    ratio estimator: (Σ (yᵢ - p nᵢ)² + c m) / (N p (1 - p) + c), for N parts, m of them a problem on average. Where all
    parts are true, or none is, it is m: each problem then counts as one trial. It is never below 1.
    """
    if not parts or not all(parts):
        raise ValueError("a share of parts needs at least one problem, and at least one part of every problem")
    total = sum(map(len, parts))
    p = sum(map(sum, parts)) / total
    spread = sum((sum(row) - p * len(row)) ** 2 for row in parts)
    effect = (spread + CAUTION * total / len(parts)) / (total * p * (1 - p) + CAUTION)
    effective = total / max(1.0, effect)
    return Estimate(p, *wilson(p, effective), effective)


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _estimate(shares: Sequence[float], floor: float) -> Estimate:
    p = fmean(shares)
    effective = len(shares) / design_effect(shares, floor)
    return Estimate(p, *wilson(p, effective), effective)


@dataclass(frozen=True)
class Vote:
    """One sample's vote. answer: the number of its class among the problem's answers, None for no answer. correct:
    whether it is right; the same for all samples of a class."""

    answer: int | None
    correct: bool


@dataclass(frozen=True)
class Consensus:
    """cons@k. ties: problems in which a right and a wrong answer shared the most votes. silent: problems without a
    vote."""

    estimate: Estimate
    ties: int
    silent: int


def consensus(votes: Sequence[Sequence[Vote]]) -> Consensus:
    """cons@k of problems with k votes each. ValueError for no problem, or one without samples."""
    if not votes or not all(votes):
        raise ValueError("cons@k needs at least one problem, and at least one sample of every problem")
    shares, ties, silent = [], 0, 0
    for of_problem in votes:
        counts = Counter(vote.answer for vote in of_problem if vote.answer is not None)
        right = {vote.answer for vote in of_problem if vote.correct}
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
    p, q = pass_at_1([first[name] for name in names]), pass_at_1([second[name] for name in names])
    covariance = sum((x - p.value) * (y - q.value) for x, y in zip(a, b, strict=True))
    spread = sqrt(sum((x - p.value) ** 2 for x in a) * sum((y - q.value) ** 2 for y in b))
    corrected = max(covariance - 0.5, 0.0) if covariance > 0 else covariance
    correlation = corrected / spread if spread else 0.0

    def reach(x: float, y: float) -> float:
        return sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    value = p.value - q.value
    low = value - reach(p.value - p.low, q.high - q.value)
    high = value + reach(p.high - p.value, q.value - q.low)
    gained = tuple(name for name, x, y in zip(names, a, b, strict=True) if x > y)
    lost = tuple(name for name, x, y in zip(names, a, b, strict=True) if x < y)
    return Difference(value, max(low, -1.0), min(high, 1.0), gained, lost, sign_test(len(gained), len(lost)))


def sign_test(more: int, fewer: int) -> float:
    """The chance of a split at least as uneven, were both sides equally likely."""
    n, least = more + fewer, min(more, fewer)
    return min(1.0, 2 * sum(comb(n, i) for i in range(least + 1)) / (1 << n))


@dataclass(frozen=True)
class Statistics:
    """The scores of one model on one benchmark, named as in `artefacts.Scores`. Rates are shares of all samples."""

    problems: int
    samples: int
    correct: int
    pass_at_1: Interval
    effective_trials: float
    pass_at_k: dict[int, Interval]
    consensus_at_k: dict[int, ConsensusScore]
    instructions: InstructionScores | None
    truncated_rate: float
    no_answer_rate: float
    unverifiable_rate: float
    mean_completion_tokens: float | None
    median_completion_tokens: float | None
    mean_reasoning_tokens: float
    median_reasoning_tokens: float


def summarise(samples: Iterable[Sample], votes: bool = True) -> Statistics:
    """The statistics of graded samples. votes: whether answers can be equal, else there is no consensus.

    Errors: ValueError when there is no sample.
    """
    samples = list(samples)
    problems: dict[str, list[Sample]] = {}
    for sample in samples:
        problems.setdefault(sample.problem, []).append(sample)
    correct = [[sample.verdict == "correct" for sample in of_problem] for of_problem in problems.values()]
    estimate = pass_at_1(correct)
    reasoning = [sample.reasoning_tokens for sample in samples]
    completion = [sample.completion_tokens for sample in samples if sample.completion_tokens is not None]
    same_number = len({len(of_problem) for of_problem in correct}) == 1
    several = same_number and len(correct[0]) > 1
    return Statistics(
        problems=len(problems),
        samples=len(samples),
        correct=sum(sample.verdict == "correct" for sample in samples),
        pass_at_1=_interval(estimate),
        effective_trials=estimate.effective,
        pass_at_k=_pass_at_several_k(correct) if several else {},
        consensus_at_k=_consensus_of_all(list(problems.values())) if several and votes else {},
        instructions=_instructions(list(problems.values())),
        truncated_rate=fmean(sample.truncated for sample in samples),
        no_answer_rate=fmean(not sample.answered for sample in samples),
        unverifiable_rate=fmean(sample.verdict == "unverifiable" for sample in samples),
        mean_completion_tokens=fmean(completion) if completion else None,
        median_completion_tokens=median(completion) if completion else None,
        mean_reasoning_tokens=fmean(reasoning),
        median_reasoning_tokens=median(reasoning),
    )


def _pass_at_several_k(correct: Sequence[Sequence[bool]]) -> dict[int, Interval]:
    """pass@k for the powers of two below the number of samples n, and for n."""
    n = len(correct[0])
    ks = sorted({n, *(2**i for i in range(1, n.bit_length()) if 2**i < n)})
    return {k: _interval(pass_at_k(correct, k)) for k in ks}


def _consensus_of_all(problems: Sequence[Sequence[Sample]]) -> dict[int, ConsensusScore]:
    """cons@n of problems with n samples each."""
    votes = [[Vote(sample.vote, sample.verdict == "correct") for sample in samples] for samples in problems]
    result = consensus(votes)
    estimate = result.estimate
    score = ConsensusScore(
        value=estimate.value, low=estimate.low, high=estimate.high, ties=result.ties, silent=result.silent
    )
    return {len(votes[0]): score}


def _instructions(problems: Sequence[Sequence[Sample]]) -> InstructionScores | None:
    """IFEval's four accuracies; None where the problems are not instructions.

    A sample that could not be checked follows none of its instructions, of which there is at least one: pass@1 counts
    it as wrong too.
    """
    if not any(sample.followed for samples in problems for sample in samples):
        return None
    followed = list[list[Followed]]()
    for samples in problems:
        count = max(len(sample.followed.strict) if sample.followed else 1 for sample in samples)
        none = Followed((False,) * count, (False,) * count)
        followed.append([sample.followed or none for sample in samples])
    strict, loose = ([[getattr(each, level) for each in rows] for rows in followed] for level in ("strict", "loose"))
    at_prompts = [pass_at_1([[all(parts) for parts in rows] for rows in level]) for level in (strict, loose)]
    at_parts = [
        share_of_parts([[one for parts in rows for one in parts] for rows in level]) for level in (strict, loose)
    ]
    return InstructionScores(
        prompt_strict=_interval(at_prompts[0]),
        prompt_loose=_interval(at_prompts[1]),
        instruction_strict=_interval(at_parts[0]),
        instruction_loose=_interval(at_parts[1]),
    )


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)
