"""What a user gets wrong in a recipe with rollouts: one line, and nothing left behind that is in the way afterwards."""

import json

import pytest
import rollout_support
from server_support import JSON, body, server

from distill import backends
from distill.errors import UserError
from distill.models import teacher_of
from distill.recipe import LocalEngine, Recipe
from distill.run import Run
from distill.train.rollouts.student import StudentEngine

OWNED = 200, JSON, body({"object": "list", "data": [{"id": "m", "owned_by": "vllm"}]})
KINDS = {"grpo": rollout_support.GRPO, "on_policy": rollout_support.ON_POLICY}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"val_size": 0.1}, "trains on rollouts alone, none is held out; remove val_size"),
        ({"train_batch_size": 6}, "train_batch_size has no effect with .* set objective.rollouts.prompts_per_step"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps has no effect with"),
        ({"data": [{"kind": "run", "path": "runs/x"}]}, "trains on rollouts alone; remove `data`"),
    ],
)
def test_keys_without_an_effect(kind, train, message):
    with pytest.raises(ValueError, match=message):
        rollout_support.make_recipe(KINDS[kind], **train)


def test_rows_of_the_teacher_may_be_held_out():
    objective = rollout_support.ON_POLICY | {"student_share": 0.5}
    assert rollout_support.make_recipe(objective, val_size=0.1).train.val_size == 0.1


def test_a_group_of_one():
    with pytest.raises(ValueError, match="a group of one has no advantage"):
        rollout_support.make_recipe(rollout_support.GRPO, {"samples": 1})


def refused(directory, recipe):
    """The line of the refusal; fails if a stage has begun or anything was made."""
    with pytest.raises(UserError) as refusal:
        rollout_support.train(directory, recipe)
    left = {path.name for path in directory.rglob("*") if path.is_file()} - {"run.json", "recipe.yaml", ".lock"}
    assert not left and "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"max_length": 60}, "exceeds train.max_length of 60 tokens; set train.objective.rollouts"),
    ],
)
def test_what_no_rollout_is_needed_to_refuse(tmp_path, kind, train, message):
    assert message in refused(tmp_path / "run", rollout_support.make_recipe(KINDS[kind], **train))


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_longer_than_the_context(tmp_path, kind):
    recipe = rollout_support.make_recipe(KINDS[kind], {"sampling": {"max_new_tokens": 5000}}, max_length=100000)
    assert "the context of the student of 4,096 tokens" in refused(tmp_path / "run", recipe)


def test_no_gold_answers(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"question": f"Say {n}."}) + "\n" for n in range(6)))
    recipe = rollout_support.make_recipe(rollout_support.GRPO)
    source = {"kind": "file", "path": str(tmp_path / "prompts.jsonl"), "question": "question", "answer": None}
    recipe = Recipe.model_validate(recipe.model_dump(mode="json") | {"prompts": [source]})
    assert "has a gold answer" in refused(tmp_path / "run", recipe)


def served(recipe, made):
    place = {"url": f"http://127.0.0.1:{made.server_address[1]}/v1", "model": "m"}
    return Recipe.model_validate(recipe.model_dump(mode="json") | {"server": place})


def test_a_refusal_by_the_first_rollouts_is_forgotten(tmp_path):
    """A server that does not score is known once it is asked: a corrected recipe begins anew."""
    recipe = rollout_support.make_recipe(rollout_support.ON_POLICY, max_steps=1)
    with server(lambda *_: (200, JSON, body({"choices": [{}]})), OWNED) as made:
        line = refused(tmp_path / "run", served(recipe, made))
    assert "does not score texts" in line
    with Run(tmp_path / "run", recipe) as run:
        assert not run.begun("train")
    changed = rollout_support.make_recipe(rollout_support.ON_POLICY, max_steps=2, learning_rate=2e-3)
    assert rollout_support.train(tmp_path / "run", changed).steps == 2
    assert len(rollout_support.rollouts(tmp_path / "run")) == 32


def test_steps_are_kept_when_a_later_set_is_refused(tmp_path, monkeypatch):
    """Also where the sets are smaller than `prompts_per_step`, because there are fewer prompts."""
    few = {"prompts_per_step": 16}
    recipe = rollout_support.make_recipe(rollout_support.GRPO, few, save_steps=100, logging_steps=100)
    recipe = recipe.model_copy(update={"prompts": (recipe.prompts[0].model_copy(update={"limit": 4}),)})
    sample, sets = StudentEngine.sample, []

    def failing(student, jobs, name, top_k):
        sets.append(name)
        if len(sets) == 3:
            raise UserError("the student computes numbers that are not finite")
        return sample(student, jobs, name, top_k)

    monkeypatch.setattr(StudentEngine, "sample", failing)
    with pytest.raises(UserError, match="not finite"):
        rollout_support.train(tmp_path / "run", recipe)
    assert len(rollout_support.rollouts(tmp_path / "run")) == 2 * 4 * 4
    with Run(tmp_path / "run", recipe) as run:
        assert run.begun("train")


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_without_a_step(tmp_path, kind):
    recipe = rollout_support.make_recipe(KINDS[kind], max_steps=None, num_train_epochs=1e-8)
    message = "18 prompts in 1e-08 epochs are less than one optimiser step: raise train.num_train_epochs"
    assert message in refused(tmp_path / "run", recipe)


@pytest.mark.slow
def test_a_served_teacher_scores_rollouts(tmp_path, capsys):
    """The sampled estimator needs no more than a server gives: with the numbers of the local teacher it is the local
    training. The exact one says what is missing, once."""
    recipe = rollout_support.make_recipe(rollout_support.ON_POLICY | {"estimator": "sampled", "top_k": 32}, max_steps=2)
    rollout_support.train(tmp_path / "local", recipe)
    with backends.open(teacher_of("teacher", "tiny-r1"), LocalEngine(dtype="float32")) as local:

        def reply(number, handler):
            asked = handler.server.asked[number]
            scores = local.engine.score([asked["prompt"]], asked["prompt_logprobs"])[0]
            positions: list[object] = [None]
            for token, logprob, top in zip(asked["prompt"][1:], scores.logprobs, scores.top_logprobs, strict=True):
                positions.append({str(t): {"logprob": p} for t, p in (*top, (token, logprob))})
            return 200, JSON, body({"choices": [{"text": "x", "prompt_logprobs": positions}]})

        with server(reply, OWNED) as made:
            rollout_support.train(tmp_path / "served", served(recipe, made))
            exact = rollout_support.make_recipe(rollout_support.ON_POLICY, max_steps=2)
            capsys.readouterr()
            rollout_support.train(tmp_path / "exact", served(exact, made))
    said = capsys.readouterr()
    assert (said.out + said.err).count("is behind a server, which names its own 8 likeliest tokens") == 1
    ours, theirs = (rollout_support.rollouts(tmp_path / name) for name in ("served", "local"))
    assert [trace.completion_token_ids for trace in ours] == [trace.completion_token_ids for trace in theirs]
    for ours, theirs in zip(*(rollout_support.log(tmp_path / name) for name in ("served", "local")), strict=True):
        assert ours["unscored"] == 0 and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert rollout_support.log(tmp_path / "exact")[0]["unscored"] == 0
