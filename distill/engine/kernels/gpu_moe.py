"""The mixture of experts on the GPU, beside its products: the router, the order of tokens by expert, the sum back.

A (token, expert) pair gets a slot. Slots are in the order of experts, within one in the order of tokens, and every
expert begins at a new block of slots, the tile of the products. How many blocks there are depends on the routing, so
their number is taken as large as it can be (whole blocks for all pairs, and one more for each expert), and those
without work are marked. Thus shapes depend on shapes only: no host waits for a count, and a CUDA graph can hold a
layer.

Sums are in a fixed order: counts are integers, and a token adds up its own experts, in the order they were chosen. No
atomic additions anywhere.

Legend: t tokens, k experts of a token, x experts, s slots, b blocks of slots, c hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 1024  # looked at in one go
_COLUMNS = 1024


@dataclass(frozen=True)
class Slots:
    """pair_s: the pair (token · k + number) in a slot, or -1. slot_p: the slot of a pair. expert_b: the expert of a
    block, or -1."""

    pair_s: Tensor
    slot_p: Tensor
    expert_b: Tensor


@triton.jit
def _count(experts_ptr, count_ptr, PAIRS, BLOCK: tl.constexpr):
    expert, matches = tl.program_id(0), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, PAIRS, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        matches += (tl.load(experts_ptr + pair, mask=pair < PAIRS, other=-1) == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(matches, axis=0))


@triton.jit
def _place(
    experts_ptr, count_ptr, pair_ptr, slot_ptr, expert_ptr, PAIRS, EXPERTS, BLOCKS, ROWS: tl.constexpr,
    ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an expert, and a last one for the blocks that no expert needs."""
    expert, every = tl.program_id(0), tl.arange(0, ALL)
    blocks = tl.cdiv(tl.load(count_ptr + every, mask=every < EXPERTS, other=0), ROWS)
    begin = tl.sum(tl.where(every < expert, blocks, 0), axis=0)
    own = tl.sum(tl.where(every == expert, blocks, 0), axis=0)
    if expert == EXPERTS:
        own = BLOCKS - begin
    for first in range(0, own, BLOCK):
        block = first + tl.arange(0, BLOCK)
        number = tl.where(expert < EXPERTS, expert, -1)
        tl.store(expert_ptr + begin + block, tl.zeros((BLOCK,), tl.int32) + number, mask=block < own)
    slot = begin * ROWS
    for first in range(0, PAIRS, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        mine = tl.load(experts_ptr + pair, mask=pair < PAIRS, other=-1) == expert
        at = slot + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(slot_ptr + pair, at, mask=mine)
        tl.store(pair_ptr + at, pair, mask=mine)
        slot += tl.sum(mine.to(tl.int32), axis=0)
    end = (begin + own) * ROWS
    for first in range(slot, end, BLOCK):
        empty = first + tl.arange(0, BLOCK)
        tl.store(pair_ptr + empty, tl.full((BLOCK,), -1, tl.int32), mask=empty < end)


@triton.jit
def _combine(
    y_ptr, slot_ptr, weight_ptr, onto_ptr, C, onto_stride, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + token * K + k).to(tl.int64)
        weight = tl.load(weight_ptr + token * K + k)
        total += weight * tl.load(y_ptr + slot * C + c, mask=c < C, other=0.0).to(tl.float32)
    at = onto_ptr + token * onto_stride + c
    total += tl.load(at, mask=c < C, other=0.0).to(tl.float32)
    tl.store(at, total.to(onto_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _route(
    logits_ptr, bias_ptr, experts_ptr, weights_ptr, EXPERTS, PER_GROUP, scale, logits_stride,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, BEST_TWO: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    ALL_GROUPS: tl.constexpr, ALL_OF_GROUP: tl.constexpr, ALL_K: tl.constexpr,
):  # fmt: skip
    """Scores are laid out as [group, place], both rounded up to powers of two; padding is -inf."""
    token = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, ALL_GROUPS), tl.arange(0, ALL_OF_GROUP)
    number = group[:, None] * PER_GROUP + place[None, :]
    real = (group < GROUPS)[:, None] & (place < PER_GROUP)[None, :]
    logits = tl.load(logits_ptr + token * logits_stride + number, mask=real, other=float("-inf"))
    if SOFTMAX:
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + number, mask=real, other=0.0)
    undefined = (
        tl.max(tl.max(((choice != choice) & real).to(tl.int32), axis=1), axis=0) > 0
    )  # NaN: there is no best one
    choice = tl.where(real & (choice == choice), choice, float("-inf"))
    if GROUPS > 1:
        worth = tl.max(choice, axis=1)
        if BEST_TWO:
            best = tl.argmax(choice, axis=1)
            worth += tl.max(tl.where(place[None, :] == best[:, None], float("-inf"), choice), axis=1)
        worth = tl.where(group < GROUPS, worth, float("-inf"))
        kept = tl.zeros((ALL_GROUPS,), tl.int1)
        for _ in tl.static_range(KEPT):
            taken = group == tl.argmax(worth, axis=0)
            kept = kept | taken
            worth = tl.where(taken, float("-inf"), worth)
        choice = tl.where(kept[:, None], choice, float("-inf"))

    scores, choice = tl.reshape(scores, (ALL_GROUPS * ALL_OF_GROUP,)), tl.reshape(choice, (ALL_GROUPS * ALL_OF_GROUP,))
    number = tl.reshape(number, (ALL_GROUPS * ALL_OF_GROUP,))
    column, k = tl.arange(0, ALL_GROUPS * ALL_OF_GROUP), tl.arange(0, ALL_K)
    experts, weights = tl.zeros((ALL_K,), tl.int32), tl.zeros((ALL_K,), tl.float32)
    for i in tl.static_range(K):
        taken = column == tl.argmax(choice, axis=0)
        experts = tl.where(k == i, tl.sum(tl.where(taken, number, 0), axis=0), experts)
        weights = tl.where(k == i, tl.sum(tl.where(taken, scores, 0.0), axis=0), weights)
        choice = tl.where(taken, float("-inf"), choice)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    experts = tl.where(undefined, k, experts)
    weights = tl.where(undefined, float("nan"), weights * scale)
    tl.store(experts_ptr + token * K + k, experts, mask=k < K)
    tl.store(weights_ptr + token * K + k, weights, mask=k < K)


def slots(experts_tk: Tensor, experts: int, rows: int) -> Slots:
    """The slots of the pairs of int32 experts_tk, in blocks of `rows` slots."""
    pairs, device = experts_tk.numel(), experts_tk.device
    blocks = triton.cdiv(pairs, rows) + min(experts, pairs)
    count_x, slot_p, expert_b, pair_s = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (experts, pairs, blocks, blocks * rows)
    )
    _count[experts,](experts_tk, count_x, pairs, _PAIRS)
    _place[experts + 1,](
        experts_tk, count_x, pair_s, slot_p, expert_b, pairs, experts, blocks, rows,
        triton.next_power_of_2(experts + 1), _PAIRS,
    )  # fmt: skip
    return Slots(pair_s, slot_p, expert_b)


