"""Attention over paged caches: grouped-query (GQA), and DeepSeek's latent form (MLA) in its two shapes.

A step is one flat batch of tokens: first the rows that decode, then the chunks of prompts. Projections run over all of
it at once; only the attention core tells segments of rows apart.

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

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distill.engine import indexer, sliding
from distill.engine.cache import PagedCache
from distill.engine.delta import Turns, turns
from distill.engine.kernels import Ops
from distill.engine.residual import added
from distill.engine.sliding import Span, WindowRows
from distill.engine.spec import LATENT_NORM_EPS, Indexer, ModelSpec, Rope, Sliding
from distill.engine.weights import GqaWeights, IndexerWeights, Linear, MlaWeights


@dataclass(frozen=True)
class Chunk:
    """Tokens `ids` of one sequence, from position `start` on, to be computed in this step. Earlier tokens are cached;
    `pages` cover all. slot: of its recurrent state, in models that have one."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]
    slot: int = -1

    @property
    def end(self) -> int:
        """The position after the last of `ids`."""
        return self.start + len(self.ids)


@dataclass(frozen=True)
class DecodeRows:
    """Rows `start … end-1` of the flat batch: one token each, at the end of a context of length_b tokens."""

    start: int
    end: int
    table_bp: Tensor
    length_b: Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """Rows `start … end-1` of the flat batch: the last tokens of a context of `length` tokens."""

    start: int
    end: int
    table_p: Tensor
    length: int


@dataclass(frozen=True)
class SparseRows:
    """Rows `start … end-1` of the flat batch, each of which sees more tokens than sparse attention keeps: chunks of one
    or more rows."""

    start: int
    end: int
    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True)
class Local:
    """What layers with a sliding window take in place of a batch's fields of the same names."""

    cos_tr: Tensor
    sin_tr: Tensor
    segments: tuple[DecodeRows | PrefillChunk | WindowRows, ...]


@dataclass(frozen=True)
class Batch:
    """One step's input, as tensors. cos and sin: [t, rotated width / 2], float32. segments: of the rows, in order.
    local: for models with sliding windows. turns: the order of recurrent layers, in models that have some."""

    ids_t: Tensor
    page_t: Tensor
    offset_t: Tensor
    cos_tr: Tensor
    sin_tr: Tensor
    segments: tuple[DecodeRows | PrefillChunk | SparseRows, ...]
    local: Local | None = None
    turns: Turns | None = None

    def of_window(self, window: Sliding | None) -> Batch | Local:
        """What a layer with this window takes: the batch itself without one."""
        if window is None:
            return self
        assert self.local is not None
        return self.local


@dataclass(frozen=True)
class Wanted:
    """The rows of a batch whose hidden states are requested, and these rows as a batch of their own. The last layer
    writes the cache for all rows and computes everything else for these alone."""

    row_r: Tensor
    batch: Batch


@dataclass(frozen=True)
class Chosen:
    """The tokens that sparse attention keeps for the rows of a batch: their places in a pool, [t, k], and whether
    a row's places are undefined, [t]. Rows that attend to their whole context need no places: theirs are zeros."""

    place_tk: Tensor
    undefined_t: Tensor

    def of(self, row_r: Tensor) -> Chosen:
        """Those of some rows."""
        return Chosen(self.place_tk.index_select(0, row_r), self.undefined_t.index_select(0, row_r))


