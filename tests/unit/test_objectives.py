"""The settings of the objectives on the student's own text: defaults, limits, and one line per mistake."""

import pytest

from distill.config import parse
from distill.errors import UserError
from distill.objectives import Grpo, Logits, OnPolicy, Sft
from distill.recipe import Train


def objective(**fields):
    return parse(Train, {"objective": fields}, "my.yaml").objective


def problem(**fields):
    with pytest.raises(UserError) as caught:
        objective(**fields)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def test_defaults():
    student, group = objective(kind="on_policy"), objective(kind="grpo")
    assert (student.divergence, student.estimator, student.student_share) == ("reverse_kl", "exact", 1.0)
    assert (student.rollouts.samples, group.rollouts.samples) == (1, 8)
    assert (group.clip, group.kl_weight, group.normalise) == ((0.2, 0.28), 0.0, False)
    for settings in (student.rollouts, group.rollouts):
        assert (settings.sampling.temperature, settings.sampling.top_p, settings.sampling.top_k) == (1.0, 1.0, 0)
    assert objective(kind="grpo", rollouts={"updates": 2}).rollouts.samples == 8, "a partial section keeps the default"


def test_what_an_objective_needs():
    plain, logits = Sft(kind="sft"), Logits(kind="logits")
    assert plain.rollout_settings is None and logits.rollout_settings is None
    exact, sampled = OnPolicy(kind="on_policy", top_k=8), OnPolicy(kind="on_policy", estimator="sampled")
    assert (exact.teacher_top_k, sampled.teacher_top_k, Grpo(kind="grpo").teacher_top_k) == (8, 1, None)
    mixed = OnPolicy(kind="on_policy", estimator="sampled", student_share=0.5, top_k=8)
    assert mixed.teacher_top_k == 8, "on the traces the loss is the divergence, which needs more than their own token"
    assert [each.rollout_top_k for each in (exact, sampled, mixed)] == [8, 1, 1]
    assert exact.rollout_settings is exact.rollouts
    assert [Grpo(kind="grpo", kl_weight=weight).needs_reference for weight in (0.0, 0.1)] == [False, True]
    assert not exact.needs_reference


def test_the_settings_are_in_the_fingerprint():
    flat = objective(kind="grpo").settings()
    assert flat["rollouts.samples"] == 8 and flat["rollouts.sampling.temperature"] == 1.0
    assert flat["rewards.correct"] == 1.0 and flat["clip"] == [0.2, 0.28]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "grpo", "rollouts": {"samples": 1}}, "rollouts.samples: a group of one has no advantage"),
        ({"kind": "grpo", "rollouts": {"samples": 0}}, "rollouts.samples: a group of one has no advantage"),
        (
            {"kind": "grpo", "rollouts": {"ratio_limit": 1.2}},
            "rollouts.ratio_limit 1.2 must be above 1 + clip[1], 1.28",
        ),
        ({"kind": "grpo", "rewards": {"correct": 0}}, "rewards: all weights are 0"),
        ({"kind": "grpo", "rewards": {"length": -1}}, "rewards.length: should be greater than or equal to 0"),
        ({"kind": "grpo", "clip": [0.2]}, "objective.clip: write two positive numbers"),
        ({"kind": "grpo", "clip": [1.5, 0.2]}, "objective.clip: write two positive numbers"),
        ({"kind": "grpo", "clip": [0.1, 0.2, 0.3]}, "objective.clip: write two positive numbers"),
        ({"kind": "grpo", "clip": [0.2, 0]}, "objective.clip: write two positive numbers"),
        ({"kind": "grpo", "rollouts": {"sampling": {"temperature": 0}}}, "temperature: should be greater than 0"),
        ({"kind": "grpo", "rollouts": {"sampling": {"top_k": 2**31}}}, "top_k: should be less than 2147483648"),
        ({"kind": "grpo", "top_k": 4}, "objective.top_k: unknown key"),
        ({"kind": "on_policy", "student_share": 0}, "student_share: without rows of the student's, use"),
        ({"kind": "on_policy", "student_share": 1.5}, "student_share: should be less than or equal to 1"),
        ({"kind": "on_policy", "top_k": 1}, "top_k: should be greater than or equal to 2"),
        (
            {"kind": "on_policy", "estimator": "sampled", "divergence": "jsd"},
            "estimator: sampled estimates reverse_kl; divergence is jsd",
        ),
        ({"kind": "on_policy", "beta": 0.1}, "beta is a setting of divergence: jsd; divergence is reverse_kl"),
        ({"kind": "on_policy", "divergence": "jsd", "beta": 1.0}, "beta: should be less than 1"),
        (
            {"kind": "on_policy", "rollouts": {"prompts_per_step": 2, "updates": 3}},
            "rollouts: updates 3 is more than the 2 completions of a set",
        ),
    ],
)
def test_a_mistake_is_one_line(fields, message):
    assert message in problem(**fields)
