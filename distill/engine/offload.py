"""Models larger than memory: which experts stay in memory, and how the others are streamed.

In batch work nearly every expert of every layer is needed in every step, so a cache of the most used ones would be
useless: a fixed part of each layer's experts stays in memory, and the others are streamed layer by layer from the
mapped files. While a layer computes, the next one's experts are read and packed beside it, into the other of two
arenas. When few tokens are computed most experts are idle, and then only the chosen ones are read, and not ahead.

A memory budget is spent in this order: the weights that every token passes through, the cache, the activations
of one step, the two arenas, and experts. Where an expert is kept changes no bit of its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.kernels.ops import ExpertBank
from distill.engine.spec import ModelSpec

GIB = 1 << 30
Bank: TypeAlias = ExpertBank[object]
_UNCOUNTED = 8 << 20  # bytes of a budget, beside 3 %: small objects, buffers, threads


def experts_within(budget: int, fixed: int, banks: Sequence[Bank]) -> int | None:
    """How many experts of each layer fit into a budget of memory, `fixed` bytes of which are taken; None: all.

    ValueError if the budget is too small for any.
    """
    usable = int(0.97 * budget) - _UNCOUNTED
    if fixed > usable:
        raise ValueError(
            f"memory_budget is {budget / GIB:.3g} GiB and {fixed / GIB:.3g} GiB are needed for weights, cache and one "
            "step; raise it or lower max_batch"
        )
    return resident_experts(usable - fixed, banks)


def resident_experts(budget: int, banks: Sequence[Bank]) -> int | None:
    """How many experts of each layer fit into `budget` bytes beside two arenas for the others; None: all of them.

    Layers have the same number of experts, whose size may differ. ValueError if not even the arenas fit.
    """
    if not banks:
        return None
    count, one_of_each, arenas = banks[0].count, sum(bank.bytes_each for bank in banks), 2 * _largest(banks)
    if count * one_of_each <= budget:
        return None
    # resident · one_of_each + (count - resident) · arenas bytes are in memory. With two layers nothing is gained.
    room = budget - count * arenas
    if room < 0 or one_of_each <= arenas:
        needed = count * min(one_of_each, arenas)
        raise ValueError(
            f"{budget / GIB:.3g} GiB are left for experts and those of two layers need {needed / GIB:.3g} GiB; "
            "raise memory_budget or lower max_batch"
        )
    return min(count, room // (one_of_each - arenas))


def _largest(banks: Sequence[Bank]) -> int:
    return max(bank.bytes_each for bank in banks)


def step_bytes(
    spec: ModelSpec, prompt_tokens: int, rows: int, dtype: torch.dtype, context: int = 0, heads: int = 0
) -> int:
    """Roughly the memory of a step beside the weights: activations, the form that products read, and logits; with
    compressed attention, places of what each token of a context of this length attends to; with latent attention, the
    context's keys and values, which `prefill_mla` writes out for this many heads at a time."""
    parts = 1 if dtype == torch.bfloat16 else 3  # bfloat16 numbers that a product reads for one
    numbers = 2 * spec.num_heads * spec.head_dim + 6 * spec.hidden_size
    read = max(spec.intermediate_size, spec.hidden_size)
    if spec.moe:
        read = max(read, (spec.moe.per_token + spec.moe.shared_experts) * spec.moe.intermediate_size)
    places = 32 * spec.compressed.most_rows(context) if spec.compressed else 0  # numbers of 8 bytes, four times
    written = 0
    if spec.mla:
        whole = min(context, spec.indexer.top_k) if spec.indexer else context  # a longer one is read as latents
        # Keys are put together from the part that is not rotated, whose memory values take next.
        written = heads * whole * (spec.head_dim + max(spec.mla.nope_dim, spec.mla.v_dim)) * dtype.itemsize
    return (prompt_tokens + rows) * (4 * numbers + 2 * parts * read + places) + 8 * rows * spec.vocab_size + written


def bytes_of(part: object) -> int:
    """The memory that weights take: tensors and packed matrices in dataclasses. Banks of experts are not counted."""
    if isinstance(part, tuple):
        return sum(map(bytes_of, part))
    if is_dataclass(part):
        return sum(bytes_of(getattr(part, field.name)) for field in fields(part))
    return 0 if hasattr(part, "bytes_each") else int(getattr(part, "nbytes", 0))


class ExpertStream:
    """Streams the experts that are not resident, for banks that are used one after the other, again and again."""

    def __init__(self, banks: Sequence[Bank], ops: Ops) -> None:
        self._next = {id(bank): after for bank, after in zip(banks, [*banks[1:], banks[0]], strict=True)}
        size = (banks[0].count - banks[0].resident) * _largest(banks)
        self._arenas = [ops.arena(size), ops.arena(size)]
        self._worker = ThreadPoolExecutor(1, "experts")
        self._coming: tuple[Bank, Future[None]] | None = None

    def bring(self, bank: Bank, experts_tk: Tensor) -> None:
        """Bring the experts of `bank` that the tokens chose into memory, where they stay until the next call."""
        coming, self._coming = self._coming, None
        if coming:
            coming[1].result()
        arena = self._arenas[0]
        whole = 2 * experts_tk.numel() >= bank.count
        if not coming or coming[0] is not bank:
            bank.fill(arena, None if whole else sorted(set(experts_tk.flatten().tolist())))
        bank.install(arena)
        self._arenas.reverse()
        if whole:
            after = self._next[id(bank)]
            self._coming = after, self._begin(after)

    def _begin(self, bank: Bank) -> Future[None]:
        """Fill the next arena while other ops compute: on a thread, or on a device's stream, which needs none."""
        if not bank.queued:
            return self._worker.submit(bank.fill, self._arenas[0], None, True)
        bank.fill(self._arenas[0], None, True)
        queued: Future[None] = Future()
        queued.set_result(None)
        return queued
