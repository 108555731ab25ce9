"""Products of FP8 matrices with FP8 activations on the GPU: one matrix, or the experts of a layer.

Both sides are e4m3 and a scale belongs to 128 channels, so a step along the sum is 128 wide: the tensor cores add up
128 products, and the sum is scaled and added in float32. (Hopper's FP8 accumulators keep about 14 bits, which is why
the checkpoints were trained this way: DeepSeek-V3, arXiv:2412.19437, section 3.5.2.) A tile is never wider than a block
of the weights, which makes the scale of its weights one number.

`linear`: tiles come through tensor descriptors, which the hardware's copy engine reads, bounds and edges included. With
few rows there are fewer tiles than multiprocessors: the sum is cut into parts, which a second kernel adds in order, so
that the result is the same every time.

`grouped`: rows are sorted by expert, each expert's padded to whole tiles (gpu_moe.py), and every tile knows its expert.
Experts may be in several places, resident and streamed; each place takes a launch, in which tiles of others end at
once. The number of tiles is an upper bound that depends on shapes only, so that a CUDA graph can hold it.

Legend: m rows, n columns of a result, g groups of 128 along the sum, s slots for (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distill.engine.kernels.gpu_rows import ROWS
from distill.engine.kernels.gpu_tiles import Tile, linear_tile
from distill.engine.kernels.stored import FP8_BLOCK
from distill.engine.kernels.w8a8 import Activations, Fp8Matrix, Quantised

_TILES_DOWN = 8  # tiles are numbered down columns of so many, so that neighbours share what they read
_JOIN_COLUMNS = 1024


@triton.jit(do_not_specialize=["M", "PARTS", "a_scale_stride"])
def _linear(
    a, a_scale_ptr, w, w_scale_ptr, bias_ptr, onto_ptr, out_ptr, M, N, GROUPS, a_scale_stride, out_stride, PARTS,
    BIAS: tl.constexpr, ONTO: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_DOWN: tl.constexpr,
):  # fmt: skip
    tile, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tile // (TILES_DOWN * tiles_n) * TILES_DOWN
    height = tl.minimum(tiles_m - band, TILES_DOWN)
    within = tile % (TILES_DOWN * tiles_n)
    first_m, first_n = (band + within % height) * BLOCK_M, within // height * BLOCK_N
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)

    part = tl.program_id(1)
    each = tl.cdiv(GROUPS, PARTS)
    begin = part * each
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_scale_ptr += m
    w_scale_ptr += first_n // 128 * GROUPS
    at = tl.minimum(begin, GROUPS - 1)
    a_scale, w_scale = tl.load(a_scale_ptr + at * a_scale_stride, mask=m < M, other=0.0), tl.load(w_scale_ptr + at)
    for g in range(begin, tl.minimum(begin + each, GROUPS)):
        at = tl.minimum(g + 1, GROUPS - 1)  # scales are asked for a step ahead: products wait for nothing else
        next_a = tl.load(a_scale_ptr + at * a_scale_stride, mask=m < M, other=0.0)
        next_w = tl.load(w_scale_ptr + at)
        products = tl.dot(a.load([first_m, g * 128]), w.load([first_n, g * 128]).T)
        total += products * (a_scale * w_scale)[:, None]
        a_scale, w_scale = next_a, next_w

    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None].to(tl.int64) * out_stride + n[None, :]
    if SPLIT:
        tl.store(out_ptr + part.to(tl.int64) * M * out_stride + at, total, mask=inside)
    else:
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ONTO:
            total += tl.load(onto_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "PARTS"])
def _add_parts(
    parts_ptr, bias_ptr, onto_ptr, out_ptr, M, N, out_stride, PARTS,
    BIAS: tl.constexpr, ONTO: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + (part * M + row) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ONTO:
        total += tl.load(onto_ptr + row * out_stride + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + n, total.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def rows_of(row_ptr, slot, PER_ROW: tl.constexpr, GATHER: tl.constexpr):
    """The row of x that each slot multiplies, and whether it has one: by its pair, or a row of its own."""
    if GATHER:
        pair = tl.load(row_ptr + slot)
        row, real = pair // PER_ROW, pair >= 0
    else:
        row, real = slot, slot >= 0
    return row, real


@triton.jit(do_not_specialize=["BLOCKS", "FIRST", "EXPERTS", "a_scale_stride"])
def _grouped(
    a_ptr, a_scale_ptr, row_ptr, w, w_scale_ptr, expert_ptr, out_ptr,
    N, GROUPS, BLOCKS, FIRST, EXPERTS, a_scale_stride, w_scale_stride,
    PER_ROW: tl.constexpr, GATHER: tl.constexpr, FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """a, w: FP8 with scales, or bfloat16 (float32) without. w: [experts, n, k], of experts FIRST and on."""
    block, first_n = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS * BLOCK_N
    expert = tl.load(expert_ptr + block) - FIRST
    if (expert < 0) | (expert >= EXPERTS):
        return
    slot, n, k = block * BLOCK_M + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, 128)
    row, real = rows_of(row_ptr, slot, PER_ROW, GATHER)
    a_ptrs = a_ptr + row[:, None].to(tl.int64) * (GROUPS * 128) + k[None, :]
    a_scale_ptrs = a_scale_ptr + row
    w_scale_ptr += expert.to(tl.int64) * w_scale_stride + first_n // 128 * GROUPS

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FP8:
        a_scale, w_scale = tl.load(a_scale_ptrs, mask=real, other=0.0), tl.load(w_scale_ptr)
    for g in range(GROUPS):
        a = tl.load(a_ptrs + g * 128, mask=real[:, None], other=0.0)
        w_tile = w.load([expert, first_n, g * 128]).reshape(BLOCK_N, 128)
        if FP8:
            at = tl.minimum(g + 1, GROUPS - 1)
            next_a = tl.load(a_scale_ptrs + at * a_scale_stride, mask=real, other=0.0)
            next_w = tl.load(w_scale_ptr + at)
            total += tl.dot(a, w_tile.T) * (a_scale * w_scale)[:, None]
            a_scale, w_scale = next_a, next_w
        else:
            total = tl.dot(a, w_tile.T, total, input_precision="ieee")
    at = slot[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(n < N)[None, :] & real[:, None])


def linear(
    x: Quantised, weight: Fp8Matrix, bias_n: Tensor | None = None, onto_mn: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x · weightᵀ + bias → bfloat16 [m, n]; added to `onto`, in place, if that is given. tile: other than the
    table's."""
    (m, n), groups, device = (len(x.codes), len(weight.codes)), weight.scale.shape[1], x.codes.device
    assert x.codes.shape[1] == weight.codes.shape[1] == groups * FP8_BLOCK and x.scale.stride(0) == 1
    out_mn = torch.empty(m, n, dtype=torch.bfloat16, device=device) if onto_mn is None else onto_mn
    assert out_mn.stride(1) == 1
    if not m:
        return out_mn
    if tile is None:
        tile = linear_tile(m, n, groups)
        if not x.codes.is_cuda:  # the interpreter
            tile = replace(tile, by="triton")
    if tile.by == "torch":
        return _by_torch(x, weight, bias_n, onto_mn)
    grid = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns), tile.parts
    into = out_mn if tile.parts == 1 else torch.empty(tile.parts, m, n, device=device)
    bias, onto = bias_n if bias_n is not None else out_mn, out_mn
    flags = bias_n is not None, onto_mn is not None
    _linear[grid](
        TensorDescriptor.from_tensor(x.codes, [tile.rows, FP8_BLOCK]), x.scale,
        TensorDescriptor.from_tensor(weight.codes, [tile.columns, FP8_BLOCK]), weight.scale,
        bias, onto, into, m, n, groups, x.scale.stride(1), into.stride(-2), tile.parts, *flags, tile.parts > 1,
        tile.rows, tile.columns, _TILES_DOWN, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if tile.parts > 1:
        join = m, triton.cdiv(n, _JOIN_COLUMNS)
        _add_parts[join](into, bias, onto, out_mn, m, n, out_mn.stride(0), tile.parts, *flags, _JOIN_COLUMNS)
    return out_mn


def _by_torch(x: Quantised, weight: Fp8Matrix, bias_n: Tensor | None, onto_mn: Tensor | None) -> Tensor:
    whole, plain = (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128), F.SwizzleType.NO_SWIZZLE
    m, codes, scale = len(x.codes), x.codes, x.scale
    if m % ROWS:  # the padding behind the rows is multiplied, too, and dropped
        rows = -(-m // ROWS) * ROWS
        codes, scale = (part.as_strided((rows, part.shape[1]), part.stride()) for part in (codes, scale))
    out_mn = F.scaled_mm(
        codes, weight.codes.T, scale, whole[0], weight.scale.T, whole[1], plain, plain, output_dtype=torch.bfloat16
    )[:m]
    if bias_n is not None:
        out_mn += bias_n
    return out_mn if onto_mn is None else onto_mn.add_(out_mn)


@dataclass(frozen=True)
class Matrices:
    """One matrix [n, g·128] of each of the experts `first` and on, of the same distance in memory. scale: float32
    [experts, ⌈n/128⌉ · g] for FP8 ones."""

    values: Tensor
    scale: Tensor
    first: int


def grouped(
    x: Activations, row_s: Tensor | None, per_row: int, places: Sequence[Matrices], expert_b: Tensor, tile: Tile
) -> Tensor:
    """Slot s times the matrix of the expert of its block of tile.rows slots → [s, n], bfloat16 if x is FP8.

    x: quantised if the matrices are FP8, of their dtype if they are not. row_s: the pair in a slot, whose row of x is
    pair // per_row, or -1; None: a slot is its own row. places: of the experts. expert_b: int32, -1 for unused
    blocks. Their slots, and the slots of pairs -1, are undefined.
    """
    fp8, blocks = isinstance(x, Quantised), len(expert_b)
    values, scale = (x.codes, x.scale) if isinstance(x, Quantised) else (x, x)
    assert values.is_contiguous() and values.shape[1] % FP8_BLOCK == 0 and (not fp8 or scale.stride(0) == 1)
    assert row_s is not None or len(values) == blocks * tile.rows
    n, dtype = places[0].values.shape[1], torch.bfloat16 if fp8 else values.dtype
    out_sn = torch.empty(blocks * tile.rows, n, dtype=dtype, device=values.device)
    for some in places:
        w = TensorDescriptor.from_tensor(some.values, [1, tile.columns, FP8_BLOCK])
        _grouped[blocks * triton.cdiv(n, tile.columns),](
            values, scale, expert_b if row_s is None else row_s, w, some.scale, expert_b, out_sn,
            n, values.shape[1] // FP8_BLOCK, blocks, some.first, len(some.values),
            scale.stride(1), some.scale.stride(0), per_row, row_s is not None, fp8,
            tile.rows, tile.columns, num_warps=tile.warps, num_stages=tile.stages if fp8 else 2,
        )  # fmt: skip
    return out_sn
