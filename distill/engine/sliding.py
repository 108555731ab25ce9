"""Sliding windows: layers whose tokens attend to the last tokens before them, and to no others.

A row whose context fits into the window is computed as in any other layer. Of a longer one, the places of its last
`window` tokens are its table, over the same pool seen as pages of one token, and every op for a decoding query computes
it: it attends to the same tokens in the same order whether its token was decoded alone, in a batch, or in a chunk of a
prompt. Sparse attention takes the same way (attention.py).

Pages of tokens that have left the window are not given back: all layers of a sequence share one list of pages, and the
layers without a window need them. Rejected: a lower limit in the kernels, which would make prompts somewhat faster, as
neighbouring rows would share the keys that they read, and would have to be added to every kernel of every column.

Legend: t tokens of the step, b rows, h query heads, k key-value heads, d width of a head, w window, r half the rotated
width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.engine.kernels import Ops

PLACES = 1 << 22  # of a table that is made at a time


@dataclass(frozen=True)
class WindowRows:
    """Rows `start … end-1` of the flat batch, each of which sees more tokens than a window has. token_bw: the last
    ones, as page · page size + offset."""

    start: int
    end: int
    token_bw: Tensor


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in a step: `count` of them, the first at position `first`."""

    first: int
    count: int
    pages: Sequence[int]


def whole_rows(first: int, count: int, window: int) -> int:
    """How many of `count` rows from position `first` on have contexts that fit into a window."""
    return min(max(window - first, 0), count)


def window_rows(start: int, spans: Sequence[Span], window: int, page_size: int, device: torch.device) -> WindowRows:
    """Rows from number `start` on, of contexts that are longer than the window."""
    parts = []
    for span in spans:
        last_b = np.arange(span.first, span.first + span.count)
        token_bw = last_b[:, None] + np.arange(1 - window, 1)
        parts.append(np.asarray(span.pages, np.int64)[token_bw // page_size] * page_size + token_bw % page_size)
    tokens = np.concatenate(parts)
    return WindowRows(start, start + len(tokens), torch.from_numpy(tokens).to(device))


def runs(long: Iterator[bool]) -> Iterator[tuple[bool, int, int]]:
    """(value, first, end) of each run of equal values."""
    for value, group in itertools.groupby(enumerate(long), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        yield value, numbers[0], numbers[-1] + 1


def attend(ops: Ops, rows: WindowRows, q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, scale: float) -> Tensor:
    """Attention of rows to the tokens of their windows → [b, h, d]. Each key-value head of a row is a row of the op."""
    _, heads, page_size, width = k_pool.shape
    window = rows.token_bw.shape[1]
    keys, values = (pool.view(-1, 1, 1, width) for pool in (k_pool, v_pool))  # the same pools, in pages of one token
    page_bw, offset_bw = rows.token_bw // page_size, rows.token_bw % page_size
    head_k1 = torch.arange(heads, device=page_bw.device)[:, None] * page_size
    parts = []
    step = max(1, PLACES // (heads * window))
    for at in range(0, len(q_bhd), step):
        these = slice(at, at + step)
        place_bkw = page_bw[these, None] * (heads * page_size) + head_k1 + offset_bw[these, None]
        q_nhd = q_bhd[these].unflatten(1, (heads, -1)).flatten(0, 1)
        lengths_n = torch.full((len(q_nhd),), window, device=page_bw.device)
        out_nhd = ops.decode_gqa(q_nhd, keys, values, place_bkw.flatten(0, 1), lengths_n, scale)
        parts.append(out_nhd.view(-1, *q_bhd.shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
