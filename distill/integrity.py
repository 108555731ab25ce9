"""What a file held when it was written, so that a later reader can tell whether it still does.

A record has a file's size, its modification time and a SHA-256 of each chunk of `CHUNK` bytes. Two questions are asked
of it, at different prices:

    looks_unchanged   size and time, one `stat` a file: asked before "nothing to do"
    damage            the content, read and hashed: asked when a file is read, when size or time differ, on --verify

A hash per chunk and not one per file, because the weights of a 70B student are shards of 5 GB: a message can say where
the damage is, and a large file is hashed in pieces by several threads (hashlib releases the interpreter's lock).
Standard library only: a finished run must be recognised at once, before torch is imported.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK = 64 << 20  # bytes
THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written.

    size: bytes. mtime_ns: modification time, nanoseconds. chunks: the first 128 bits of each chunk's SHA-256, in hex.
    """

    size: int
    mtime_ns: int
    chunks: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read the file and describe it. Errors: OSError."""
        about = path.stat()
        return cls(about.st_size, about.st_mtime_ns, _chunks(path, about.st_size))

    def looks_unchanged(self, path: Path) -> bool:
        """Compare size and time only; False for a file that is missing."""
        try:
            about = path.stat()
        except OSError:
            return False
        return (about.st_size, about.st_mtime_ns) == (self.size, self.mtime_ns)

    def damage(self, path: Path) -> str | None:
        """Read the file; None when it holds what was recorded, else what differs, as the end of a sentence.

        A file that was copied (same content, another time) is not damaged. Errors: OSError other than a missing file.
        """
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return "is missing"
        if size != self.size:
            return f"has {size:,} bytes instead of {self.size:,}"
        found = _chunks(path, size)
        wrong = [i for i, (one, two) in enumerate(zip(found, self.chunks, strict=True)) if one != two]
        if not wrong:
            return None
        return f"has changed between bytes {wrong[0] * CHUNK:,} and {min((wrong[0] + 1) * CHUNK, size):,}"

    def to_row(self) -> dict[str, int | list[str]]:
        """The record as a JSON object."""
        return {"size": self.size, "mtime_ns": self.mtime_ns, "chunks": list(self.chunks)}

    @classmethod
    def from_row(cls, row: object) -> "FileRecord":
        """Read what `to_row` gave. Errors: ValueError when it is something else."""
        match row:
            case {"size": int(size), "mtime_ns": int(time), "chunks": list(chunks)} if all(
                isinstance(chunk, str) for chunk in chunks
            ):
                return cls(size, time, tuple(chunks))
        raise ValueError("not a file's record")


def record_files(root: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """The records of files under `root`, by their POSIX path relative to it, sorted."""
    return {path.relative_to(root).as_posix(): FileRecord.of(path) for path in sorted(paths)}


def first_damage(root: Path, records: Mapping[str, FileRecord]) -> str | None:
    """Read every recorded file; "PATH is missing" and the like for the first that is not as recorded, else None."""
    for name, record in records.items():
        if (what := record.damage(root / name)) is not None:
            return f"{root / name} {what}"
    return None


def _chunks(path: Path, size: int) -> tuple[str, ...]:
    offsets = range(0, max(size, 1), CHUNK)
    if len(offsets) == 1:
        return (_chunk(path, 0),)
    with ThreadPoolExecutor(THREADS) as pool:
        return tuple(pool.map(lambda offset: _chunk(path, offset), offsets))


def _chunk(path: Path, offset: int) -> str:
    total, left = hashlib.sha256(), CHUNK
    with path.open("rb") as file:
        file.seek(offset)
        while left and (data := file.read(min(left, 1 << 20))):
            total.update(data)
            left -= len(data)
    return total.hexdigest()[:32]
