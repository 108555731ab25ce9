"""Attention over paged caches: grouped-query (GQA), and DeepSeek's latent form (MLA) in its two shapes.

A step is one flat batch of tokens (batch.py). Projections run over all of it at once; the core takes its segments one
by one.

MLA caches per token the normalised latent c (512 numbers in V3) and the rotated key part that all heads share (64). It
has two forms, equal up to rounding:
  expanded (prompts): kv_b_proj turns the latents into keys and values per head; fewer multiplications when many
    queries share the context;
  absorbed (what is generated): kv_b_proj is moved to the query and the output, q' = q_nope·W_UK and o = (P·c)·W_UV, so
    that the latents are read as they are cached, once for all heads (DeepSeek-V2, arXiv:2405.04434, section
    2.1.2). Sparse attention (indexer.py) takes this form for prompts, too.

Legend: t tokens of the step, r requested rows (or, as a width, the rotated part), b decoding sequences, h query
heads, k key-value heads, d width of q and k, n and r its unrotated and rotated parts, e width of values, c latent, l
context, p pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine import indexer, sliding
from distill.engine.batch import Batch, DecodeRows, PrefillChunk, SparseRows, Wanted
from distill.engine.cache import PagedCache
from distill.engine.kernels import Ops
from distill.engine.residual import added
from distill.engine.sliding import WindowRows
from distill.engine.spec import LATENT_NORM_EPS, ModelSpec
from distill.engine.weights import GqaWeights, IndexerWeights, Linear, MlaWeights


@dataclass(frozen=True)
class Chosen:
    """The tokens that sparse attention keeps for the rows of a batch: their places in a pool, [t, k], and whether
    a row's places are undefined, [t]. Rows that attend to their whole context need no places: theirs are zeros."""

    place_tk: Tensor
    undefined_t: Tensor

    def of(self, row_r: Tensor) -> Chosen:
        """Those of some rows."""
        return Chosen(self.place_tk.index_select(0, row_r), self.undefined_t.index_select(0, row_r))


def _narrowed(batch: Batch, x_tc: Tensor, wanted: Wanted | None) -> tuple[Batch, Tensor]:
    return (batch, x_tc) if wanted is None else (wanted.batch, x_tc.index_select(0, wanted.row_r))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _linear(ops: Ops, x_tc: Tensor, w: Linear) -> Tensor:
    return ops.linear(x_tc, w.weight, w.bias)


def _linears(ops: Ops, x_tc: Tensor, *linears: Linear) -> Sequence[Tensor]:
    return ops.linears(x_tc, [w.weight for w in linears], [w.bias for w in linears])


