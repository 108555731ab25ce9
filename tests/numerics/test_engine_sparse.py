"""Sparse attention (V3.2-Exp): the choice of tokens by hand, and the mistakes that parity must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from random_models import GLM, V32, Checkpoint
from torch import Tensor
from transformers import GlmMoeDsaConfig

from distill.engine import Engine, ModelSpec, attention, indexer
from distill.engine.families import spec_of
from distill.engine.kernels import ops_for, reference

GetCheckpoint = Callable[[str], Checkpoint]
TOKENS = some_tokens(90)
TOP_K = 24  # of the checkpoint "v32"


def test_index_scores_by_hand() -> None:
    """Two heads: relu before the weights, a negative weight, a token that is yet to come."""
    pool = torch.zeros(2, 1, 2, 1)
    pool.view(-1)[:] = torch.tensor([5.0, 7.0, 1.0, -2.0])
    q_thd, weight_th = torch.tensor([[[2.0], [-1.0]], [[1.0], [3.0]]]), torch.tensor([[1.0, 10.0], [0.5, -1.0]])
    scores = reference.index_scores(q_thd, weight_th, pool, torch.tensor([1, 0]), 3)  # keys 1, -2, 5
    assert scores.tolist() == [[2.0, 20.0, float("-inf")], [0.5 - 3.0, 0.0, 2.5 - 15.0]]


def test_the_best_places_in_order_and_of_equals_the_earliest() -> None:
    """Keys 3, 1, 3, 2, 3, 1 by position; pages of two tokens in the order 2, 0, 1."""
    pool = torch.zeros(3, 1, 2, 1)
    table_p = torch.tensor([2, 0, 1])
    for position, key in enumerate([3.0, 1.0, 3.0, 2.0, 3.0, 1.0]):
        pool[table_p[position // 2], 0, position % 2, 0] = key
    q_thd, weight_th = torch.ones(2, 1, 1), torch.ones(2, 1)
    ops = ops_for("reference")
    best_two, undefined = indexer.select(ops, q_thd, weight_th, pool, table_p, 6, 2)
    assert best_two.tolist() == [[4, 0], [4, 0]]  # positions 0, 2
    assert undefined.tolist() == [False, False]
    best_four, _ = indexer.select(ops, q_thd, weight_th, pool, table_p, 6, 4)
    assert best_four.tolist() == [[4, 0, 1, 2]] * 2  # positions 0, 2, 3, 4


def test_a_row_with_a_nan_score_is_named_and_its_places_are_valid() -> None:
    """The query of the second row is NaN."""
    pool, table_p = torch.ones(3, 1, 2, 1), torch.tensor([2, 0, 1])
    q_thd, weight_th = torch.tensor([[[1.0]], [[float("nan")]]]), torch.ones(2, 1)
    places, undefined = indexer.select(ops_for("reference"), q_thd, weight_th, pool, table_p, 6, 4)
    assert undefined.tolist() == [False, True]
    assert places.min() >= 0 and places.max() < 6


@pytest.mark.parametrize("elements", [1, 100, 1 << 24])
def test_selection_is_the_same_in_any_block(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(8, 1, 4, 6, generator=generator)
    q, weight = torch.randn(9, 3, 6, generator=generator), torch.randn(9, 3, generator=generator)
    table_p = torch.tensor([5, 2, 7, 0, 1, 3, 4, 6])
    whole, _ = indexer.select(ops_for("reference"), q, weight, pool, table_p, 30, 20)
    monkeypatch.setattr(indexer, "_SCORE_ELEMENTS", elements)
    assert torch.equal(indexer.select(ops_for("reference"), q, weight, pool, table_p, 30, 20)[0], whole)
    assert whole.shape == (9, 20) and all(len(set(row)) == 20 for row in whole.tolist())


def _rope_in_pairs(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    reference.rope(x_thd, cos_tr, sin_tr, True)


def _rope_of_the_main_path(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    if interleaved:
        reference.rope(x_thd, cos_tr, sin_tr, True)


MUTATIONS: dict[str, dict[str, Callable[..., Tensor | None]]] = {
    "RoPE in pairs": {"rope": _rope_in_pairs},
    "not rotated": {"rope": _rope_of_the_main_path},
    "heads not weighed": {
        "index_scores": lambda q, w, *rest: reference.index_scores(q, torch.ones_like(w), *rest),
    },
    "weights without their sign": {"index_scores": lambda q, w, *rest: reference.index_scores(q, w.abs(), *rest)},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_indexer_shows_past_top_k_and_only_there(name: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("v32")
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=1024, kernels="reference"))
    ops = SimpleNamespace(**vars(engine._model.ops) | MUTATIONS[name])
    engine._model = replace(engine._model, ops=ops)
    theirs = ckpt.logits(TOKENS)
    for ours in (engine_logits(engine, TOKENS), engine_logits(engine, TOKENS, decode_from=10)):
        error, report = relative_error(ours[TOP_K:], theirs[TOP_K:])
        assert error > 1e-2, f"{name} goes unnoticed: {report}"
        error, report = relative_error(ours[:TOP_K], theirs[:TOP_K])
        assert error <= 1e-4, report


GLM_MUTATIONS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "index heads rotated as halves": lambda s: replace(s, indexer=replace(s.indexer, interleaved=False)),
    "main path rotated as halves": lambda s: replace(s, rope=replace(s.rope, interleaved=False)),
}


@pytest.mark.parametrize("name", GLM_MUTATIONS)
def test_a_wrong_spec_of_glm_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("glm-shared")
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=1024, kernels="reference"))
    engine._model = replace(engine._model, spec=GLM_MUTATIONS[name](engine._model.spec))
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error > 1e-2, f"{name} goes unnoticed: {report}"


def test_layers_that_share_an_indexer_attend_to_what_it_chose(
    checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a layer caches no index keys, and with another choice of tokens the logits past top_k are wrong."""
    ckpt = checkpoint("glm-shared")
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=1024, kernels="reference"))
    assert [len(pools) for pools in engine._cache.pools] == [2, 1, 2, 1]
    mla, shared = attention.mla, 0

    def other_choice(*args: Any) -> tuple[Tensor, attention.Chosen | None]:
        nonlocal shared
        *rest, chosen = args
        if args[2].indexer is None and chosen is not None:
            places_tk = torch.arange(TOP_K).expand_as(chosen.place_tk)  # other tokens of the only sequence
            chosen, shared = replace(chosen, place_tk=places_tk), shared + 1
        return mla(*rest, chosen)

    monkeypatch.setattr(attention, "mla", other_choice)
    ours, theirs = engine_logits(engine, TOKENS), ckpt.logits(TOKENS)
    assert shared == 2
    error, report = relative_error(ours[TOP_K:], theirs[TOP_K:])
    assert error > 1e-2, report
    error, report = relative_error(ours[:TOP_K], theirs[:TOP_K])
    assert error <= 1e-4, report


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({}, set()),
        ({"index_topk_freq": 4}, {2, 3, 4, 6, 7}),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, {1, 2, 3, 5, 6, 7}),
        ({"index_topk_pattern": "FFSSFSSS"}, {2, 3, 5, 6, 7}),
        ({"index_topk_pattern": "FS", "indexer_types": ["full"] * 7 + ["shared"]}, {7}),
    ],
)
def test_which_layers_share_an_indexer(change: dict[str, Any], shared: set[int]) -> None:
    config = {**GLM, "num_hidden_layers": 8, **change}
    spec = spec_of(config)
    assert spec.indexer is not None and spec.indexer.shared_layers == shared
    theirs = GlmMoeDsaConfig(**{key: value for key, value in config.items() if key != "model_type"}).indexer_types
    assert {layer for layer, kind in enumerate(theirs) if kind == "shared"} == shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_topk_pattern": "FXFF"}, "'index_topk_pattern' does not say"),
        ({"indexer_types": ["full"] * 3}, "'indexer_types' does not say"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, "'index_topk_freq' does not say"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, "'mlp_layer_types' is not 1 times 'dense'"),
        ({"layer_types": ["full_attention"] * 4}, "'layer_types' has others than"),
        ({"indexer_rope_interleave": False}, "'indexer_rope_interleave' is False"),
        ({"mlp_bias": True}, "'mlp_bias' is True"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
        ({"routed_scaling_factor": None}, "'routed_scaling_factor' is missing"),
        ({"index_topk_freq": "2"}, "'index_topk_freq' is '2'"),
    ],
)
def test_glm_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        spec_of({**GLM, **change})
    assert "\n" not in str(caught.value)


def test_attention_to_everything_is_another_model(checkpoint: GetCheckpoint) -> None:
    ckpt = checkpoint("v32")
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=1024, kernels="reference"))
    engine.spec = replace(engine.spec, indexer=replace(engine.spec.indexer, top_k=1000))
    error, report = relative_error(engine_logits(engine, TOKENS), ckpt.logits(TOKENS))
    assert error > 1e-2, report


def test_the_published_keys_are_read_and_needed() -> None:
    spec = spec_of(V32)
    assert spec.indexer is not None
    assert (spec.indexer.heads, spec.indexer.head_dim, spec.indexer.top_k) == (16, 32, TOP_K)
    assert spec.cache_dims(0) == (48, 32)
    for key in ("index_n_heads", "index_head_dim", "index_topk", "q_lora_rank"):
        with pytest.raises(ValueError, match=f"'{key}' is missing"):
            spec_of({k: v for k, v in V32.items() if k != key})
