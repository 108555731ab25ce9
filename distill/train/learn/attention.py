"""Attention inside the rows of a batch of concatenated rows, as an attention implementation of transformers.

On a GPU in half precision this is FlashAttention for sequences of different lengths, which torch includes. Elsewhere
rows of similar length are padded to a small batch, and torch's causal attention runs on each such batch: it computes no
scores between rows, whereas a block-diagonal mask computes all of them and discards most.

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
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "distill_rows"
SIMILAR = 0.8  # a group's shortest row has at least this share of its longest: below, padding costs more than a call


@dataclass(frozen=True)
class Group:
    """Neighbouring rows computed together: tokens start … stop of the batch, as `rows` rows of at most `width`."""

    start: int
    stop: int
    rows: int
    width: int
    gather: Tensor | None  # int64 [b·w]: token of each position, from `start`; None where all rows have one length
    scatter: Tensor | None  # int64 [stop - start]: position of each token


class Rows:
    """The boundaries of the rows of a batch. lengths: tokens of each, in order."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = tuple(lengths), device

    @cached_property
    def offsets(self) -> Tensor:
        """Start of each row and the end of the last, int32 [rows + 1], on the device."""
        return torch.tensor(np.cumsum((0, *self.lengths)), dtype=torch.int32, device=self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbouring rows of similar length."""
        made: list[Group] = []
        start, together = 0, [self.lengths[0]]
        for length in self.lengths[1:]:
            if min(length, *together) < SIMILAR * max(length, *together):
                made.append(self._group(start, together))
                start, together = made[-1].stop, []
            together.append(length)
        return (*made, self._group(start, together))

    def _group(self, start: int, lengths: list[int]) -> Group:
        rows, width, total = len(lengths), max(lengths), sum(lengths)
        if rows * width == total:
            return Group(start, start + total, rows, width, None, None)
        begins = np.cumsum([0, *lengths[:-1]])
        # Padding repeats the row's last token; it comes after all tokens of the row, so none of them attends to it.
        gather = np.concatenate([b + np.minimum(np.arange(width), n - 1) for b, n in zip(begins, lengths, strict=True)])
        scatter = np.concatenate([i * width + np.arange(n) for i, n in enumerate(lengths)])
        return Group(
            start, start + total, rows, width, *(torch.from_numpy(a).to(self.device) for a in (gather, scatter))
        )


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
    attention weights."""
    assert attention_mask is None and query.shape[0] == 1, "rows are concatenated in one sequence"
    assert not sliding_window or sliding_window >= rows.longest, (
        "students with a sliding window are refused at the gate"
    )
    q_thc, k_tgc, v_tgc = (x[0].transpose(0, 1) for x in (query, key, value))
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    if query.is_cuda and dtype in (torch.bfloat16, torch.float16) and not dropout:
        q_thc, k_tgc, v_tgc = (x.to(dtype) for x in (q_thc, k_tgc, v_tgc))
        return flash(q_thc, k_tgc, v_tgc, rows, scaling)[None], None
    parts = [grouped(q_thc, k_tgc, v_tgc, group, scaling, dropout) for group in rows.groups]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def flash(q_thc: Tensor, k_tgc: Tensor, v_tgc: Tensor, rows: Rows, scaling: float | None) -> Tensor:
    """By torch's FlashAttention for sequences of different lengths. Returns [t, h, c]."""
    from torch.nn.attention.varlen import varlen_attn

    at, longest = rows.offsets, rows.longest
    attention = varlen_attn
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older versions always accept grouped heads
        attention = partial(varlen_attn, enable_gqa=True)
    causal = (-1, 0)  # all tokens to the left, none to the right
    out_thc = attention(q_thc, k_tgc, v_tgc, at, at, longest, longest, scale=scaling, window_size=causal)
    assert isinstance(out_thc, Tensor)
    return out_thc


def grouped(q_thc: Tensor, k_tgc: Tensor, v_tgc: Tensor, group: Group, scaling: float | None, dropout: float) -> Tensor:
    """By torch's scaled dot-product attention on the group as a padded batch. Returns the group's tokens [·, h, c]."""

    def batch(x_thc: Tensor) -> Tensor:
        x_thc = x_thc[group.start : group.stop]
        if group.gather is not None:
            x_thc = x_thc.index_select(0, group.gather)
        return x_thc.reshape(group.rows, group.width, *x_thc.shape[1:]).transpose(1, 2)

    out_bhwc = F.scaled_dot_product_attention(
        batch(q_thc), batch(k_tgc), batch(v_tgc), dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    out_thc = out_bhwc.transpose(1, 2).flatten(0, 1)
    return out_thc if group.scatter is None else out_thc.index_select(0, group.scatter)


AttentionInterface.register(NAME, attend)
