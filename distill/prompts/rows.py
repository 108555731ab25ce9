"""Rows of a file, each with its place for messages: the door to every kind of file that prompts and traces come in.

    .jsonl  .json (an array)  .csv  .tsv        each also compressed, as .gz or .zst
    .parquet
    a directory that `save_to_disk` of `datasets` wrote, with one split or several

Whatever is wrong with a file is a `UserError` that names it and the line or the row. What a row may hold is checked
once for prompts and traces: a line without an end, a row with a gigabyte behind a few compressed kilobytes, brackets
nested a thousand deep and a key that is written twice are refused. `NaN`, which pandas and Python write for a missing
value and JSON does not know, is a missing value; infinities are refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.errors import UserError
from distill.prompts.columns import Row, checked, has_column, parse_json, value_at
from distill.prompts.parquet_rows import parquet_columns, parquet_rows
from distill.prompts.streams import COMPRESSIONS, check_beginning
from distill.prompts.text_rows import SEPARATORS, array_rows, csv_columns, csv_rows, jsonl_rows

__all__ = ["Row", "checked", "columns_of", "has_column", "parse_json", "rows_of_file", "value_at"]

TEXTS = (".jsonl", ".json", *SEPARATORS)
SAVED = ("state.json", "dataset_dict.json")  # one of these is in a directory that `save_to_disk` wrote


def rows_of_file(path: Path, columns: Sequence[str] | None = None, split: str | None = None) -> Iterator[Row]:
    """The rows of a file or a saved data set. columns: those that are read of a Parquet file; None reads all. split: of
    a directory that holds several.

    Errors: UserError at once for a file that is missing or of another kind, later for a row that cannot be read.
    """
    match kind := _checked_kind(path, split):
        case "saved":
            from distill.prompts.hub import load_saved, rows_of_dataset

            return rows_of_dataset(load_saved(path, split), str(path))
        case ".parquet":
            return parquet_rows(path, columns)
        case ".jsonl":
            return jsonl_rows(path)
        case ".json":
            return array_rows(path)
    return csv_rows(path, SEPARATORS[kind])


def columns_of(path: Path, split: str | None = None) -> list[str] | None:
    """The columns that all rows have; None for JSON, whose rows have their own. Errors: UserError."""
    match kind := _checked_kind(path, split):
        case "saved":
            from distill.prompts.hub import load_saved

            return list(load_saved(path, split).column_names)
        case ".parquet":
            return parquet_columns(path)
        case ".jsonl" | ".json":
            return None
    return csv_columns(path, SEPARATORS[kind])


def _checked_kind(path: Path, split: str | None) -> str:
    """`saved`, or the suffix without that of a compression. Errors: UserError."""
    if path.is_dir():
        if not any((path / name).is_file() for name in SAVED):
            raise UserError(
                f"{path}: a directory, but not one that `save_to_disk` wrote; a directory of data files is read with "
                f"`kind: hub` and `dataset: {path}`"
            )
        return "saved"
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if kind not in TEXTS and path.suffix != ".parquet":
        advice = _advice(path)
        raise UserError(
            f"{path}: not a prompt or trace file; expected {', '.join(TEXTS)} (also as .gz or .zst), .parquet, or a "
            f"directory of save_to_disk{advice}"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file; a path is relative to where the command runs")
    if split is not None:
        raise UserError(f"{path}: a file has no split; remove `split: {split}`")
    if path.suffix != ".parquet":
        check_beginning(path)
        return kind
    with path.open("rb") as file:
        lfs = file.read(24).startswith(b"version https://git-lfs")
    if lfs:
        raise UserError(f"{path}: a Git LFS pointer, not the file: run `git lfs pull` in its repository")
    return ".parquet"


def _advice(path: Path) -> str:
    if path.suffix == ".zip":
        return f"; unpack {path.name} first"
    if path.suffix in COMPRESSIONS and path.with_suffix("").suffix == ".parquet":
        return "; Parquet is compressed inside: unpack the file"
    if path.suffix == ".arrow":
        return "; name the directory that holds the .arrow file"
    return ""
