"""The model against transformers, in float32, on small random models with peaked attention; and the same check shown to
fail when the model is wrong in one of the ways that models usually are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from random_models import CONFIGS, LLAMA, V3_YARN, Checkpoint, build
from torch import Tensor

from distill.engine import Engine, ModelSpec
from distill.engine.kernels import cpu, reference
from distill.engine.weights import LayerWeights

TOLERANCE = 1e-4  # of the largest logit
TOKENS = some_tokens(90)

GetCheckpoint = Callable[[str], Checkpoint]


def small(path: Path, kernels: str = "reference") -> Engine:
    return Engine.load(path, engine_options(cache_tokens=1024, kernels=kernels))


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    return str(request.param)


# The compiled kernels on every config; the reference on every third, on the others in the slow tests.
EVERY = [
    pytest.param(name, kernels, marks=[pytest.mark.slow] if kernels == "reference" and number % 3 else [])
    for number, name in enumerate(CONFIGS)
    for kernels in ("cpu", "reference")
]


@pytest.mark.parametrize(("name", "kernels"), EVERY, indirect=["kernels"])
def test_logits_match_transformers(name: str, kernels: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint(name)
    theirs = ckpt.logits(TOKENS)
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    engine = small(ckpt.path, kernels)
    for how, ours in {
        "whole": engine_logits(engine, TOKENS),
        "chunks": engine_logits(engine, TOKENS, cuts=(1, 33, 48, 77)),
        "token by token": engine_logits(engine, TOKENS, decode_from=1),
    }.items():
        error, report = relative_error(ours, theirs)
        assert error <= TOLERANCE, f"{how}: {report}"


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_in_one_call_give_the_bits_of_single_ops(
    name: str, dtype: torch.dtype, checkpoint: GetCheckpoint
) -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    engine = Engine.load(checkpoint(name).path, engine_options(dtype=dtype, cache_tokens=1024, kernels="cpu"))
    op_by_op = CONFIGS[name].keys() & {"index_topk", "sliding_window"} or CONFIGS[name].get("mlp_bias", False)
    assert (engine._model.decode_plan is None) == bool(op_by_op or engine.spec.delta), "these run op by op"
    at_once = engine_logits(engine, TOKENS, decode_from=60)
    engine._model = replace(engine._model, decode_plan=None)
    assert torch.equal(engine_logits(engine, TOKENS, decode_from=60), at_once)


@pytest.mark.parametrize("name", ["v3-yarn", "qwen2"])
def test_greedy_text_matches_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    from distill.engine import Request, SamplingParams

    ckpt, prompt = checkpoint(name), TOKENS[:20]
    tokens = list(prompt)
    for _ in range(24):
        tokens.append(int(ckpt.logits(tokens)[-1].argmax()))
    greedy = SamplingParams(temperature=0, max_new_tokens=24)
    (done,) = small(ckpt.path).generate([Request("a", tuple(prompt), greedy, seed=0, prompt_key=0, samples=(0,))])
    assert list(done.token_ids) == tokens[20:]


@pytest.mark.parametrize("shards", [1, 3])
def test_fp8_checkpoint_with_partial_blocks(shards: int, kernels: str, tmp_path: Path) -> None:
    config = {**V3_YARN, "hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 136}
    ckpt = build(tmp_path, config, fp8=True, shards=shards)
    theirs = ckpt.logits(TOKENS)
    assert theirs.std(-1).min() >= 1
    engine = small(tmp_path, kernels)
    assert engine.numerics.weights == "fp8-e4m3 block 128"
    error, report = relative_error(engine_logits(engine, TOKENS, decode_from=60), theirs)
    assert error <= TOLERANCE, report


def test_fp8_llama(kernels: str, tmp_path: Path) -> None:
    """FP8 is decided by the tensor, not by the family."""
    ckpt = build(tmp_path, {**LLAMA, "hidden_size": 192, "head_dim": 48}, fp8=True)
    error, report = relative_error(engine_logits(small(tmp_path, kernels), TOKENS), ckpt.logits(TOKENS))
    assert error <= TOLERANCE, report


def test_bfloat16_stays_near(kernels: str, checkpoint: GetCheckpoint) -> None:
    """A dense model: in a mixture of experts, rounding tips near-ties of the router, and such a token is far off."""
    ckpt = checkpoint("llama-gqa")
    engine = Engine.load(ckpt.path, engine_options(dtype=torch.bfloat16, cache_tokens=1024, kernels=kernels))
    ours = engine_logits(engine, TOKENS, decode_from=60)
    assert ours.dtype == torch.float32
    error, report = relative_error(ours, ckpt.logits(TOKENS))
    assert 1e-4 < error < 0.1, report


def _half_split(spec: ModelSpec) -> ModelSpec:
    return replace(spec, rope=replace(spec.rope, interleaved=not spec.rope.interleaved))


def _moe(spec: ModelSpec, **changes: object) -> ModelSpec:
    assert spec.moe is not None
    return replace(spec, moe=replace(spec.moe, **changes))


SPEC_MUTATIONS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "RoPE halves instead of pairs": _half_split,
    "softmax scale without YaRN's m²": lambda s: replace(s, softmax_scale=s.head_dim**-0.5),
    "softmax scale of the unrotated part": lambda s: replace(s, softmax_scale=s.softmax_scale * (40 / 24) ** 0.5),
    "routing factor left out": lambda s: _moe(s, routed_scale=1.0),
    "weights not normalised": lambda s: _moe(s, normalise=False),
    "a group dropped": lambda s: _moe(s, groups_kept=s.moe.groups_kept - 1 if s.moe else 0),
    "no groups": lambda s: _moe(s, groups=1, groups_kept=1),
}


@pytest.mark.parametrize("name", SPEC_MUTATIONS)
def test_a_wrong_spec_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("v3-yarn")
    engine = small(ckpt.path)
    engine._model = replace(engine._model, spec=SPEC_MUTATIONS[name](engine._model.spec))
    engine.spec = engine._model.spec
    error, report = relative_error(engine_logits(engine, TOKENS, decode_from=60), ckpt.logits(TOKENS))
    assert error > TOLERANCE, f"{name} goes unnoticed: {report}"


def _bias_as_weight(logits_tx: Tensor, bias_x: Tensor, *how: object) -> tuple[Tensor, Tensor]:
    *_, scale = how
    experts_tk, _ = reference.route(logits_tx, bias_x, *how)
    weights_tk = (logits_tx.sigmoid() + bias_x).gather(-1, experts_tk)
    return experts_tk, weights_tk / weights_tk.sum(-1, keepdim=True) * scale


def _bias_ignored(logits_tx: Tensor, bias_x: Tensor, *how: object) -> tuple[Tensor, Tensor]:
    return reference.route(logits_tx, torch.zeros_like(bias_x), *how)


def _group_by_maximum(logits_tx: Tensor, bias_x: Tensor, scoring: str, _: str, *how: object) -> tuple[Tensor, Tensor]:
    """V2's rule: a group is worth its best expert."""
    return reference.route(logits_tx, bias_x, scoring, "best", *how)


