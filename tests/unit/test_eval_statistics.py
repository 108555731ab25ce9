"""pass@1 and its interval, against figures one can look up or work out by hand, and by simulation."""

import json
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.eval.statistics import Sample, pass_at_1, summarise, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_table(successes, trials, low, high):
    """Newcombe 1998, table I, method 3 (score)."""
    assert wilson(successes / trials, trials) == pytest.approx((low, high), abs=5e-5)


def test_one_sample_a_problem_is_plain_wilson():
    estimate = pass_at_1([[True]] * 81 + [[False]] * 182)
    assert estimate.value == 81 / 263
    assert estimate.effective == pytest.approx(263)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(81 / 263, 263))


def test_all_or_nothing_problems_are_worth_one_trial_each():
    """Eight samples that always agree say no more than one: the interval is that of 30 trials, not of 240."""
    once, eight = (pass_at_1([[True] * n] * 12 + [[False] * n] * 18) for n in (1, 8))
    assert (eight.low, eight.high) == pytest.approx((once.low, once.high))


def test_equal_problems_are_worth_one_trial_a_sample():
    """Every problem solved in one of two samples: 100 problems × 2 samples are 200 trials of a coin."""
    estimate = pass_at_1([[True, False]] * 100)
    assert estimate.effective == pytest.approx(200)


def test_clustering_worked_out_by_hand():
    """Problems right in 4/4, 2/4, 2/4 and 0/4 samples: p = 1/2, Σ(x - p)² = 1/2, P·p(1 - p) = 1, so
    deff = (1/2 + 1/8) / (1 + 1/8) = 5/9 and four problems are worth 4 · 9/5 = 7.2 trials."""
    estimate = pass_at_1([[True] * 4, [True, True, False, False], [False, True, False, True], [False] * 4])
    assert estimate.value == 0.5
    assert estimate.effective == pytest.approx(7.2)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.5, 7.2))


@pytest.mark.parametrize("answer", [True, False])
def test_certain_scores_keep_an_honest_interval(answer):
    """30 of 30, sixteen times each, is not 100 % ± 0: it is what 30 trials can say, 3.84/33.84 = 11.4 % wide."""
    estimate = pass_at_1([[answer] * 16] * 30)
    assert estimate.value == float(answer)
    assert estimate.high - estimate.low == pytest.approx(3.8415 / 33.8415, abs=1e-4)


def test_every_problem_counts_once_whatever_its_samples():
    estimate = pass_at_1([[True], [False] * 9])
    assert estimate.value == 0.5


@pytest.mark.parametrize("correct", [[], [[True], []]])
def test_missing_samples_are_refused(correct):
    with pytest.raises(ValueError, match="at least one"):
        pass_at_1(correct)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=20))
def test_the_interval_holds_the_score_and_counts_between_problems_and_samples(correct):
    estimate = pass_at_1(correct)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high
    assert len(correct) * 0.999 <= estimate.effective <= sum(map(len, correct)) * 1.001
    mirrored = pass_at_1([[not answer for answer in samples] for samples in correct])
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((estimate.low, estimate.high))


@pytest.mark.parametrize("truth", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("problems", [30, 100])
def test_coverage(problems, samples, truth):
    """The interval holds the true score about 95 times in 100 when problems differ in difficulty (beta, a + b = 2).

    1,000 seeded experiments a cell: their own error is ±1.4 points, hence the bounds.
    """
    draw = random.Random(f"{problems} {samples} {truth}")
    experiments, held = 1000, 0
    for _ in range(experiments):
        difficulty = [draw.betavariate(2 * truth, 2 * (1 - truth)) for _ in range(problems)]
        estimate = pass_at_1([[draw.random() < d for _ in range(samples)] for d in difficulty])
        held += estimate.low <= truth <= estimate.high
    assert 0.92 <= held / experiments <= 0.99


def test_real_samples_equal_an_independent_count(real_data):
    """100 MATH problems × 8 samples of Qwen2.5-Math with the stored verdicts of another grader."""
    path = real_data("qwen25math_cot100x8/math_cot_100.slim.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = [[bool(verdict) for verdict in row["score"]] for row in rows]
    estimate = pass_at_1(right)
    assert estimate.value == pytest.approx(sum(map(sum, right)) / 800)
    error = statistics.stdev(sum(samples) / 8 for samples in right) / 10  # clustered by problem, central limit theorem
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_rates_and_lengths():
    samples = [
        Sample("a", "correct", True, False, 10, 6),
        Sample("a", "wrong", True, False, 20, 12),
        Sample("b", "wrong", False, True, 60, 60),
        Sample("b", "unverifiable", True, False, 30, 0),
    ]
    scores = summarise(samples)
    assert (scores["problems"], scores["samples"], scores["correct"]) == (2, 4, 1)
    assert scores["pass@1"] == 0.25
    assert scores["truncated_rate"] == scores["no_answer_rate"] == scores["unverifiable_rate"] == 0.25
    assert (scores["mean_completion_tokens"], scores["median_completion_tokens"]) == (30, 25)
    assert (scores["mean_reasoning_tokens"], scores["median_reasoning_tokens"]) == (19.5, 9)
    json.dumps(scores, allow_nan=False)
