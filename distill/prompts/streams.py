"""The bytes of a file, plain or compressed by gzip or zstd, as bounded lines with their numbers.

gzip is read by the standard library, which compares each member's checksum and length, zstd by pyarrow. A compressed
file that was cut off is refused where it ends, with the last line that was read: an interrupted download must not look
like a shorter data set. Nothing is unpacked to the disk, and never more than one line at a time is held, so that a
small file that unpacks to terabytes costs no memory.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from distill.errors import UserError
from distill.limits import ROW_BYTES

COMPRESSIONS = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}  # suffix → name, first bytes

BEGINNINGS = {  # of files under a wrong name → what they are and what to do
    b"version https://git-lfs": "a Git LFS pointer, not the file: run `git lfs pull` in its repository",
    b"\xff\xfe": "UTF-16 text: convert it, iconv -f UTF-16 -t UTF-8 {path} > new{suffix}",
    b"\xfe\xff": "UTF-16 text: convert it, iconv -f UTF-16 -t UTF-8 {path} > new{suffix}",
    b"\x1f\x8b": "compressed by gzip: name it {name}.gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: name it {name}.zst",
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"PAR1": "a Parquet file: name it .parquet",
}


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file. Errors: UserError when it is not compressed as its name says."""
    with path.open("rb") as raw:
        if path.suffix not in COMPRESSIONS:
            yield raw
            return
        name, magic = COMPRESSIONS[path.suffix]
        head = raw.read(24)
        raw.seek(0)
        if kind := _other_kind(head, path, magic):
            raise UserError(f"{path}: {kind}")
        if not head.startswith(magic):
            what = "it is empty" if not head else "its first bytes are not those of such a file"
            raise UserError(f"{path}: not compressed by {name} ({what}); download it again, or correct its name")
        if name == "gzip":
            with gzip.open(raw) as file:
                yield cast(IO[bytes], file)
        else:
            import pyarrow as pa

            with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
                yield io.BufferedReader(stream)


def check_beginning(path: Path) -> None:
    """Raise UserError when a text file begins like one of another kind."""
    with opened(path) as file, readable(path):
        head = file.read(24)
    if kind := _other_kind(head, path):
        raise UserError(f"{path}: {kind}")


def _other_kind(head: bytes, path: Path, expected: bytes | None = None) -> str | None:
    kind = next((what for begin, what in BEGINNINGS.items() if head.startswith(begin) and begin != expected), None)
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return kind and kind.format(path=path, name=plain.name, suffix=plain.suffix)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, line ends included. Errors: UserError for one that is too long, and for
    a damaged compressed file."""
    number = 0
    with opened(path) as file:
        while True:
            with readable(path, f", after line {number}" if number else ""):
                line = file.readline(ROW_BYTES + 1)
            if not line:
                return
            number += 1
            if len(line) > ROW_BYTES:
                raise UserError(f"{path}, line {number}: longer than {ROW_BYTES >> 20} MiB; correct or remove the line")
            yield number, line


@contextmanager
def readable(path: Path, after: str = "") -> Iterator[None]:
    """Report damaged compression. after: the place that was reached, for the message. Errors: UserError."""
    try:
        yield
    except EOFError as error:
        raise _damaged(path, after, "it is cut off") from error
    except zlib.error as error:
        raise _damaged(path, after, str(error)) from error
    except OSError as error:  # gzip's and pyarrow's have no errno; a full disk or a missing permission has one
        if error.errno is not None:
            raise
        raise _damaged(path, after, " ".join(str(error).split())) from error


def _damaged(path: Path, after: str, reason: str) -> UserError:
    return UserError(f"{path}{after}: damaged compressed file ({reason}); download or write it again")
