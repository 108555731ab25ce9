"""The compiled kernels of native/ as ops: weights packed once, activations float32 between ops.

A product reads activations rounded to bfloat16 (compute dtype bfloat16), or split into three bfloat16 whose sum is the
float32 itself (compute dtype float32: exact to float32, at a third of the speed). Weights keep their published form:
FP8 codes with their scales, bfloat16, or float32. Sums run in a fixed order, so that no result depends on the rest of
the batch, on chunks, or on the number of threads.

Every op checks the numbers that it uses as places in memory (pages, offsets, rows, experts) and raises IndexError for
one that is out of range. Activations that are not finite give results that are not finite, never a wrong access.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import partial

import torch
from torch import Tensor

from distill.engine.kernels import reference
from distill.engine.kernels.cpu_attention import decode_gqa as decode_gqa
from distill.engine.kernels.cpu_attention import decode_mla as decode_mla
from distill.engine.kernels.cpu_attention import index_scores as index_scores
from distill.engine.kernels.cpu_attention import paged_write as paged_write
from distill.engine.kernels.cpu_attention import prefill_gqa as prefill_gqa
from distill.engine.kernels.cpu_attention import prefill_mla as prefill_mla
from distill.engine.kernels.cpu_delta import delta_rule as delta_rule
from distill.engine.kernels.cpu_delta import sigmoid_gate as sigmoid_gate
from distill.engine.kernels.cpu_four_bit import FourBitBank
from distill.engine.kernels.cpu_layer import decode_plan as decode_plan
from distill.engine.kernels.cpu_library import amx_missing as amx_missing
from distill.engine.kernels.cpu_library import call, library, threads
from distill.engine.kernels.cpu_library import instruction_set as instruction_set
from distill.engine.kernels.cpu_library import instruction_sets as instruction_sets
from distill.engine.kernels.cpu_library import session as session
from distill.engine.kernels.cpu_library import why_missing as why_missing
from distill.engine.kernels.cpu_packing import ExpertBank, ExpertMatrix, Memory, Packed, with_rows
from distill.engine.kernels.cpu_structs import (
    Arguments,
    DrawArgs,
    ExpertsArgs,
    LikeliestArgs,
    LinearArgs,
    NormArgs,
    RopeArgs,
    RouteArgs,
    TrainGateArgs,
    address,
)
from distill.engine.kernels.four_bit import FourBit
from distill.engine.kernels.ops import GroupBy, Scoring
from distill.engine.kernels.reference import attend_rows as attend_rows
from distill.engine.kernels.reference import device as device
from distill.engine.kernels.reference import pool_windows as pool_windows
from distill.engine.kernels.reference import side_by_side as side_by_side
from distill.engine.kernels.reference import stream_weights as stream_weights
from distill.engine.kernels.stored import Place, Plain, Stored


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, whatever the compute dtype: products round activations themselves."""
    return torch.float32


def check(weight: Stored) -> None:
    """As reference.check."""
    weight.check(has_nan=has_nan_codes)


def has_nan_codes(codes: Tensor) -> bool:
    """As stored.has_nan_codes, for contiguous codes."""
    assert codes.is_contiguous()
    return bool(library().distill_has_nan(c_void_p(codes.data_ptr()), c_int64(codes.numel()), threads()))


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Packed:
    """As reference.pack: panels of 64 outputs, in the stored form. Raises Damaged."""
    return Packed([weight], dtype, place)


def repack(packed: Packed, numbers_nc: Tensor) -> None:
    """As reference.repack. The memory is another one only where the new numbers are kept in another dtype than the old
    ones: float32 in place of bfloat16, or the reverse, with compute dtype float32."""
    packed.fill([Plain(numbers_nc)])


def pack_heads(weights: Sequence[Stored], dtype: torch.dtype) -> Packed:
    """As reference.pack_heads."""
    return Packed(list(weights), dtype)


def expert_bank(count: int, dtype: torch.dtype, like: Sequence[Stored] = ()) -> ExpertBank | FourBitBank:
    """As reference.expert_bank; experts in four bits stay so."""
    return FourBitBank(count, dtype) if like and isinstance(like[0], FourBit) else ExpertBank(count, dtype)


def arena(size: int) -> Memory:
    """Memory of `size` bytes for the experts of a layer that are not resident."""
    return Memory(size)


