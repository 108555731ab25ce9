"""The tokens of one step as one flat batch: first the rows that decode, then the chunks of prompts.

Projections run over all of it at once; only what looks at other tokens (attention, a recurrence) tells segments of rows
apart. A row is a token; `Batch` says where each is cached, how it is rotated, and which segments there are.

Legend: t tokens of the step, r requested rows (or, as a width, half the rotated part), b decoding sequences, p pages.
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

from distill.engine import sliding
from distill.engine.delta import Turns, turns
from distill.engine.sliding import Span, WindowRows
from distill.engine.spec import Indexer, ModelSpec, Rope, Sliding


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
    """One token of each of several sequences, as `build_batch` lays them out, for a model without `spec.indexer`."""
    if spec.sliding is not None:
        where = zip(ids, positions, pages, slots, strict=True)
        chunks = [Chunk((each,), at, own, slot) for each, at, own, slot in where]
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
