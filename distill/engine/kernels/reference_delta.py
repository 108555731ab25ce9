"""The gated delta rule in plain torch: the op of layers whose memory is a matrix a head in place of cached tokens.

A token first passes a short causal convolution over channels, then updates each head's matrix S and reads it
(Gated DeltaNet, arXiv:2412.06464, equation 10, with S transposed):

    S ← a S;   S ← S + k (b (v − Sᵀ k))ᵀ;   o = Sᵀ q

Tokens are taken one by one. The chunked form of the paper, with matrix products over 64 tokens, is faster on long
prompts, and was rejected: its sums depend on where a chunk begins, and a prompt's result must not depend on how it is
cut into steps, nor differ from decoding.

Legend: t tokens, s sequences, n channels of the convolution, k taps, h value heads, d width of keys, e of values. The
pools have a slot for each sequence: conv_pool [slots, k − 1, n], state_pool [slots, h, d, e], float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # of the unit length that queries and keys are brought to


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
    """The outputs of all tokens, normalised head by head and multiplied by silu(gate) → [t, h·e]; updates the pools.

    write: b before its sigmoid; decay: log a = rate · softplus(decay + rate_bias). gate: [t, h·e]. row: the rows of
    the batch, those of a sequence together and in order; those of sequence i are row[first[i] : first[i + 1]], and
    first has s + 1 entries. slot: of each sequence, no two the same. fresh: 1 where it begins here, so that what its
    slot holds is not read.
    """
    lengths = first_s.diff()
    order_s = lengths.argsort(descending=True, stable=True)  # those that have a token in a round come first
    lengths, begin_s, slot_s, fresh_s = lengths[order_s], first_s[:-1][order_s], slot_s[order_s], fresh_s[order_s]
    window_skn, state_shde = conv_pool.index_select(0, slot_s), state_pool.index_select(0, slot_s)
    window_skn[fresh_s.bool()] = 0
    state_shde[fresh_s.bool()] = 0
    out_the = qkv_tn.new_empty(len(qkv_tn), len(rate_h), len(norm_e), dtype=torch.float32)
    for turn in range(int(lengths[0])):
        active = int((lengths > turn).sum())
        row_b = row_t[begin_s[:active] + turn]
        x_bkn = torch.cat((window_skn[:active], qkv_tn[row_b, None].float()), dim=1)
        window_skn[:active] = x_bkn[:, 1:]
        log_decay_bh = rate_h * F.softplus(decay_th[row_b].float() + rate_bias_h)
        write_bh = write_th[row_b].float().sigmoid()
        out_the[row_b] = _turn(_convolved(x_bkn, conv_kn), log_decay_bh.exp(), write_bh, state_shde[:active])
    conv_pool.index_copy_(0, slot_s, window_skn)
    state_pool.index_copy_(0, slot_s, state_shde)
    normed_the = F.rms_norm(out_the, norm_e.shape, norm_e, eps)
    return (normed_the.flatten(1) * F.silu(gate_te.float())).to(qkv_tn.dtype)


def _convolved(x_bkn: Tensor, conv_kn: Tensor) -> Tensor:
    """The newest token of the convolution, after its activation, [b, n]. Taps are added oldest first."""
    sum_bn = x_bkn[:, 0] * conv_kn[0]
    for tap in range(1, len(conv_kn)):
        sum_bn = sum_bn + x_bkn[:, tap] * conv_kn[tap]
    return F.silu(sum_bn)


def _turn(mixed_bn: Tensor, decay_bh: Tensor, write_bh: Tensor, state_bhde: Tensor) -> Tensor:
    """One token of each sequence → [b, h, e]; updates the state in place."""
    h, d, e = state_bhde.shape[1:]
    keys = (mixed_bn.shape[1] - h * e) // 2
    q_bgd, k_bgd, v_bhe = (
        part.unflatten(1, (-1, width))
        for part, width in zip(mixed_bn.split((keys, keys, h * e), dim=1), (d, d, e), strict=True)
    )
    q_bhd, k_bhd = (
        (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)).repeat_interleave(h * d // keys, dim=1)
        for x in (q_bgd, k_bgd)
    )
    state_bhde *= decay_bh[..., None, None]
    known_bhe = (state_bhde * k_bhd[..., None]).sum(2)
    state_bhde += k_bhd[..., None] * ((v_bhe - known_bhe) * write_bh[..., None])[:, :, None]
    out_bhe: Tensor = (state_bhde * (q_bhd * d**-0.5)[..., None]).sum(2)
    return out_bhe


def sigmoid_gate(x_tn: Tensor, gate_tn: Tensor) -> Tensor:
    """x · sigmoid(gate) (gated attention's output, arXiv:2505.06708)."""
    return x_tn * gate_tn.sigmoid()
