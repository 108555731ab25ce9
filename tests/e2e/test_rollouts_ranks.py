"""Two processes that share the rollouts of a set: the rollouts and losses of one."""

import pytest
import rollout_support as support
from safetensors.torch import load_file

TRAINING = {"max_steps": 3, "save_steps": 2}
OBJECTIVES = {
    "grpo": (support.GRPO | {"kl_weight": 0.05}, {"updates": 2}),
    "on_policy": (support.ON_POLICY, {"prompts_per_step": 3}),  # one rank has a prompt more
}
LORA = {"adapter": {"kind": "lora"}}


def pair(tmp_path, name, **settings):
    objective, rollouts = OBJECTIVES[name]
    one = support.make_recipe(objective, rollouts, **TRAINING | {k: v for k, v in settings.items() if k != "parallel"})
    two = support.make_recipe(objective, rollouts, **TRAINING | settings, num_processes=2)
    support.train(tmp_path / "one", one)
    assert support.train(tmp_path / "two", two).processes == 2
    return tmp_path / "one", tmp_path / "two"


def assert_alike(one, two):
    """Log-probabilities differ by rounding, because a rank decodes fewer sequences at once; tokens do not."""
    ours, theirs = support.rollouts(two), support.rollouts(one)
    assert [(t.key, t.completion_token_ids) for t in ours] == [(t.key, t.completion_token_ids) for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3), a.key
    for a, b in zip(support.log(two), support.log(one), strict=True):
        assert a.keys() == b.keys() and {k: a[k] for k in ("step", "tokens")} == {k: b[k] for k in ("step", "tokens")}
        for key in ("loss", "grad_norm", "entropy", "kl", "correct", "length"):
            same = a.get(key) == b.get(key) or a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)
            assert same, (a["step"], key)
        assert a["mismatch"] is None or a["mismatch"] < 1e-5
    weights = [load_file(root / "student" / "model.safetensors") for root in (two, one)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name


@pytest.mark.slow
def test_two_ranks_share_rollouts(tmp_path):
    assert_alike(*pair(tmp_path, "on_policy", parallel="ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_learn_as_one_does(tmp_path, name, parallel):
    assert_alike(*pair(tmp_path, name, parallel=parallel))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_on_two_ranks_are_sampled_with(tmp_path, parallel):
    """Adapters of a sharded model begin elsewhere, with the same product, zero: the first rollouts are equal, and the
    engine's weights are the trainer's at every step."""
    one, two = pair(tmp_path, "on_policy", parallel=parallel, learning_rate=1e-2, **LORA)
    if parallel == "ddp":
        assert_alike(one, two)
    log = support.log(two)
    assert log[0]["loss"] == pytest.approx(support.log(one)[0]["loss"], rel=1e-5)
    assert all(row["mismatch"] < 1e-5 for row in log)
    assert log[-1]["loss"] != pytest.approx(log[0]["loss"], rel=1e-3)