def build_batch(
    decode: Sequence[Chunk], prefill: Sequence[Chunk], page_size: int, spec: ModelSpec, device: torch.device
) -> Batch:
    """Lay chunks out as one flat batch: first `decode` (one token each), then `prefill`, in order."""
    ids: list[int] = [chunk.ids[0] for chunk in decode]
    positions: list[int] = [chunk.start for chunk in decode]
    pages: list[int] = [chunk.pages[chunk.start // page_size] for chunk in decode]
    for chunk in prefill:
        ids += chunk.ids
        positions += range(chunk.start, chunk.end)
        pages += [chunk.pages[i // page_size] for i in range(chunk.start, chunk.end)]
    ids_t, page_t, position_t = torch.from_numpy(np.array((ids, pages, positions), np.int64)).to(device).unbind()
    cos_tr, sin_tr = rotations(spec.rope, position_t)
    segments = tuple(_segments(decode, prefill, page_size, spec.indexer, device))
    local, order = None, None
    if spec.sliding is not None:
        rows = tuple(_local_segments(decode, prefill, page_size, spec.sliding, device))
        local = Local(*rotations(spec.sliding.rope, position_t), rows)
    if spec.delta is not None:
        order = turns([chunk.slot for chunk in (*decode, *prefill) for _ in chunk.ids], positions, device)
    return Batch(ids_t, page_t, position_t % page_size, cos_tr, sin_tr, segments, local, order)


def decode_batch(
    ids: Sequence[int],
    positions: Sequence[int],
    pages: Sequence[Sequence[int]],
    slots: Sequence[int],
    page_size: int,
    spec: ModelSpec,
    device: torch.device,
) -> Batch:
    """One token of each of several sequences, as `build_batch` lays them out, for a model without sparse attention."""
    if spec.sliding is not None:
        chunks = [Chunk((each,), at, own) for each, at, own in zip(ids, positions, pages, strict=True)]
        return build_batch(chunks, [], page_size, spec, device)
    id_b, position_b = np.array((ids, positions), np.int64)
    count_b = position_b // page_size + 1
    widest = int(count_b.max())
    table = np.array([[*own[:widest], *[0] * (widest - len(own))] for own in pages], np.int64)
    page_b = table[np.arange(len(table)), count_b - 1]
    ids_t, page_t, position_t, offset_t, length_t, table_bp = (
        torch.from_numpy(numbers).to(device)
        for numbers in (id_b, page_b, position_b, position_b % page_size, position_b + 1, table)
    )
    cos_tr, sin_tr = rotations(spec.rope, position_t)
    rows = DecodeRows(0, len(table), table_bp, length_t)
    order = None if spec.delta is None else turns(slots, positions, device)
    return Batch(ids_t, page_t, offset_t, cos_tr, sin_tr, (rows,), turns=order)


def rotations(rope: Rope, position_t: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions, [t, rotated width / 2], float32."""
    angle_tr = position_t[:, None].float() * _inv_freq(rope, position_t.device)
    if rope.magnitude == 1:
        return angle_tr.cos(), angle_tr.sin()
    return angle_tr.cos() * rope.magnitude, angle_tr.sin() * rope.magnitude


@lru_cache(maxsize=8)
def _inv_freq(rope: Rope, device: torch.device) -> Tensor:
    return torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)


def _segments(
    decode: Sequence[Chunk], prefill: Sequence[Chunk], page_size: int, indexer: Indexer | None, device: torch.device
) -> Iterator[DecodeRows | PrefillChunk | SparseRows]:
    def chunk_of(start: int, end: int, chunk: Chunk, length: int) -> PrefillChunk:
        table_p = torch.tensor(chunk.pages[: -(-length // page_size)], device=device)
        return PrefillChunk(start, end, table_p, length)

    dense_until = indexer.top_k if indexer else sys.maxsize  # a longer context is not attended to whole
    row = 0
    for sparse, rows in itertools.groupby(decode, lambda chunk: chunk.end > dense_until):
        chunks = list(rows)
        start, row = row, row + len(chunks)
        if sparse:
            yield SparseRows(
                start, row, tuple(chunk_of(start + i, start + i + 1, c, c.end) for i, c in enumerate(chunks))
            )
        else:
            yield _decode_rows(start, chunks, page_size, device)
    for chunk in prefill:
        start, row = row, row + len(chunk.ids)
        dense = min(max(dense_until - chunk.start, 0), len(chunk.ids))
        if dense:
            yield chunk_of(start, start + dense, chunk, chunk.start + dense)
        if start + dense < row:
            yield SparseRows(start + dense, row, (chunk_of(start + dense, row, chunk, chunk.end),))


def _local_segments(
    decode: Sequence[Chunk], prefill: Sequence[Chunk], page_size: int, local: Sliding, device: torch.device
) -> Iterator[DecodeRows | PrefillChunk | WindowRows]:
    """The rows of a step in layers with a sliding window."""
    row = 0
    for long, first, end in sliding.runs(chunk.end > local.window for chunk in decode):
        rows = decode[first:end]
        if long:
            spans = [Span(chunk.start, 1, chunk.pages) for chunk in rows]
            yield sliding.window_rows(first, spans, local.window, page_size, device)
        else:
            yield _decode_rows(first, rows, page_size, device)
        row = end
    for chunk in prefill:
        start, row = row, row + len(chunk.ids)
        whole = sliding.whole_rows(chunk.start, len(chunk.ids), local.window)
        if whole:
            table_p = torch.tensor(chunk.pages[: -(-(chunk.start + whole) // page_size)], device=device)
            yield PrefillChunk(start, start + whole, table_p, chunk.start + whole)
        if whole < len(chunk.ids):
            span = Span(chunk.start + whole, len(chunk.ids) - whole, chunk.pages)
            yield sliding.window_rows(start + whole, [span], local.window, page_size, device)


def _decode_rows(start: int, decode: Sequence[Chunk], page_size: int, device: torch.device) -> DecodeRows:
    used = [-(-chunk.end // page_size) for chunk in decode]
    widest = max(used)
    table = [[*row.pages[:n], *[0] * (widest - n)] for row, n in zip(decode, used, strict=True)]
    table_bp, length_b = (
        torch.from_numpy(np.array(numbers, np.int64)).to(device) for numbers in (table, [row.end for row in decode])
    )
    return DecodeRows(start, start + len(decode), table_bp, length_b)


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
        q_bhd, weight_bh = indexer.queries(
            spec, ops, w, latent_tq[these], x_tc[these], batch.cos_tr[these], batch.sin_tr[these]
        )
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
