"""Checkpoints that are whole or absent, verified before they are loaded, and never unpickled.

A checkpoint is a directory `step-000200/`: tensors in safetensors files (`ranks.tensors`; each rank writes its own), a
copy of the log, and `state.json` with the position of the training, the fingerprint of its settings and a hash of every
file. It is written under another name, fsync'd, and renamed; a rename happens or does not. A checkpoint that is deleted
is renamed first, too, so that a half-deleted one is never taken for whole.

A rename does not protect from a disk or a copy that changes bits, and eight changed bits of the weights are enough for
another student without any message. So every byte is hashed before it is loaded (the ranks share the files among
them), and `state.json` carries a checksum of itself. A damaged checkpoint is reported and deleted, and training resumes
from the one before, or starts over.

The log is part of the checkpoint: restoring puts it back as it was at that step, so that every step is in it once, and
a log that was lost or damaged returns.

Rejected: torch's distributed checkpoint, whose `.metadata` is a pickle: writing it means running code at the next
resume.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import JsonValue
from safetensors import SafetensorError

from distill.artefacts import Artefact
from distill.console import say
from distill.durable import new_name, remove_directory, remove_leftovers, replace_directory, sync, write_whole
from distill.errors import UserError, WorkError
from distill.integrity import FileRecord, record_files
from distill.traces.ledger import line_of

NAME = re.compile(r"step-(\d{6,})")
LOG, STATE = "log.jsonl", "state.json"


class Step(NamedTuple):
    """Figures of one optimiser step. parts: the means of the loss parts over its supervised tokens. figures: those of
    the feed (`rows.feed.Feed.after`)."""

    parts: tuple[float, ...]
    norm: float
    supervised: int
    figures: dict[str, JsonValue] | None = None


@dataclass
class Position:
    """Where a training is: everything that is neither a tensor nor a function of the step.

    step: optimiser steps done. tokens, supervised_tokens: seen so far. first_loss, last_loss: of the log lines.
    eval_loss: the last one on the held-out rows. window: steps since the last log line. recent: losses of the last
    steps, to detect a jump. feed: the state of the feed.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    window: list[Step] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    feed: JsonValue = None


class CheckpointRecord(Artefact):
    """`state.json`. fingerprint: of the settings of the training. files: all other files of the checkpoint."""

    fingerprint: str
    position: Position
    files: dict[str, FileRecord]


class Tensors(Protocol):
    """`ranks.tensors.State`: what is saved beside a position. All ranks call it at the same time."""

    def save(self, directory: Path) -> None:
        """Write the tensors of this rank into `directory`."""

    def load(self, directory: Path) -> None:
        """Read the tensors of this rank from `directory`."""


