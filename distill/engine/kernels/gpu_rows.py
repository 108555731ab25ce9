"""Ops on single rows of activations on the GPU: RMSNorm, silu(gate) · up, RoPE, and quantisation to FP8.

Quantisation alone reads and writes every activation once more, and in a decode step it is one more launch. So norm and
activation quantise their results while they hold them. They round to the compute dtype first, as they would without
quantisation, so that they give the same codes as the plain form does. Divisions are rounded correctly: an approximate
division moves codes at ties.

Scales are [g, t] in memory, so that a product reads the scales of its rows from consecutive addresses. There is room
for a multiple of four rows, as torch's product requires; the rest is undefined.

Legend: as in w8a8.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.engine.kernels.stored import FP8_BLOCK
from distill.engine.kernels.w8a8 import Quantised

ROWS = 4  # quantised activations have room for a multiple of this many rows
_GROUPS = 8  # groups of a row that a program takes, where it does not need the whole row


@triton.jit
def power_of_two_above(x):
    """The least power of two that is not below a positive, normal float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def quantise_groups(x, UE8M0: tl.constexpr, GROUPS: tl.constexpr):
    """float32 [GROUPS · 128] → e4m3 codes, likewise, and scales [GROUPS]."""
    groups = tl.reshape(x, (GROUPS, 128))
    amax = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-4)
    scale = tl.div_rn(amax, tl.full((GROUPS,), 448.0, tl.float32))
    if UE8M0:
        scale = power_of_two_above(scale)
    codes = tl.div_rn(groups, tl.broadcast_to(scale[:, None], (GROUPS, 128))).to(tl.float8e4nv)
    return tl.reshape(codes, (GROUPS * 128,)), scale


@triton.jit
def _store_quantised(x, codes_ptr, scale_ptr, row, apart, first, width, UE8M0: tl.constexpr, GROUPS: tl.constexpr):
    """x: float32 [GROUPS · 128], of a row's groups `first` and on; columns past `width` are left out. apart: numbers
    between the scales of two groups."""
    codes, scale = quantise_groups(x, UE8M0, GROUPS)
    column, group = first * 128 + tl.arange(0, GROUPS * 128), first + tl.arange(0, GROUPS)
    tl.store(codes_ptr + row * width + column, codes, mask=column < width)
    tl.store(scale_ptr + group * apart + row, scale, mask=group * 128 < width)


@triton.jit
def _quantise(x_ptr, codes_ptr, scale_ptr, x_stride, apart, C, width, UE8M0: tl.constexpr, GROUPS: tl.constexpr):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    column = first * 128 + tl.arange(0, GROUPS * 128)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < C, other=0.0).to(tl.float32)
    _store_quantised(x, codes_ptr, scale_ptr, row, apart, first, width, UE8M0, GROUPS)


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, codes_ptr, scale_ptr, x_stride, apart, C, width, eps,
    QUANTISE: tl.constexpr, UE8M0: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS * 128)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    y = (x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * C + column, y, mask=column < C)
    if QUANTISE:
        _store_quantised(y.to(tl.float32), codes_ptr, scale_ptr, row, apart, 0, width, UE8M0, GROUPS)


