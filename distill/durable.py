"""Files that are there whole or not at all, whatever is killed and whenever the power goes.

The known recipe (write aside, fsync, rename, fsync the directory), in one place because run states and trace shards
both stand on it. Without the fsync of the file a rename may reach the disk before the data and leave an empty file
under the right name; without the fsync of the directory the rename itself may be lost.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def aside(path: Path) -> Path:
    """Where a file is written before it takes its name. Hidden, and no `*.parquet`: no glob for data meets it."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when the block raises."""
    temporary = aside(path)
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


def sync_directory(directory: Path) -> None:
    """Make the directory's entries (new names, renames, removals) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
