"""What a sequence does in a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine.scheduler import SequenceState


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: the tokens to compute, from its position `computed` on, and where their hidden
    states will be: first the requested rows of its prompt, among the prefilled, then the decoding rows."""

    sequence: SequenceState
    ids: list[int]
    decoded: slice
    prefilled: slice

    def rows(self, decoded_tc: Tensor, prefilled_rc: Tensor) -> Tensor:
        """Its hidden states, in order, [r, c]."""
        return torch.cat((prefilled_rc[self.prefilled], decoded_tc[self.decoded]))
