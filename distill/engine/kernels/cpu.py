"""The kernels of cpu.cpp as ops: weights packed once, activations float32 between ops.

A product reads activations rounded to bfloat16 (compute dtype bfloat16), or split into three bfloat16 whose sum is the
float32 itself (compute dtype float32: exact to float32, at a third of the speed). Weights keep their published form:
FP8 codes with their scales, bfloat16, or float32. Sums run in a fixed order, so that no result depends on what else is
in the batch, on chunks, or on the number of threads.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.engine.kernels import reference
from distill.engine.kernels.cpu_library import (
    DecodeArgs,
    DrawArgs,
    ExpertsArgs,
    IndexArgs,
    LinearArgs,
    NormArgs,
    PrefillArgs,
    RopeArgs,
    RouteArgs,
    WriteArgs,
    library,
    threads,
)
from distill.engine.kernels.cpu_library import instruction_set as instruction_set
from distill.engine.kernels.cpu_library import instruction_sets as instruction_sets
from distill.engine.kernels.cpu_library import session as session
from distill.engine.kernels.cpu_library import why_missing as why_missing
from distill.engine.kernels.cpu_packing import ExpertBank, Memory, Packed, with_rows
from distill.engine.kernels.reference import Place, Stored
from distill.engine.kernels.reference import device as device
from distill.engine.kernels.reference import side_by_side as side_by_side


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def has_nan_codes(codes: Tensor) -> bool:
    assert codes.is_contiguous()
    return bool(library().distill_has_nan(c_void_p(codes.data_ptr()), c_int64(codes.numel()), threads()))


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Packed:
    return Packed([weight], dtype, place)


def pack_heads(weights: Sequence[Stored], dtype: torch.dtype) -> Packed:
    return Packed(list(weights), dtype)


def expert_bank(count: int, dtype: torch.dtype) -> ExpertBank:
    return ExpertBank(count, dtype)


def arena(size: int) -> Memory:
    return Memory(size)


def packed_bytes(packed: Packed) -> int:
    return packed.bytes


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


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    assert x_thd.stride(-1) == 1
    t, h, d = x_thd.shape
    library().distill_rope(
        byref(
            RopeArgs(
                x_thd.data_ptr(),
                x_thd.stride(0),
                x_thd.stride(1),
                cos_tr.data_ptr(),
                sin_tr.data_ptr(),
                x_thd.data_ptr(),
                x_thd.stride(0),
                x_thd.stride(1),
                t,
                h,
                d // 2,
                interleaved,
                threads(),
                0,
            )
        )
    )


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    x_tkd = with_rows(x_tkd)
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


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, to: Any = None) -> Tensor:
    x_tc = with_rows(x_tc)
    rows, c = x_tc.shape
    out = torch.empty(rows, c)
    library().distill_rms_norm(
        byref(
            NormArgs(x_tc.data_ptr(), x_tc.stride(0), weight_c.data_ptr(), out.data_ptr(), c, rows, c, eps, threads())
        )
    )
    return out


write_latents = partial(reference.write_latents, rms_norm=rms_norm, rope=rope, paged_write=paged_write)


def _linear_args(x: Tensor, w: Packed, bias: Tensor | None, out: Tensor, add: bool = False) -> Any:
    """x [t, c] or [t, h, c], out [t, n] or [t, h, n], their last dimensions contiguous."""
    grouped = x.dim() == 3
    return LinearArgs(
        x.data_ptr(),
        x.stride(0),
        x.stride(1) if grouped else 0,
        w.address,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        out.stride(1) if grouped else 0,
        x.shape[0],
        w.parts,
        add,
        threads(),
    )


def linear(x_tc: Tensor, weight: Packed, bias_n: Tensor | None = None, onto_tn: Tensor | None = None) -> Tensor:
    x_tc = with_rows(x_tc)
    assert x_tc.dtype == torch.float32 and x_tc.shape[1] == weight.k
    out = torch.empty(x_tc.shape[0], weight.n) if onto_tn is None else onto_tn
    assert out.stride(-1) == 1
    library().distill_linear(byref(_linear_args(x_tc, weight, bias_n, out, onto_tn is not None)))
    return out


def linears(x_tc: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [linear(x_tc, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def swiglu_linear(
    x_tc: Tensor,
    gate: Packed,
    up: Packed,
    gate_bias_f: Tensor | None = None,
    up_bias_f: Tensor | None = None,
    to: Any = None,
) -> Tensor:
    if gate_bias_f is not None or up_bias_f is not None:
        return torch.nn.functional.silu(linear(x_tc, gate, gate_bias_f)) * linear(x_tc, up, up_bias_f)
    x_tc = with_rows(x_tc)
    out = torch.empty(x_tc.shape[0], gate.n)
    library().distill_swiglu_linear(byref(_linear_args(x_tc, gate, None, out)), c_void_p(up.address))
    return out


def per_head(x_thc: Tensor, weight: Packed, behind_thr: Tensor | None = None) -> Tensor:
    x_thc = with_rows(x_thc)
    out = torch.empty(*x_thc.shape[:2], weight.n)
    library().distill_linear(byref(_linear_args(x_thc, weight, None, out)))
    return out if behind_thr is None else torch.cat((out, behind_thr), dim=-1)


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank,
    shared: tuple[Packed, Packed, Packed] | None,
    onto_tc: Tensor,
) -> Tensor:
    x_tc, experts_tk, weights_tk = x_tc.contiguous(), experts_tk.contiguous(), weights_tk.contiguous()
    t, k = experts_tk.shape
    assert onto_tc.is_contiguous()
    beside = shared is not None and bank.goes_with(shared[0])
    library().distill_experts(
        byref(
            ExpertsArgs(
                x_tc.data_ptr(),
                experts_tk.data_ptr(),
                weights_tk.data_ptr(),
                *bank.addresses,
                *([matrix.address for matrix in shared] if shared and beside else [None] * 3),
                onto_tc.data_ptr(),
                t,
                k,
                bank.count,
                bank.parts,
                True,
                threads(),
            )
        )
    )
    if shared is not None and not beside:
        linear(swiglu_linear(x_tc, *shared[:2]), shared[2], None, onto_tc)
    return onto_tc


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


def draw(
    logits_rv: Tensor,
    row_b: Tensor,
    uniform_b: Tensor,
    temperature_b: Tensor,
    top_k_b: Tensor,
    top_p_b: Tensor,
) -> tuple[Tensor, Tensor]:
    logits_rv = logits_rv.contiguous()
    token_b, logprob_b = torch.empty_like(row_b), torch.empty_like(temperature_b)
    library().distill_draw(
        byref(
            DrawArgs(
                logits_rv.data_ptr(),
                row_b.data_ptr(),
                uniform_b.data_ptr(),
                temperature_b.data_ptr(),
                top_k_b.data_ptr(),
                top_p_b.data_ptr(),
                token_b.data_ptr(),
                logprob_b.data_ptr(),
                len(row_b),
                logits_rv.shape[1],
                threads(),
                0,
            )
        )
    )
    return token_b, logprob_b
