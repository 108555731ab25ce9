"""The kernels of cpu.cpp as ops: weights packed once, activations float32 between ops.

A product reads activations rounded to bfloat16 (compute dtype bfloat16), or split into three bfloat16 whose sum is the
float32 itself (compute dtype float32: exact to float32, at a third of the speed). Weights keep their published form:
FP8 codes with their scales, bfloat16, or float32. Sums run in a fixed order, so that no result depends on what else is
in the batch, on chunks, or on the number of threads.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import addressof, byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import (
    DecodeArgs,
    ExpertsArgs,
    IndexArgs,
    LinearArgs,
    NormArgs,
    PackedMatrix,
    PrefillArgs,
    RopeArgs,
    RouteArgs,
    WriteArgs,
    library,
    threads,
)
from distill.engine.kernels.cpu_library import instruction_set as instruction_set
from distill.engine.kernels.cpu_library import session as session
from distill.engine.kernels.cpu_library import why_missing as why_missing
from distill.engine.kernels.reference import FP8_BLOCK, Fp8, Stored

PANEL = 64  # outputs side by side in a packed matrix
_ALIGNMENT = 64
_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 2-dimensional strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Memory:
    """Bytes for packed matrices, given out one after the other."""

    def __init__(self, size: int) -> None:
        self._data = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        self._end = self._data.data_ptr() + self._data.numel()
        self._next = self._data.data_ptr()

    def take(self, size: int) -> int:
        """The address of `size` bytes, aligned."""
        begin = self._next + -self._next % _ALIGNMENT
        self._next = begin + size
        assert self._next <= self._end
        return begin


class Packed:
    """A matrix [n, c], or `groups` of them, in panels. `parts`: bfloat16 parts that activations are split into.

    memory: where to put it; its own unless given.
    """

    def __init__(self, weights: list[Stored], dtype: torch.dtype, memory: Memory | None = None) -> None:
        self.parts = 1 if dtype == torch.bfloat16 else 3
        first = weights[0]
        codes = [w.codes if isinstance(w, Fp8) else w.to(_kept(w.dtype, dtype)) for w in weights]
        self.n, self.k = codes[0].shape
        kind = _KINDS[codes[0].dtype]
        size = library().distill_packed_bytes(kind, self.n, self.k)
        self._memory = memory or Memory(len(weights) * size)
        begin = self._memory.take(len(weights) * size)
        for index, matrix in enumerate(codes):
            matrix = _rows(matrix)
            library().distill_pack(
                kind,
                self.n,
                self.k,
                c_void_p(matrix.data_ptr()),
                c_int64(matrix.stride(0)),
                c_void_p(begin + index * size),
                threads(),
            )
            library().distill_page_out(c_void_p(matrix.data_ptr()), c_int64(matrix.nbytes))
        self._scale: Tensor | None = None
        if isinstance(first, Fp8):  # one scale per panel and 128 columns
            rows = torch.arange(0, self.n, PANEL) // FP8_BLOCK
            self._scale = torch.stack([w.scale.float()[rows] for w in weights if isinstance(w, Fp8)]).contiguous()
        scale = None if self._scale is None else self._scale.data_ptr()
        self.struct = PackedMatrix(kind, self.n, self.k, len(weights), begin, scale)
        self.address = addressof(self.struct)


def _kept(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """In which of the kernels' forms a dense matrix is kept: never less exact than the compute dtype asks."""
    return torch.bfloat16 if compute == torch.bfloat16 or stored == torch.bfloat16 else torch.float32


def _packed_bytes(weight: Stored, dtype: torch.dtype) -> int:
    matrix = weight.codes if isinstance(weight, Fp8) else weight
    kept = matrix.dtype if isinstance(weight, Fp8) else _kept(matrix.dtype, dtype)
    n, k = matrix.shape
    return int(library().distill_packed_bytes(_KINDS[kept], n, k)) + _ALIGNMENT


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def has_nan_codes(codes: Tensor) -> bool:
    assert codes.is_contiguous()
    return bool(library().distill_has_nan(c_void_p(codes.data_ptr()), c_int64(codes.numel()), threads()))


def pack(weight: Stored, dtype: torch.dtype) -> Packed:
    return Packed([weight], dtype)


def pack_heads(weight_hnc: Tensor, dtype: torch.dtype) -> Packed:
    return Packed([head.contiguous() for head in weight_hnc.to(dtype)], dtype)