def combine(y_sc: Tensor, slot_p: Tensor, weights_tk: Tensor, onto_tc: Tensor) -> Tensor:
    """Σ over a token's experts of weight · y, added to `onto` [t, c], in place."""
    (t, k), c = weights_tk.shape, y_sc.shape[1]
    assert y_sc.is_contiguous() and weights_tk.is_contiguous() and onto_tc.stride(1) == 1
    _combine[t, triton.cdiv(c, _COLUMNS)](y_sc, slot_p, weights_tk, onto_tc, c, onto_tc.stride(0), k, _COLUMNS)
    return onto_tc


def route(
    logits_tx: Tensor, bias_x: Tensor | None, scoring: str, group_by: str, groups: int, groups_kept: int,
    per_token: int, normalise: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reference.route, experts as int32."""
    t, x = logits_tx.shape
    assert logits_tx.dtype == torch.float32 and logits_tx.stride(1) == 1
    experts_tk = torch.empty(t, per_token, dtype=torch.int32, device=logits_tx.device)
    weights_tk = torch.empty(t, per_token, device=logits_tx.device)
    _route[t,](
        logits_tx, logits_tx if bias_x is None else bias_x, experts_tk, weights_tk, x, x // groups, scale,
        logits_tx.stride(0), bias_x is not None, scoring == "softmax", group_by == "best two", normalise,
        groups, groups_kept, per_token, triton.next_power_of_2(groups), triton.next_power_of_2(x // groups),
        triton.next_power_of_2(per_token), num_warps=1,
    )  # fmt: skip
    return experts_tk, weights_tk
