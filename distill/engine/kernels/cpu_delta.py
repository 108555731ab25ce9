"""The gated delta rule on the compiled kernels: see reference_delta.py for what it computes, and for the legend."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import call, threads
from distill.engine.kernels.cpu_structs import DeltaArgs, SigmoidGateArgs, address


def delta_rule(
    qkv_tn: Tensor,
    write_th: Tensor,
    decay_th: Tensor,
    gate_te: Tensor,
    conv_kn: Tensor,
    rate_h: Tensor,
    rate_bias_h: Tensor,
    norm_e: Tensor,
    eps: float,
    conv_pool: Tensor,
    state_pool: Tensor,
    row_t: Tensor,
    first_s: Tensor,
    slot_s: Tensor,
    fresh_s: Tensor,
) -> Tensor:
    """As reference_delta.delta_rule; float32 in and out."""
    qkv_tn, write_th, decay_th, gate_te = (x.contiguous() for x in (qkv_tn, write_th, decay_th, gate_te))
    slots, h, d, e = state_pool.shape
    rows, channels = qkv_tn.shape
    assert qkv_tn.dtype == conv_kn.dtype == torch.float32 and conv_pool.is_contiguous() and state_pool.is_contiguous()
    out_te = torch.empty(rows, h * e)
    call(
        "delta_rule",
        DeltaArgs(
            qkv=address(qkv_tn),
            write=address(write_th),
            decay=address(decay_th),
            gate=address(gate_te),
            conv=address(conv_kn),
            rate=address(rate_h),
            rate_bias=address(rate_bias_h),
            norm=address(norm_e),
            conv_state=address(conv_pool),
            state=address(state_pool),
            row=address(row_t),
            first=address(first_s),
            slot=address(slot_s),
            fresh=address(fresh_s),
            out=address(out_te),
            rows=rows,
            sequences=len(slot_s),
            slots=slots,
            channels=channels,
            key_heads=(channels - h * e) // (2 * d),
            value_heads=h,
            key_dim=d,
            value_dim=e,
            taps=len(conv_kn),
            threads=threads(),
            eps=eps,
            unused=0,
        ),
    )
    return out_te


def sigmoid_gate(x_tn: Tensor, gate_tn: Tensor) -> Tensor:
    """As reference_delta.sigmoid_gate; float32 in and out."""
    x_tn, gate_tn = x_tn.contiguous(), gate_tn.contiguous()
    assert x_tn.dtype == gate_tn.dtype == torch.float32
    out_tn = torch.empty_like(x_tn)
    addresses = {"x": address(x_tn), "gate": address(gate_tn), "out": address(out_tn)}
    call("sigmoid_gate", SigmoidGateArgs(**addresses, count=x_tn.numel(), threads=threads(), unused=0))
    return out_tn
