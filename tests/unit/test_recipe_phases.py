"""`train.phases` in a recipe: what is merged, what decides the student, what is refused with which key."""

import pytest
import yaml

from distill.config import parse
from distill.errors import UserError
from distill.recipe import Recipe, Train

BASE = {
    "name": "x",
    "teacher": "t",
    "student": "s",
    "prompts": [{"kind": "procedural", "name": "arithmetic"}],
    "eval": {"benchmarks": ["b"]},
}
OWN = [{"kind": "own", "samples": 2}]


def recipe(train, *overrides, **changes):
    return parse(Recipe, BASE | changes | {"train": train}, "file", overrides)


def two(**defaults):
    return defaults | {"phases": [{"name": "a"}, {"name": "b", "max_steps": 7, "data": OWN}]}


def test_keys_beside_phases_are_defaults_of_each():
    first, second = recipe(two(learning_rate=0.5, max_steps=3, report_to=["wandb"])).train.phases
    assert (first.learning_rate, first.max_steps, first.report_to) == (0.5, 3, ("wandb",))
    assert (second.learning_rate, second.max_steps, second.report_to) == (0.5, 7, ("wandb",))


def test_the_resolved_recipe_writes_every_phase_out_and_reads_back_the_same():
    written = recipe(two(learning_rate=0.5))
    train = yaml.safe_load(written.to_yaml())["train"]
    assert list(train) == ["phases"] and next(iter(train["phases"][0])) == "name"
    assert [phase["learning_rate"] for phase in train["phases"]] == [0.5, 0.5]
    assert parse(Recipe, yaml.safe_load(written.to_yaml()), "file") == written


def test_settings_name_phase_and_key():
    settings = recipe(two(learning_rate=0.5)).train.settings()
    assert settings["phases"] == ["a", "b"]
    assert (settings["phases.0.learning_rate"], settings["phases.1.max_steps"]) == (0.5, 7)
    assert "learning_rate" not in settings and "phases.0.save_steps" not in settings
    assert "phases" not in Train().settings()  # runs begun before there were phases go on


def test_overrides_reach_phases_and_their_defaults():
    train = recipe(two(), "train.phases.1.learning_rate=0.25", "train.seed=3").train
    assert (train.phases[1].learning_rate, train.phases[0].seed, train.phases[1].seed) == (0.25, 3, 3)


def test_what_trains_on_kept_traces():
    assert recipe(two()).reads_traces
    assert not recipe({"phases": [{"name": "a", "data": OWN}]}).reads_traces


def test_rollouts_alone_read_no_traces():
    assert not recipe({"objective": {"kind": "grpo"}}).reads_traces
    assert not recipe({"objective": {"kind": "on_policy"}}).reads_traces
    assert recipe({"objective": {"kind": "on_policy", "student_share": 0.5}}).reads_traces
    assert recipe({"phases": [{"name": "a"}, {"name": "b", "objective": {"kind": "grpo"}}]}).reads_traces


def test_the_template_is_that_of_the_last_phase_that_names_one():
    phases = [{"name": "a", "chat_template": "chatml"}, {"name": "b"}]
    assert recipe({"phases": phases}).train.template == "chatml"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (two(learning_rte=1), "train.learning_rte: unknown key; did you mean train.learning_rate?"),
        (two(learning_rate="x"), "train.learning_rate: should be a valid number"),
        ({"phases": [{"name": "a", "lr": 1}]}, "train.phases.0.lr: unknown key; did you mean train.phases.0.learning"),
        ({"phases": [{"name": "a", "method": "lora"}]}, "train.phases.0.method: unknown key; write train.adapter"),
        ({"phases": [{"name": "a"}, {"name": "a"}]}, "two phases are named a"),
        ({"phases": [{"name": "../a"}]}, "train.phases.0.name: should match pattern"),
        ({"phases": [{}]}, "train.phases.0.name: is missing"),
        ({"phases": [{"name": "a", "phases": []}]}, "train.phases.0.phases: unknown key"),
        ({"phases": 3}, "train.phases: should be a valid list"),
        ({"phases": [3]}, "train.phases.0: should be a mapping of keys"),
        ({"seed": 1, "phases": [{"name": "a", "seed": 2}]}, "every phase sets seed itself"),
        ({"phases": [{"name": "a", "data": OWN + OWN}]}, "several sources of kind own"),
        ({"data": OWN}, "data of kind own needs a phase"),
        (
            {"phases": [{"name": "a", "data": OWN, "objective": {"kind": "logits"}}]},
            "train.phases.0: objective logits reads the teacher's probabilities",
        ),
        ({"data": [{"kind": "kept", "plain": True, "wrap": True}]}, "plain and wrap exclude each other: keep plain"),
        (
            {"objective": {"kind": "logits"}, "content": "answer"},
            "objective logits compares with the teacher's probabilities of its own text, and content answer removes",
        ),
        (
            {"objective": {"kind": "on_policy", "student_share": 0.5}, "content": "answer"},
            "objective on_policy compares with the teacher's probabilities of its own text, and content answer removes",
        ),
        (
            {"objective": {"kind": "logits"}, "data": [{"kind": "kept", "wrap": True}]},
            "objective logits compares with the teacher's probabilities of its own text, and wrap changes the text",
        ),
        ({"objective": {"kind": "grpo"}, "data": [{"kind": "run", "path": "x"}]}, "trains on rollouts alone"),
    ],
)
def test_mistakes_are_one_line_with_the_key(train, message):
    with pytest.raises(UserError) as caught:
        recipe(train)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count(message.partition(":")[0]) >= 1


def test_a_mistake_in_a_default_is_reported_once():
    with pytest.raises(UserError) as caught:
        recipe(two(learning_rate="x"))
    assert str(caught.value).count("learning_rate") == 1


def test_own_answers_need_prompts():
    published = {"prompts": [], "traces": [{"kind": "run", "path": "runs/other"}]}
    with pytest.raises(UserError, match="data of kind own samples answers to `prompts`"):
        recipe(two(), **published)
