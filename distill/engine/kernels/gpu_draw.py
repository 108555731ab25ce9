"""Drawing tokens on the GPU: one program a draw, no sort, and nothing that a host has to wait for.

Top k and top p are thresholds: the least probability p such that fewer than k tokens are above it, and the least such
that the mass above it is below top p of the total. Both are computed exactly by a search over the bits of a float32,
whose order as integers is that of the numbers: each of 16 passes over a row in the cache divides the range by four.
Sorting 129,280 logits takes longer, and a look at the largest few needs a host that decides whether they suffice.

The draw inverts the cumulative distribution in vocabulary order, in float64, as reference.draw does.

Legend: as in reference.py; v vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16
_CUTS = 16  # of a range of 2³⁰ bits into four


@triton.jit
def _probabilities(x_ptr, first, V, top, temperature, BLOCK: tl.constexpr):
    """Probabilities of columns first … first+BLOCK-1, scaled so that the row's largest is 1."""
    v = first + tl.arange(0, BLOCK)
    return tl.exp((tl.load(x_ptr + v, mask=v < V, other=float("-inf")) - top) / temperature)


@triton.jit
def _above(x_ptr, bits, V, top, temperature, BLOCK: tl.constexpr):
    """The number of probabilities above the one with these bits, and their mass (float64)."""
    threshold = bits.to(tl.float32, bitcast=True)
    count, mass = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, V, BLOCK):
        p = _probabilities(x_ptr, first, V, top, temperature, BLOCK)
        count += (p > threshold).to(tl.int32)
        mass += tl.where(p > threshold, p, 0.0).to(tl.float64)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _cuts(low, high):
    """The three bounds that cut a range into four."""
    second = low + (high - low) // 2
    return low + (high - low) // 4, second, second + (high - second) // 2


@triton.jit
def _narrowed(low, high, first, second, third, enough_1, enough_2, enough_3):
    """The quarter of the range with the least number for which `enough` holds; it holds at every cut above it."""
    down = tl.where(enough_1, low, tl.where(enough_2, first + 1, tl.where(enough_3, second + 1, third + 1)))
    up = tl.where(enough_1, first, tl.where(enough_2, second, tl.where(enough_3, third, high)))
    return down, up


