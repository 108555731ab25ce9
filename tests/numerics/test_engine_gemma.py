"""Gemma 4's parts, each left out or changed, against transformers; sliding windows against masks; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from gemma4_models import GEMMA4, GEMMA4_LARGE, SLIDING, WHOLE
from random_models import CONFIGS, YARN, Checkpoint, build
from torch import Tensor

from distill.engine import Engine, ModelSpec, sliding
from distill.engine.families import spec_of
from distill.engine.kernels import cpu, ops_for
from distill.engine.kernels.stored import Plain
from distill.engine.sliding import Span
from distill.engine.weights import GqaWeights, LayerWeights, Linear, ModelWeights

TOLERANCE = 1e-4  # of the largest logit
TOKENS = some_tokens(90)

GetCheckpoint = Callable[[str], Checkpoint]


def refute(name: str, checkpoint: GetCheckpoint, change: Callable[[Engine], None], what: str) -> None:
    """The engine fails parity once `change` has changed it."""
    ckpt = checkpoint(name)
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=1024, kernels="reference"))
    change(engine)
    engine.spec = engine._model.spec
    error, report = relative_error(engine_logits(engine, TOKENS, decode_from=60), ckpt.logits(TOKENS))
    assert not error <= TOLERANCE, f"{what} goes unnoticed: {report}"


def _local(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert spec.sliding is not None
    return replace(spec, sliding=replace(spec.sliding, **changes))


def _turned(width: int, base: float) -> tuple[float, ...]:
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


SPECS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "no sliding window": lambda s: _local(s, window=10**6),
    "a window that is one token shorter": lambda s: _local(s, window=23),
    "a window that is one token longer": lambda s: _local(s, window=25),
    "logits without a cap": lambda s: replace(s, logit_cap=None),
    "embeddings without their factor": lambda s: replace(s, embedding_scale=1.0),
    "another activation": lambda s: replace(s, activation="silu"),
    "whole heads rotated": lambda s: replace(s, rope=replace(s.rope, inv_freq=_turned(s.head_dim, 1e6))),
    "the other RoPE base": lambda s: _local(s, rope=replace(s.rope, dim=16, inv_freq=_turned(16, 1e6))),
    "scores with a factor": lambda s: replace(s, softmax_scale=s.head_dim**-0.5),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_wrong_spec_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    def change(engine: Engine) -> None:
        engine._model = replace(engine._model, spec=SPECS[name](engine._model.spec))

    refute("gemma4", checkpoint, change, name)


def _attention(layer: LayerWeights, **changes: Any) -> LayerWeights:
    assert isinstance(layer.attention, GqaWeights)
    return replace(layer, attention=replace(layer.attention, **changes))


def _of_layers(change: Callable[[LayerWeights], LayerWeights]) -> Callable[[ModelWeights], ModelWeights]:
    return lambda weights: replace(weights, layers=tuple(map(change, weights.layers)))


WEIGHTS: dict[str, Callable[[ModelWeights], ModelWeights]] = {
    "no norm of queries": _of_layers(lambda w: _attention(w, q_norm=None)),
    "no norm of keys": _of_layers(lambda w: _attention(w, k_norm=None)),
    "no norm of values": _of_layers(lambda w: _attention(w, v_norm=None)),
    "no norm before attention": _of_layers(lambda w: replace(w, attention_norm_c=torch.ones_like(w.attention_norm_c))),
    "no norm before the MLP": _of_layers(lambda w: replace(w, mlp_norm_c=torch.ones_like(w.mlp_norm_c))),
    "no norm behind attention": _of_layers(lambda w: replace(w, attention_post_norm_c=None)),
    "no norm behind the MLP": _of_layers(lambda w: replace(w, mlp_post_norm_c=None)),
    "no last norm": lambda w: replace(w, norm_c=torch.ones_like(w.norm_c)),
    "no embeddings of layers": lambda w: replace(w, inputs=None),
    "embeddings of layers by context alone": lambda w: replace(
        w, inputs=w.inputs and replace(w.inputs, embed_vp=torch.zeros_like(w.inputs.embed_vp))
    ),
    "embeddings of layers by id alone": lambda w: replace(
        w, inputs=w.inputs and replace(w.inputs, norm_p=torch.zeros_like(w.inputs.norm_p))
    ),
    "no norm of what embeddings of layers add": _of_layers(
        lambda w: replace(w, inputs=w.inputs and replace(w.inputs, norm_c=torch.ones_like(w.inputs.norm_c)))
    ),
    "no factor on layers": _of_layers(lambda w: replace(w, scalar_1=None)),
    "no rotation": _of_layers(lambda w: _attention(w, rotated=False)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_part_left_out_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    def change(engine: Engine) -> None:
        engine._model = replace(engine._model, weights=WEIGHTS[name](engine._model.weights))

    refute("gemma4", checkpoint, change, name)


def test_keys_of_another_layer_fail_parity(checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer with a window in place of the last one that has keys of its own."""
    spec = spec_of(GEMMA4)
    assert [spec.cached_by(layer) for layer in range(6)] == [0, 1, 2, 1, 1, 2]
    assert [spec.cache_dims(layer) for layer in (1, 2, 3)] == [(16, 16), (32, 32), ()]
    assert [spec.mlp_width(layer) for layer in (2, 3)] == [80, 160]
    monkeypatch.setattr(ModelSpec, "cached_by", lambda self, layer: [0, 1, 2, 0, 0, 2][layer])
    refute("gemma4", checkpoint, lambda engine: None, "another layer's keys")


