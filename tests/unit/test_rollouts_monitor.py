"""The monitor of rollouts: constructed trainings that collapse, that learn, and that are resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from filter_support import GOOD, make_trace
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import WorkError
from distill.train.rollouts.monitor import (
    BUCKETS,
    SETS,
    Monitor,
    StepFigures,
    means_by_position,
    step_figures,
    sums_by_position,
)

HEALTHY = StepFigures(0, length=100.0, truncated=0.05, repetition=0.02, entropy=0.5, correct=0.2)
UNGRADED = replace(HEALTHY, correct=None)
EXPLODED = {"length": 480.0, "truncated": 0.9}


def series(*phases, start=HEALTHY):
    """The figures of a training: (number of steps, changes) one after the other."""
    steps = [replace(start, **changes) for count, changes in phases for _ in range(count)]
    return [replace(figures, step=i) for i, figures in enumerate(steps, 1)]


def watch(figures, monitor=None):
    """The message and the step of the stop; None where there is none."""
    monitor = monitor or Monitor("grpo", 16)
    for each in figures:
        try:
            monitor.step(each)
        except WorkError as error:
            return str(error), each.step
    return None


def ramp(count, **ends):
    """Figures that change by equal steps from (start, end)."""
    return [
        replace(HEALTHY, step=i, **{name: a + (b - a) * i / (count - 1) for name, (a, b) in ends.items()})
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (EXPLODED, ("exploded", "90% are truncated", "480 tokens", "5% and 100 over the first 8", "max_new_tokens")),
        ({"repetition": 0.6}, ("60% contain a loop", "2% over the first 8", "train.learning_rate", "kl_weight")),
        ({"entropy": 0.004}, ("0.004 nats per token", "0.5 over the first 8", "rollouts.sampling.temperature")),
        ({"correct": 0.0, "length": 9.0}, ("0% over the last 8", "20% over the first 8", "9 and 100", "kl_weight")),
    ],
)
def test_a_collapse_stops_the_training_with_numbers_and_what_to_do(changes, words):
    message, step = watch(series((SETS, {}), (SETS, changes)))
    assert step == 2 * SETS
    assert message.startswith(f"step {step}: ") and "\n" not in message
    assert all(word in message for word in words), message
    _, step = watch(series((20, {}), (30, changes)))
    assert 20 < step <= 20 + SETS


def test_on_policy_is_offered_none_of_grpos_options():
    for changes in (EXPLODED, {"repetition": 0.6}, {"entropy": 0.004}):
        message, _ = watch(series((SETS, {}), (SETS, changes), start=UNGRADED), Monitor("on_policy", 16))
        assert "kl_weight" not in message and "rewards" not in message


@pytest.mark.parametrize(
    "figures",
    [
        ramp(300, length=(9, 60), truncated=(0.0, 0.02), entropy=(0.9, 0.1)),  # it learns to reason
        ramp(300, length=(200, 8000), truncated=(0.0, 0.3), correct=(0.1, 0.7)),  # R1-Zero
        ramp(300, length=(500, 60), truncated=(0.9, 0.0), repetition=(0.8, 0.0), entropy=(3.0, 0.1)),
        ramp(300, length=(490, 512), truncated=(0.9, 1.0)),  # the base rambled already
        ramp(300, repetition=(0.7, 0.95)),
        series((20, {}), (50, {"length": 480.0, "truncated": 0.7})),  # longer, and one in three still ends
        series((20, {"truncated": 0.5}), (50, {"length": 480.0, "truncated": 0.78})),  # cut off from the beginning
        series((20, {}), (50, {"length": 140.0, "truncated": 0.9})),  # cut off more, but not longer
        series((20, {}), (50, {"repetition": 0.49})),
        series((20, {}), (50, {"entropy": 0.011})),
        series((20, {}), (100, {"entropy": 0.0001, "correct": 0.97})),  # sure of what is right
        series(
            (20, {"correct": None, "teacher_kl": 0.8}), (100, {"entropy": 0.001, "teacher_kl": 0.1, "correct": None})
        ),
        series(
            (20, {"correct": None, "teacher_kl": 0.03}), (99, {"entropy": 1e-3, "teacher_kl": 0.03, "correct": None})
        ),
        series((20, {"entropy": None}), (50, {"entropy": None})),  # not measured
        series((20, {"entropy": 0.0}), (50, {"entropy": 0.0})),  # sampled greedily from a student that was sure
        series((SETS - 1, {}), *[(1, EXPLODED | {"repetition": 1.0}), (5, {})] * 20),  # a bad step now and then
        series((2 * SETS - 1, EXPLODED)),
        [],
    ],
)
def test_trainings_that_learn_are_not_stopped(figures):
    assert watch(figures) is None


def test_a_low_entropy_at_the_level_of_a_teacher_that_is_often_wrong_is_excused():
    wrong = replace(HEALTHY, correct=0.3, entropy=1.0, teacher_kl=1.0)
    near = series((SETS, {}), (50, {"entropy": 0.015, "teacher_kl": 0.002}), start=wrong)
    assert watch(near, Monitor("on_policy", 16)) is None
    far = series((SETS, {}), (50, {"entropy": 0.015, "teacher_kl": 0.9}), start=wrong)
    assert "entropy" in watch(far, Monitor("on_policy", 16))[0]


def test_a_low_entropy_is_excused_by_the_teacher_where_no_answer_is_graded():
    far = series((20, {"teacher_kl": 0.8}), (50, {"entropy": 1e-3, "teacher_kl": 0.7}), start=UNGRADED)
    assert "entropy" in watch(far, Monitor("on_policy", 16))[0]
    assert watch(series((20, {}), (50, {"entropy": 1e-3, "teacher_kl": 0.0}))) is not None  # wrong, and sure of it


@pytest.mark.parametrize("prompts", [1, 2, 4])
@pytest.mark.parametrize(("objective", "samples"), [("grpo", 8), ("on_policy", 1)])
def test_a_student_that_does_not_change_is_not_stopped_by_chance(prompts, objective, samples):
    """Each prompt has a rate of its own at which it is solved, and one at which its answers are cut off."""
    draw = np.random.default_rng(prompts)
    for _ in range(4):
        solved, cut = draw.binomial(samples, draw.beta(0.5, 0.7, (2, 300, prompts))).mean(2) / samples
        lengths = 100 + 400 * cut
        steps = [
            replace(HEALTHY, step=i, correct=float(a), truncated=float(b), length=float(c))
            for i, (a, b, c) in enumerate(zip(solved, cut, lengths, strict=True))
        ]
        assert watch(steps, Monitor(objective, prompts)) is None


def test_a_collapse_of_few_prompts_is_stopped_after_as_many_of_them():
    message, step = watch(series((64, {}), (64, {"correct": 0.0})), Monitor("grpo", 2))
    assert step == 128 and "over the last 64 sets" in message


def test_a_checkpoint_with_shorter_windows_is_continued_with_all_its_figures():
    steps = series((20, {}))
    after = Monitor("grpo", 4)
    before = Monitor("grpo", 16)
    assert watch(steps[:16], before) is None
    after.restore(json.loads(json.dumps(before.state())))
    assert (after.first, after.recent) == (steps[:16], [])


shares = st.floats(0, 1)
figures = st.builds(
    StepFigures,
    step=st.just(0),
    length=st.floats(1, 1e5),
    truncated=shares,
    repetition=shares,
    entropy=st.none() | st.floats(0, 12),
    correct=st.none() | shares,
    teacher_kl=st.none() | st.floats(0, 20),
)


@given(st.lists(figures, max_size=60))
def test_length_alone_never_stops_a_training(steps):
    limits = {"repetition": 0.0, "entropy": None, "correct": None}
    calm = [replace(each, truncated=min(each.truncated, 0.74), **limits) for each in steps]
    assert watch(calm) is None


@given(st.lists(figures, max_size=60), st.floats(0.1, 5))
def test_entropy_that_stays_above_its_share_never_stops_a_training(steps, start):
    calm = [
        replace(
            each,
            truncated=0.0,
            repetition=0.0,
            entropy=start * (0.03 + (each.entropy or 0) / 13),
            correct=max(each.correct or 0.0, HEALTHY.correct),
        )
        for each in steps
    ]
    assert watch([replace(HEALTHY, entropy=start)] * SETS + calm) is None


@given(st.lists(figures, max_size=40), st.integers(0, 40))
def test_a_resumed_training_stops_where_an_uninterrupted_one_does(steps, at):
    steps = [replace(each, step=i) for i, each in enumerate(steps)]
    whole = watch(steps)
    before = Monitor("grpo", 16)
    if watch(steps[:at], before) is None:
        after = Monitor("grpo", 16)
        after.restore(json.loads(json.dumps(before.state())))
        assert after.state() == before.state()
        assert watch(steps[at:], after) == whole
    else:
        assert whole is not None and whole[1] < at


def test_figures_of_rollouts():
    loop = make_trace("<think>\n" + "wait " * 30, tokens=40, finish_reason="length")
    figures = step_figures(3, [make_trace(GOOD, tokens=10), loop], entropy=0.7, correct=0.5)
    assert figures == StepFigures(3, length=25.0, truncated=0.5, repetition=0.5, entropy=0.7, correct=0.5)


def test_means_by_position_by_hand():
    positions = np.array([0, 1, 2, 3, 15, 16, 100])  # of a limit of 16: two to a bucket; the end token is in the last
    values = np.array([1, 3, 5, 5, 2, 4, 6], np.float32)
    sums = sums_by_position(positions, values, 16)
    assert sums.shape == (2, BUCKETS)
    assert means_by_position(sums) == [2.0, 5.0, None, None, None, None, None, 4.0]
    assert means_by_position(sums + sums) == means_by_position(sums)
    assert means_by_position(sums_by_position(positions[:0], values[:0], 16)) == [None] * BUCKETS
    assert means_by_position(sums_by_position(np.array([0]), np.ones(1, np.float32), 3))[0] == 1.0


@pytest.mark.parametrize("objective", ["grpo", "on_policy"])
@pytest.mark.parametrize(("first", "last", "stops"), [(0.6, 0.31, False), (0.6, 0.29, True), (0.3, 0.11, False)])
def test_pass_at_1_is_gone_below_half_and_twenty_points_lower(objective, first, last, stops):
    start = replace(HEALTHY, correct=first)
    message = watch(series((SETS, {}), (SETS, {"correct": last}), start=start), Monitor(objective, 16))
    assert (message is not None) == (stops and objective == "grpo")
