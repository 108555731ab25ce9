"""Checkpoints that are whole or not there.

A checkpoint is a directory `step-000200/`: the tensors (`train.state`; each rank writes its own) and `state.json` with
the step, the counters and the size of every file. It is written under another name, fsync'd, and renamed; a rename
happens or does not. A checkpoint that is to go is renamed first, too, so that one caught half-deleted is never taken
for whole. The sizes guard against what a rename cannot: a directory copied by half.

Where several processes train they share the directory; the first one makes, renames and deletes.

The log is cut back to the length it had when the checkpoint was taken: a step stands in it once.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors import SafetensorError

from distill.errors import WorkError
from distill.traces.ledger import line_of

SCRATCH = "tmp-"  # names of directories that are being written or deleted


class Step(NamedTuple):
    """One optimiser step's figures. parts: the means of the objective's parts over its supervised tokens."""

    parts: tuple[float, ...]
    norm: float
    supervised: int


@dataclass
class Position:
    """Where a training stands: all that is neither a tensor nor a function of the step."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # seen so far
    supervised_tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None  # of the first log line
    last_loss: float | None = None
    eval_loss: float | None = None  # the last one on the held-out rows
    window: list[Step] = field(default_factory=list)  # done and not yet logged
    recent: list[float] = field(default_factory=list)  # losses of the last steps, to notice a jump
    log_bytes: int = 0


class Tensors(Protocol):
    """`train.state.State`: what is saved beside a position. Every rank calls, at the same time."""

    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...


class Ranks(Protocol):
    """`train.world.World`: whether this process is the one that makes and renames, and a wait for all."""

    @property
    def main(self) -> bool: ...
    def wait(self) -> None: ...


class Alone:
    """One process."""

    main = True

    def wait(self) -> None:
        pass


class Checkpoints:
    """The directory `checkpoints/` of a run: the log, and at most `limit` checkpoints."""

    def __init__(self, directory: Path, limit: int, ranks: Ranks | None = None) -> None:
        self.directory, self.limit = directory, limit
        self.ranks: Ranks = ranks or Alone()
        self.log_path = directory / "log.jsonl"
        if self.ranks.main:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(f"{SCRATCH}*"):
                shutil.rmtree(leftover)
        self.ranks.wait()

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next((path for path in reversed(self._all()) if whole(path)), None)

    def restore(self, tensors: Tensors) -> Position:
        """Load the newest checkpoint, if there is one, into the tensors; cut the log back to it."""
        position = Position()
        if path := self.newest():
            tensors.load(path)
            fields = json.loads((path / "state.json").read_text())["position"]
            fields["window"] = [Step(tuple(parts), *rest) for parts, *rest in fields["window"]]
            position = Position(**fields)
        self.ranks.wait()
        if self.ranks.main and self.log_path.exists():
            os.truncate(self.log_path, min(position.log_bytes, self.log_path.stat().st_size))
        return position

    def log(self, position: Position, row: dict[str, Any]) -> None:
        """Append one line. It is on the disk for sure when the next checkpoint is."""
        if self.ranks.main:
            with self.log_path.open("ab") as file:
                file.write(line_of(row))
                position.log_bytes = file.tell()

    def save(self, tensors: Tensors, position: Position) -> None:
        """Write a checkpoint of `position`, then delete the oldest beyond the limit. Errors: WorkError."""
        path = self.directory / f"step-{position.step:06d}"
        scratch = self.directory / f"{SCRATCH}{path.name}"
        with writing(scratch, path, self.ranks):
            tensors.save(scratch)
            self.ranks.wait()
            if self.ranks.main:
                sizes = {str(p.relative_to(scratch)): p.stat().st_size for p in scratch.rglob("*") if p.is_file()}
                state = {"position": asdict(position), "sizes": sizes}
                (scratch / "state.json").write_text(json.dumps(state, indent=1))
                if self.log_path.exists():
                    sync(self.log_path)
        if self.ranks.main:
            for old in self._all()[: -self.limit]:
                discard(old)
        self.ranks.wait()

    def _all(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def whole(path: Path) -> bool:
    """Whether every file of a checkpoint is there at its full size."""
    state = path / "state.json"
    if not state.is_file():
        return False
    sizes: dict[str, int] = json.loads(state.read_text())["sizes"]
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items())


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Delete a directory so that no half of it is ever met under its own name."""
    path.rename(doomed(path))
    shutil.rmtree(doomed(path))


def doomed(path: Path) -> Path:
    """What a directory is called while it is deleted."""
    return path.with_name(f"{SCRATCH}old-{path.name}")


@contextmanager
def writing(scratch: Path, path: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Around the code that fills `scratch`: it takes the place of `path` at the end, or vanishes. Errors: WorkError."""
    ranks = ranks or Alone()
    if ranks.main:
        for leftover in (scratch, doomed(path)):  # of a process that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
    ranks.wait()
    try:
        yield
        if ranks.main:
            replace_directory(scratch, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(scratch, ignore_errors=True)
        reason = str(error).partition("\n")[0]
        raise WorkError(
            f"{path} could not be written ({reason}): see that there is room, then rerun the same command; it resumes "
            f"from the newest checkpoint"
        ) from error


def replace_directory(scratch: Path, path: Path) -> None:
    """Put a finished directory in its place: files first on the disk, then one rename. An older one there gives way."""
    for inner in scratch.rglob("*"):
        sync(inner)
    sync(scratch)
    if path.exists():
        discard(path)
    scratch.rename(path)
    sync(path.parent)
