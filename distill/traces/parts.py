"""Directories of `part-00000.parquet` …: sharded zstd Parquet that `datasets.load_dataset("parquet", …)` reads as is.

A part is sealed (`distill.traces.sealed`) and takes its name in one step, so it is whole or absent. Its pages carry
checksums too, for readers of Parquet that know nothing of seals.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from distill.durable import replacing
from distill.errors import UserError
from distill.traces.sealed import Damage, Sealed, seal

SHARD_ROWS = 4096  # some 400 MB of R1-sized traces
GROUP_ROWS = 128  # rows held in memory at once, when reading and when writing


def parts(directory: Path) -> list[Path]:
    """The parts in a directory, in order of their numbers."""
    return sorted(directory.glob("part-*.parquet"))


@contextmanager
def open_part(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a part for reading: every read of a stored trace's column comes through here, which tests count.

    Errors: UserError when the file is not what was written, also in the middle of the block.
    """
    try:
        with Sealed(path) as file, pq.ParquetFile(file, page_checksum_verification=True) as part:
            yield part
    except Damage as damage:
        raise UserError(
            f"{path}: damaged ({damage}); delete it and rerun the command that wrote it, which recreates it"
        ) from damage


def batches(directory: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of all parts, up to `GROUP_ROWS` at a time. columns: None for all; names that a part lacks are skipped.

    Errors: UserError when a part is damaged.
    """
    for path in parts(directory):
        with open_part(path) as part:
            names = part.schema_arrow.names
            wanted = names if columns is None else [name for name in columns if name in names]
            for group in range(part.num_row_groups):  # all at once, and the whole part would be read ahead
                yield from part.iter_batches(GROUP_ROWS, row_groups=[group], columns=wanted)


def row_count(directory: Path) -> int:
    """The number of rows, from the footers of the parts. Errors: UserError when one is damaged."""
    total = 0
    for path in parts(directory):
        with open_part(path) as part:
            total += part.metadata.num_rows
    return total


class PartWriter:
    """Writes tables of any length as parts, numbered after those that are there; a context manager.

    Leaving the block writes the rest; an exception leaves the finished parts, and nothing of the one being written.
    columns_at_least: whether no rows at all give one part without rows, so that its columns can be read.
    Errors: OSError when the disk is full.
    """

    def __init__(self, directory: Path, schema: pa.Schema, columns_at_least: bool = False) -> None:
        self.directory, self.schema, self.columns_at_least = directory, schema, columns_at_least
        last = max((int(path.stem.removeprefix("part-")) for path in parts(directory)), default=-1)
        self._numbers = count(last + 1)
        self._waiting = schema.empty_table()  # fewer rows than a group has
        self._part = ExitStack()  # of the part being written, if there is one
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0  # in it

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._part.__exit__(kind, error, trace)
            return
        while self._waiting.num_rows:
            self._write_group(self._waiting.num_rows)
        if self.columns_at_least and self._writer is None and not parts(self.directory):
            self._write_group(0)
        self._end_part()

    def write(self, table: pa.Table) -> None:
        """Add rows; what makes a whole row group is written."""
        self._waiting = pa.concat_tables([self._waiting, table])
        while self._waiting.num_rows >= GROUP_ROWS:
            self._write_group(GROUP_ROWS)

    def _write_group(self, rows: int) -> None:
        rows = min(rows, SHARD_ROWS - self._rows)
        if self._writer is None:
            path = self.directory / f"part-{next(self._numbers):05d}.parquet"
            self._writer = self._part.enter_context(_new_part(path, self.schema))
        self._writer.write_table(self._waiting.slice(0, rows))
        self._waiting = self._waiting.slice(rows)
        self._rows += rows
        if self._rows == SHARD_ROWS:
            self._end_part()

    def _end_part(self) -> None:
        self._part.close()
        self._writer, self._rows = None, 0


@contextmanager
def _new_part(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    with replacing(path) as file:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            yield writer
        file.flush()
        seal(Path(file.name))