def route(
    logits_tx: Tensor,
    bias_x: Tensor | None,
    scoring: Scoring,
    group_by: GroupBy,
    groups: int,
    groups_kept: int,
    per_token: int,
    normalise: bool,
    scale: float,
    given_tk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As reference.route; what the kernel does not compute is the reference, token by token, whose bits do not depend
    on the others then."""
    logits_tx = logits_tx.contiguous()
    if scoring == "sqrtsoftplus" or given_tk is not None:
        how = (scoring, group_by, groups, groups_kept, per_token, normalise, scale)
        rows = given_tk.split(1) if given_tk is not None else [None] * len(logits_tx)
        routed = [
            reference.route(x.clone(), bias_x, *how, row) for x, row in zip(logits_tx.split(1), rows, strict=True)
        ]
        experts, weights = zip(*routed, strict=True)
        return torch.cat(experts), torch.cat(weights)
    t, x = logits_tx.shape
    experts_tk, weights_tk = torch.empty(t, per_token, dtype=torch.int64), torch.empty(t, per_token)
    call(
        "route",
        RouteArgs(
            logits=address(logits_tx),
            bias=address(bias_x),
            expert=address(experts_tk),
            weight=address(weights_tk),
            tokens=t,
            experts=x,
            groups=groups,
            groups_kept=groups_kept,
            per_token=per_token,
            softmax=scoring == "softmax",
            group_by_best=group_by == "best",
            normalise=normalise,
            factor=scale,
            threads=threads(),
        ),
    )
    return experts_tk, weights_tk


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    """As reference.rope, in place; the last dimension of x is contiguous."""
    assert x_thd.stride(-1) == 1
    t, h, d = x_thd.shape
    call(
        "rope",
        RopeArgs(
            x=address(x_thd),
            x_row=x_thd.stride(0),
            x_head=x_thd.stride(1),
            cos=address(cos_tr),
            sin=address(sin_tr),
            out=address(x_thd),
            out_row=x_thd.stride(0),
            out_head=x_thd.stride(1),
            rows=t,
            heads=h,
            r=d // 2,
            interleaved=interleaved,
            threads=threads(),
            unused=0,
        ),
    )


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, to: object = None) -> Tensor:
    """As reference.rms_norm."""
    x_tc = with_rows(x_tc)
    rows, c = x_tc.shape
    out_tc = torch.empty(rows, c)
    call(
        "rms_norm",
        NormArgs(
            x=address(x_tc),
            x_stride=x_tc.stride(0),
            weight=address(weight_c),
            out=address(out_tc),
            out_stride=c,
            rows=rows,
            c=c,
            eps=eps,
            threads=threads(),
        ),
    )
    return out_tc


write_latents = partial(reference.write_latents, rms_norm=rms_norm, rope=rope, paged_write=paged_write)


def _linear_args(x: Tensor, w: ExpertMatrix, bias: Tensor | None, out: Tensor, add: bool = False) -> Arguments:
    """x [t, c] or [t, h, c], out [t, n] or [t, h, n], their last dimensions contiguous."""
    grouped = x.dim() == 3
    return LinearArgs(
        x=address(x),
        x_stride=x.stride(0),
        x_group=x.stride(1) if grouped else 0,
        w=w.address,
        bias=address(bias),
        out=address(out),
        out_stride=out.stride(0),
        out_group=out.stride(1) if grouped else 0,
        rows=x.shape[0],
        parts=w.parts,
        add=add,
        threads=threads(),
    )


def linear(x_tc: Tensor, weight: ExpertMatrix, bias_n: Tensor | None = None, onto_tn: Tensor | None = None) -> Tensor:
    """As reference.linear; float32 in and out."""
    x_tc = with_rows(x_tc)
    assert x_tc.dtype == torch.float32 and x_tc.shape[1] == weight.k
    out_tn = torch.empty(x_tc.shape[0], weight.n) if onto_tn is None else onto_tn
    assert out_tn.stride(-1) == 1
    call("linear", _linear_args(x_tc, weight, bias_n, out_tn, onto_tn is not None))
    return out_tn


def linears(x_tc: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """As reference.linears."""
    return [linear(x_tc, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def swiglu_linear(
    x_tc: Tensor,
    gate: Packed,
    up: Packed,
    gate_bias_f: Tensor | None = None,
    up_bias_f: Tensor | None = None,
    to: object = None,
) -> Tensor:
    """As reference.swiglu_linear."""
    if gate_bias_f is not None or up_bias_f is not None:
        return torch.nn.functional.silu(linear(x_tc, gate, gate_bias_f)) * linear(x_tc, up, up_bias_f)
    x_tc = with_rows(x_tc)
    out_tf = torch.empty(x_tc.shape[0], gate.n)
    call("swiglu_linear", _linear_args(x_tc, gate, None, out_tf), up.struct)
    return out_tf


def per_head(x_thc: Tensor, weight: Packed, behind_thr: Tensor | None = None) -> Tensor:
    """As reference.per_head."""
    x_thc = with_rows(x_thc)
    out_thn = torch.empty(*x_thc.shape[:2], weight.n)
    call("linear", _linear_args(x_thc, weight, None, out_thn))
    return out_thn if behind_thr is None else torch.cat((out_thn, behind_thr), dim=-1)


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank | FourBitBank,
    shared: tuple[Packed, Packed, Packed] | None,
    onto_tc: Tensor,
    limit: float | None = None,
) -> Tensor:
    """As reference.experts; the shared expert is computed beside the others where its weights have their form."""
    x_tc, experts_tk, weights_tk = x_tc.contiguous(), experts_tk.contiguous(), weights_tk.contiguous()
    if isinstance(bank, FourBitBank) or limit is not None:
        return _experts_one_by_one(x_tc, experts_tk, weights_tk, bank, shared, onto_tc, limit)
    t, k = experts_tk.shape
    assert onto_tc.is_contiguous()
    gate, up, down = bank.addresses
    beside = shared if shared is not None and bank.goes_with(shared) else None
    shared_gate, shared_up, shared_down = (None, None, None) if beside is None else (w.address for w in beside)
    call(
        "experts",
        ExpertsArgs(
            x=address(x_tc),
            expert=address(experts_tk),
            weight=address(weights_tk),
            gate=gate,
            up=up,
            down=down,
            shared_gate=shared_gate,
            shared_up=shared_up,
            shared_down=shared_down,
            out=address(onto_tc),
            tokens=t,
            per_token=k,
            experts=bank.count,
            parts=bank.parts,
            add=True,
            threads=threads(),
        ),
    )
    if shared is not None and beside is None:
        linear(swiglu_linear(x_tc, *shared[:2]), shared[2], None, onto_tc)
    return onto_tc


def _experts_one_by_one(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank | FourBitBank,
    shared: tuple[Packed, Packed, Packed] | None,
    onto_tc: Tensor,
    limit: float | None,
) -> Tensor:
    """`experts` where the kernel does not compute them: codes of four bits, decoded for their expert's rows, and gates
    with a limit. A token's experts are added in the order in which they were chosen."""

    def expert(x: Tensor, gate: ExpertMatrix, up: ExpertMatrix, down: ExpertMatrix) -> Tensor:
        if limit is not None:
            return linear(_limited_swiglu(x, gate, up, limit), down)
        assert isinstance(gate, Packed) and isinstance(up, Packed), "else the kernel computes the experts"
        return linear(swiglu_linear(x, gate, up), down)

    y_tkc = x_tc.new_empty(*experts_tk.shape, x_tc.shape[1])
    for number in experts_tk.unique().tolist():
        t, k = (experts_tk == number).nonzero(as_tuple=True)
        y_tkc[t, k] = expert(x_tc[t], *bank.matrices(number))
    total_tc = torch.zeros_like(x_tc)
    for y_tc, weight_t in zip(y_tkc.unbind(1), weights_tk.unbind(1), strict=True):
        total_tc += y_tc * weight_t[:, None]
    if shared is not None:
        total_tc += expert(x_tc, *shared)
    return onto_tc.add_(total_tc)


def _limited_swiglu(x: Tensor, gate: ExpertMatrix, up: ExpertMatrix, limit: float) -> Tensor:
    both = torch.stack(reference.limited([linear(x, gate), linear(x, up)], limit), dim=1)
    out = torch.empty_like(both[:, 0])
    rows, _, n = both.shape
    sizes = {"rows": rows, "n": n, "half": False, "backward": False, "threads": threads(), "unused": 0}
    call("train_gate", TrainGateArgs(both=address(both), out=address(out), gradient=None, **sizes))
    return out


def draw(
    logits_rv: Tensor,
    row_b: Tensor,
    uniform_b: Tensor,
    temperature_b: Tensor,
    top_k_b: Tensor,
    top_p_b: Tensor,
) -> tuple[Tensor, Tensor]:
    """As reference.draw."""
    logits_rv = logits_rv.contiguous()
    token_b, logprob_b = torch.empty_like(row_b), torch.empty_like(temperature_b)
    call(
        "draw",
        DrawArgs(
            logits=address(logits_rv),
            row=address(row_b),
            uniform=address(uniform_b),
            temperature=address(temperature_b),
            top_k=address(top_k_b),
            top_p=address(top_p_b),
            token=address(token_b),
            logprob=address(logprob_b),
            rows=len(logits_rv),
            draws=len(row_b),
            vocabulary=logits_rv.shape[1],
            threads=threads(),
        ),
    )
    return token_b, logprob_b


def likeliest(logits_rv: Tensor, normaliser_r1: Tensor, top_k: int, given_rm: Tensor | None) -> tuple[Tensor, Tensor]:
    """As reference.likeliest; of equal logits the lower id comes first."""
    logits_rv, normaliser_r1 = logits_rv.contiguous(), normaliser_r1.contiguous()
    rows, vocabulary = logits_rv.shape
    given_rm = None if given_rm is None else given_rm.contiguous()
    given = 0 if given_rm is None else given_rm.shape[1]
    id_rk = torch.empty(rows, top_k + given, dtype=torch.int32)
    logprob_rk = torch.empty(rows, top_k + given)
    call(
        "likeliest",
        LikeliestArgs(
            logits=address(logits_rv),
            normaliser=address(normaliser_r1),
            given=address(given_rm),
            id=address(id_rk),
            logprob=address(logprob_rk),
            rows=rows,
            vocabulary=vocabulary,
            k=top_k,
            given_count=given,
            threads=threads(),
            unused=0,
        ),
    )
    return id_rk, logprob_rk
