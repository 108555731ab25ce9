"""Parquet files with a seal: digests of all their bytes, checked before Parquet's reader sees any of them.

Parquet's own page checksums cover the pages' data, and neither the headers of the pages nor the footer. With them on,
a flipped bit in a page header (its number of values, its encoding) still changed rows without an error, and others came
out as OSError, as an allocation of gigabytes, or crashed inside the decoder. So a digest is kept of every block of the
file, and reading goes through `Sealed`, a file object that checks each block it hands out:

    pages of the row groups │ seal │ footer, its length, "PAR1"

    seal = 16 bytes of SHA-256 of each `BLOCK` bytes of the pages, the last block shorter
         + 16 bytes of SHA-256 of all that follows the seal
         + the number of bytes before the seal (8 bytes, little-endian)
         + 16 bytes of SHA-256 of the seal up to here

Parquet finds its footer from the end and its pages from the footer, so bytes between the two are ignored: every Parquet
reader opens a sealed file. Blocks, and not one digest of the file, so that reading two columns of a large file reads
and checks those columns only. Rejected: a file of digests beside each part (two files cannot be replaced in one step,
and are copied apart), the footer's metadata (which then covers everything but itself).
"""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 64 << 10  # bytes; the two key columns of 128 traces fit into one
DIGEST = 16  # bytes
TAIL = 8  # bytes at the end of a Parquet file: the footer's length and "PAR1"
END = DIGEST + 8 + DIGEST  # bytes of the seal after the digests of the blocks


class Damage(Exception):
    """What is wrong with a sealed file, as the end of a sentence. The caller names the file and the remedy."""


def seal(path: Path) -> None:
    """Insert the seal into a Parquet file that has just been written. Errors: OSError."""
    with path.open("r+b") as file:
        start, footer = _footer(file)
        file.seek(0)
        digests = b"".join(_digest(block) for block in _blocks(file, start))
        digests += _digest(footer) + start.to_bytes(8, "little")
        file.seek(start)
        file.write(digests + _digest(digests) + footer)


class Sealed(io.RawIOBase):
    """A sealed Parquet file, open for reading. Every byte that it returns has been checked.

    Errors: Damage, on opening and on reading; OSError.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._position = 0
        try:
            self._pages, self._digests, self._rest = _open(self._file)
        except BaseException:
            self._file.close()
            raise
        self._size = self._pages + len(self._rest)

    def readable(self) -> bool:
        """Say that the file can be read."""
        return True

    def seekable(self) -> bool:
        """Say that the file can be read at any place."""
        return True

    def tell(self) -> int:
        """The position of the next read, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position of the next read, and return it."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read and check up to `size` bytes, all that is left if it is negative."""
        start = min(self._position, self._size)
        end = self._size if size < 0 else min(start + size, self._size)
        data = b"".join(self._checked(start, min(end, self._pages)))
        if end > self._pages:
            data += self._rest[max(start - self._pages, 0) : end - self._pages]
        self._position = end
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _checked(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end` of the pages, block by block."""
        if start >= end:
            return
        self._file.seek(start - start % BLOCK)
        for number in range(start // BLOCK, (end - 1) // BLOCK + 1):
            first = number * BLOCK
            block = _read(self._file, min(BLOCK, self._pages - first))
            if _digest(block) != self._digests[number * DIGEST : (number + 1) * DIGEST]:
                raise Damage(f"bytes {first:,} to {first + len(block):,} are not what was written")
            yield block[max(start - first, 0) : end - first]


def _open(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """(bytes of pages, their digests, all that follows the pages) of a sealed file, the latter two checked."""
    end, footer = _footer(file)
    if end < END:
        raise Damage("its seal is missing")
    file.seek(end - END + DIGEST)
    pages = int.from_bytes(_read(file, 8), "little")
    blocks = -(-pages // BLOCK)
    if pages + blocks * DIGEST + END != end:
        raise Damage("its seal is missing or was changed")
    file.seek(pages)
    digests = _read(file, end - pages)
    if _digest(digests[:-DIGEST]) != digests[-DIGEST:]:
        raise Damage("its seal was changed")
    if _digest(footer) != digests[blocks * DIGEST : (blocks + 1) * DIGEST]:
        raise Damage("its footer is not what was written")
    return pages, digests[: blocks * DIGEST], digests + footer


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """(offset of the footer, the footer with its length and "PAR1")."""
    size = file.seek(0, os.SEEK_END)
    if size < TAIL:
        raise Damage(f"it has {size} bytes, too few for a Parquet file")
    file.seek(size - TAIL)
    length = int.from_bytes(_read(file, TAIL)[:4], "little") + TAIL
    if length > size:
        raise Damage("its end is not that of a Parquet file")
    file.seek(size - length)
    return size - length, _read(file, length)


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    for start in range(0, size, BLOCK):
        yield _read(file, min(BLOCK, size - start))


def _read(file: BinaryIO, size: int) -> bytes:
    """Exactly `size` bytes from the file's position; an unbuffered file may give fewer at a time."""
    parts, left = [], size
    while left:
        part = file.read(left)
        if not part:
            raise Damage("it is cut off")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST]