OP_MUTATIONS = {
    "bias used as weight": {"route": _bias_as_weight},
    "bias ignored": {"route": _bias_ignored},
    "group worth its maximum": {"route": _group_by_maximum},
    "gate and up swapped": {"swiglu_linear": lambda x, gate, up, *_: reference.swiglu_linear(x, up, gate)},
    "norm without weight": {"rms_norm": lambda x, w, eps, to=None: reference.rms_norm(x, torch.ones_like(w), eps)},
}


@pytest.mark.parametrize("name", OP_MUTATIONS)
def test_a_wrong_op_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("v3-yarn")
    engine = small(ckpt.path)
    ops = SimpleNamespace(**vars(engine._model.ops) | OP_MUTATIONS[name])
    engine._model = replace(engine._model, ops=ops)
    error, report = relative_error(engine_logits(engine, TOKENS, decode_from=60), ckpt.logits(TOKENS))
    assert error > TOLERANCE, f"{name} goes unnoticed: {report}"


def _rotated(layer: LayerWeights) -> LayerWeights:
    return replace(layer, attention=replace(layer.attention, rotated=True))


def test_rotation_in_layers_without_it_fails_parity(checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("smollm3")
    engine = small(ckpt.path)
    layers = engine._model.weights.layers
    assert [layer.attention.rotated for layer in layers] == [True, True, True, False]
    weights = replace(engine._model.weights, layers=tuple(map(_rotated, layers)))
    engine._model = replace(engine._model, weights=weights)
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error > TOLERANCE, report


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-yarn"])
def test_dense_rope_in_pairs_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint(name)
    engine = small(ckpt.path)
    engine._model = replace(engine._model, spec=_half_split(engine._model.spec))
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error > TOLERANCE, report
