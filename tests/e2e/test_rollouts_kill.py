"""kill -9 while a student learns from its own text: rollouts, losses and weights are those of an undisturbed run."""

import multiprocessing
import random
import time

import pytest
import rollout_support as support

SAMPLED = ("distill.train.rollouts.student:StudentEngine", "sample")
APPENDED = ("distill.train.rollouts.store:RolloutStore", "append")
COMPACTED = ("distill.train.rollouts.store:RolloutStore", "compact")
TAUGHT = ("distill.train.rollouts.teachers:Teacher", "score")
REWARDED = ("distill.train.rollouts.rewards:Rewarder", "rewards")
FORGOTTEN = ("distill.train.rollouts.store:RolloutStore", "forget")
STEPPED = ("distill.train.learn.loop:Loop", "step")
SAVING = ("distill.train.ranks.tensors:State", "save")

# Where each process dies, one after the other: (method, which call of that process, after it or before it).
MOMENTS = {
    "grpo": [(SAMPLED, 1, True), (SAVING, 1, True), (APPENDED, 2, True), (REWARDED, 1, True), (COMPACTED, 1, False)],
    "on_policy": [(TAUGHT, 1, True), (APPENDED, 1, True), (STEPPED, 1, True), (SAVING, 2, True)],
    "updates": [(APPENDED, 1, True), (STEPPED, 3, True), (STEPPED, 2, True)],
    "likeliest": [(FORGOTTEN, 1, True), (STEPPED, 2, True), (FORGOTTEN, 1, True)],
}
ONE = {
    "grpo": (APPENDED, 2, True),
    "on_policy": (SAVING, 2, True),
    "updates": (STEPPED, 5, True),
    "likeliest": (STEPPED, 5, True),
}
RECIPES = {
    "grpo": support.make_recipe(support.GRPO | {"kl_weight": 0.05}),
    "on_policy": support.make_recipe(support.ON_POLICY),
    "updates": support.make_recipe(support.GRPO, {"updates": 2}, max_steps=6, save_steps=3),
    # The checkpoint of step 3 is in the middle of a set, whose likeliest tokens the current weights do not give.
    "likeliest": support.make_recipe(support.ON_POLICY, {"updates": 2}, max_steps=6, save_steps=3),
}


@pytest.fixture(scope="module")
def spawn():
    """Start a training in a process of its own; torch is imported once, in the server that forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.train.learn.fit", "distill.train.rollouts.setup", "rollout_support"])

    def start(directory, recipe, place=None, calls=1, after=True):
        arguments = directory, recipe.model_dump_json(), place, calls, after
        process = context.Process(target=support.victim, args=arguments)
        process.start()
        return process

    return start


def whole(spawn, directory, recipe):
    process = spawn(directory, recipe)
    process.join()
    assert process.exitcode == 0


def same(killed, undisturbed):
    assert support.rollouts(killed) == support.rollouts(undisturbed)
    assert support.log(killed) == support.log(undisturbed)
    assert support.weights(killed) == support.weights(undisturbed)
    names = [sorted(path.name for path in (root / "rollouts").iterdir()) for root in (killed, undisturbed)]
    assert names == [["part-00000.parquet", "rewards.jsonl"]] * 2
    assert support.rewards(killed) == support.rewards(undisturbed)


def killed_at(tmp_path, spawn, name, moments):
    recipe = RECIPES[name]
    whole(spawn, tmp_path / "undisturbed", recipe)
    for moment in moments:
        process = spawn(tmp_path / "killed", recipe, *moment)
        process.join()
        assert process.exitcode == -9, f"{moment} never came"
    whole(spawn, tmp_path / "killed", recipe)
    same(tmp_path / "killed", tmp_path / "undisturbed")
    assert any(row["grad_norm"] for row in support.log(tmp_path / "killed")), "nothing was learned"


@pytest.mark.parametrize("name", [n if n == "grpo" else pytest.param(n, marks=pytest.mark.slow) for n in ONE])
def test_a_kill_changes_nothing(tmp_path, spawn, name):
    killed_at(tmp_path, spawn, name, [ONE[name]])


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_kills_at_every_kind_of_moment_change_nothing(tmp_path, spawn, name):
    killed_at(tmp_path, spawn, name, MOMENTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_kills_at_random_moments_change_nothing(tmp_path, spawn, name):
    recipe = RECIPES[name].model_copy(update={"train": RECIPES[name].train.model_copy(update={"max_steps": 24})})
    whole(spawn, tmp_path / "undisturbed", recipe)
    draw = random.Random(0)
    for target in sorted(draw.sample(range(1, 20), 8)):
        process = spawn(tmp_path / "killed", recipe)
        while process.is_alive() and len(support.log(tmp_path / "killed")) < target:
            time.sleep(0.003)
        time.sleep(draw.uniform(0, 0.2))  # anywhere in the next steps
        process.kill()
        process.join()
        assert process.exitcode == -9, "the training had ended before"
    whole(spawn, tmp_path / "killed", recipe)
    same(tmp_path / "killed", tmp_path / "undisturbed")
