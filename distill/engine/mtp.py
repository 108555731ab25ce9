"""Multi-token prediction: the checkpoint's own draft layer proposes tokens, the model decides.

The model draws the token of every position with that position's own random number, as it does without drafts, and a
draft is accepted if it is the same token. So the text with drafts is the text without them, at any temperature and any
top p. Drafts are drawn with the same random number as well, which makes them agree more often than an independent draw
or the likeliest token would. The classical rule (accept with probability min(1, p/q), else draw from the rest) was
rejected: it keeps the distribution but not the text, which would then depend on whether there are drafts.

Position i of the layer's cache is computed from the model's hidden state at position i and the token at i+1. It thus
lags the model by one position, and by more where drafts were accepted: `SequenceState.hidden` keeps the states that it
has not processed. To draft further than one token, its own state takes the place of the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.engine.batch import Batch, Chunk
from distill.engine.cache import PagedCache
from distill.engine.model import Model
from distill.engine.sampler import Draw, sample
from distill.engine.scheduler import SequenceState


def accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the drawn tokens are accepted: those that equal their drafts, and the token after them.

    drawn[i] is the model's token for the position of drafts[i], and there is one more: where all drafts agree.
    """
    for number, (draft, token) in enumerate(zip(drafts, drawn, strict=False)):
        if draft != token:
            return number + 1
    return len(drawn)


class Drafter:
    """The draft layer and its place in the cache. Attributes: `proposed` and `accepted`, running totals of tokens."""

    def __init__(self, model: Model, cache: PagedCache, batch: Callable[[list[Chunk], list[Chunk]], Batch]) -> None:
        self.proposed = self.accepted = 0
        self._model, self._cache, self._batch = model, cache, batch

    def follow(self, computed: Sequence[tuple[SequenceState, Tensor]]) -> None:
        """Run over prompts as far as they are computed. Each sequence comes with the hidden states of its newest
        positions, [n, c]; the last of them is kept until its next token is known."""
        chunks, hidden = [], []
        for sequence, new_nc in computed:
            states_nc = new_nc if sequence.hidden is None else torch.cat((sequence.hidden, new_nc))
            first = sequence.computed - len(states_nc)
            if len(states_nc) > 1:
                chunks.append(Chunk(sequence.tokens[first + 1 : sequence.computed], first, sequence.pages))
                hidden.append(states_nc[:-1])
            sequence.hidden = states_nc[-1:].clone()
        if chunks:
            self._model.draft(torch.cat(hidden), self._batch([], chunks), self._cache)

    def draft(self, sequences: Sequence[SequenceState], counts: Sequence[int]) -> list[list[int]]:
        """Up to counts[i] tokens that may follow the last one of sequence i, whose pages have room for them."""
        drafts: list[list[int]] = [[] for _ in sequences]
        asked = [i for i, count in enumerate(counts) if count]
        if not asked:
            return drafts
        chunks, hidden, last = [], [], []
        for i in asked:
            sequence = sequences[i]
            assert sequence.hidden is not None
            first = sequence.computed - len(sequence.hidden)
            chunks += [
                Chunk(sequence.tokens[p + 1 : p + 2], p, sequence.pages) for p in range(first, sequence.computed)
            ]
            hidden.append(sequence.hidden)
            last.append(len(chunks) - 1)
        state_tc = self._model.draft(torch.cat(hidden), self._batch(chunks, []), self._cache)
        state_bc = state_tc.index_select(0, torch.tensor(last, device=state_tc.device))
        while True:
            depth = len(drafts[asked[0]])
            drawn = sample(
                self._model.ops,
                self._model.logits(state_bc),
                [
                    Draw(row, sequences[i].key, len(sequences[i].tokens) + depth, sequences[i].request.sampling)
                    for row, i in enumerate(asked)
                ],
            )
            for i, token in zip(asked, drawn, strict=True):
                drafts[i].append(token.token)
            rows = [row for row, i in enumerate(asked) if counts[i] > depth + 1]
            if not rows:
                self.proposed += sum(map(len, drafts))
                return drafts
            state_bc = state_bc.index_select(0, torch.tensor(rows, device=state_bc.device))
            asked = [asked[row] for row in rows]
            chunks = [Chunk(drafts[i][-1:], sequences[i].computed + depth, sequences[i].pages) for i in asked]
            state_bc = self._model.draft(state_bc, self._batch(chunks, []), self._cache)
