"""The ops over paged caches in plain torch: the part of the definition (reference.py) that reads and writes pages.

Scores and softmax are in float32 whatever the compute dtype. Fused attention calls of torch were rejected: on CPU they
fall back to slower paths for one query per sequence and for values narrower than keys, which is all MLA is.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Prefill computes attention for blocks of queries whose score matrix has at most so many elements (64 MiB in float32).
_SCORE_ELEMENTS = 1 << 24


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    """Store token t of x in `pool`, in the pool's dtype, at page page_t[t], place offset_t[t]. In place."""
    pool[page_t, :, offset_t] = x_tkd.to(pool.dtype)


def paged_gather(pool: Tensor, table_bp: Tensor) -> Tensor:
    """The pages of each sequence side by side: [b, k, p·page_size, width]. The tail past a sequence's end is junk."""
    pages, heads, page_size, width = pool.shape
    rows_bkp = table_bp[:, None, :] * heads + torch.arange(heads, device=table_bp.device)[:, None]
    flat = pool.view(pages * heads, page_size * width).index_select(0, rows_bkp.flatten())
    return flat.view(table_bp.shape[0], heads, table_bp.shape[1] * page_size, width)


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float
) -> Tensor:
    """One query per row over its first length_b cached tokens → [b, h, e]. Query head i reads kv head i·k//h."""
    parts = [
        _attend_one(q_bhd[rows], paged_gather(k_pool, table_gp), paged_gather(v_pool, table_gp), length_b[rows], scale)
        for rows, table_gp in _groups(table_bp, length_b, k_pool.shape[2])
    ]
    return torch.cat(parts)


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    """Absorbed MLA: all heads share one cached row per token, and its first e numbers are the values → [b, h, e]."""
    parts = []
    for rows, table_gp in _groups(table_bp, length_b, pool.shape[2]):
        kv_gkld = paged_gather(pool, table_gp)
        parts.append(_attend_one(q_bhd[rows], kv_gkld, kv_gkld[..., :e], length_b[rows], scale))
    return torch.cat(parts)


def _groups(table_bp: Tensor, length_b: Tensor, page_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Neighbouring rows and their table, cut where a row has less than half or more than twice the pages of the first.

    Gathered caches are padded to the longest of a group, so padding never does much more than double the work if rows
    come sorted by length. One group for all would let one long sequence make every short one pay.
    """
    used = [-(-length // page_size) for length in length_b.tolist()]
    start = 0
    while start < len(used):
        end = start + 1
        while end < len(used) and used[start] <= 2 * used[end] and used[end] <= 2 * used[start]:
            end += 1
        yield slice(start, end), table_bp[start:end, : max(used[start:end])]
        start = end


def _attend_one(q_bhd: Tensor, k_bkld: Tensor, v_bkle: Tensor, length_b: Tensor, scale: float) -> Tensor:
    b, h, d = q_bhd.shape
    k, length = k_bkld.shape[1:3]
    scores = torch.bmm(q_bhd.reshape(b * k, h // k, d) * scale, k_bkld.flatten(0, 1).transpose(1, 2))
    past_end_bl = torch.arange(length, device=q_bhd.device) >= length_b[:, None]
    scores = scores.view(b, h, length).float().masked_fill_(past_end_bl[:, None], float("-inf"))
    probs = scores.softmax(-1).to(v_bkle.dtype).view(b * k, h // k, length)
    return torch.bmm(probs, v_bkle.flatten(0, 1)).view(b, h, v_bkle.shape[-1])


def prefill_gqa(q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float) -> Tensor:
    """The last t of a sequence's `length` cached tokens attend to themselves and all before → [t, h, e]."""
    k_kld = paged_gather(k_pool, table_p[None])[0, :, :length]
    v_kle = paged_gather(v_pool, table_p[None])[0, :, :length]
    return attend_causal(q_thd, k_kld, v_kle, scale)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k_hnc: Tensor, expand_v_hec: Tensor, scale: float
) -> Tensor:
    """The same with keys and values of every head written out from the cached latents: fewer operations than the
    absorbed form where many queries share a context. A cached row is the latent, then the key part all heads share."""
    h, latent = expand_k_hnc.shape[0], expand_k_hnc.shape[2]
    c_lc, kr_lr = paged_gather(pool, table_p[None])[0, 0, :length].tensor_split((latent,), dim=-1)
    kn_hln = torch.matmul(c_lc, expand_k_hnc.transpose(1, 2))
    v_hle = torch.matmul(c_lc, expand_v_hec.transpose(1, 2))
    k_hld = torch.cat((kn_hln, kr_lr.expand(h, -1, -1)), dim=-1)
    return attend_causal(q_thd, k_hld, v_hle, scale)


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


def index_scores(q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int) -> Tensor:
    """Σ over heads of weight · relu(q · key) of the last t of `length` cached tokens with those before them and
    themselves → [t, l] float32, -inf for tokens that are yet to come. (DeepSeek-V3.2-Exp, equation 1.)"""
    key_ld = paged_gather(pool, table_p[None])[0, 0, :length]
    score_tl = q_thd.new_empty(len(q_thd), length, dtype=torch.float32)
    for row, (q_hd, weight_h) in enumerate(zip(q_thd, weight_th, strict=True)):
        score_tl[row] = weight_h.float() @ F.relu((q_hd @ key_ld.T).float())
    position_l = torch.arange(length, device=q_thd.device)
    return score_tl.masked_fill_(position_l > position_l[length - len(q_thd) :, None], float("-inf"))
