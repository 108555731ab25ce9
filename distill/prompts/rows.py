"""Rows of a JSONL or Parquet file, each with its place for messages.

Read row by row with our own few lines and not with `datasets`, because a user whose file has one bad line must be told
which one, and `datasets` says "An error occurred while generating the dataset". Whatever is wrong with a file is a
`UserError` that names it and the line (Parquet: the row).

What a row may hold is checked here, once for prompts and traces: a line without an end, a row with a gigabyte behind a
few compressed kilobytes, brackets nested a thousand deep and a key that is written twice are refused. `NaN`, which
pandas and Python write for a missing value and JSON does not know, is a missing value; infinities are refused.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.limits import BATCH_ROWS, JSON_DEPTH, ROW_BYTES

if TYPE_CHECKING:
    import pyarrow.parquet as pq

Row = tuple[str, dict[str, object]]  # the place, for messages, and the columns

BEGINNINGS = {  # of files under a wrong name → what they are and what to do
    b"version https://git-lfs": "a Git LFS pointer, not the file: run `git lfs pull` in its repository",
    b"\xff\xfe": "UTF-16 text: convert it, iconv -f UTF-16 -t UTF-8 {path} > new.jsonl",
    b"\xfe\xff": "UTF-16 text: convert it, iconv -f UTF-16 -t UTF-8 {path} > new.jsonl",
    b"\x1f\x8b": "compressed by gzip: unpack it, gunzip -c {path} > new.jsonl",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, unzstd {path} -o new.jsonl",
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"PAR1": "a Parquet file: name it .parquet",
}
CONVERSIONS = {  # suffix → the name by which `datasets` reads such files
    ".csv": ("csv", ""),
    ".tsv": ("csv", ", sep='\\t'"),
    ".json": ("json", ""),
    ".arrow": ("arrow", ""),
}


def rows_of_file(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file. columns: those that are read of a Parquet file; None reads all.

    Errors: UserError at once for a file that is missing or of another kind, later for a row that cannot be read.
    """
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.is_dir():
        raise UserError(
            f"{path}: a directory; a data set directory, such as `save_to_disk` writes, is read with `kind: hub` and "
            f"`dataset: {path}`"
        )
    if path.suffix not in readers:
        raise UserError(f"{path}: not a {' or '.join(readers)} file{_conversion(path)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; a path is relative to where the command runs")
    with path.open("rb") as file:
        head = file.read(24)
    kind = next((what for begin, what in BEGINNINGS.items() if head.startswith(begin)), None)
    if kind is not None and not (head.startswith(b"PAR1") and path.suffix == ".parquet"):
        raise UserError(f"{path}: {kind.format(path=path)}")
    return readers[path.suffix](path, columns)


def _conversion(path: Path) -> str:
    if path.suffix in (".gz", ".zst", ".zip"):
        return f"; unpack {path.name} first"
    if path.suffix not in CONVERSIONS:
        return ""
    name, options = CONVERSIONS[path.suffix]
    code = f"load_dataset('{name}', data_files='{path}', split='train'{options}).to_json('{path.stem}.jsonl')"
    return f'; convert it: python -c "from datasets import load_dataset as l; {code.replace("load_dataset", "l")}"'


def columns_of(path: Path) -> list[str] | None:
    """The columns of a Parquet file; None for JSONL, whose rows have their own. Errors: UserError."""
    if path.suffix != ".parquet":
        return None
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def value_at(row: Mapping[str, object], column: str) -> object:
    """The value of a column, None where it is missing. `a.b` is the key b of the column a, if no column is named so."""
    if column in row or "." not in column:
        return row.get(column)
    value: object = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def has_column(row: Mapping[str, object], column: str) -> bool:
    """Whether a row has a column, or the first part of a dotted one."""
    return column in row or column.partition(".")[0] in row


# ---- JSON


def parse_json(text: str) -> object:
    """A JSON value; NaN is None. Errors: ValueError, for infinities, duplicate keys and deep nesting too."""
    try:
        value: object = json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_unique)
    except RecursionError:
        value = None
    if text.count("[") + text.count("{") > JSON_DEPTH and _depth(text) > JSON_DEPTH:
        raise ValueError(f"brackets are nested more than {JSON_DEPTH} deep")
    return value


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON value")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return row


def _depth(text: str) -> int:
    """How deep the brackets outside strings are nested in valid JSON."""
    deepest = depth = 0
    inside = escaped = False
    for character in text:
        if inside:
            inside = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _jsonl_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    del columns  # a line is read whole
    with path.open("rb") as file:
        number = 0
        while line := file.readline(ROW_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > ROW_BYTES:
                raise UserError(f"{where}: longer than {ROW_BYTES >> 20} MiB; each line is one JSON object")
            if not line.strip():
                continue
            if line.strip() in (b"[", b"\xef\xbb\xbf["):
                raise UserError(f"{where}: a JSON array{_array_advice(path)}")
            try:
                row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # broken JSON or broken UTF-8
                raise UserError(f"{where}: not JSON ({error}); correct or remove the line") from error
            if not isinstance(row, dict):
                what = _array_advice(path) if isinstance(row, list) else ""
                raise UserError(f"{where}: not a JSON object; each line is one {{column: value}} object{what}")
            yield where, row


def _array_advice(path: Path) -> str:
    return f"; write one object per line: `jq -c '.[]' {path} > new.jsonl` converts an array"


# ---- Parquet


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


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
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


def _texts(file: "pq.ParquetFile") -> list[str]:
    """The columns of text. A text that a dictionary holds once may be that of every row: it stays encoded until a row
    needs it. The schema says which they are, and not the row groups: asking pyarrow about a damaged row group ends the
    process."""
    described = [file.schema.column(number) for number in range(len(file.schema))]
    return sorted(column.path for column in described if column.physical_type == "BYTE_ARRAY")


def checked(row: dict[str, object], where: str) -> dict[str, object]:
    """A row with None for NaN. Errors: UserError when it holds too much text."""
    if text_size(row) > ROW_BYTES:
        raise UserError(f"{where}: more than {ROW_BYTES >> 20} MiB of text in one row; remove the row")
    return {key: without_nan(value) for key, value in row.items()}


def text_size(value: object) -> int:
    """Characters and bytes of the texts in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_size, value.values()))
    return sum(map(text_size, value)) if isinstance(value, list) else 0


def without_nan(value: object) -> object:
    """The value with None for NaN, at every level."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return [without_nan(inner) for inner in value] if isinstance(value, list) else value
