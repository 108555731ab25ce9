"""From a model directory to what an engine is made of: checks, the sizes of cache and steps, which experts are kept in
memory, the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from distill.engine.cache import token_bytes
from distill.engine.checkpoint import Checkpoint
from distill.engine.device import choose_device, memory_of, refuse_too_large
from distill.engine.families import read_spec
from distill.engine.fused import decode_plan
from distill.engine.kernels import column_for, describe, ops_for
from distill.engine.model import Model
from distill.engine.offload import ExpertStream, bytes_of, experts_within, step_bytes
from distill.engine.reader import load_weights
from distill.engine.spec import ModelSpec
from distill.engine.weights import ModelWeights

# Default size of the cache: what max_batch full contexts need, but no more than this, unless one long context needs it.
_DEFAULT_CACHE_BYTES = 512 << 20
_DEFAULT_LONG_CONTEXT = 32768


def prepare(
    model_dir: Path | str,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype,
    max_batch: int,
    max_step_tokens: int,
    page_size: int | None,
    cache_tokens: int | None,
    max_context: int | None,
    num_speculative_tokens: int,
    memory_budget: int | None,
    resident_experts: int | None,
    kv_cache_dtype: Literal["auto", "fp8"],
    kernels: str | None,
) -> tuple[Model, str, dict[str, Any]]:
    """The model, its numerics, and the engine's other arguments. As `Engine.load` takes them, and with its errors."""
    spec = read_spec(model_dir)
    kernels = kernels or column_for(choose_device(device).type)
    ops = ops_for(kernels)
    place_of = ops.device()
    if page_size is None:
        page_size = 64 if kernels == "cuda" else 16
    context = _checked_context(spec, max_context, num_speculative_tokens)
    for name, value in (("max_batch", max_batch), ("max_step_tokens", max_step_tokens), ("page_size", page_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if kv_cache_dtype == "fp8" and (kernels not in ("cuda", "w8a8") or dtype != torch.bfloat16):
        raise ValueError("kv_cache_dtype is 'fp8', which takes a GPU and dtype bfloat16; set 'auto'")
    drafts = num_speculative_tokens > 0
    cache_dtype = torch.uint8 if kv_cache_dtype == "fp8" else dtype
    each = token_bytes(spec, spec.num_layers + drafts, cache_dtype)
    memory_budget = memory_of(place_of) if memory_budget is None else memory_budget
    if place_of.type == "cuda":
        assert memory_budget is not None
        refuse_too_large(model_dir, Checkpoint(Path(model_dir)).sizes(), memory_budget)
    if cache_tokens is None:
        share = _DEFAULT_CACHE_BYTES if memory_budget is None else memory_budget // 5
        cache_tokens = min(max_batch * context, max(share // each, min(context, _DEFAULT_LONG_CONTEXT)))
    if cache_tokens < page_size:
        raise ValueError(f"cache_tokens is {cache_tokens}; it must be at least one page ({page_size})")
    streamed: list[Any] = []

    def place(weights: ModelWeights, banks: list[Any]) -> int | None:
        rows = max_batch * (1 + num_speculative_tokens)
        beside = cache_tokens * each + step_bytes(spec, max_step_tokens, rows, dtype)
        resident = resident_experts
        if spec.moe and resident is not None and not 0 <= resident <= spec.moe.num_experts:
            raise ValueError(f"resident_experts is {resident}; there are {spec.moe.num_experts} in a layer")
        if resident is None and memory_budget is not None:
            resident = experts_within(memory_budget, bytes_of(weights, ops) + beside, banks)
        if resident is not None and banks and resident < banks[0].count:
            streamed.extend(banks)
        return resident

    limited = memory_budget is not None or resident_experts is not None
    weights = load_weights(model_dir, spec, ops, dtype, drafts=drafts, place=place if limited else None)
    stream = ExpertStream(streamed, ops) if streamed else None
    computed = str(dtype).removeprefix("torch.")
    numerics = f"{describe(kernels)}, weights {weights.stored} as published, activations {computed}"
    numerics += ", latents cached in fp8" if kv_cache_dtype == "fp8" else ""
    model = Model(
        spec,
        weights,
        ops,
        stream,
        None if stream else decode_plan(spec, weights.layers, ops),
        decode_plan(spec, (weights.draft.layer,), ops) if weights.draft else None,
    )
    sizes = {
        "max_batch": max_batch,
        "max_step_tokens": max_step_tokens,
        "page_size": page_size,
        "cache_tokens": cache_tokens,
        "max_context": context,
        "drafts": num_speculative_tokens,
        "cache_dtype": cache_dtype,
        "graphs": kernels == "cuda" and not stream,
    }
    return model, numerics, sizes


def _checked_context(spec: ModelSpec, asked: int | None, drafts: int) -> int:
    """The longest context. ValueError for one, or for a number of drafts, that the model does not have."""
    if drafts < 0:
        raise ValueError(f"num_speculative_tokens is {drafts}; it must not be negative")
    if drafts and not spec.num_nextn_predict_layers:
        raise ValueError(f"num_speculative_tokens is {drafts}; this model has no layer that drafts: set 0")
    context = spec.max_context if asked is None else asked
    if not 1 <= context <= spec.max_context:
        raise ValueError(f"max_context is {context}; this model's limit is {spec.max_context}")
    return context
