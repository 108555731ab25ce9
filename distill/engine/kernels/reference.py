"""Every op in plain torch. This is the definition; other kernels are tested against it.

An op takes and returns tensors and numbers only: no spec, no module, no state beyond the page tensors it is handed. The
cut between ops follows what a hand-written kernel would want to own whole: attention reads through the page table
itself instead of being given gathered keys, so that a kernel which never materialises them fits the same slot.

Legend (suffixes of tensor names): t tokens, b sequences that decode, h query heads, k key-value heads, d width of
queries and keys, e width of values, l context length, p pages of one sequence, s (token, expert) pairs sorted by
expert, x experts, n output features, c input features, r half the rotated width. A pool of pages is [pages, k,
page_size, width].

Scores, softmax and norms are in float32 whatever the compute dtype. Fused attention calls of torch were rejected: on
CPU they fall back to slower paths for one query per sequence and for values narrower than keys, which is all MLA is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128

# Prefill computes attention for blocks of queries whose score matrix has at most so many elements (64 MiB in float32).
_SCORE_ELEMENTS = 1 << 24


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467)."""
    return F.rms_norm(x_tc, (x_tc.shape[-1],), weight_c, eps)


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> Tensor:
    """Rotate all of x's last dimension, 2r wide: pair i by the angle whose cos and sin are column i (arXiv:2104.09864).

    interleaved: pair i is (x[2i], x[2i+1]); otherwise it is (x[i], x[i+r]). The layout of the output is that of x.
    """
    cos_t1r, sin_t1r = cos_tr[:, None], sin_tr[:, None]
    if interleaved:
        a, b = x_thd[..., 0::2], x_thd[..., 1::2]
        rotated = torch.stack((a * cos_t1r - b * sin_t1r, b * cos_t1r + a * sin_t1r), dim=-1)
        return rotated.flatten(-2).to(x_thd.dtype)
    a, b = x_thd.chunk(2, dim=-1)
    return torch.cat((a * cos_t1r - b * sin_t1r, b * cos_t1r + a * sin_t1r), dim=-1).to(x_thd.dtype)


