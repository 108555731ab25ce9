"""Layers between hyper-connections: the residual is several streams wide (mHC, arXiv:2512.24880).

A block, attention or experts, reads a mixture of the streams and adds its result to each of them with a weight of its
own, while a doubly stochastic matrix mixes the streams; all these weights are computed from the streams, token by
token. The streams of a token lie side by side, [t, s · c], and no other kind of layer knows of them: the embedding is
copied into each stream before the first layer, and a last mixture is what the final norm reads.

Legend: t tokens, r requested rows, s streams, c hidden, m weights of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.engine import compressed, moe
from distill.engine.batch import Batch, Wanted
from distill.engine.cache import PagedCache
from distill.engine.kernels import Ops
from distill.engine.offload import ExpertStream
from distill.engine.spec import ModelSpec
from distill.engine.weights import CompressedWeights, LayerWeights, MixerWeights, MoeWeights


def layer(
    spec: ModelSpec,
    ops: Ops,
    index: int,
    w: LayerWeights,
    x_tn: Tensor,
    batch: Batch,
    cache: PagedCache,
    wanted: Wanted | None,
    stream: ExpertStream | None,
) -> Tensor:
    """The streams after a layer, [r, s · c], of all rows or the wanted ones. stream: brings experts that are not in
    memory."""
    assert w.mixers is not None and isinstance(w.attention, CompressedWeights) and isinstance(w.mlp, MoeWeights)
    assert spec.moe is not None
    before_attention, before_experts = w.mixers
    into_tc, *onto = _mixed(spec, ops, before_attention, x_tn)
    normed_tc = ops.rms_norm(into_tc, w.attention_norm_c, spec.norm_eps, w.attention.reader)
    y_rc = compressed.attend(spec, ops, w.attention, index, normed_tc, batch, cache, wanted)
    if wanted is not None:
        batch = wanted.batch
        x_tn, *onto = (part.index_select(0, wanted.row_r) for part in (x_tn, *onto))
    if not len(x_tn):
        return x_tn
    x_rn = _joined(x_tn, y_rc, *onto)
    into_rc, *onto = _mixed(spec, ops, before_experts, x_rn)
    normed_rc = ops.rms_norm(into_rc, w.mlp_norm_c, spec.norm_eps, w.mlp.reader)
    y_rc = moe.moe(spec.moe, ops, w.mlp, normed_rc, stream, torch.zeros_like(into_rc), batch.ids_t)
    return _joined(x_rn, y_rc, *onto)


def spread(spec: ModelSpec, x_tc: Tensor) -> Tensor:
    """What the first layer reads, from embeddings: [t, s · c], or x itself where the residual is one stream."""
    return x_tc if spec.streams is None else x_tc.repeat(1, spec.streams.count)


def collapse(spec: ModelSpec, ops: Ops, w: MixerWeights, x_rn: Tensor) -> Tensor:
    """What the final norm reads, [r, c]."""
    return _mixed(spec, ops, w, x_rn)[0] if len(x_rn) else x_rn[:, : spec.hidden_size]


def _mixed(spec: ModelSpec, ops: Ops, w: MixerWeights, x_tn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a block reads [t, c]; the weights by which its result is added to the streams [t, s], and by which streams
    are added to streams [t, s, s]."""
    dims = spec.streams
    assert dims is not None
    mix_tm = ops.linear(ops.rms_norm(x_tn.float(), w.ones_n, spec.norm_eps), w.project)
    into_ts, out_ts, across_tss = ops.stream_weights(mix_tm, w.scale_m, w.base_m, dims.count, dims.iterations, dims.eps)
    return _weighted(x_tn, into_ts), out_ts, across_tss


def _weighted(x_tn: Tensor, weight_ts: Tensor) -> Tensor:
    """Σ over streams of weight · stream → [t, c], in the order of the streams."""
    total_tc = torch.zeros_like(x_tn[:, : x_tn.shape[1] // weight_ts.shape[1]], dtype=torch.float32)
    for x_tc, weight_t in zip(x_tn.chunk(weight_ts.shape[1], dim=1), weight_ts.unbind(1), strict=True):
        total_tc += x_tc * weight_t[:, None]
    return total_tc.to(x_tn.dtype)


def _joined(x_tn: Tensor, y_tc: Tensor, out_ts: Tensor, across_tss: Tensor) -> Tensor:
    """Stream k becomes out[k] · y + Σ over streams j of across[j, k] · stream j."""
    parts = [
        _weighted(x_tn, across_tss[:, :, stream]) + out_ts[:, stream, None] * y_tc for stream in range(out_ts.shape[1])
    ]
    return torch.cat(parts, dim=1).to(x_tn.dtype)
