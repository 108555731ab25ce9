"""A ledger: one JSON object a line, appended and fsynced, so that acknowledged rows survive any crash.

JSON lines and not SQLite or a growing Parquet file, because a killed writer can do one kind of damage only, a last line
that is cut off, which can be recognised and removed, and because a user can read the file with `head` or `jq`. The JSON
is pure ASCII: every string that Python can hold goes through, lone surrogates and U+2028 included, and a newline byte
is always the end of a row.

The last key of every line is `crc32`, the checksum of what precedes it. A disk or a copy that changes one bit inside a
number leaves valid JSON; without the checksum the changed row would be read as if it had been written so.

Two kinds of bad line are kept apart. A *cut-off* last line has no newline, or holds the zero bytes that a power cut
leaves where data was not yet written: no row was acknowledged there, so it is skipped, and removed when the ledger is
opened for appending. Every other line that does not match its checksum is *damage*, and raises.
"""

import json
import mmap
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from distill.durable import sync_directory
from distill.errors import UserError

Row = dict[str, Any]  # a JSON object; its keys are known to the readers of each ledger

FLUSH_SECONDS = 0.5  # of work that a kill may repeat, where an fsync a row would cost more than the row
UNWRITTEN = b"\0\0"  # JSON in ASCII holds no zero byte; two of them, because one may be a flipped bit


class Ledger:
    """Rows in a file. `rows()` reads at any time; appending needs the `with` block, and one writer at a time.

    cut_off: bytes of a cut-off last line that opening removed; 0 when the file was whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut_off = 0
        self._descriptor: int | None = None
        self._end = 0  # bytes that are known to be whole rows on the disk
        self._pending: list[Row] = []
        self._flushed = 0.0  # on the monotonic clock

    def __enter__(self) -> "Ledger":
        """Open for appending. Errors: UserError when the last line is damaged, OSError."""
        assert self._descriptor is None, "this ledger is open already"
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            self._end = self._end_of_last_row(descriptor, size)
            self.cut_off = size - self._end
            if self.cut_off:
                os.ftruncate(descriptor, self._end)
            if new:
                sync_directory(self.path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._flushed = descriptor, time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Store the rows that `add` still holds, also when the block raised, and close the file."""
        assert self._descriptor is not None
        try:
            self._flush()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def end(self) -> int:
        """Bytes of whole rows on the disk, where the next row begins; of a ledger that is open for appending."""
        assert self._descriptor is not None, "open the ledger with `with`"
        return self._end

    def append(self, rows: Iterable[Row]) -> None:
        """Store the rows durably, all or none: after a failure the file is whole and has none of them.

        Errors: OSError when the disk is full or gone; TypeError for a value that is not JSON.
        """
        assert self._descriptor is not None, "append needs the ledger opened by `with`"
        data = b"".join(map(line_of, rows))
        if not data:
            return
        try:
            _write_all(self._descriptor, data)
            os.fsync(self._descriptor)
        except BaseException:  # KeyboardInterrupt too: half a row must not precede the next one
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(data)

    def add(self, row: Row) -> None:
        """Store the row together with its neighbours: within `FLUSH_SECONDS` of work, or at the end of the block."""
        self._pending.append(row)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flush()

    def rows(self) -> Iterator[Row]:
        """Yield every whole row on the disk. A cut-off last line is skipped; a missing file has no rows.

        Errors: UserError naming file and line for a damaged line.
        """
        return (row for _, row in self.located_rows())

    def located_rows(self) -> Iterator[tuple[int, Row]]:
        """As `rows`, each with the offset of its line, for `row_at`."""
        with self.reading() as rows:
            yield from rows

    @contextmanager
    def reading(self) -> Iterator[Iterator[tuple[int, Row]]]:
        """The located rows of the file as it is opened here: what a writer moves elsewhere meanwhile is still read."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            yield iter(())
            return
        with file:
            yield self._rows_of(file)

    def _rows_of(self, file: BinaryIO) -> Iterator[tuple[int, Row]]:
        number, line, offset = 0, b"", 0
        for following in file:
            if number:
                yield offset, self._row(line, number)
                offset += len(line)
            number, line = number + 1, following
            if not line.endswith(b"\n"):
                break  # a writer may be adding the rest
        if number and not _is_cut_off(line):
            yield offset, self._row(line, number)

    def row_at(self, offset: int) -> Row:
        """The row whose line begins at an offset that `located_rows` gave. Errors: as `rows`."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._row(file.readline(), None)

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        self.append(rows)
        self._flushed = time.monotonic()

    def _row(self, line: bytes, number: int | None) -> Row:
        text = _content(line)
        if text is None:
            where = "its last line" if number is None else f"line {number}"
            raise UserError(
                f"{self.path}, {where}: damaged (its checksum does not match); delete this line and rerun the command "
                f"that wrote it, which regenerates what is missing"
            )
        row: Row = json.loads(text + b"}")
        return row

    def _end_of_last_row(self, descriptor: int, size: int) -> int:
        """Offset after the last line, or where that line begins if it is cut off. Reads only the file's end."""
        if size == 0:
            return 0
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as file:
            start = file.rfind(b"\n", 0, size - 1) + 1
            line = file[start:size]
        if _is_cut_off(line):
            return start
        self._row(line, None)
        return size


def line_of(row: Row) -> bytes:
    """The line of a row, for files that are read as ledgers and written in another way."""
    return _line(json.dumps(row).encode("ascii")[:-1])


def _line(text: bytes) -> bytes:
    """The line of a row; `text` is its JSON without the closing brace."""
    return b'%b%b"crc32": "%08x"}\n' % (text, b"" if text == b"{" else b", ", zlib.crc32(text))


def _content(line: bytes) -> bytes | None:
    """The text that `_line` was given, None for a line that it cannot have made."""
    text = line[: -len(_line(b"{")) + 1].removesuffix(b", ")
    return text if _line(text) == line else None


def _is_cut_off(line: bytes) -> bool:
    """Whether a crash may have left this last line. A whole row with another byte for its newline is damage instead."""
    return UNWRITTEN in line or (not line.endswith(b"\n") and _content(line[:-1] + b"\n") is None)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a disk that is almost full takes a part, then raises
        view = view[os.write(descriptor, view) :]