@triton.jit
def _sums_above(x_ptr, first, second, third, V, top, temperature, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The mass (float64), or the number, of the probabilities above each of three given as bits."""
    a = first.to(tl.float32, bitcast=True)
    b = second.to(tl.float32, bitcast=True)
    c = third.to(tl.float32, bitcast=True)
    none = tl.zeros((BLOCK,), tl.float64 if MASS else tl.int32)
    sum_a, sum_b, sum_c = none, none, none
    for begin in range(0, V, BLOCK):
        p = _probabilities(x_ptr, begin, V, top, temperature, BLOCK)
        value = p.to(tl.float64) if MASS else none + 1  # once: a conversion takes longer than an addition
        sum_a += tl.where(p > a, value, none)
        sum_b += tl.where(p > b, value, none)
        sum_c += tl.where(p > c, value, none)
    return tl.sum(sum_a, axis=0), tl.sum(sum_b, axis=0), tl.sum(sum_c, axis=0)


@triton.jit
def _draw(
    logits_ptr, row_ptr, uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr, token_ptr, logprob_ptr, V, stride,
    CUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0)
    x_ptr = logits_ptr + tl.load(row_ptr + draw).to(tl.int64) * stride
    temperature = tl.load(temperature_ptr + draw)
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)

    lane = tl.arange(0, BLOCK)
    highest, highest_at = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, V, BLOCK):
        x = tl.load(x_ptr + begin + lane, mask=begin + lane < V, other=float("-inf"))
        highest_at = tl.where(x > highest, begin + lane, highest_at)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, axis=0)
    best = tl.min(tl.where(highest == top, highest_at, V), axis=0)
    raw = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        raw += _probabilities(x_ptr, begin, V, top, 1.0, BLOCK)
    total = tl.sum(raw, axis=0)
    normaliser = top + tl.log(total)
    # NaN, +inf or nothing but -inf: no distribution. Nothing is searched for then, and no place is taken from it.
    undefined = total != total

    one: tl.constexpr = 0x3F800000
    top_k, top_p = tl.load(top_k_ptr + draw).to(tl.int32), tl.load(top_p_ptr + draw)
    low, high = tl.full((), 0, tl.int32), tl.full((), one, tl.int32)
    limited = (top_k > 0) & (top_k < V) & (greedy == 0) & (undefined == 0)
    for _ in range(tl.where(limited, CUTS, 0)):
        first, second, third = _cuts(low, high)
        above_1, above_2, above_3 = _sums_above(x_ptr, first, second, third, V, top, temperature, False, BLOCK)
        low, high = _narrowed(low, high, first, second, third, above_1 < top_k, above_2 < top_k, above_3 < top_k)
    least = tl.where(limited, high, 0)
    count, mass = _above(x_ptr, least, V, top, temperature, BLOCK)
    if limited:
        mass += (top_k - count).to(tl.float64) * least.to(tl.float32, bitcast=True).to(tl.float64)
    nucleus = (top_p < 1.0) & (greedy == 0) & (undefined == 0)
    wanted = top_p * mass
    # Without all tokens up to this one, most of what may be left out would still be there.
    spared = (0.5 * (1.0 - top_p) * mass / V).to(tl.float32)
    low, high = tl.maximum(least, spared.to(tl.int32, bitcast=True)), tl.full((), one, tl.int32)
    while nucleus & (low < high):
        first, second, third = _cuts(low, high)
        above_1, above_2, above_3 = _sums_above(x_ptr, first, second, third, V, top, temperature, True, BLOCK)
        low, high = _narrowed(low, high, first, second, third, above_1 < wanted, above_2 < wanted, above_3 < wanted)
    threshold = tl.where(nucleus, high, least).to(tl.float32, bitcast=True)

    mass = tl.full((), 0.0, tl.float64)
    last = tl.full((), 0, tl.int32)
    for begin in range(0, V, BLOCK):
        p = _probabilities(x_ptr, begin, V, top, temperature, BLOCK)
        kept = (p >= threshold) & (p > 0.0)
        mass += tl.sum(tl.where(kept, p, 0.0).to(tl.float64), axis=0)
        last = tl.maximum(last, tl.max(tl.where(kept, begin + lane, 0), axis=0))
    aim = tl.load(uniform_ptr + draw) * mass
    token, before = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), 0.0, tl.float64)
    for begin in range(0, V, BLOCK):
        p = _probabilities(x_ptr, begin, V, top, temperature, BLOCK)
        kept = (p >= threshold) & (p > 0.0)
        p = tl.where(kept, p, 0.0).to(tl.float64)
        reached = kept & (before + tl.cumsum(p, axis=0) > aim)
        token = tl.minimum(token, tl.min(tl.where(reached, begin + lane, 0x7FFFFFFF), axis=0))
        before += tl.sum(p, axis=0)
    token = tl.where(undefined, 0, tl.where(greedy, best, tl.minimum(token, last)))
    tl.store(token_ptr + draw, token.to(tl.int64))
    tl.store(logprob_ptr + draw, tl.where(undefined, float("nan"), tl.load(x_ptr + token) - normaliser))


def draw(
    logits_rv: Tensor, row_b: Tensor, uniform_b: Tensor, temperature_b: Tensor, top_k_b: Tensor, top_p_b: Tensor
) -> tuple[Tensor, Tensor]:
    """As reference.draw."""
    assert logits_rv.dtype == torch.float32 and logits_rv.stride(1) == 1
    b, device = len(row_b), logits_rv.device
    token_b, logprob_b = torch.empty(b, dtype=torch.int64, device=device), torch.empty(b, device=device)
    if b:
        block = min(_BLOCK, triton.next_power_of_2(logits_rv.shape[1]))
        _draw[b,](
            logits_rv, row_b, uniform_b, temperature_b, top_k_b, top_p_b, token_b, logprob_b,
            logits_rv.shape[1], logits_rv.stride(0), _CUTS, block, num_warps=_WARPS,
        )  # fmt: skip
    return token_b, logprob_b
