"""pass@1 and its interval, against figures one can look up or work out by hand, and by simulation."""

import itertools
import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.eval.statistics import (
    Sample,
    Vote,
    compare,
    consensus,
    pass_at_1,
    pass_at_k,
    sign_test,
    summarise,
    wilson,
)


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
    assert (scores.problems, scores.samples, scores.correct) == (2, 4, 1)
    assert scores.pass_at_1.value == 0.25
    assert scores.truncated_rate == scores.no_answer_rate == scores.unverifiable_rate == 0.25
    assert (scores.mean_completion_tokens, scores.median_completion_tokens) == (30, 25)
    assert (scores.mean_reasoning_tokens, scores.median_reasoning_tokens) == (19.5, 9)
    assert scores.pass_at_k[2].value == 0.5 and scores.consensus_at_k[2].silent == 2


# ---- several samples


def by_every_choice(correct: list[bool], k: int) -> float:
    """pass@k by its definition: the share of the ways to choose k samples that have a right one among them."""
    ways = list(itertools.combinations(correct, k))
    return sum(any(way) for way in ways) / len(ways)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=7), min_size=1, max_size=6), st.integers(1, 4))
def test_pass_at_k_is_its_definition(correct, k):
    made = pass_at_k(correct, k)
    assert made.value == pytest.approx(statistics.fmean(by_every_choice(of_one, k) for of_one in correct))
    assert 0 <= made.low <= made.value <= made.high <= 1


def test_pass_at_k_by_hand():
    """One right of four: of the six pairs three have it."""
    assert pass_at_k([[True, False, False, False]], 2).value == 0.5
    assert pass_at_k([[True, False, False, False], [False] * 4], 4).value == 0.5
    assert pass_at_k([[True, False]] * 9, 1) == pass_at_1([[True, False]] * 9)


def test_too_few_samples_are_refused_and_not_divided_by():
    """A model of 0.4375 scored 0.0547 where eight samples were taken for 64."""
    correct = [[True] * 3 + [False] * 5, [True] * 4 + [False] * 4]
    assert pass_at_1(correct).value == 0.4375
    with pytest.raises(ValueError, match="pass@64 needs 64 samples of every problem; there are 8"):
        pass_at_k(correct, 64)
    with pytest.raises(ValueError, match="pass@1 was asked of 64 samples a problem; there are 8"):
        pass_at_k(correct, 1, samples=64)
    with pytest.raises(ValueError, match="there are 2 to 3"):
        pass_at_k([[True] * 2, [True] * 3], 3)


def test_consensus_by_hand():
    """Right by two votes of three; a tie of a right and a wrong answer; a right answer that is outvoted; no vote."""
    right, wrong, other, none = Vote(0, True), Vote(1, False), Vote(2, False), Vote(None, False)
    made = consensus([[right, wrong, right], [right, wrong, none], [wrong, right, wrong], [none] * 3])
    assert made.estimate.value == (1 + 0.5 + 0 + 0) / 4
    assert (made.ties, made.silent) == (1, 1)
    assert consensus([[right, wrong, other]]).estimate.value == pytest.approx(1 / 3)
    assert consensus([[wrong, other, none]]).ties == 0  # two wrong answers: no way to be right
    with pytest.raises(ValueError, match="at least one problem"):
        consensus([])


def newcombe_paired(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Method 10 of Newcombe 1998 as its paper writes it: both right, only the first, only the second, neither."""
    n = a + b + c + d
    (l1, u1), (l2, u2) = wilson((a + b) / n, n), wilson((a + c) / n, n)
    p1, p2 = (a + b) / n, (a + c) / n
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    top = a * d - b * c
    phi = 0.0 if not margins else (max(top - n / 2, 0) if top > 0 else top) / math.sqrt(margins)
    low = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return p1 - p2 - low, p1 - p2 + high


@pytest.mark.parametrize(
    "table", [(20, 12, 2, 16), (1, 7, 0, 2), (15, 0, 0, 15), (0, 30, 0, 0), (3, 5, 9, 40), (2, 8, 9, 1)]
)
def test_two_models_of_one_sample_are_compared_as_newcombe_does(table):
    a, b, c, d = table
    outcomes = [(True, True)] * a + [(True, False)] * b + [(False, True)] * c + [(False, False)] * d
    first, second = ({str(i): [pair[side]] for i, pair in enumerate(outcomes)} for side in (0, 1))
    made = compare(first, second)
    assert made.value == pytest.approx((b - c) / len(outcomes))
    low, high = newcombe_paired(*table)
    assert (made.low, made.high) == pytest.approx((max(low, -1), min(high, 1)))
    assert (len(made.gained), len(made.lost)) == (b, c)
    if table == (15, 0, 0, 15):
        assert made.high - made.low > 0.1, "thirty problems of agreement are no certainty"


def test_sign_test_by_hand():
    """Seven of eight: 2 · (1 + 8) / 256."""
    assert sign_test(7, 1) == pytest.approx(18 / 256)
    assert sign_test(0, 0) == sign_test(4, 4) == 1.0


def test_models_on_other_problems_are_not_compared():
    with pytest.raises(ValueError, match="same problems"):
        compare({"a": [True]}, {"b": [True]})


def test_the_difference_covers_the_truth():
    """Two models whose difficulty is shared: 60 problems, 4 samples, 400 experiments."""
    rng = random.Random(5)
    inside = 0
    for _ in range(400):
        first, second = {}, {}
        for problem in range(60):
            hard = rng.betavariate(1.5, 1.5)
            first[str(problem)] = [rng.random() < hard for _ in range(4)]
            second[str(problem)] = [rng.random() < 0.8 * hard for _ in range(4)]
        made = compare(first, second)
        inside += made.low <= 0.5 - 0.8 * 0.5 <= made.high
    assert 0.93 <= inside / 400 <= 0.99
