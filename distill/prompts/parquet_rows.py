"""Rows of a Parquet file, decoded in small batches with their page checksums verified."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.limits import BATCH_ROWS
from distill.prompts.columns import Row, checked

if TYPE_CHECKING:
    import pyarrow.parquet as pq


def parquet_columns(path: Path) -> list[str]:
    """The columns of the file. Errors: UserError when it cannot be read."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    """The rows. columns: those that are read; None reads all. Errors: UserError naming the row."""
    with _opened(path) as file:
        wanted = set(file.schema_arrow.names if columns is None else columns)
        wanted |= {column.partition(".")[0] for column in wanted}
        names = [name for name in file.schema_arrow.names if name in wanted]
        texts = _texts(file)
    number = 0
    with _opened(path, texts) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            for i in range(batch.num_rows):
                number += 1
                where = f"{path}, row {number}"
                (row,) = batch.slice(i, 1).to_pylist()
                yield where, checked(row, where)


@contextmanager
def _opened(path: Path, dictionaries: Sequence[str] = ()) -> "Iterator[pq.ParquetFile]":
    """A Parquet file. dictionaries: columns that stay encoded. Errors: UserError for whatever pyarrow cannot read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        options = {"read_dictionary": list(dictionaries)} if dictionaries else {}
        with pq.ParquetFile(path, page_checksum_verification=True, **options) as file:
            yield file
    except UserError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise _damaged(path, error) from error
    except OSError as error:  # a damaged page; a full disk or a missing permission has an errno
        if error.errno is not None:
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path}: not a readable Parquet file ({reason}); download or write it again")


def _texts(file: "pq.ParquetFile") -> list[str]:
    """The columns of text. A text that a dictionary holds once may be that of every row: it stays encoded until a row
    needs it. The schema says which they are, and not the row groups: asking pyarrow about a damaged row group ends the
    process."""
    described = [file.schema.column(number) for number in range(len(file.schema))]
    return sorted(column.path for column in described if column.physical_type == "BYTE_ARRAY")