@triton.jit
def _swiglu(
    gate_ptr, up_ptr, used_ptr, out_ptr, codes_ptr, scale_ptr, stride, apart, F, width,
    SOME: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    if SOME:  # noqa: SIM102
        if tl.load(used_ptr + row) < 0:
            return
    column = first * 128 + tl.arange(0, GROUPS * 128)
    gate = tl.load(gate_ptr + row * stride + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=column < F, other=0.0).to(tl.float32)
    y = (gate / (1.0 + tl.exp(-gate)) * up).to(gate_ptr.dtype.element_ty)
    if QUANTISE:
        _store_quantised(y.to(tl.float32), codes_ptr, scale_ptr, row, apart, first, width, UE8M0, GROUPS)
    else:
        tl.store(out_ptr + row * F + column, y, mask=column < F)


@triton.jit
def _rope(
    x_ptr,
    cos_ptr,
    sin_ptr,
    t_stride,
    h_stride,
    H,
    R,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    ALL_R: tl.constexpr,
):
    token, h, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, ALL_R)
    cos = tl.load(cos_ptr + token * R + r, mask=r < R, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * R + r, mask=r < R, other=0.0)[None, :]
    first, second = (2 * r, 2 * r + 1) if INTERLEAVED else (r, r + R)
    at, inside = x_ptr + token * t_stride + h[:, None] * h_stride, (h < H)[:, None] & (r < R)[None, :]
    a = tl.load(at + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + second[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(at + first[None, :], (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(at + second[None, :], (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask=inside)


def _empty(rows: int, columns: int, device: torch.device) -> Quantised:
    groups, room = -(-columns // FP8_BLOCK), -(-rows // ROWS) * ROWS
    codes = torch.empty(room, groups * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    return Quantised(codes[:rows], torch.empty(groups, room, device=device).T[:rows])


def quantise(x_tc: Tensor, ue8m0: bool = False) -> Quantised:
    """[t, c], its last dimension contiguous; see w8a8.quantise."""
    assert x_tc.stride(1) == 1
    t, c = x_tc.shape
    out = _empty(t, c, x_tc.device)
    width = out.codes.shape[1]
    if t:
        _quantise[t, triton.cdiv(width, _GROUPS * FP8_BLOCK)](
            x_tc, out.codes, out.scale, x_tc.stride(0), out.scale.stride(1), c, width, ue8m0, _GROUPS
        )
    return out


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, ue8m0: bool | None = None) -> tuple[Tensor, Quantised | None]:
    """As reference.rms_norm, and the result quantised as well unless `ue8m0` is None. A row must fit into a program."""
    assert x_tc.stride(1) == 1
    (t, c), device = x_tc.shape, x_tc.device
    out_tc, quantised = torch.empty(t, c, dtype=x_tc.dtype, device=device), None
    if ue8m0 is not None:
        quantised = _empty(t, c, device)
    if t:
        groups = triton.next_power_of_2(triton.cdiv(c, FP8_BLOCK))
        codes, scale = (quantised.codes, quantised.scale) if quantised else (out_tc, out_tc)
        apart = scale.stride(1)
        width = -(-c // FP8_BLOCK) * FP8_BLOCK
        _rms_norm[t,](
            x_tc, weight_c, out_tc, codes, scale, x_tc.stride(0), apart, c, width, eps,
            quantised is not None, bool(ue8m0), groups, num_warps=4 if groups <= 16 else 8,
        )  # fmt: skip
    return out_tc, quantised


def swiglu(
    gate_tf: Tensor, up_tf: Tensor, ue8m0: bool | None = None, used_t: Tensor | None = None
) -> Tensor | Quantised:
    """silu(gate) · up [t, f], quantised unless `ue8m0` is None. Both have the same strides. used (int32): rows where it
    is negative are left as they are."""
    assert gate_tf.stride() == up_tf.stride() and gate_tf.stride(1) == 1
    (t, f), device = gate_tf.shape, gate_tf.device
    quantised = None if ue8m0 is None else _empty(t, f, device)
    out_tf = torch.empty(t if quantised is None else 0, f, dtype=gate_tf.dtype, device=device)
    width = -(-f // FP8_BLOCK) * FP8_BLOCK
    if t:
        codes, scale = (quantised.codes, quantised.scale) if quantised else (out_tf, out_tf)
        _swiglu[t, triton.cdiv(width, _GROUPS * FP8_BLOCK)](
            gate_tf, up_tf, gate_tf if used_t is None else used_t, out_tf, codes, scale, gate_tf.stride(0),
            scale.stride(1), f, width, used_t is not None, quantised is not None, bool(ue8m0), _GROUPS,
        )  # fmt: skip
    return quantised or out_tf


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    """As reference.rope."""
    (t, h, d), heads = x_thd.shape, 16
    assert x_thd.stride(2) == 1 and cos_tr.is_contiguous() and sin_tr.is_contiguous() and cos_tr.shape == (t, d // 2)
    if t:
        _rope[t, triton.cdiv(h, heads)](
            x_thd, cos_tr, sin_tr, x_thd.stride(0), x_thd.stride(1), h, d // 2, interleaved,
            heads, triton.next_power_of_2(d // 2),
        )  # fmt: skip
