"""Compressed attention and hyper-connections: each part, left out, is noticed; bits do not depend on company; what is
not computed is refused. Parity itself is in test_engine_parity.py, for every config of v4_models.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from four_bit_models import build_four_bit
from random_models import Checkpoint, build
from safetensors.torch import load_file, save_file
from test_engine_published import write_shards
from torch import Tensor
from transformers import AutoModelForCausalLM
from v4_models import V4

from distill.engine import Completion, Engine, Request, SamplingParams, compressed
from distill.engine.batch import Chunk
from distill.engine.families import read_spec, spec_of
from distill.engine.kernels import cpu, reference
from distill.engine.model import Model
from distill.engine.spec import ModelSpec
from distill.engine.weights import CompressedWeights, LayerWeights

GetCheckpoint = Callable[[str], Checkpoint]
TOLERANCE = 1e-4  # of the largest logit
TOKENS = some_tokens(90)
ROOT = Path(__file__).resolve().parents[2]


def load(path: Path, **options: Any) -> Engine:
    return Engine.load(path, engine_options(**{"cache_tokens": 1024, "kernels": "reference", **options}))


def _compressed(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert spec.compressed is not None
    return replace(spec, compressed=replace(spec.compressed, **changes))


def _rope(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert spec.compressed is not None
    return _compressed(replace(spec, rope=replace(spec.rope, **changes)), rope=replace(spec.compressed.rope, **changes))


def _indexer(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert spec.compressed is not None
    return _compressed(spec, indexer=replace(spec.compressed.indexer, **changes))


SPECS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "a window one token wider": lambda s: _compressed(s, window=11),
    "all entries instead of the chosen": lambda s: _indexer(s, top_k=100),
    "one entry fewer": lambda s: _indexer(s, top_k=5),
    "rotation of halves": lambda s: _rope(s, interleaved=False),
    "the whole head rotated": lambda s: _rope(s, dim=12, inv_freq=(*s.rope.inv_freq, 0.01, 0.001)),
    "one rotation for all layers": lambda s: _compressed(s, rope=s.rope),
    "fewer rounds of Sinkhorn-Knopp": lambda s: replace(s, streams=replace(s.streams, iterations=1)),
    "experts without a limit": lambda s: replace(s, moe=replace(s.moe, limit=1e9)),
    "sigmoid in place of sqrt-softplus": lambda s: replace(s, moe=replace(s.moe, scoring="sigmoid")),
}


def _no_sinks(q: Tensor, rows: Tensor, row_tl: Tensor, sink_h: Tensor, scale: float) -> Tensor:
    return reference.attend_rows(q, rows, row_tl, torch.full_like(sink_h, -torch.inf), scale)


def _no_overlap(x_nwd: Tensor, gate_nwd: Tensor) -> Tensor:
    """Entries of windows of eight are the heavy ones, or two windows of four: only the second of these is kept."""
    if x_nwd.shape[1] == 8 and bool((gate_nwd[0, 0] == -torch.inf).all()):
        return reference.pool_windows(x_nwd[:, 4:], gate_nwd[:, 4:])
    return reference.pool_windows(x_nwd, gate_nwd)


def _streams(part: int, value: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    def weights(*args: Any) -> list[Tensor]:
        parts = list(reference.stream_weights(*args))
        parts[part] = value(parts[part])
        return parts

    return weights


OPS: dict[str, dict[str, Callable[..., Any]]] = {
    "no sinks": {"attend_rows": _no_sinks},
    "entries that do not overlap": {"pool_windows": _no_overlap},
    "entries are plain means": {"pool_windows": lambda x, gate: reference.pool_windows(x, gate.clamp(-1e9, 0) * 0)},
    "streams read alike": {"stream_weights": _streams(0, lambda pre: torch.full_like(pre, 0.25))},
    "results added to streams alike": {"stream_weights": _streams(1, torch.ones_like)},
    "streams not mixed": {"stream_weights": _streams(2, lambda comb: torch.eye(comb.shape[1]).expand_as(comb))},
    "streams mixed the other way": {"stream_weights": _streams(2, lambda comb: comb.transpose(1, 2))},
}


def _attention(change: Callable[[CompressedWeights], CompressedWeights]) -> Callable[[LayerWeights], LayerWeights]:
    def changed(layer: LayerWeights) -> LayerWeights:
        assert isinstance(layer.attention, CompressedWeights)
        return replace(layer, attention=change(layer.attention))

    return changed


def _no_bias(w: CompressedWeights) -> CompressedWeights:
    if w.compressor is None:
        return w
    return replace(w, compressor=replace(w.compressor, bias_wm=torch.zeros_like(w.compressor.bias_wm)))


WEIGHTS: dict[str, Callable[[LayerWeights], LayerWeights]] = {
    "no position bias in windows": _attention(_no_bias),
    "heads of queries not normalised alike": _attention(lambda w: replace(w, ones_d=2 * w.ones_d)),
    "groups of heads exchanged": _attention(lambda w: replace(w, o_a=w.o_a.flip(0))),
    "experts chosen by score in the first layers": lambda w: replace(w, mlp=replace(w.mlp, by_token_vk=None)),
}


@pytest.mark.parametrize("name", [*SPECS, *OPS, *WEIGHTS])
def test_a_part_left_out_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("v4")
    engine = load(ckpt.path)
    model: Model = engine._model
    if name in SPECS:
        model = replace(model, spec=SPECS[name](model.spec))
    elif name in OPS:
        model = replace(model, ops=SimpleNamespace(**vars(model.ops) | OPS[name]))
    else:
        layers = tuple(map(WEIGHTS[name], model.weights.layers))
        model = replace(model, weights=replace(model.weights, layers=layers))
    engine._model, engine.spec = model, model.spec
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error > TOLERANCE, f"{name} goes unnoticed: {report}"


@pytest.mark.parametrize("rate", [4, 8])
def test_entries_left_out_fail_parity(rate: int, checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt, places = checkpoint("v4"), compressed._entry_places

    def none(spans: Any, its_rate: int, *args: Any) -> Tensor:
        return places(spans, its_rate, *args) if its_rate != rate else places(spans, its_rate, *args).fill_(-1)

    monkeypatch.setattr(compressed, "_entry_places", none)
    error, report = relative_error(engine_logits(load(ckpt.path), TOKENS), ckpt.logits(TOKENS))
    assert error > TOLERANCE, report


def test_a_rotation_that_is_not_undone_fails_parity(checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("v4")
    engine, attended = load(ckpt.path), []

    def attend_rows(*args: Any) -> Tensor:
        attended.append(reference.attend_rows(*args))
        return attended[-1]

    def rope(x: Tensor, *args: Any) -> None:
        if not attended or x.data_ptr() - attended[-1].data_ptr() != 16 * 4:  # its last 8 of 24 dimensions
            reference.rope(x, *args)

    ops = SimpleNamespace(**vars(engine._model.ops) | {"attend_rows": attend_rows, "rope": rope})
    engine._model = replace(engine._model, ops=ops)
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error > TOLERANCE, report


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse layer with hash routing and a heavy one, windows shorter than prompts, and most entries left out."""
    config = {**V4, "num_hidden_layers": 2, "compress_ratios": [4, 128], "num_hash_layers": 1, "compress_rate_csa": 2}
    config |= {"index_topk": 2, "sliding_window": 4, "compress_rate_hca": 5, "hc_sinkhorn_iters": 2, "hc_mult": 2}
    config |= {"n_routed_experts": 16, "num_experts_per_tok": 2, "index_n_heads": 2, "num_attention_heads": 2}
    return build(tmp_path_factory.mktemp("small"), config).path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_company(dtype: torch.dtype, small: Path) -> None:
    """Alone, among 63 others, in chunks, forked, and recomputed after preemption: every log-probability is equal."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    sampling = SamplingParams(temperature=1.0, max_new_tokens=6)

    def request(number: int, samples: tuple[int, ...] = (0,)) -> Request:
        prompt = tuple(some_tokens(3 + 5 * (number % 4), seed=number))
        return Request(str(number), prompt, sampling, seed=5, prompt_key=number, samples=samples)

    def run(requests: list[Request], **options: int) -> dict[tuple[str, int], Completion]:
        engine = load(small, dtype=dtype, kernels="cpu", **options)
        done = {(c.request_id, c.sample): c for c in engine.generate(requests)}
        assert engine._pages.free_pages == engine._pages.num_pages
        return done

    together = run([request(number) for number in range(64)], cache_tokens=4096)
    some = {("3", 0), *((str(number), 0) for number in range(12))}
    in_chunks = run([request(n) for n in range(12)], max_step_tokens=7, max_batch=6)
    preempted = run([request(n) for n in range(12)], cache_tokens=48, page_size=3)
    assert {key: together[key] for key in some} == in_chunks == preempted
    assert run([request(3)]) == {("3", 0): together["3", 0]}
    forked = run([request(3, tuple(range(4)))], page_size=4)
    assert forked["3", 0] == together["3", 0]
    assert forked["3", 1] == run([request(3, (1,))])["3", 1]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@torch.inference_mode()
def test_rows_that_nobody_asked_for(kernels: str, small: Path) -> None:
    if kernels == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    engine = load(small, kernels=kernels)
    tokens, pages = some_tokens(30), engine._pages.allocate(2)
    whole = engine._forward([], [Chunk(tokens, 0, pages)])
    assert engine._forward([], [Chunk(tokens[:20], 0, pages)], [False]).shape == (0, 64)
    (last,) = engine._forward([], [Chunk(tokens[20:], 20, pages)], [True])
    torch.testing.assert_close(last, whole[-1], rtol=0, atol=0 if kernels == "cpu" else 1e-5)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_fp8_with_published_names(kernels: str, tmp_path: Path) -> None:
    """Scales are named `.scale`; blocks are partial, and groups of the output begin within one or at one."""
    if kernels == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    config = {**V4, "num_hidden_layers": 2, "compress_ratios": [4, 128], "hidden_size": 160, "o_lora_rank": 128}
    ckpt = build(tmp_path, config, fp8=True, shards=2)
    engine = load(tmp_path, kernels=kernels)
    assert engine.numerics.weights == "fp8-e4m3 block 128"
    error, report = relative_error(engine_logits(engine, TOKENS[:40]), ckpt.logits(TOKENS[:40]))
    assert error <= TOLERANCE, report


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_published_experts_in_fp4(kernels: str, tmp_path: Path) -> None:
    config = {**V4, "num_hidden_layers": 3, "moe_intermediate_size": 64, "expert_dtype": "fp4"}
    ckpt = build_four_bit(tmp_path, config, "mxfp4")
    engine = load(tmp_path, kernels=kernels)
    assert engine.numerics.weights == "mxfp4 group 32"
    error, report = relative_error(engine_logits(engine, TOKENS[:40], cuts=(7,)), ckpt.logits(TOKENS[:40]))
    assert error <= TOLERANCE, report
    streamed = load(tmp_path, kernels=kernels, resident_experts=3)
    assert torch.equal(engine_logits(engine, TOKENS[:20]), engine_logits(streamed, TOKENS[:20]))


def test_experts_that_are_streamed_give_the_same_bits(small: Path) -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    held, streamed = (load(small, kernels="cpu", resident_experts=count) for count in (16, 3))
    assert streamed._model.stream is not None
    assert torch.equal(engine_logits(held, TOKENS[:20]), engine_logits(streamed, TOKENS[:20]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_dtype": "int3"}, "'expert_dtype' is 'int3'"),
        ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "int3"}}, "'expert_dtype' is 'int3'"),
        ({"scoring_func": "softmax"}, "'scoring_func' is 'softmax'; 'sqrtsoftplus' and 'sigmoid' are supported"),
        ({"compress_ratios": [0, 4, 64, 4]}, "'compress_ratios' must list 4 values, each 0, 4 or 128"),
        ({"compress_ratios": [0, 4]}, "'compress_ratios' must list 4"),
        ({"compress_ratios": None}, "'compress_ratios' or 'layer_types' is required"),
        ({"layer_types": ["full_attention"] * 4}, "'layer_types' must list 4 values, each sliding_attention"),
        ({"mlp_layer_types": ["dense"] * 4}, "'mlp_layer_types' must list 4 values, each 'hash_moe' or 'moe'"),
        ({"n_shared_experts": 2}, "'n_shared_experts' is 2"),
        ({"norm_topk_prob": False}, "'norm_topk_prob' is False"),
        ({"num_key_value_heads": 4}, "'num_key_value_heads' is 4"),
        ({"o_groups": 3}, "'num_attention_heads' 4 is no multiple of 'o_groups' 3"),
        ({"index_head_dim": 4}, "'index_head_dim' is 4; its last 8"),
        ({"num_experts_per_tok": 17}, "17 experts per token of 16"),
        ({"qk_rope_head_dim": 32}, "the rotary width is 32; it must be from 1 to head_dim, which is 24"),
        ({"swiglu_limit": None}, "'swiglu_limit' is missing"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        spec_of({**V4, **change})
    assert "\n" not in str(caught.value)


def test_the_cache_of_each_kind_of_layer() -> None:
    spec = spec_of(V4)
    assert spec.compressed is not None and spec.compressed.rates == (0, 4, 8, 4)
    assert [spec.cache_dims(layer) for layer in range(3)] == [(24,), (48, 96, 16, 64), (48, 48)]
    assert spec.num_nextn_predict_layers == 0, "the layer that drafts is not computed"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.full((300, 4), 16), "does not name 4 of 16 experts for each token"),
        (torch.zeros(300, 4, dtype=torch.int32), "does not name 4 of 16 experts"),
        (torch.zeros(300, 4), "is F32; supported are I32 and I64"),
    ],
)
def test_a_damaged_table_of_experts_is_refused(
    table: Tensor, message: str, checkpoint: GetCheckpoint, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("v4").path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors") | {"layers.1.ffn.gate.tid2eid": table}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_published_directory_loads_as_it_is(tmp_path: Path) -> None:
    """Shards with an index, bfloat16, int32 tables, a layer that drafts, a config with every published key."""
    path = tmp_path / "model"
    sizes = {"vocab_size": 576, "bos_token_id": 554, "eos_token_id": 555, "pad_token_id": 555}
    config = {**V4, **sizes, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}
    config = {key: value for key, value in config.items() if not key.startswith("compress_rate_")}
    build(path, config)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    kept = (".bias", "attn_sink", "ape", "fn", "base", "scale")
    stored = {name: t.int() if name.endswith("tid2eid") else t for name, t in tensors.items()}
    stored = {n: t.bfloat16() if t.is_floating_point() and not n.endswith(kept) else t for n, t in stored.items()}
    write_shards(path, stored | {"mtp.0.e_proj.weight": torch.ones(64, 64, dtype=torch.bfloat16)})
    published = {"architectures": ["DeepseekV4ForCausalLM"], "use_cache": True, "transformers_version": "4.57.1"}
    (path / "config.json").write_text(json.dumps({**config, **published, "expert_dtype": "bf16"}), encoding="utf-8")
    assert read_spec(path).family == "deepseek_v4"
    tokens = some_tokens(150, vocab=550)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens]), use_cache=False).logits[0]
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    error, report = relative_error(engine_logits(load(path), tokens), theirs)
    assert error <= TOLERANCE, report
    with pytest.raises(ValueError, match="num_speculative_tokens is 1; this model has no layer that drafts"):
        load(path, num_speculative_tokens=1)
