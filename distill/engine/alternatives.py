"""The likeliest tokens at each position of a text, as arrays: a tuple for each of them takes longer than sampling a
token from a small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Alternatives at t positions, likeliest first, int32 and float32 [t, k]. Past the last one of a position the
    log-probability is −∞ (and the id 0)."""

    id_tk: np.ndarray
    logprob_tk: np.ndarray

    @classmethod
    def of(cls, tops: Sequence[Sequence[tuple[int, float]]]) -> Alternatives:
        """Those that are given as (id, log-probability) at each position, any number of them."""
        width = max(map(len, tops), default=0)
        id_tk, logprob_tk = np.zeros((len(tops), width), np.int32), np.full((len(tops), width), -np.inf, np.float32)
        for place, top in enumerate(tops):
            if top:
                id_tk[place, : len(top)], logprob_tk[place, : len(top)] = zip(*top, strict=True)
        return cls(id_tk, logprob_tk)

    @classmethod
    def joined(cls, parts: Sequence[Alternatives]) -> Alternatives:
        """One after the other, as many at each position."""
        if not parts:
            return cls.of(())
        return cls(np.concatenate([part.id_tk for part in parts]), np.concatenate([part.logprob_tk for part in parts]))

    def __len__(self) -> int:
        return len(self.id_tk)

    def __getitem__(self, places: slice) -> Alternatives:
        return Alternatives(self.id_tk[places], self.logprob_tk[places])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alternatives) and self.pairs == other.pairs

    @property
    def pairs(self) -> tuple[TopLogprobs, ...]:
        """(id, log-probability) of the alternatives at each position."""
        count_t = (self.logprob_tk > -np.inf).sum(1).tolist()
        rows = zip(self.id_tk.tolist(), self.logprob_tk.tolist(), count_t, strict=True)
        return tuple(tuple(zip(ids[:count], logprobs[:count], strict=True)) for ids, logprobs, count in rows)
