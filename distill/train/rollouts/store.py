"""Rollouts on the disk: what the student wrote, and in which step.

    rollouts/ledger.jsonl, part-*.parquet   the rollouts, as traces are stored (`traces.store`)

A rollout is a trace whose sample number says when it was written: set · samples + number, so that a prompt that comes
again in a later epoch has other samples. A set is on the disk before it is trained on. A training that was killed
resumes at its newest checkpoint, finds the sets that came after it, and does not sample them again; where the engine's
kernels sum in a fixed order it would sample the same.
"""

from collections.abc import Sequence
from pathlib import Path

from distill.traces.store import TraceStore
from distill.traces.trace import Trace

COMPACTED = 8192  # rollouts in the ledger from which on they are moved into Parquet at the next checkpoint


class RolloutStore:
    """The rollouts of one training. samples: per prompt and set. One process writes."""

    def __init__(self, directory: Path, samples: int) -> None:
        self.samples = samples
        self._store = TraceStore(directory)
        self._appended = 0

    def set_of(self, trace: Trace) -> int:
        """The set that a rollout belongs to."""
        return trace.sample // self.samples

    def from_set(self, first: int) -> dict[int, list[Trace]]:
        """The stored rollouts of set `first` and later ones, by set. Errors: UserError when a file is damaged."""
        sets: dict[int, list[Trace]] = {}
        if self._store.directory.exists():
            for trace in self._store:
                if self.set_of(trace) >= first:
                    sets.setdefault(self.set_of(trace), []).append(trace)
        return sets

    def append(self, rollouts: Sequence[Trace]) -> None:
        """Store rollouts durably, all or none. Errors: OSError when the disk is full."""
        with self._store:
            self._store.append(rollouts)
        self._appended += len(rollouts)

    def compact(self, least: int = COMPACTED) -> None:
        """Move the ledger into Parquet, if this process has appended `least` rollouts. 0: in any case, since an earlier
        process may have left it."""
        if self._appended >= least:
            self._store.compact()
            self._appended = 0
