"""Plain files in which a `CorpusFilter` keeps what grows with the number of traces.

`Buckets` finds the traces that share a key, such as a band of a MinHash signature: a file of 64-bit keys for each band,
in the order of the traces, sorted in memory one band at a time (24 bytes a trace while a band is sorted). `Vectors`
holds a row of numbers for each trace, such as the signature itself, and reads single rows back.

Rejected: SQLite (for 100,000 traces of 20 bands 5.7 s and 20 MB of memory, where the files take 0.3 s and 4 MB) and
memory maps (the pages that were touched count as the process's memory until the system needs them).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

BUFFERED = 4096  # rows that wait to be written together


class Buckets:
    """Traces by key; a trace is its number in the order of adding. A context manager, which closes the files.

    directory: exists; gets a file a band. bands: keys of a trace.
    """

    def __init__(self, directory: Path, bands: int) -> None:
        self._files = [(directory / f"band-{band:04d}").open("w+b") for band in range(bands)]
        self._waiting: list[Keys] = []

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, keys: Keys) -> None:
        """Add the next trace. keys: uint64, shape (bands,)."""
        assert keys.shape == (len(self._files),) and keys.dtype == np.uint64
        self._waiting.append(keys)
        if len(self._waiting) == BUFFERED:
            self._write()

    def shared(self) -> Iterator[Numbers]:
        """Yield the numbers of the traces that share a key, ascending, for every such key of every band."""
        self._write()
        for file in self._files:
            file.seek(0)
            keys = np.fromfile(file, np.uint64)
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else order
            ends = np.append(starts[1:], len(keys)) if len(keys) else order
            several = np.flatnonzero(ends - starts > 1)
            for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
                yield order[start:end]

    def _write(self) -> None:
        if self._waiting:
            columns = np.ascontiguousarray(np.stack(self._waiting).T)
            self._waiting.clear()
            for file, column in zip(self._files, columns, strict=True):
                column.tofile(file)


class Vectors:
    """A row of uint32 numbers for each trace; a context manager, which closes the file. width: numbers of a row."""

    def __init__(self, path: Path, width: int) -> None:
        self._file = path.open("w+b")
        self._bytes = 4 * width

    def __enter__(self) -> "Vectors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: npt.NDArray[np.uint32]) -> None:
        """Add the next trace's row, shape (width,)."""
        assert row.nbytes == self._bytes and row.dtype == np.uint32
        self._file.write(row.tobytes())

    def read(self, numbers: Sequence[int] | Numbers) -> npt.NDArray[np.uint32]:
        """The rows of these traces, shape (len(numbers), width)."""
        self._file.flush()
        rows = b"".join(os.pread(self._file.fileno(), self._bytes, int(n) * self._bytes) for n in numbers)
        return np.frombuffer(rows, np.uint32).reshape(len(numbers), self._bytes // 4)