class Experts:
    """The three matrices of every expert of a layer."""

    def __init__(self, experts: Iterable[tuple[Stored, Stored, Stored]], count: int, dtype: torch.dtype) -> None:
        self.matrices: list[tuple[Packed, ...]] = []
        memory = None
        for expert in experts:
            if memory is None:
                memory = Memory(count * sum(_packed_bytes(matrix, dtype) for matrix in expert))
            self.matrices.append(tuple(Packed([matrix], dtype, memory) for matrix in expert))
        assert len(self.matrices) == count
        self.parts = self.matrices[0][0].parts
        self.arrays = [
            (PackedMatrix * len(self.matrices))(*(matrices[part].struct for matrices in self.matrices))
            for part in range(3)
        ]
        self.addresses = [addressof(array) for array in self.arrays]


def pack_experts(experts: Iterable[tuple[Stored, Stored, Stored]], count: int, dtype: torch.dtype) -> Experts:
    return Experts(experts, count, dtype)


def route(
    logits_tx: Tensor,
    bias_x: Tensor | None,
    scoring: str,
    group_by: str,
    groups: int,
    groups_kept: int,
    per_token: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits_tx = logits_tx.contiguous()
    t, x = logits_tx.shape
    experts_tk, weights_tk = torch.empty(t, per_token, dtype=torch.int64), torch.empty(t, per_token)
    library().distill_route(
        byref(
            RouteArgs(
                logits_tx.data_ptr(),
                None if bias_x is None else bias_x.data_ptr(),
                experts_tk.data_ptr(),
                weights_tk.data_ptr(),
                t,
                x,
                groups,
                groups_kept,
                per_token,
                scoring == "softmax",
                group_by == "best",
                normalise,
                scale,
                threads(),
            )
        )
    )
    return experts_tk, weights_tk


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> Tensor:
    x_thd = _rows(x_thd)
    t, h, d = x_thd.shape
    out = torch.empty(t, h, d)
    library().distill_rope(
        byref(
            RopeArgs(
                x_thd.data_ptr(),
                x_thd.stride(0),
                x_thd.stride(1),
                cos_tr.data_ptr(),
                sin_tr.data_ptr(),
                out.data_ptr(),
                h * d,
                d,
                t,
                h,
                d // 2,
                interleaved,
                threads(),
                0,
            )
        )
    )
    return out


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    x_tkd = _rows(x_tkd)
    t, heads, width = x_tkd.shape
    assert pool.is_contiguous() and pool.shape[1] == heads and pool.shape[3] == width
    library().distill_paged_write(
        byref(
            WriteArgs(
                pool.data_ptr(),
                page_t.data_ptr(),
                offset_t.data_ptr(),
                x_tkd.data_ptr(),
                x_tkd.stride(0),
                x_tkd.stride(1),
                t,
                heads,
                width,
                pool.shape[2],
                pool.dtype == torch.float32,
                0,
            )
        )
    )


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float) -> Tensor:
    x_tc = _rows(x_tc)
    rows, c = x_tc.shape
    out = torch.empty(rows, c)
    library().distill_rms_norm(
        byref(
            NormArgs(x_tc.data_ptr(), x_tc.stride(0), weight_c.data_ptr(), out.data_ptr(), c, rows, c, eps, threads())
        )
    )
    return out


def _linear_args(x: Tensor, x_stride: int, w: Packed, bias: Tensor | None, out: Tensor, rows: int) -> Any:
    return LinearArgs(
        x.data_ptr(),
        x_stride,
        w.address,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.shape[1] if out.dim() == 2 else out.shape[1] * out.shape[2],
        rows,
        w.parts,
        0,
        threads(),
    )


def linear(x_tc: Tensor, weight: Packed, bias_n: Tensor | None = None) -> Tensor:
    x_tc = _rows(x_tc)
    assert x_tc.dtype == torch.float32 and x_tc.shape[1] == weight.k
    out = torch.empty(x_tc.shape[0], weight.n)
    library().distill_linear(byref(_linear_args(x_tc, x_tc.stride(0), weight, bias_n, out, x_tc.shape[0])))
    return out