@pytest.mark.parametrize("what", ["of another matrix", "normalised as keys"])
def test_values_that_are_not_the_keys_fail_parity(what: str, checkpoint: GetCheckpoint) -> None:
    def other(w: LayerWeights) -> LayerWeights:
        assert isinstance(w.attention, GqaWeights) and w.attention.k is not None
        if w.attention.v is not None:
            return w
        if what == "normalised as keys":
            return _attention(w, v_norm=w.attention.k_norm)
        matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        return _attention(w, v=Linear(ops_for("reference").pack(Plain(matrix), torch.float32)))

    def change(engine: Engine) -> None:
        weights = engine._model.weights
        assert sum(layer.attention.v is None for layer in weights.layers) == 2  # type: ignore[union-attr]
        engine._model = replace(engine._model, weights=replace(weights, layers=tuple(map(other, weights.layers))))

    refute("gemma4-large", checkpoint, change, what)


# ---- windows


@pytest.mark.parametrize("column", ["reference", "cpu"])
@pytest.mark.parametrize("window", [1, 5, 16, 33])
def test_a_window_is_a_band_of_the_mask(window: int, column: str) -> None:
    """Pages in any order; two key heads of three queries each."""
    if column == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    ops, generator = ops_for(column), torch.Generator().manual_seed(window)
    page_size, pages, length, first = 4, [7, 2, 11, 0, 5, 9, 1, 3, 10, 4], 38, 34
    q_thd, k_lkd, v_lkd = (torch.randn(length, n, 8, generator=generator) for n in (6, 2, 2))
    pools = [torch.zeros(12, 2, page_size, 8) for _ in range(2)]
    where = torch.arange(length)
    for pool, x in zip(pools, (k_lkd, v_lkd), strict=True):
        ops.paged_write(pool, torch.tensor(pages)[where // page_size], where % page_size, x)
    rows = sliding.window_rows(3, [Span(first, length - first, pages)], window, page_size, torch.device("cpu"))
    assert (rows.start, rows.end) == (3, 3 + length - first)
    ours = sliding.attend(ops, rows, q_thd[first:], *pools, 0.5)
    behind = where[:, None] - where
    mask = (behind >= 0) & (behind < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_thd, k_lkd, v_lkd))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1)[first:], rtol=1e-5, atol=1e-5)


def test_a_table_in_several_parts_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(8, 2, 4, 8, generator=generator) for _ in range(2)]
    rows = sliding.window_rows(0, [Span(20, 9, range(8))], 7, 4, torch.device("cpu"))
    q = torch.randn(9, 4, 8, generator=generator)
    whole = sliding.attend(ops_for("reference"), rows, q, *pools, 1.0)
    monkeypatch.setattr(sliding, "PLACES", 2 * 7 * 2)
    torch.testing.assert_close(sliding.attend(ops_for("reference"), rows, q, *pools, 1.0), whole, rtol=0, atol=1e-6)


# ---- configs and weights


