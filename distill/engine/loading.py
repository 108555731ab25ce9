"""From a model directory to what an engine is made of: checks, the sizes of cache and steps, which experts are kept in
memory, the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill.engine.cache import state_bytes, token_bytes
from distill.engine.checkpoint import Checkpoint
from distill.engine.device import choose_device, host_memory, memory_of, refuse_more_than_host_memory, refuse_too_large
from distill.engine.families import FAMILIES, read_spec
from distill.engine.fused import decode_plan
from distill.engine.kernels import column_for, ops_for
from distill.engine.kernels.ops import ExpertBank
from distill.engine.model import Model
from distill.engine.numerics import Numerics
from distill.engine.offload import ExpertStream, bytes_of, experts_within, step_bytes
from distill.engine.options import EngineOptions
from distill.engine.reader import load_weights
from distill.engine.spec import ModelSpec
from distill.engine.weights import ModelWeights

# Default size of the cache: what max_batch full contexts need, but no more than this, unless one long context needs it.
_DEFAULT_CACHE_BYTES = 512 << 20
_DEFAULT_LONG_CONTEXT = 32768


@dataclass(frozen=True)
class Sizes:
    """What an engine needs beside its model. cache_tokens: of the key-value cache; max_context: prompt and completion;
    drafts: tokens proposed at a time; graphs: whether decode steps are replayed as CUDA graphs; slots: of recurrent
    states, one for each sequence that runs and one that samples of a prompt share; none for models without."""

    max_batch: int
    max_step_tokens: int
    page_size: int
    cache_tokens: int
    max_context: int
    drafts: int
    cache_dtype: torch.dtype
    graphs: bool
    slots: int = 0


def prepare(model_dir: Path | str, options: EngineOptions) -> tuple[Model, Numerics, Sizes]:
    """Load a model for an engine. Errors: ValueError, as `Engine.load`."""
    spec = read_spec(model_dir)
    kernels = options.kernels or column_for(choose_device(options.device).type)
    ops, dtype = ops_for(kernels), _dtype(options)
    budget = memory_of(ops.device()) if options.memory_budget is None else options.memory_budget
    sizes = _sizes(spec, options, kernels, budget)
    if ops.device().type == "cuda":
        assert budget is not None
        expert = FAMILIES[spec.family].names.moe.expert
        refuse_too_large(model_dir, Checkpoint(Path(model_dir)).sizes(), budget, expert)
    streamed: list[ExpertBank[object]] = []
    heads = torch.get_num_threads() if kernels == "cpu" else spec.num_heads  # a thread of a CPU takes one at a time

    def place(weights: ModelWeights, banks: list[ExpertBank[object]]) -> int | None:
        resident = _resident(spec, options, sizes, heads, budget, weights, banks)
        if resident is not None and banks and resident < banks[0].count:
            streamed.extend(banks)
            if banks[0].queued:  # from the host's memory, not from files
                refuse_more_than_host_memory(sum((bank.count - resident) * bank.bytes_each for bank in banks))
        return resident

    limited = budget is not None or options.resident_experts is not None
    weights = load_weights(model_dir, spec, ops, dtype, drafts=sizes.drafts > 0, place=place if limited else None)
    stream = ExpertStream(streamed, ops) if streamed else None
    cached = "fp8" if options.kv_cache_dtype == "fp8" else options.dtype
    numerics = Numerics.of(kernels, weights.stored, options.dtype, cached)
    model = Model(
        spec,
        weights,
        ops,
        stream,
        None if stream else decode_plan(spec, weights.layers, ops),
        decode_plan(spec, (weights.draft.layer,), ops) if weights.draft else None,
    )
    return model, numerics, replace(sizes, graphs=sizes.graphs and not stream)


def _dtype(options: EngineOptions) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]


def _sizes(spec: ModelSpec, options: EngineOptions, kernels: str, budget: int | None) -> Sizes:
    page_size = options.page_size or (64 if kernels == "cuda" else 16)
    context, drafts = _checked_context(spec, options), options.num_speculative_tokens
    if options.kv_cache_dtype == "fp8" and (kernels not in ("cuda", "w8a8") or options.dtype != "bfloat16"):
        raise ValueError("kv_cache_dtype is 'fp8', which takes a GPU and dtype bfloat16; set 'auto'")
    cache_dtype = torch.uint8 if options.kv_cache_dtype == "fp8" else _dtype(options)
    cache_tokens, slots, share = options.cache_tokens, 0, _DEFAULT_CACHE_BYTES if budget is None else budget // 5
    if spec.delta:  # with fewer slots than sequences, fewer run at once
        for_states = host_memory() // 4 if budget is None else share // 2
        slots = min(options.max_batch + 1, max(2, int(for_states // state_bytes(spec, 1))))
    if cache_tokens is None:
        each = token_bytes(spec, spec.num_layers + (drafts > 0), cache_dtype)
        left = max(share - state_bytes(spec, slots), 0)
        if budget is None:  # a CPU's, whose untouched pages take no memory: one whole context, if there is any room
            left = max(left, min(context * each, host_memory() // 4))
        cache_tokens = min(options.max_batch * context, max(left // each, min(context, _DEFAULT_LONG_CONTEXT)))
        context = min(context, cache_tokens)
        cache_tokens = int(cache_tokens) + page_size  # one page more, which a prompt's samples may share
    if cache_tokens < page_size:
        raise ValueError(f"cache_tokens is {cache_tokens}; it must be at least one page ({page_size})")
    return Sizes(
        max_batch=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        page_size=page_size,
        cache_tokens=cache_tokens,
        max_context=context,
        drafts=drafts,
        cache_dtype=cache_dtype,
        # Shapes of compressed attention follow from lengths; a delta rule takes its tokens one after another.
        graphs=kernels == "cuda" and spec.compressed is None and spec.delta is None,
        slots=slots,
    )


def _resident(
    spec: ModelSpec,
    options: EngineOptions,
    sizes: Sizes,
    heads: int,
    budget: int | None,
    weights: ModelWeights,
    banks: list[ExpertBank[object]],
) -> int | None:
    """How many experts of each layer stay in memory; None: all. heads: as in `step_bytes`. Errors: ValueError when the
    budget is too small."""
    asked = options.resident_experts
    if spec.moe and asked is not None and not 0 <= asked <= spec.moe.num_experts:
        raise ValueError(f"resident_experts is {asked}; there are {spec.moe.num_experts} in a layer")
    if asked is not None or budget is None:
        return asked
    each = token_bytes(spec, spec.num_layers + (sizes.drafts > 0), sizes.cache_dtype)
    rows = sizes.max_batch * (1 + sizes.drafts)
    cached = sizes.cache_tokens * each + state_bytes(spec, sizes.slots)
    beside = cached + step_bytes(spec, sizes.max_step_tokens, rows, _dtype(options), sizes.max_context, heads)
    return experts_within(budget, bytes_of(weights) + beside, banks)


def _checked_context(spec: ModelSpec, options: EngineOptions) -> int:
    """The longest context. Errors: ValueError for one, or for a number of drafts, that the model does not have."""
    if options.num_speculative_tokens and not spec.num_nextn_predict_layers:
        raise ValueError(
            f"num_speculative_tokens is {options.num_speculative_tokens}; this model has no layer that drafts: set 0"
        )
    context = spec.max_context if options.max_context is None else options.max_context
    if not 1 <= context <= spec.max_context:
        raise ValueError(f"max_context is {context}; this model's limit is {spec.max_context}")
    return context