def gqa(
    spec: ModelSpec,
    ops: Ops,
    w: GqaWeights,
    layer: int,
    x_tc: Tensor,
    batch: Batch,
    cache: PagedCache,
    onto_rc: Tensor,
    wanted: Wanted | None = None,
    post_norm_c: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention (arXiv:2305.13245) of one layer, added to `onto`, in place; writes the cache.

    wanted: the rows of `onto`, if they are not all. post_norm_c: the norm of what is added, where there is one.
    """
    window, heads = spec.window(layer), spec.heads(layer)
    if w.k is not None:
        _write_gqa(spec, ops, w, layer, x_tc, batch, cache)
    if not len(onto_rc):
        return onto_rc
    k_pool, v_pool = cache.pools[spec.cached_by(layer)]
    batch, x_rc = _narrowed(batch, x_tc, wanted)
    of_layer = batch.of_window(window)
    q_thd = _linear(ops, x_rc, w.q).unflatten(-1, (spec.num_heads, -1))
    if spec.output_gate:
        q_thd, gate_thd = (part.contiguous() for part in q_thd.chunk(2, dim=-1))
    if w.q_norm is not None:
        q_thd = ops.rms_norm(q_thd.flatten(0, 1), w.q_norm, spec.norm_eps).view_as(q_thd)
    if w.rotated:
        ops.rope(q_thd[..., : heads.rope.dim], of_layer.cos_tr, of_layer.sin_tr, heads.rope.interleaved)
    parts = []
    for rows in of_layer.segments:
        q = q_thd[rows.start : rows.end]
        if isinstance(rows, DecodeRows):
            parts.append(ops.decode_gqa(q, k_pool, v_pool, rows.table_bp, rows.length_b, spec.softmax_scale))
        elif isinstance(rows, PrefillChunk):
            parts.append(ops.prefill_gqa(q, k_pool, v_pool, rows.table_p, rows.length, spec.softmax_scale))
        else:
            assert isinstance(rows, WindowRows)
            parts.append(sliding.attend(ops, rows, q, k_pool, v_pool, spec.softmax_scale))
    out_rn = _joined(parts).flatten(1)
    if spec.output_gate:
        out_rn = ops.sigmoid_gate(out_rn, gate_thd.flatten(1))
    return added(ops, out_rn, w.o, onto_rc, post_norm_c, spec.norm_eps)


def _write_gqa(
    spec: ModelSpec, ops: Ops, w: GqaWeights, layer: int, x_tc: Tensor, batch: Batch, cache: PagedCache
) -> None:
    """Store keys and values of all rows."""
    heads, of_layer = spec.heads(layer), batch.of_window(spec.window(layer))
    assert w.k is not None
    k_tkd = _linear(ops, x_tc, w.k).unflatten(-1, (heads.num_kv_heads, heads.head_dim))
    v_tkd = k_tkd if w.v is None else _linear(ops, x_tc, w.v).unflatten(-1, (heads.num_kv_heads, heads.head_dim))
    if w.v_norm is not None:
        v_tkd = ops.rms_norm(v_tkd.flatten(0, 1), w.v_norm, spec.norm_eps).view_as(v_tkd)
    elif w.v is None:
        v_tkd = k_tkd.clone()  # keys are rotated in place
    if w.k_norm is not None:
        k_tkd = ops.rms_norm(k_tkd.flatten(0, 1), w.k_norm, spec.norm_eps).view_as(k_tkd)
    if w.rotated:
        ops.rope(k_tkd[..., : heads.rope.dim], of_layer.cos_tr, of_layer.sin_tr, heads.rope.interleaved)
    cache.write(layer, batch.page_t, batch.offset_t, k_tkd, v_tkd)


def mla(
    spec: ModelSpec,
    ops: Ops,
    w: MlaWeights,
    layer: int,
    x_tc: Tensor,
    batch: Batch,
    cache: PagedCache,
    onto_rc: Tensor,
    wanted: Wanted | None = None,
    chosen: Chosen | None = None,
) -> tuple[Tensor, Chosen | None]:
    """Multi-head latent attention of one layer, added to `onto`, in place; writes the cache.

    wanted: the rows of `onto`, if they are not all. chosen: by the last layer with an indexer. Returns the sum, and the
    choice for the next layers; None where all rows attend to their whole context.
    """
    dims = spec.mla
    assert dims is not None
    # Behind the latent, the part of the keys that all heads share. first: of the queries, which this layer may want of
    # some rows only.
    if wanted is None:
        first_tn, latent_tc = _linears(ops, x_tc, w.q_a or w.q, w.kv_a)
    else:
        latent_tc = _linear(ops, x_tc, w.kv_a)
    pool, *key_pool = cache.pools[layer]
    where, angles = (batch.page_t, batch.offset_t), (batch.cos_tr, batch.sin_tr)
    ops.write_latents(pool, *where, latent_tc, w.kv_norm, LATENT_NORM_EPS, *angles, spec.rope.interleaved)
    if w.indexer is not None:
        ops.paged_write(key_pool[0], *where, indexer.keys(spec, ops, w.indexer, x_tc, *angles))
    if not len(onto_rc):
        return onto_rc, None

    batch, x_rc = _narrowed(batch, x_tc, wanted)
    if wanted is not None:
        first_tn = _linear(ops, x_rc, w.q_a or w.q)
    to_q = x_rc if w.q_norm is None else ops.rms_norm(first_tn, w.q_norm, LATENT_NORM_EPS, w.q.weight)
    q_tn = first_tn if w.q_a is None else _linear(ops, to_q, w.q)
    q_thd = q_tn.unflatten(-1, (spec.num_heads, spec.head_dim))
    qn_thn, qr_thr = q_thd.split((dims.nope_dim, dims.rope_dim), dim=-1)
    ops.rope(qr_thr, batch.cos_tr, batch.sin_tr, spec.rope.interleaved)

    if w.indexer is not None:
        chosen = _choose(spec, ops, w.indexer, to_q, x_rc, batch, key_pool[0])
    elif chosen is not None and wanted is not None:
        chosen = chosen.of(wanted.row_r)

    def absorbed(rows: DecodeRows | SparseRows) -> Tensor:
        return ops.per_head(qn_thn[rows.start : rows.end], w.absorb_q, qr_thr[rows.start : rows.end])

    parts = []
    for rows in batch.segments:
        if isinstance(rows, PrefillChunk):
            q = q_thd[rows.start : rows.end]
            part = ops.prefill_mla(q, pool, rows.table_p, rows.length, w.expand_k, w.expand_v, spec.softmax_scale)
        elif isinstance(rows, DecodeRows):
            part = ops.decode_mla(
                absorbed(rows), pool, rows.table_bp, rows.length_b, spec.softmax_scale, dims.kv_lora_rank
            )
            part = ops.per_head(part, w.expand_v)
        else:
            assert chosen is not None
            part = _sparse(spec, ops, rows, absorbed(rows), chosen, pool)
            part = ops.per_head(part, w.expand_v)
        parts.append(part)
    return ops.linear(_joined(parts).flatten(1), w.o.weight, w.o.bias, onto_rc), chosen


def _choose(
    spec: ModelSpec, ops: Ops, w: IndexerWeights, latent_tq: Tensor, x_tc: Tensor, batch: Batch, key_pool: Tensor
) -> Chosen | None:
    """The tokens that the indexer keeps for the rows that see more of them; None where no row does."""
    sparse = [rows for rows in batch.segments if isinstance(rows, SparseRows)]
    if not sparse:
        return None
    assert spec.indexer is not None
    top_k = spec.indexer.top_k
    place_tk = torch.zeros(len(x_tc), top_k, dtype=torch.int64, device=x_tc.device)
    undefined_t = torch.zeros(len(x_tc), dtype=torch.bool, device=x_tc.device)
    for rows in sparse:
        these = slice(rows.start, rows.end)
        q_bhd, weight_bh = indexer.queries(ops, spec.indexer, w, latent_tq[these], x_tc[these])
        angles = batch.cos_tr[these], batch.sin_tr[these]
        ops.rope(q_bhd[..., : spec.rope.dim], *angles, spec.indexer.interleaved)
        for chunk in rows.chunks:
            own, at = slice(chunk.start - rows.start, chunk.end - rows.start), slice(chunk.start, chunk.end)
            place_tk[at], undefined_t[at] = indexer.select(
                ops, q_bhd[own], weight_bh[own], key_pool, chunk.table_p, chunk.length, top_k
            )
    return Chosen(place_tk, undefined_t)


def _sparse(spec: ModelSpec, ops: Ops, rows: SparseRows, q_bhd: Tensor, chosen: Chosen, pool: Tensor) -> Tensor:
    """Absorbed attention to the tokens that an indexer keeps → [b, h, latent]."""
    assert spec.mla is not None
    these = slice(rows.start, rows.end)
    # Which tokens an undefined row attends to is not known, so its result must not be a number.
    q_bhd = q_bhd.masked_fill(chosen.undefined_t[these, None, None], float("nan"))
    places_bk = chosen.place_tk[these]
    lengths_b = torch.full((len(q_bhd),), places_bk.shape[1], device=pool.device)
    single = pool.view(-1, 1, 1, pool.shape[-1])  # the same pool, in pages of one token
    return ops.decode_mla(q_bhd, single, places_bk, lengths_b, spec.softmax_scale, spec.mla.kv_lora_rank)
