"""Attention to a window of tokens and to compressed entries (DeepSeek-V4's report, section 2.3).

Every token attends to the last `window` tokens. In most layers it attends, besides, to entries: the weighted mean of
what the `rate` tokens of a whole window projected, weights per element. Heavy compression (a rate of 128) attends to
all entries; sparse compression (a rate of 4) has entries that overlap by a window, and attends to those that an indexer
ranks highest. Keys and values are one, for all heads; a value's rotation is undone on the result of its query.

Everything is addressed by token in the paged cache, as in other layers: a token's slot holds its key, and what it
projected for entries; the slot of a window's last token holds its entry, computed in the step of that token from what
is cached by then. So an entry is the same however its tokens were cut into steps, and forks, shared pages and
recomputed sequences need nothing of their own. Rejected: a state beside the cache with the open window (must be forked,
copied and rebuilt). The price is that closed windows keep what they were made of, three quarters of the cache.

Each token is computed as if alone (kernels/reference_streams.py), so that prompts and generated text are one form.

Legend: t tokens, r requested rows, n windows or entries, w tokens of a window, h heads, d width of keys, l rows
attended to, q latent of queries, i width of index keys, g groups of heads. A *place* is page · page_size + offset; a
*row* is a place in a pool seen as [rows, d], where layers with entries have two for each place: key, entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine import indexer
from distill.engine.batch import Batch, DecodeRows, PrefillChunk, Wanted, rotations
from distill.engine.cache import PagedCache
from distill.engine.kernels import Ops
from distill.engine.spec import Compressed, ModelSpec, Rope
from distill.engine.weights import CompressedWeights, CompressorWeights, EntryIndexerWeights


@dataclass(frozen=True)
class _Span:
    """Rows `start …` of a batch: `count` tokens of one sequence, from position `first` on, whose pages are in
    table_p."""

    start: int
    first: int
    count: int
    table_p: Tensor

    def places(self, position: Tensor, page_size: int) -> Tensor:
        """Of positions, of any shape."""
        return self.table_p[position // page_size] * page_size + position % page_size

    def entries(self, rate: int, most: int, page_size: int) -> Tensor:
        """Places of the first `most` entries, each that of its window's last token; past the last token, any."""
        last_n = (torch.arange(most, device=self.table_p.device) + 1) * rate - 1
        return self.places(last_n.clamp(max=self.first + self.count - 1), page_size)


def _spans(batch: Batch) -> Iterator[_Span]:
    for rows in batch.segments:
        if isinstance(rows, DecodeRows):
            for number, length in enumerate(rows.length_b.tolist()):
                yield _Span(rows.start + number, length - 1, 1, rows.table_bp[number])
        else:
            assert isinstance(rows, PrefillChunk)
            count = rows.end - rows.start
            yield _Span(rows.start, rows.length - count, count, rows.table_p)


def _angles(rope: Rope, spans: list[_Span], device: torch.device) -> tuple[Tensor, Tensor]:
    positions = [position for span in spans for position in range(span.first, span.first + span.count)]
    return rotations(rope, torch.tensor(positions, device=device))