def linear(x_tc: Tensor, weight_nc: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    return F.linear(x_tc, weight_nc, bias_n)


def dequantize_fp8_block(weight_nc: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float8_e4m3fn [n, c] times its block's scale: one per 128×128 block, [⌈n/128⌉, ⌈c/128⌉], edge blocks partial.

    The product is taken in float32 and rounded to `dtype` once. (DeepSeek-V3, arXiv:2412.19437, section 3.3.2.)
    """
    n, c = weight_nc.shape
    scale_nc = scale.to(torch.float32).repeat_interleave(FP8_BLOCK, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :c]
    return (weight_nc.to(torch.float32) * scale_nc).to(dtype)


def linear_fp8_block(x_tc: Tensor, weight_nc: Tensor, scale: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """x · dequantised(weight)ᵀ + bias, with x in its own precision (activations are not quantised here)."""
    return F.linear(x_tc, dequantize_fp8_block(weight_nc, scale, x_tc.dtype), bias_n)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of a tensor that holds gate in its first and up in its second half (arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_linear(x_sc: Tensor, weight_xnc: Tensor, counts: list[int]) -> Tensor:
    """Rows sorted by expert, the first counts[0] of them expert 0's: each times its expert's weightᵀ → [s, n]."""
    out_sn = x_sc.new_empty(x_sc.shape[0], weight_xnc.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            torch.mm(x_sc[rows], weight_xnc[expert].T, out=out_sn[rows])
            start += count
    return out_sn


def route_noaux_tc(
    logits_tx: Tensor, bias_x: Tensor, groups: int, groups_kept: int, per_token: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv:2412.19437, section 2.1.2) → experts [t, per_token] int64, weights likewise float32.

    The bias moves the choice and never the weight. A group's score is the sum of its two best biased scores; experts
    outside the `groups_kept` best groups cannot be chosen.
    """
    scores_tx = logits_tx.float().sigmoid()
    choice_tx = scores_tx + bias_x
    if groups > 1:
        choice_tgx = choice_tx.unflatten(-1, (groups, -1))
        best_tg = choice_tgx.topk(2, dim=-1).values.sum(-1).topk(groups_kept, dim=-1).indices
        dropped_tg = torch.ones_like(choice_tgx[..., 0], dtype=torch.bool).scatter_(-1, best_tg, False)
        choice_tx = choice_tgx.masked_fill(dropped_tg[..., None], float("-inf")).flatten(-2)
    experts_tk = choice_tx.topk(per_token, dim=-1).indices
    weights_tk = scores_tx.gather(-1, experts_tk)
    if normalise:
        weights_tk = weights_tk / (weights_tk.sum(-1, keepdim=True) + 1e-20)
    return experts_tk, weights_tk * scale


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    """Store token t of x in `pool`, at page page_t[t], place offset_t[t]. In place."""
    pool[page_t, :, offset_t] = x_tkd


def paged_gather(pool: Tensor, table_bp: Tensor) -> Tensor:
    """The pages of each sequence side by side: [b, k, p·page_size, width]. The tail past a sequence's end is junk."""
    pages, heads, page_size, width = pool.shape
    rows_bkp = table_bp[:, None, :] * heads + torch.arange(heads, device=table_bp.device)[:, None]
    flat = pool.view(pages * heads, page_size * width).index_select(0, rows_bkp.flatten())
    return flat.view(table_bp.shape[0], heads, table_bp.shape[1] * page_size, width)


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float
) -> Tensor:
    """One query per sequence over its first length_b cached tokens → [b, h, e]. Query head i reads kv head i·k//h."""
    return _attend_one(q_bhd, paged_gather(k_pool, table_bp), paged_gather(v_pool, table_bp), length_b, scale)


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    """Absorbed MLA: all heads share one cached row per token, and its first e numbers are the values → [b, h, e]."""
    kv_bkld = paged_gather(pool, table_bp)
    return _attend_one(q_bhd, kv_bkld, kv_bkld[..., :e], length_b, scale)


def _attend_one(q_bhd: Tensor, k_bkld: Tensor, v_bkle: Tensor, length_b: Tensor, scale: float) -> Tensor:
    b, h, d = q_bhd.shape
    k, length = k_bkld.shape[1:3]
    scores = torch.bmm(q_bhd.reshape(b * k, h // k, d) * scale, k_bkld.flatten(0, 1).transpose(1, 2))
    past_end_bl = torch.arange(length, device=q_bhd.device) >= length_b[:, None]
    scores = scores.view(b, h, length).float().masked_fill_(past_end_bl[:, None], float("-inf"))
    probs = scores.softmax(-1).to(v_bkle.dtype).view(b * k, h // k, length)
    return torch.bmm(probs, v_bkle.flatten(0, 1)).view(b, h, v_bkle.shape[-1])


def attend_causal(q_thd: Tensor, k_kld: Tensor, v_kle: Tensor, scale: float) -> Tensor:
    """The last t of l positions attend to themselves and everything before → [t, h, e]. Query head i reads i·k//h."""
    t, h, d = q_thd.shape
    k, length = k_kld.shape[:2]
    position_l = torch.arange(length, device=q_thd.device)
    out_the = q_thd.new_empty(t, h, v_kle.shape[-1])
    block = max(1, _SCORE_ELEMENTS // (h * length))
    for start in range(0, t, block):
        q = q_thd[start : start + block]
        rows = q.shape[0]
        q_kgd = q.view(rows, k, h // k, d).permute(1, 2, 0, 3).reshape(k, -1, d) * scale
        scores = torch.bmm(q_kgd, k_kld.transpose(1, 2)).float().view(h, rows, length)
        first = length - t + start
        future_tl = position_l > position_l[first : first + rows, None]
        probs = scores.masked_fill_(future_tl, float("-inf")).softmax(-1).to(v_kle.dtype)
        out = torch.bmm(probs.view(k, -1, length), v_kle).view(h, rows, -1)
        out_the[start : start + rows] = out.transpose(0, 1)
    return out_the