def swiglu_linear(
    x_tc: Tensor, gate: Packed, up: Packed, gate_bias_f: Tensor | None = None, up_bias_f: Tensor | None = None
) -> Tensor:
    if gate_bias_f is not None or up_bias_f is not None:
        return torch.nn.functional.silu(linear(x_tc, gate, gate_bias_f)) * linear(x_tc, up, up_bias_f)
    x_tc = _rows(x_tc)
    out = torch.empty(x_tc.shape[0], gate.n)
    args = _linear_args(x_tc, x_tc.stride(0), gate, None, out, x_tc.shape[0])
    library().distill_swiglu_linear(byref(args), c_void_p(up.address))
    return out


def per_head(x_thc: Tensor, weight: Packed) -> Tensor:
    t, h, c = x_thc.shape
    if x_thc.stride(2) != 1 or x_thc.stride(1) != c:
        x_thc = x_thc.contiguous()
    out = torch.empty(t, h, weight.n)
    library().distill_linear(byref(_linear_args(x_thc, x_thc.stride(0), weight, None, out, t)))
    return out


def experts(x_tc: Tensor, experts_tk: Tensor, weights_tk: Tensor, packed: Experts) -> Tensor:
    x_tc, experts_tk, weights_tk = x_tc.contiguous(), experts_tk.contiguous(), weights_tk.contiguous()
    t, k = experts_tk.shape
    out = torch.empty_like(x_tc)
    library().distill_experts(
        byref(
            ExpertsArgs(
                x_tc.data_ptr(),
                experts_tk.data_ptr(),
                weights_tk.data_ptr(),
                *packed.addresses,
                out.data_ptr(),
                t,
                k,
                len(packed.matrices),
                packed.parts,
                threads(),
                0,
            )
        )
    )
    return out


def _decode(q: Tensor, k: Tensor, v: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    q = q.contiguous()
    b, h, d = q.shape
    assert table_bp.shape[0] == length_b.shape[0] == b and table_bp.stride(1) == 1
    out = torch.empty(b, h, e)
    library().distill_decode(
        byref(
            DecodeArgs(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                table_bp.data_ptr(),
                length_b.data_ptr(),
                out.data_ptr(),
                table_bp.stride(0),
                b,
                h,
                k.shape[1],
                d,
                e,
                k.shape[3],
                v.shape[3],
                k.shape[2],
                k.dtype == torch.float32,
                threads(),
                scale,
            )
        )
    )
    return out


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float
) -> Tensor:
    return _decode(q_bhd, k_pool, v_pool, table_bp, length_b, scale, v_pool.shape[3])


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    return _decode(q_bhd, pool, pool, table_bp, length_b, scale, e)


def prefill_gqa(q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float) -> Tensor:
    return _prefill(q_thd, k_pool, v_pool, None, None, table_p, length, v_pool.shape[3], scale)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k: Packed, expand_v: Packed, scale: float
) -> Tensor:
    return _prefill(q_thd, pool, None, expand_k, expand_v, table_p, length, expand_v.n, scale)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    expand_k: Packed | None,
    expand_v: Packed | None,
    table_p: Tensor,
    length: int,
    e: int,
    scale: float,
) -> Tensor:
    q = q.contiguous()
    t, h, d = q.shape
    assert t <= length <= table_p.numel() * k.shape[2] and table_p.is_contiguous()
    out = torch.empty(t, h, e)
    library().distill_prefill(
        byref(
            PrefillArgs(
                q.data_ptr(),
                k.data_ptr(),
                None if v is None else v.data_ptr(),
                table_p.data_ptr(),
                None if expand_k is None else expand_k.address,
                None if expand_v is None else expand_v.address,
                out.data_ptr(),
                t,
                length,
                h,
                k.shape[1],
                d,
                e,
                k.shape[3],
                0 if v is None else v.shape[3],
                k.shape[2],
                k.dtype == torch.float32,
                threads(),
                scale,
            )
        )
    )
    return out


def index_scores(q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int) -> Tensor:
    q_thd, weight_th = q_thd.contiguous(), weight_th.contiguous()
    t, h, d = q_thd.shape
    assert t <= length <= table_p.numel() * pool.shape[2] and table_p.is_contiguous()
    out = torch.empty(t, length)
    library().distill_index_scores(
        byref(
            IndexArgs(
                q_thd.data_ptr(),
                weight_th.data_ptr(),
                pool.data_ptr(),
                table_p.data_ptr(),
                out.data_ptr(),
                t,
                length,
                h,
                d,
                pool.shape[2],
                pool.dtype == torch.float32,
                threads(),
                0,
            )
        )
    )
    return out
