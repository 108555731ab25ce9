"""Decoding ahead: the next step is launched before the tokens of the one before are known here, so that the device
never waits for the host to prepare it.

Rows take their tokens from the device; here each sequence has `UNKNOWN` in its place until the step is taken in. A
row that was launched for a sequence which turns out to be finished is wasted and skipped; it writes the sequence's
pages once more, which is harmless, because the device runs whatever reuses these pages later. Only steps that are
certain to be one more token of every running sequence can be launched ahead (`Scheduler.steady`), and only without
alternatives' log-probabilities, which are read from the logits, and without a thinking budget, which may put another
token in place of the drawn one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill.engine.batch import Chunk
from distill.engine.graphs import DecodeGraphs, Launched
from distill.engine.sampler import Draw
from distill.engine.scheduler import Scheduler, SequenceState

UNKNOWN = -1


class Ahead:
    """Launches decode steps; at most one is launched and not taken in."""

    def __init__(self, graphs: DecodeGraphs) -> None:
        self._graphs = graphs
        self._step: Launched | None = None
        self._places: list[tuple[SequenceState, int]] = []  # of its rows: the sequence, where its new token belongs

    def must_take_in(self, scheduler: Scheduler) -> bool:
        """Whether a step is launched whose tokens must be known before the next one."""
        running = scheduler.running
        return self._step is not None and not (scheduler.steady and self.serve(running))

    def serve(self, sequences: Sequence[SequenceState]) -> bool:
        """Whether a step that is one token of each of these can be launched."""
        return self._graphs.serve(len(sequences), max((len(s.tokens) for s in sequences), default=0))

    def decode(
        self, sequences: Sequence[SequenceState], chunks: Sequence[Chunk], draws: Sequence[Draw]
    ) -> Iterator[tuple[SequenceState, int]]:
        """Launch a step, then take in the step before it, if there is one, as `take_in`; with alternatives requested,
        the new step too."""
        row_of = {id(sequence): row for row, (sequence, _) in enumerate(self._places)}
        before, places = self._step, self._places
        self._step = self._graphs.launch(chunks, draws, [row_of.get(id(sequence), -1) for sequence in sequences])
        self._places = []
        for sequence in sequences:
            self._places.append((sequence, len(sequence.tokens)))
            sequence.tokens.append(UNKNOWN)
            sequence.computed += 1
        if before is not None:
            yield from _filled(before, places)
        if any(draw.params.logprobs or draw.params.thinking_budget is not None for draw in draws):
            yield from self.take_in()

    def take_in(self) -> Iterator[tuple[SequenceState, int]]:
        """Wait for the launched step and fill in its tokens. Yields each sequence that is still running, and the number
        of its known tokens."""
        step, places = self._step, self._places
        self._step, self._places = None, []
        if step is not None:
            yield from _filled(step, places)


def _filled(step: Launched, places: list[tuple[SequenceState, int]]) -> Iterator[tuple[SequenceState, int]]:
    for (sequence, at), drawn in zip(places, step.drawn(), strict=True):
        if sequence.pages:  # else it has finished or was aborted
            sequence.fill(at, drawn)
            yield sequence, at + 1
