"""A ledger: one JSON object a line, appended and fsynced, so that what was acknowledged is there after any crash.

JSON lines and not SQLite or a growing Parquet file, because the only damage that a killed writer can do is one cut-off
line at the very end, which can be recognised and taken off, and because a user can read it with `head`. The JSON is
pure ASCII: every string that Python can hold goes through, lone surrogates and U+2028 included, and a newline byte is
always the end of a row.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.durable import sync_directory
from distill.errors import UserError


class Ledger:
    """Rows in a file. `rows()` reads at any time; appending needs the `with` block, and one writer at a time.

    Opening takes a cut-off last row off the file: `cut_off` then says how many bytes it had (0: the file was whole).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut_off = 0
        self._descriptor: int | None = None
        self._end = 0  # bytes that are known to be whole rows on the disk

    def __enter__(self) -> "Ledger":
        assert self._descriptor is None, "this ledger is open already"
        new = not self.path.exists()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._descriptor).st_size
        self._end = _end_of_last_row(self._descriptor, size)
        self.cut_off = size - self._end
        if self.cut_off:
            os.ftruncate(self._descriptor, self._end)
        if new:
            sync_directory(self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Store the rows: when this returns they are on the disk. On a failure none of them is, and the file is whole.

        Errors: OSError when the disk is full or gone.
        """
        assert self._descriptor is not None, "append needs the ledger opened by `with`"
        data = b"".join(json.dumps(row).encode("ascii") + b"\n" for row in rows)
        if not data:
            return
        try:
            _write_all(self._descriptor, data)
            os.fsync(self._descriptor)
        except BaseException:  # KeyboardInterrupt too: half a row must not stand before the next one
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(data)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every whole row. A last line that was cut off is passed over; a file that is not there has no rows.

        Errors: UserError naming file and line when a line before the last is broken, which no crash of ours does.
        """
        if not self.path.exists():
            return
        broken = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if broken:
                    raise UserError(
                        f"{self.path}, line {broken}: not a whole row; delete this line and run again to redo it"
                    )
                row = _parse(line)
                if row is None:
                    broken = number
                else:
                    yield row


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row, or None for a line that is not a whole one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _end_of_last_row(descriptor: int, size: int) -> int:
    """Offset behind the last line if that is whole, else the offset where it starts. Reads only the file's end."""
    if size == 0:
        return 0
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as file:
        start = file.rfind(b"\n", 0, size - 1) + 1
        return size if _parse(file[start:size]) is not None else start


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a disk that is almost full takes a part, then raises
        view = view[os.write(descriptor, view) :]
