"""The tokens of a run from a pilot: by hand, and against real runs whose traces are all known.

`lengths.json` holds the completion tokens of every trace of two runs, by prompt: the tiny pair (3,000 prompts) and
SmolLM2-135M-Instruct on 200 problems of GSM8K with two samples each, temperature 0.6, at most 512 tokens.
"""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from distill.plan.lengths import expected_tokens, student_t

RUNS = json.loads((Path(__file__).parent / "lengths.json").read_text())
LIMITS = {"tiny": 192, "smollm2-gsm8k": 512}


def test_two_prompts_by_hand():
    """Means 200 and 300 of ten prompts: m = 250, s/√2 = 50, t₁ = 12.7062, √(1 − 2/10) = 0.894427; the normal interval
    of the logarithm has the ratio exp(12.7062 · 0.894427 · 50 / 250) = 9.709. ȳ = 5.5010, v = 0.082201, the
    log-normal one exp(5.5421 ± 11.3648 · √(0.0411 + 0.003379)) = 255.2 / 10.986 and more than the limit."""
    estimate = expected_tokens([[100, 300], [300, 300]], prompts=10, samples=2, limit=1000)
    assert estimate.value == 250 * 20
    assert estimate.low == pytest.approx(255.2 / 10.986 * 20, rel=2e-3)
    assert estimate.high == 1000 * 20


def test_alike_prompts_give_no_width_and_one_prompt_no_interval():
    estimate = expected_tokens([[50]] * 8, prompts=1000, samples=1, limit=100)
    assert estimate.value == 50_000 and estimate.low == pytest.approx(50_000) and estimate.high == pytest.approx(50_000)
    alone = expected_tokens([[50, 70]], prompts=1000, samples=2, limit=100)
    assert (alone.value, alone.low, alone.high) == (120_000, None, None)


def test_a_pilot_of_all_prompts_is_the_truth():
    estimate = expected_tokens([[10, 20], [50, 80]], prompts=2, samples=2, limit=100)
    assert (estimate.value, estimate.low, estimate.high) == (160, 160, 160)


def test_samples_of_one_prompt_do_not_narrow_the_interval():
    """Twice the same samples is no more knowledge: the interval is scaled, and as wide."""
    lengths = [[n] for n in (40, 60, 90, 200)]
    once = expected_tokens(lengths, 100, 1, 1000)
    twice = expected_tokens([2 * of_prompt for of_prompt in lengths], 100, 2, 1000)
    assert twice.low == pytest.approx(2 * once.low) and twice.high == pytest.approx(2 * once.high)


def test_quantiles_of_student():
    """Of a table: 7 and 30 degrees of freedom; 120 by the expansion."""
    assert (student_t(7), student_t(30)) == (2.3646, 2.0423)
    assert student_t(31) == pytest.approx(2.0395, abs=1e-4) and student_t(120) == pytest.approx(1.9799, abs=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_a_hundred_pilots_of_eight_prompts(name):
    errors, held, widths = resampled(RUNS[name], LIMITS[name], seed=0)
    assert statistics.median(errors) <= 0.25
    assert held >= 90
    assert statistics.median(widths) < 0.8, "an interval that holds everything says nothing"


@pytest.mark.parametrize("name", RUNS)
def test_two_thousand_pilots_have_the_coverage_that_the_interval_says(name):
    """Of a hundred, 95 % is 90 to 99; of two thousand, 94 to 96."""
    held = [resampled(RUNS[name], LIMITS[name], seed)[1] for seed in range(20)]
    assert 0.93 <= sum(held) / 2000 <= 0.98


def test_heavy_tails_are_held_too():
    """Log-normal lengths of R1's size with a coefficient of variation of about one, at most 32,768."""
    draw = random.Random(3)
    lengths = [[min(32768, round(math.exp(draw.gauss(8, 0.85))))] for _ in range(2000)]
    errors, held, _ = resampled(lengths, 32768, seed=1)
    assert statistics.median(errors) <= 0.3 and held >= 90


def resampled(lengths, limit, seed):
    """Errors and relative widths of a hundred pilots, and how many intervals hold the truth."""
    draw, samples = random.Random(seed), len(lengths[0])
    truth = sum(map(sum, lengths))
    errors, widths, held = [], [], 0
    for _ in range(100):
        estimate = expected_tokens(draw.sample(lengths, 8), len(lengths), samples, limit)
        errors.append(abs(estimate.value / truth - 1))
        widths.append((estimate.high - estimate.low) / truth)
        held += estimate.low <= truth <= estimate.high
    return errors, held, widths


def test_some_samples_of_all_prompts_give_no_interval():
    estimate = expected_tokens([[10, 20], [30, 40]], prompts=2, samples=4, limit=1000)
    assert (estimate.value, estimate.low, estimate.high) == (200, None, None)
