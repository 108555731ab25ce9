"""Files and directories that are there whole or not at all, whatever is killed and whenever the power goes.

The known recipe (write aside, fsync, rename, fsync the directory), in one place because everything that a run keeps
relies on it: records, shards of traces, checkpoints, the student. Without the fsync of the file a rename may reach the
disk before the data and leave an empty file under the right name; without the fsync of the directory the rename itself
may be lost.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from distill import interrupts


def aside(path: Path) -> Path:
    """Where a file is written before it takes its name. Hidden, and no `*.parquet`: no glob for data meets it."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when the block raises or is interrupted."""
    temporary = aside(path)
    with interrupts.held():
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file's content (text as UTF-8) in one step. Errors: OSError."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


# ---- directories


def new_name(path: Path) -> Path:
    """Where a directory is written before it takes its name."""
    return path.with_name(f".{path.name}.new")


def old_name(path: Path) -> Path:
    """The name of a directory while it is deleted, so that a half-deleted one never has its own."""
    return path.with_name(f".{path.name}.old")


def remove_leftovers(path: Path) -> None:
    """Delete what a killed process left of writing or deleting this directory."""
    for leftover in (new_name(path), old_name(path)):
        if leftover.exists():
            shutil.rmtree(leftover)


def remove_directory(path: Path) -> None:
    """Delete a directory: renamed first, so that it is there whole or not at all."""
    remove_leftovers(path)
    path.rename(old_name(path))
    shutil.rmtree(old_name(path))


def replace_directory(new: Path, path: Path) -> None:
    """Put a finished directory in its place: its files fsync'd, then renamed. A directory that is there is deleted.

    A reader sees the old directory, for a moment none, then the new one, never a half.
    """
    for inner in new.rglob("*"):
        sync(inner)
    sync(new)
    old = old_name(path)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def replacing_directories(*directories: Path) -> Iterator[list[Path]]:
    """Empty directories that take the places of `directories` when the block ends, and vanish when it raises or is
    interrupted."""
    new = [new_name(path) for path in directories]
    with interrupts.held():
        try:
            for path in directories:
                remove_leftovers(path)
            for path in new:
                path.mkdir(parents=True)
            yield new
            for path, made in zip(directories, new, strict=True):
                replace_directory(made, path)
        except BaseException:
            for path in new:
                if path.exists():
                    shutil.rmtree(path)
            raise


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the directory's entries (new names, renames, removals) survive a power cut."""
    sync(directory)
