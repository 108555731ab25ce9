"""Checkpoints that are whole or not there.

A checkpoint is a directory `step-000200/`: what Accelerate saves (model, optimiser, random states; sharded where the
model is) and `state.json` with the step, the counters and the size of every file. It is written under another name,
fsync'd, and renamed; a rename happens or does not. A checkpoint that is to go is renamed first, too, so that one caught
half-deleted is never taken for whole. The sizes guard against what a rename cannot: a directory copied by half.

The log is cut back to the length it had when the checkpoint was taken: a step stands in it once.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from distill.errors import WorkError

SCRATCH = "tmp-"  # names of directories that are being written or deleted


@dataclass
class Position:
    """Where a training stands: all that is neither a tensor nor a function of the step."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # seen so far, padding excluded
    supervised_tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None  # of the first log line
    last_loss: float | None = None
    window: list[tuple[float, float, int]] = field(
        default_factory=list
    )  # not yet logged: (loss, gradient norm, supervised)
    log_bytes: int = 0


class Checkpoints:
    """The directory `checkpoints/` of a run: the log, and at most `limit` checkpoints."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.log_path = directory / "log.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{SCRATCH}*"):
            shutil.rmtree(leftover)

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next((path for path in reversed(self._all()) if whole(path)), None)

    def restore(self, accelerator: Accelerator) -> Position:
        """Load the newest checkpoint, if there is one, into the accelerator's objects; cut the log back to it."""
        position = Position()
        if path := self.newest():
            accelerator.load_state(str(path))
            fields = json.loads((path / "state.json").read_text())["position"]
            fields["window"] = [tuple(entry) for entry in fields["window"]]
            position = Position(**fields)
        if self.log_path.exists():
            os.truncate(self.log_path, min(position.log_bytes, self.log_path.stat().st_size))
        return position

    def log(self, position: Position, row: dict[str, Any]) -> None:
        """Append one line. It is on the disk for sure when the next checkpoint is."""
        with self.log_path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            position.log_bytes = file.tell()

    def save(self, accelerator: Accelerator, position: Position) -> None:
        """Write a checkpoint of `position`, then delete the oldest beyond the limit. Errors: WorkError."""
        path = self.directory / f"step-{position.step:06d}"
        scratch = self.directory / f"{SCRATCH}{path.name}"
        with writing(scratch, path):
            accelerator.save_state(str(scratch))
            sizes = {str(p.relative_to(scratch)): p.stat().st_size for p in scratch.rglob("*") if p.is_file()}
            state = {"position": asdict(position), "sizes": sizes}
            (scratch / "state.json").write_text(json.dumps(state, indent=1))
            if self.log_path.exists():
                sync(self.log_path)
        for old in self._all()[: -self.limit]:
            discard(old)

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
def writing(scratch: Path, path: Path) -> Iterator[None]:
    """Around the code that fills `scratch`: it takes the place of `path` at the end, or vanishes. Errors: WorkError."""
    for leftover in (scratch, doomed(path)):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield
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
