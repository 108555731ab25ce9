"""How good is a model, and how sure are we: pass@1, its interval, and the rates that stand beside it.

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
problems, true scores 0.05 to 0.97, 1 to 64 samples, beta-spread difficulty); the unit tests repeat part of that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median
from typing import Any, Literal

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
CAUTION = 0.125  # c of the docstring, in units of p(1 - p): half a problem at p = 1/2


@dataclass(frozen=True)
class Sample:
    """One graded answer. Tokens are the answering model's; `reasoning_tokens` is 0 where it did not think."""

    problem: str
    verdict: Literal["correct", "wrong", "unverifiable"]
    answered: bool
    truncated: bool
    completion_tokens: int
    reasoning_tokens: int


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
    p = fmean(shares)
    effective = len(shares) / design_effect(shares, floor)
    return Estimate(p, *wilson(p, effective), effective)


def summarise(samples: Iterable[Sample]) -> dict[str, Any]:
    """The scores of one model on one benchmark, as `scores.json` has them. Rates are shares of all samples."""
    samples = list(samples)
    problems: dict[str, list[bool]] = {}
    for sample in samples:
        problems.setdefault(sample.problem, []).append(sample.verdict == "correct")
    estimate = pass_at_1(list(problems.values()))
    reasoning = [sample.reasoning_tokens for sample in samples]
    completion = [sample.completion_tokens for sample in samples]
    return {
        "problems": len(problems),
        "samples": len(samples),
        "correct": sum(sample.verdict == "correct" for sample in samples),
        "pass@1": estimate.value,
        "pass@1_low": estimate.low,
        "pass@1_high": estimate.high,
        "effective_trials": estimate.effective,
        "truncated_rate": fmean(sample.truncated for sample in samples),
        "no_answer_rate": fmean(not sample.answered for sample in samples),
        "unverifiable_rate": fmean(sample.verdict == "unverifiable" for sample in samples),
        "mean_completion_tokens": fmean(completion),
        "median_completion_tokens": median(completion),
        "mean_reasoning_tokens": fmean(reasoning),
        "median_reasoning_tokens": median(reasoning),
    }