class Ranks(Protocol):
    """`ranks.world.World`: this process among those that train together."""

    rank: int
    size: int

    @property
    def main(self) -> bool:
        """Whether this process creates, renames and deletes."""

    def wait(self) -> None:
        """Wait for all ranks."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""


class Alone:
    """One process."""

    rank, size, main = 0, 1, True

    def wait(self) -> None:
        """Return at once."""

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag


class Checkpoints:
    """The directory `checkpoints/` of a run: the log, and at most `limit` checkpoints.

    fingerprint: of the settings that decide the training; a checkpoint with another one is refused.
    """

    def __init__(self, directory: Path, limit: int, ranks: Ranks | None = None, fingerprint: str = "") -> None:
        self.directory, self.limit, self.fingerprint = directory, limit, fingerprint
        self.ranks: Ranks = ranks or Alone()
        self.log_path = directory / LOG
        if self.ranks.main:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in (*directory.glob(".step-*.new"), *directory.glob(".step-*.old")):
                shutil.rmtree(leftover)
        self.ranks.wait()

    def newest(self) -> Path | None:
        """The newest checkpoint, unverified."""
        return next(iter(self._newest_first()), None)

    def restore(self, tensors: Tensors) -> Position:
        """Load the newest whole checkpoint, if there is one, into the tensors, and put its log back.

        Errors: UserError when a checkpoint belongs to a training with other settings.
        """
        position, log = Position(), b""
        if path := self._newest_whole():
            record = CheckpointRecord.read(path / STATE, "it was verified just now")
            tensors.load(path)
            position = record.position
            log = (path / LOG).read_bytes() if LOG in record.files else b""
        self.ranks.wait()
        if self.ranks.main and (log or self.log_path.exists()):
            write_whole(self.log_path, log)
        return position

    def log(self, row: Mapping[str, JsonValue]) -> None:
        """Append one line. It is on the disk for certain when the next checkpoint is."""
        if self.ranks.main:
            with self.log_path.open("ab") as file:
                file.write(line_of(dict(row)))

    def save(self, tensors: Tensors, position: Position) -> None:
        """Write a checkpoint of `position`, then delete the oldest beyond the limit. Errors: WorkError."""
        path = self.directory / f"step-{position.step:06d}"
        with writing(path, self.ranks) as scratch:
            tensors.save(scratch)
            self.ranks.wait()
            if self.ranks.main:
                if self.log_path.exists():
                    sync(self.log_path)
                    shutil.copyfile(self.log_path, scratch / LOG)
                files = record_files(scratch, (p for p in scratch.rglob("*") if p.is_file()))
                CheckpointRecord(fingerprint=self.fingerprint, position=position, files=files).write(scratch / STATE)
        if self.ranks.main:
            for old in self._newest_first()[self.limit :]:
                remove_directory(old)
        self.ranks.wait()

    def _newest_first(self) -> list[Path]:
        paths = [path for path in self.directory.glob("step-*") if path.is_dir() and NAME.fullmatch(path.name)]
        return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def _newest_whole(self) -> Path | None:
        """Verify checkpoints, the newest first; delete those that are damaged. All ranks together."""
        paths = self._newest_first()
        self.ranks.wait()  # all have listed them before the first is deleted
        for path, before in zip_longest(paths, paths[1:]):
            what = self._damage(path)
            if not self.ranks.any(what is not None):
                return path
            if self.ranks.main:
                then = f"training resumes from {before.name}" if before else "training starts over"
                say(f"{what or f'{path} is damaged'}; the checkpoint is deleted, {then}")
                remove_directory(path)
            self.ranks.wait()
        return None

    def _damage(self, path: Path) -> str | None:
        """What is wrong with the checkpoint's record or with this rank's share of its files, else None."""
        if not (path / STATE).is_file():
            return f"{path / STATE} is missing"
        try:
            record = CheckpointRecord.read(path / STATE, "")
        except UserError:
            return f"{path / STATE} is damaged"
        if record.fingerprint != self.fingerprint:
            raise UserError(
                f"{path} belongs to a training with other settings; --fresh train moves it aside, or choose another "
                f"--run-dir"
            )
        return _first_damage(path, record.files, self.ranks)


def _first_damage(path: Path, files: Mapping[str, FileRecord], ranks: Ranks) -> str | None:
    mine: Sequence[str] = sorted(files)[ranks.rank :: ranks.size]
    for name in mine:
        if (what := files[name].damage(path / name)) is not None:
            return f"{path / name} {what}"
    return None


@contextmanager
def writing(path: Path, ranks: Ranks | None = None) -> Iterator[Path]:
    """A new directory that all ranks fill: at the end it replaces `path`, or it is removed.

    Errors: WorkError when the disk is full.
    """
    ranks, scratch = ranks or Alone(), new_name(path)
    if ranks.main:
        remove_leftovers(path)
        scratch.mkdir(parents=True)
    ranks.wait()
    try:
        yield scratch
        if ranks.main:
            replace_directory(scratch, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(scratch, ignore_errors=True)
        if "gloo" in str(error) or "NCCL" in str(error):  # another rank died meanwhile, which the launcher reports
            raise
        reason = str(error).partition("\n")[0]
        raise WorkError(
            f"{path} could not be written ({reason}): make sure that there is free disk space, then rerun the same "
            f"command; it resumes from the newest checkpoint"
        ) from error
