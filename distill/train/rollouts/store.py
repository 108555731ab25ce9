"""Rollouts on the disk: what the student wrote, in which step, and what it was rewarded with.

    rollouts/ledger.jsonl, part-*.parquet   the rollouts, as traces are stored (`traces.store`)
    rollouts/rewards.jsonl                  their rewards (`traces.rewarded`)
    rollouts/likeliest-000012.npy           the student's likeliest tokens in set 12, until it is trained on

A rollout is a trace whose sample number says when it was written: set · samples + number, so that a prompt that comes
again in a later epoch has other samples. A set is on the disk before it is trained on. A training that was killed
resumes at its newest checkpoint, finds the sets that came after it, and does not sample them again; where the engine's
kernels sum in a fixed order it would sample the same.

The likeliest tokens are what the teacher is asked for besides its own. They are `top_k` numbers for each token of a
rollout, more than everything else together, and nobody reads them once a set is trained on: a file of their own, int32
[tokens of the set, k] followed by its CRC-32, is written in a thousandth of the time that JSON takes and is deleted
after the checkpoint. Rewards are stored because a grader that runs out of time may decide otherwise at a resume.
"""

import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill.durable import write_whole
from distill.errors import UserError
from distill.traces.keys import Key
from distill.traces.ledger import Ledger
from distill.traces.rewarded import REWARDS, Reward, read_rewards
from distill.traces.store import TraceStore
from distill.traces.trace import Trace
from distill.train.rollouts.student import Rollout

COMPACTED = 8192  # rollouts in the ledger from which on they are moved into Parquet at the next checkpoint


class RolloutStore:
    """The rollouts of one training. samples: per prompt and set. One process writes, and closes the store."""

    def __init__(self, directory: Path, samples: int) -> None:
        self.directory, self.samples = directory, samples
        self._traces = TraceStore(directory)
        self._rewards = Ledger(directory / REWARDS)
        self._opened = ExitStack()
        self._is_open = False
        self._appended = 0

    def set_of(self, trace: Trace) -> int:
        """The set that a rollout belongs to."""
        return trace.sample // self.samples

    # ---- reading

    def from_set(self, first: int) -> dict[int, list[Trace]]:
        """The stored rollouts of set `first` and later ones, by set. Errors: UserError when a file is damaged."""
        sets: dict[int, list[Trace]] = {}
        if self.directory.exists():
            for trace in self._traces:
                if self.set_of(trace) >= first:
                    sets.setdefault(self.set_of(trace), []).append(trace)
        return sets

    def rewards_from(self, first: int) -> dict[Key, Reward]:
        """The stored rewards of set `first` and later ones. Errors: as `from_set`."""
        return {
            key: reward for key, reward in read_rewards(self.directory / REWARDS) if key[1] // self.samples >= first
        }

    def likeliest(self, number: int, traces: Sequence[Trace]) -> list[npt.NDArray[np.int32]] | None:
        """The student's likeliest tokens at each token of a set's rollouts, in the order in which they were appended;
        None where they are not stored. Errors: UserError when the file is damaged."""
        path = self._likeliest(number)
        if not path.exists():
            return None
        data = path.read_bytes()
        if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            raise UserError(f"{path}: damaged (its checksum does not match); delete it, and training recomputes it")
        ids_tk = np.load(io.BytesIO(data[:-4]), allow_pickle=False)
        ends = np.cumsum([0, *(len(trace.completion_token_ids) for trace in traces)]).tolist()
        return [ids_tk[start:end] for start, end in pairwise(ends)] if ends[-1] == len(ids_tk) else None

    # ---- writing

    def append(self, number: int, rollouts: Sequence[Rollout], stored: Iterable[Key] = ()) -> None:
        """Store a set durably, all or nothing. stored: keys of rollouts that are there already. Errors: OSError when
        the disk is full."""
        self._open()
        new = [each.trace for each in rollouts if each.trace.key not in set(stored)]
        likeliest = [each.likeliest for each in rollouts if each.likeliest is not None]
        if likeliest:
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate(likeliest), allow_pickle=False)
            data = buffer.getvalue()
            write_whole(self._likeliest(number), data + zlib.crc32(data).to_bytes(4, "little"))
        self._traces.append(new)
        self._appended += len(new)

    @contextmanager
    def appending(self, number: int, rollouts: Sequence[Rollout], stored: Iterable[Key]) -> Iterator[None]:
        """Store a set as `append` does, while the block runs: most of it is waiting for the disk. At the end of the
        block it is stored. The block leaves the store alone."""
        with ThreadPoolExecutor(1) as writer:
            written = writer.submit(self.append, number, rollouts, stored)
            yield
            written.result()

    def append_rewards(self, rewards: Iterable[tuple[Key, Reward]]) -> None:
        """Store rewards durably. Errors: OSError when the disk is full."""
        if rows := [reward.to_row(key) for key, reward in rewards]:
            self._open()
            self._rewards.append(rows)

    def compact(self, least: int = COMPACTED) -> None:
        """Move the ledger into Parquet, if this process has appended `least` rollouts. 0: in any case, since an earlier
        process may have left it."""
        if self._appended >= least:
            self.close()
            self._traces.compact()
            self._appended = 0

    def forget(self, before: int | None = None) -> None:
        """Delete the likeliest tokens of the sets before a number, None: of all."""
        for path in self.directory.glob("likeliest-*.npy"):
            if before is None or int(path.stem.removeprefix("likeliest-")) < before:
                path.unlink()

    def close(self) -> None:
        """Close the files; appending opens them again."""
        self._is_open = False
        self._opened.close()

    def _open(self) -> None:
        if not self._is_open:
            self._opened.enter_context(self._traces)
            self._opened.enter_context(self._rewards)
            self._is_open = True

    def _likeliest(self, number: int) -> Path:
        return self.directory / f"likeliest-{number:06d}.npy"