def test_what_is_cached_for_the_published_shapes() -> None:
    """E2B: 12 layers with 2 × 256 numbers a token and 3 with 2 × 512, of 35."""
    kinds = ([SLIDING] * 4 + [WHOLE]) * 7
    changes = {"num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    spec = spec_of({**GEMMA4, **changes, "layer_types": kinds, "num_kv_shared_layers": 20, "global_head_dim": 512})
    assert spec.cache_elements_per_token() == 12 * 512 + 3 * 1024
    assert spec.cached_by(15) == 13 and spec.cached_by(34) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "'enable_moe_block' is true; Gemma 4 with experts is not supported"),
        ({"use_bidirectional_attention": "all"}, "'use_bidirectional_attention' is 'all'"),
        ({"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu'"),
        ({"layer_types": [WHOLE] * 5 + [SLIDING]}, "the last one 'full_attention'"),
        ({"layer_types": [WHOLE] * 5}, "'layer_types' has 5 entries"),
        ({"layer_types": ["chunked_attention"] * 5 + [WHOLE]}, "must list 6 values"),
        ({"num_kv_shared_layers": 4}, "no layer before those has the keys and values"),
        ({"num_kv_shared_layers": 7}, "'num_kv_shared_layers' is 7"),
        ({"vocab_size_per_layer_input": 200}, "'vocab_size_per_layer_input' is 200 and 'vocab_size' is 300"),
        ({"rope_parameters": {WHOLE: {"rope_type": "default"}}}, "'sliding_attention' is missing"),
        (
            {"rope_parameters": {WHOLE: {**YARN, "rope_type": "yarn"}, SLIDING: {}}},
            "'full_attention' is missing|'yarn'",
        ),
        ({"num_key_value_heads": 3}, "no multiple of 3 key-value heads"),
        ({"global_head_dim": 31}, "heads are 31 wide"),
        ({"sliding_window": 0}, "'sliding_window' is 0"),
        ({"final_logit_softcapping": 0}, "'final_logit_softcapping' is 0"),
        ({"per_layer_config": {"2": {"head_dim": 32}, "5": {"head_dim": 24}}}, "layers of one kind"),
        ({"per_layer_config": {"1": {"head_dim": 32}}}, "layers of one kind"),
        ({"per_layer_config": {"2": {"hidden_size": 32}}}, "'hidden_size' differs between layers"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        spec_of({**GEMMA4, **change}, "config.json")
    assert str(caught.value).startswith("config.json") and "\n" not in str(caught.value)


def test_differences_between_layers_as_transformers_writes_them() -> None:
    """With zeros in front of the numbers, from ten layers on."""
    from transformers import Gemma4TextConfig

    sizes = {key: value for key, value in GEMMA4_LARGE.items() if key not in ("layer_types", "torch_dtype")}
    written = json.loads(Gemma4TextConfig(**sizes | {"num_hidden_layers": 12}).to_json_string(use_diff=False))
    assert sorted(written["per_layer_config"]) == ["05", "11"] and "global_head_dim" not in written
    spec = spec_of(written)
    assert (spec.head_dim, spec.num_kv_heads) == (32, 1) and spec == spec_of({**sizes, "num_hidden_layers": 12})
    with pytest.raises(ValueError, match="'x' is not the number of a layer"):
        spec_of({**written, "per_layer_config": {"x": {}}})


def test_the_published_layout_is_the_same_model() -> None:
    inner = {**GEMMA4_LARGE, "model_type": "gemma4_text"}
    published = spec_of(
        {"model_type": "gemma4", "text_config": inner, "vision_config": {"model_type": "gemma4_vision"}}
    )
    assert replace(published, family="gemma4_text") == spec_of(inner)
    with pytest.raises(ValueError, match="'text_config' is missing; it describes the language model"):
        spec_of({"model_type": "gemma4"})


def test_bits_of_a_layer_do_not_depend_on_its_neighbours() -> None:
    """torch's GELU gives the last numbers of a tensor other bits; ours must not."""
    from distill.engine.residual import capped, gelu_tanh

    x = torch.randn(65, 37, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(gelu_tanh(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    for op in (gelu_tanh, lambda y: capped(y, 30.0)):
        whole: Tensor = op(x)
        assert all(torch.equal(op(x[i : i + 1])[0], whole[i]) for i in range(len(x)))


def test_keys_that_shared_layers_do_not_use_are_not_read(tmp_path: Path) -> None:
    """Published checkpoints have them. Other tensors without a place are refused."""
    from random_models import write
    from safetensors.torch import load_file

    ckpt = build(tmp_path, GEMMA4)
    tensors = load_file(tmp_path / "model.safetensors")
    at = "model.layers.4.self_attn."
    more = {at + "k_proj.weight": torch.ones(32, 64), at + "v_proj.weight": torch.ones(32, 64)}
    write(tmp_path, tensors | more | {at + "k_norm.weight": torch.ones(16)})
    engine = Engine.load(tmp_path, engine_options(cache_tokens=256, kernels="reference"))
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error <= TOLERANCE, report
    write(tmp_path, tensors | {"model.layers.1.self_attn.v_norm.weight": torch.ones(16)})
    with pytest.raises(ValueError, match="v_norm.weight has no place"):
        Engine.load(tmp_path, engine_options(cache_tokens=256))
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIGS["gemma4"]
