"""DeepSeek sparse attention (V3.2-Exp's report, section 2.1): which tokens a token attends to.

Separate small heads score every earlier token, I = Σ over heads of w · relu(q·k), and the `top_k` best are attended
to. A context of top_k tokens or fewer is attended to whole, and attention is then dense, exactly. Here the chosen rows
are handed to the absorbed attention as a table of pages of one token each, in the order of their positions.

Unlike in the main path, the rotated dimensions come first. V3.2 rotates them as halves (its published code first
rotated pairs; the difference shows only past top_k tokens), GLM-5 as pairs. V3.2's published code also
multiplies q and k by a Hadamard matrix, which is orthogonal and leaves q·k as it is, and rounds both to FP8; neither is
done here, as in transformers.

GLM-5.2 has layers without an indexer, which attend to the tokens that the last layer with one chose. A place in a pool
is the same in every layer, so such a layer takes the chosen places as they are, and caches no index keys.

Legend: t tokens, h index heads, d their width, r rotated part, l context, k chosen tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.spec import Indexer, ModelSpec
from distill.engine.weights import EntryIndexerWeights, IndexerWeights

_KEY_NORM_EPS = 1e-6

# Scores of at most so many (token, key) pairs are held at a time (64 MiB in float32).
_SCORE_ELEMENTS = 1 << 24


def keys(spec: ModelSpec, ops: Ops, w: IndexerWeights, x_tc: Tensor, cos_tr: Tensor, sin_tr: Tensor) -> Tensor:
    """The index key of each token, shared by all heads: [t, 1, d], to be cached."""
    key_td = ops.linear(x_tc, w.k.weight)
    key_td = F.layer_norm(key_td, key_td.shape[-1:], w.k_norm, w.k_norm_bias, _KEY_NORM_EPS)
    assert spec.indexer is not None
    ops.rope(key_td[:, None, : spec.rope.dim], cos_tr, sin_tr, spec.indexer.interleaved)
    return key_td[:, None]


def queries(
    ops: Ops, dims: Indexer, w: IndexerWeights | EntryIndexerWeights, latent_tq: Tensor, x_tc: Tensor
) -> tuple[Tensor, Tensor]:
    """[t, h, d] from the normalised query latent, not yet rotated, and the heads' weights [t, h], float32."""
    q_thd = ops.linear(latent_tq, w.q.weight).unflatten(-1, (dims.heads, dims.head_dim))
    return q_thd, ops.linear(x_tc, w.head_weights.weight).float() * (dims.heads * dims.head_dim) ** -0.5


def select(
    ops: Ops, q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """The top_k places in a pool for the last t of `length` cached tokens, each of which sees more than top_k: [t, k]
    numbers of page · page_size + offset, in the order of positions. Of equal scores the earlier token is chosen. A row
    with a NaN among its scores gets places that are valid and mean nothing; `undefined` names these rows."""
    t, page_size = len(q_thd), pool.shape[2]
    position_l = torch.arange(length, device=pool.device)
    place_l = table_p[position_l // page_size] * page_size + position_l % page_size
    chosen, undefined = [], []
    block = max(1, _SCORE_ELEMENTS // length)
    for start in range(0, t, block):
        end = min(start + block, t)
        seen = length - t + end
        score_tl = ops.index_scores(q_thd[start:end], weight_th[start:end], pool, table_p, seen)
        undefined.append(score_tl.isnan().any(-1))
        score_tl = score_tl.nan_to_num(float("-inf"), float("inf"), float("-inf"))
        least_t1 = score_tl.topk(top_k, dim=-1).values[:, -1:]
        above_tl, equal_tl = score_tl > least_t1, score_tl == least_t1
        room_t1 = top_k - above_tl.sum(-1, keepdim=True)
        taken_tl = above_tl | (equal_tl & (equal_tl.cumsum(-1) <= room_t1))
        # Each taken one goes to its rank, all others past the end: a GPU's host need not wait for how many there are.
        rank_tl = torch.where(taken_tl, taken_tl.cumsum(-1) - 1, top_k)
        row_tk = place_l.new_empty(end - start, top_k + 1)
        chosen.append(row_tk.scatter_(1, rank_tl, place_l.expand(end - start, -1))[:, :top_k])
    return torch.cat(chosen), torch.cat(undefined)