def attend(
    spec: ModelSpec,
    ops: Ops,
    w: CompressedWeights,
    layer: int,
    x_tc: Tensor,
    batch: Batch,
    cache: PagedCache,
    wanted: Wanted | None,
) -> Tensor:
    """The attention of one layer → [r, c]; writes the cache for all rows. wanted: the rows of the result, if they are
    not all."""
    dims, pools, d = spec.compressed, cache.pools[layer], spec.head_dim
    assert dims is not None
    rate, spans = dims.rates[layer], list(_spans(batch))
    rope = dims.rope if rate else spec.rope
    cos_tr, sin_tr = _angles(rope, spans, x_tc.device)
    page_size, rows_each = pools[0].shape[2], 2 if rate else 1
    kv_td = ops.rms_norm(ops.linear(x_tc, w.kv.weight), w.kv_norm, spec.norm_eps)
    ops.rope(kv_td[:, None, -rope.dim :], cos_tr, sin_tr, rope.interleaved)
    _write_rows(ops, pools[0], d, (batch.page_t * page_size + batch.offset_t) * rows_each, kv_td)
    if w.compressor is not None:
        compress = _Compression(spec, ops, rope, rate, dims.overlap(layer), batch, spans)
        compress(w.compressor, x_tc, pools[1], pools[0], d, rows_each=2, row=1)
        if w.indexer is not None:
            compress(w.indexer.compressor, x_tc, pools[3], pools[2], dims.indexer.head_dim, rows_each=1, row=0)
    if wanted is not None:
        batch, x_tc = wanted.batch, x_tc.index_select(0, wanted.row_r)
        spans = list(_spans(batch))
        cos_tr, sin_tr = _angles(rope, spans, x_tc.device)
    if not len(x_tc):
        return x_tc
    latent_tq = ops.rms_norm(ops.linear(x_tc, w.q_a.weight), w.q_norm, spec.norm_eps, w.q.weight)
    q_thd = ops.linear(latent_tq, w.q.weight).unflatten(-1, (spec.num_heads, d))
    q_thd = ops.rms_norm(q_thd.flatten(0, 1), w.ones_d, spec.norm_eps).view_as(q_thd)
    ops.rope(q_thd[..., -rope.dim :], cos_tr, sin_tr, rope.interleaved)
    row_tl = _window_rows(spans, dims.window, page_size) * rows_each
    row_tl[row_tl < 0] = -1
    if rate:
        most = max((span.first + span.count) // rate for span in spans)
        if w.indexer is None:
            entry_tl = _entry_places(spans, rate, page_size, most)
        else:
            entry_tl = _entry_places(spans, rate, page_size, min(most, dims.indexer.top_k))
            undefined_t = _choose(
                ops, dims, w.indexer, spans, rate, latent_tq, x_tc, (cos_tr, sin_tr), pools[2], entry_tl
            )
            q_thd = q_thd.masked_fill(undefined_t[:, None, None], float("nan"))
        row_tl = torch.cat((row_tl, torch.where(entry_tl < 0, -1, 2 * entry_tl + 1)), dim=1)
    out_thd = ops.attend_rows(q_thd, pools[0].view(-1, d), row_tl, w.sink_h, spec.softmax_scale)
    ops.rope(out_thd[..., -rope.dim :], cos_tr, -sin_tr, rope.interleaved)
    out_tgc = ops.per_head(out_thd.flatten(1).unflatten(1, (dims.o_groups, -1)), w.o_a)
    return ops.linear(out_tgc.flatten(1), w.o_b.weight)


def _write_rows(ops: Ops, pool: Tensor, width: int, row_t: Tensor, x_td: Tensor) -> None:
    """Write into a pool seen as [rows, width]."""
    ops.paged_write(pool.view(-1, 1, 1, width), row_t, torch.zeros_like(row_t), x_td[:, None])


@dataclass(frozen=True)
class _Compression:
    """Caches what tokens project for entries, and the entries of the windows that they close."""

    spec: ModelSpec
    ops: Ops
    rope: Rope
    rate: int
    overlap: int
    batch: Batch
    spans: list[_Span]

    def __call__(
        self, w: CompressorWeights, x_tc: Tensor, inputs: Tensor, entries: Tensor, d: int, rows_each: int, row: int
    ) -> None:
        """inputs, entries: their pools. d: width of an entry, which is row number `row` of the `rows_each` of a
        place."""
        ops, batch, page_size = self.ops, self.batch, inputs.shape[2]
        both_tm = torch.cat((ops.linear(x_tc, w.x.weight), ops.linear(x_tc, w.gate.weight)), dim=1)
        ops.paged_write(inputs, batch.page_t, batch.offset_t, both_tm[:, None])
        windows, places, absent = [], [], []
        offset_w = torch.arange((1 - self.overlap) * self.rate, self.rate, device=x_tc.device)
        for span in self.spans:
            closed = range(span.first // self.rate, (span.first + span.count) // self.rate)
            window_n = torch.arange(closed.start, closed.stop, device=x_tc.device)
            position_nw = window_n[:, None] * self.rate + offset_w
            windows.append(window_n)
            absent.append(position_nw < 0)
            places.append(span.places(position_nw.clamp(min=0), page_size))
        window_n, place_nw, absent_nw = torch.cat(windows), torch.cat(places), torch.cat(absent)
        if not len(window_n):
            return
        cached_nwm = inputs.view(-1, inputs.shape[3])[place_nw].to(x_tc.dtype)
        x_nwd, gate_nwd = (self._overlapping(part, d) for part in cached_nwm.chunk(2, dim=2))
        # Before the first window there is nothing: no share, and nothing that a share of zero would be multiplied with.
        x_nwd = x_nwd.masked_fill(absent_nw[..., None], 0)
        gate_nwd = (gate_nwd.float() + self._overlapping(w.bias_wm.float(), d)).masked_fill(
            absent_nw[..., None], -torch.inf
        )
        entry_nd = ops.rms_norm(ops.pool_windows(x_nwd, gate_nwd), w.norm, self.spec.norm_eps)
        cos_nr, sin_nr = rotations(self.rope, window_n * self.rate)
        ops.rope(entry_nd[:, None, -self.rope.dim :], cos_nr, sin_nr, self.rope.interleaved)
        _write_rows(ops, entries, d, place_nw[:, -1] * rows_each + row, entry_nd)

    def _overlapping(self, part: Tensor, d: int) -> Tensor:
        """Select what enters into this entry of projections [..., w, overlap · d]: the first d of tokens of the window
        before, the last d of tokens of the window."""
        if self.overlap == 1:
            return part
        before, own = part.split(self.rate, dim=-2) if part.shape[-2] > self.rate else (part, part)
        return torch.cat((before[..., :d], own[..., d:]), dim=-2)


def _window_rows(spans: list[_Span], window: int, page_size: int) -> Tensor:
    """Places of the last tokens that each token sees, itself included, [t, window]; negative before the first token."""
    rows = []
    for span in spans:
        last_t = torch.arange(span.first, span.first + span.count, device=span.table_p.device)
        position_tl = last_t[:, None] + torch.arange(1 - window, 1, device=last_t.device)
        place_tl = span.places(position_tl.clamp(min=0), page_size)
        rows.append(place_tl.masked_fill(position_tl < 0, -1))
    return torch.cat(rows)


def _entry_places(spans: list[_Span], rate: int, page_size: int, most: int) -> Tensor:
    """Places of the entries that each token sees, of the windows that it closes or comes after: the first `most`, then
    -1, [t, n]."""
    places = []
    for span in spans:
        seen_t = torch.arange(span.first + 1, span.first + span.count + 1, device=span.table_p.device) // rate
        entry_n = torch.arange(most, device=seen_t.device)
        places.append(torch.where(entry_n < seen_t[:, None], span.entries(rate, most, page_size), -1))
    return torch.cat(places)


def _choose(
    ops: Ops,
    dims: Compressed,
    w: EntryIndexerWeights,
    spans: list[_Span],
    rate: int,
    latent_tq: Tensor,
    x_tc: Tensor,
    angles: tuple[Tensor, Tensor],
    pool: Tensor,
    entry_tk: Tensor,
) -> Tensor:
    """Where a token sees more than `top_k` entries, write the places of those that the indexer ranks highest into its
    row of entry_tk. pool: of index keys. Returns the tokens whose scores are not numbers, which leaves the choice
    undefined, [t]."""
    undefined_t = torch.zeros(len(x_tc), dtype=torch.bool, device=x_tc.device)
    first, top_k, more = 0, dims.indexer.top_k, []  # rows of tokens, and the places of what they see
    for span in spans:
        seen = [(span.first + 1 + number) // rate for number in range(span.count)]
        if seen[-1] > top_k:
            place_n = span.entries(rate, seen[-1], pool.shape[2])
            more += [(first + number, place_n[:count]) for number, count in enumerate(seen) if count > top_k]
        first += span.count
    if not more:
        return undefined_t
    row_b = torch.tensor([row for row, _ in more], device=x_tc.device)
    latent_bq, x_bc, cos_br, sin_br = (x.index_select(0, row_b) for x in (latent_tq, x_tc, *angles))
    q_bhi, weight_bh = indexer.queries(ops, dims.indexer, w, latent_bq, x_bc)
    ops.rope(q_bhi[..., -dims.rope.dim :], cos_br, sin_br, dims.rope.interleaved)
    single = pool.view(-1, 1, 1, dims.indexer.head_dim)  # the same pool, in pages of one token
    for number, (row, place_n) in enumerate(more):
        one = slice(number, number + 1)
        entry_tk[row], undefined_t[row] = indexer.select(
            ops, q_bhi[one], weight_bh[one], single, place_n, len(place_n), top_k
        )
    return undefined_t
