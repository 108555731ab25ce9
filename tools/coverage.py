"""How often our 95 % intervals contain the true score: the table of docs/statistics.md, by simulation.

    python tools/coverage.py [--experiments 2000] [--seed 0]

A model of a given true score answers P problems n times each. The difficulty of the problems is drawn anew in every
experiment, from a beta distribution whose mean is the true score: that is "problems like these". spread: 1 is U-shaped
or uniform at a score of a half, larger values make problems more alike. The table compares our interval with the mean
± 1.96 standard errors and with a percentile bootstrap over problems (200 resamples), which most harnesses print.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.eval.statistics import pass_at_1

PROBLEMS, SCORES, SAMPLES, SPREADS = (30, 200, 500), (0.05, 0.5, 0.97), (1, 8), (1.0, 4.0)
RESAMPLES = 200


def normal(shares: Sequence[float]) -> tuple[float, float]:
    """The mean of the problems' shares ± 1.96 standard errors."""
    p, error = fmean(shares), stdev(shares) / sqrt(len(shares))
    return p - 1.96 * error, p + 1.96 * error


def bootstrap(shares: Sequence[float], rng: random.Random) -> tuple[float, float]:
    """The percentile interval of the mean over resampled problems."""
    means = sorted(fmean(rng.choices(shares, k=len(shares))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def covered(
    problems: int, score: float, samples: int, spread: float, experiments: int, rng: random.Random
) -> tuple[float, float, float]:
    """Shares of the experiments in which our, the normal and the bootstrap interval contain the true score."""
    hits = [0, 0, 0]
    resampled = min(experiments, 200)  # the bootstrap is slow
    for number in range(experiments):
        easiness = [rng.betavariate(spread * score, spread * (1 - score)) for _ in range(problems)]
        correct = [[rng.random() < p for _ in range(samples)] for p in easiness]
        shares = [fmean(row) for row in correct]
        estimate = pass_at_1(correct)
        hits[0] += estimate.low <= score <= estimate.high
        low, high = normal(shares)
        hits[1] += low <= score <= high
        if number < resampled:
            low, high = bootstrap(shares, rng)
            hits[2] += low <= score <= high
    return hits[0] / experiments, hits[1] / experiments, hits[2] / resampled


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    print(
        "| problems | true score | samples | spread | ours | ± 1.96 errors | bootstrap |\n|---|---|---|---|---|---|---|"
    )
    for problems in PROBLEMS:
        for score in SCORES:
            for samples in SAMPLES:
                for spread in SPREADS:
                    ours, plain, bootstrapped = covered(problems, score, samples, spread, args.experiments, rng)
                    shares = " | ".join(f"{share:.1%}" for share in (ours, plain, bootstrapped))
                    print(f"| {problems} | {score} | {samples} | {spread:g} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
