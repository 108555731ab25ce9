"""Attention inside the rows of a batch of concatenated rows, as an attention implementation of transformers.

On a GPU in half precision this is FlashAttention for sequences of different lengths, which torch includes. Elsewhere
rows of similar length are padded to a small batch, and torch's causal attention runs on each such batch: it computes no
scores between rows, whereas a block-diagonal mask computes all of them and discards most.

A row may begin with tokens of an earlier row (`Batch.prefixes`): only its own tokens are its output, but it is computed
with the prefix in front, which is gathered once more. Padding and prefixes are both a gather before and a scatter
after, so neither needs a mask. Rejected: attention to the prefix and to the own tokens apart, joined by their
normalisers, which saves the few scores of prompt tokens and needs twice the calls.

A sliding window is torch's own on a GPU; elsewhere it is a mask over a group whose rows are longer than the window.

The rows reach the layers as the keyword `rows` of the model's forward pass. There is no mask: transformers makes none
for an implementation that it does not know.

Shapes: t tokens of all rows, h query heads, g key heads, c channels of a head; b rows of a group, w tokens of its
longest.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from distill.train.learn import short

NAME = "distill_rows"
FLASH_WIDTH = 256  # channels of a head, at most, in FlashAttention
SIMILAR = 0.8  # a group's shortest row has at least this share of its longest: below, padding costs more than a call


@dataclass(frozen=True)
class Group:
    """Neighbouring rows computed together: tokens start … stop of the batch, as `rows` rows of at most `width`."""

    start: int
    stop: int
    rows: int
    width: int
    gather: Tensor | None  # int64 [b·w]: token of each position; None where all rows are whole and of one length
    scatter: Tensor | None  # int64 [stop - start]: position of each token
    lengths: tuple[int, ...] = ()  # tokens of each row, with its prefix


class Rows:
    """The boundaries of the rows of a batch. lengths, prefixes: as of `Batch`; no prefixes: all rows are whole.

    wanted: the tokens whose final hidden states are read, int64; None: all. narrowed: whether the last layer returned
    these alone, which a layer that cannot leaves False.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        prefixes: Sequence[tuple[int, int]] | None = None,
        wanted: Tensor | None = None,
    ) -> None:
        self.wanted, self.narrowed = wanted, False
        self.own, self.device = tuple(lengths), device
        self.prefixes = tuple(prefixes or [(0, 0)] * len(self.own))
        self.lengths = tuple(own + prefix for own, (_, prefix) in zip(self.own, self.prefixes, strict=True))

    @cached_property
    def offsets(self) -> Tensor:
        """Start of each row with its prefix and the end of the last, int32 [rows + 1], on the device."""
        return torch.tensor(np.cumsum((0, *self.lengths)), dtype=torch.int32, device=self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row, with its prefix."""
        return max(self.lengths)

    @cached_property
    def unshared(self) -> Group | None:
        """All rows one after the other, each with its prefix, without padding; None where all are whole."""
        if not any(prefix for _, prefix in self.prefixes):
            return None
        gather = np.concatenate([self._tokens(row) for row in range(len(self.own))])
        ends = np.cumsum(self.lengths)
        kept = [np.arange(end - own, end) for end, own in zip(ends, self.own, strict=True)]
        return Group(0, sum(self.own), 1, len(gather), self._index(gather), self._index(np.concatenate(kept)))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbouring rows of similar length."""
        first, made = 0, []
        for row, length in enumerate(self.lengths):
            together = (*self.lengths[first:row], length)
            if min(together) < SIMILAR * max(together):
                made.append(self._group(range(first, row)))
                first = row
        return (*made, self._group(range(first, len(self.lengths))))

    def _group(self, rows: range) -> Group:
        lengths = [self.lengths[row] for row in rows]
        start, stop, width = sum(self.own[: rows.start]), sum(self.own[: rows.stop]), max(lengths)
        if len(rows) * width == stop - start:
            return Group(start, stop, len(rows), width, None, None, tuple(lengths))
        # Padding repeats the row's last token; it comes after all tokens of the row, so none of them attends to it.
        gather = np.concatenate([np.pad(self._tokens(row), (0, width - self.lengths[row]), "edge") for row in rows])
        scatter = [
            place * width + np.arange(self.lengths[row] - self.own[row], self.lengths[row])
            for place, row in enumerate(rows)
        ]
        at = self._index(np.concatenate(scatter))
        return Group(start, stop, len(rows), width, self._index(gather), at, tuple(lengths))

    def _tokens(self, row: int) -> npt.NDArray[np.int64]:
        """The tokens of a row with its prefix, as numbers of the batch's."""
        start, (prefix, shared) = sum(self.own[:row]), self.prefixes[row]
        return np.concatenate([np.arange(prefix, prefix + shared), np.arange(start, start + self.own[row])])

    def _index(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each row. query: [1, h, t, c]; key, value: [1, g, t, c]. Returns [1, t, h, c], and no
    attention weights. sliding_window: how many tokens a token attends to, itself included; None: all of its row."""
    assert attention_mask is None and query.shape[0] == 1, "rows are concatenated in one sequence"
    window = sliding_window if sliding_window and sliding_window < rows.longest else None
    q_thc, k_tgc, v_tgc = (x[0].transpose(0, 1) for x in (query, key, value))
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and not dropout and q_thc.shape[-1] <= FLASH_WIDTH:
        q_thc, k_tgc, v_tgc = (x.to(dtype) for x in (q_thc, k_tgc, v_tgc))
        return flash(q_thc, k_tgc, v_tgc, rows, scaling, window)[None], None
    return inside_rows(q_thc, k_tgc, v_tgc, rows, scaling, dropout, window)[None], None


def inside_rows(
    q_thc: Tensor,
    k_tgc: Tensor,
    v_tgc: Tensor,
    rows: Rows,
    scaling: float | None,
    dropout: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each row, by groups of rows of similar length. Returns [t, h, c]."""
    parts = [grouped(q_thc, k_tgc, v_tgc, group, scaling, dropout, window) for group in rows.groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def flash(
    q_thc: Tensor, k_tgc: Tensor, v_tgc: Tensor, rows: Rows, scaling: float | None, window: int | None = None
) -> Tensor:
    """By torch's FlashAttention for sequences of different lengths. Returns [t, h, c]."""
    if (all_rows := rows.unshared) is not None:
        assert all_rows.gather is not None
        q_thc, k_tgc, v_tgc = (x.index_select(0, all_rows.gather) for x in (q_thc, k_tgc, v_tgc))
    from torch.nn.attention.varlen import varlen_attn

    at, longest = rows.offsets, rows.longest
    attention = varlen_attn
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older versions always accept grouped heads
        attention = partial(varlen_attn, enable_gqa=True)
    seen = (-1 if window is None else window - 1, 0)  # tokens to the left (-1: all), none to the right
    out_thc = attention(q_thc, k_tgc, v_tgc, at, at, longest, longest, scale=scaling, window_size=seen)
    assert isinstance(out_thc, Tensor)
    if all_rows is None:
        return out_thc
    assert all_rows.scatter is not None
    return out_thc.index_select(0, all_rows.scatter)


def grouped(
    q_thc: Tensor,
    k_tgc: Tensor,
    v_tgc: Tensor,
    group: Group,
    scaling: float | None,
    dropout: float,
    window: int | None = None,
) -> Tensor:
    """By torch's scaled dot-product attention on the group as a padded batch. Returns the group's tokens [·, h, c]."""

    def batch(x_thc: Tensor) -> Tensor:
        x_thc = x_thc[group.start : group.stop] if group.gather is None else x_thc.index_select(0, group.gather)
        return x_thc.reshape(group.rows, group.width, *x_thc.shape[1:])

    q_bwhc, k_bwgc, v_bwgc = batch(q_thc), batch(k_tgc), batch(v_tgc)
    mask_ww = None if window is None or window >= group.width else band(group.width, window, q_thc.device)
    if mask_ww is None and short.takes(q_bwhc, dropout):
        out_thc = short.attend(q_bwhc, k_bwgc, v_bwgc, scaling or q_bwhc.shape[-1] ** -0.5).flatten(0, 1)
    else:
        q_bhwc, k_bgwc, v_bgwc = (x.transpose(1, 2) for x in (q_bwhc, k_bwgc, v_bwgc))
        seen = {"is_causal": True} if mask_ww is None else {"attn_mask": mask_ww}
        if q_bhwc.is_cuda and q_bhwc.shape[-1] > FLASH_WIDTH:  # the kernel that takes these takes no grouped heads
            each = q_bhwc.shape[1] // k_bgwc.shape[1]
            k_bgwc, v_bgwc = (x.repeat_interleave(each, 1) for x in (k_bgwc, v_bgwc))
        out_bhwc = F.scaled_dot_product_attention(
            q_bhwc,
            k_bgwc,
            v_bgwc,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q_bhwc.shape[1] != k_bgwc.shape[1],
            **seen,
        )
        out_thc = out_bhwc.transpose(1, 2).flatten(0, 1)
    return out_thc if group.scatter is None else out_thc.index_select(0, group.scatter)


def band(width: int, window: int, device: torch.device) -> Tensor:
    """Whether the token of a row sees that of a column: itself and the `window - 1` before it, bool [w, w]."""
    place_w = torch.arange(width, device=device)
    behind_ww = place_w[:, None] - place_w
    return (behind_ww >= 0) & (behind_ww < window)


AttentionInterface.register(NAME, attend)
