"""Rows of text files: JSONL, a JSON array, CSV and TSV.

Read with the standard library and not with `datasets` or pandas, because a user whose file has one bad line must be
told which one, and because both convert: pandas reads `007` as 7 and `NA` as missing. A CSV value is the text between
the separators; an empty one is a missing value.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from distill.console import counted
from distill.errors import UserError
from distill.limits import ARRAY_BYTES, ROW_BYTES
from distill.prompts.columns import Row, listed, parse_json, parse_json_at
from distill.prompts.streams import lines, opened, readable

SEPARATORS = {".csv": ",", ".tsv": "\t"}
WHITESPACE = " \t\n\r"


def jsonl_rows(path: Path) -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped. Errors: UserError naming the line."""
    for number, line in lines(path):
        where = f"{path}, line {number}"
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
    name = path.name.replace(".jsonl", ".json")
    return f"; name the file {name}, or write one object per line: `jq -c '.[]' {path} > new.jsonl` converts an array"


def array_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON array, which is held in memory whole. Errors: UserError naming the row."""
    text = _text(path)
    position = _skipped(text, 0)
    if text[position : position + 1] != "[":
        raise UserError(
            f"{path}: not a JSON array of objects; a file with one object per line is named {path.stem.split('.')[0]}"
            f".jsonl, and a list inside an object is taken out by `jq '.KEY' {path} > new.json`"
        )
    position, number = _skipped(text, position + 1), 0
    while text[position : position + 1] != "]" or number:
        number += 1
        where = f"{path}, row {number}"
        start = position
        try:
            row, position = parse_json_at(text, start)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); correct or remove the row") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; each row of the array is one {{column: value}} object")
        if position - start > ROW_BYTES:
            raise UserError(f"{where}: longer than {ROW_BYTES >> 20} MiB; correct or remove the row")
        yield where, row
        position = _skipped(text, position)
        separator = text[position : position + 1]
        if separator == "]":
            break
        if separator != ",":
            what = "the file ends here" if not separator else f"{separator!r} follows it, not a comma"
            raise UserError(f"{where}: {what}; the array is cut off or damaged: write it again")
        position = _skipped(text, position + 1)
    if _skipped(text, position + 1) < len(text):
        raise UserError(f"{path}: text after the end of the array; write one array per file")


def _text(path: Path) -> str:
    with opened(path) as file, readable(path):
        data = file.read(ARRAY_BYTES + 1)
    if len(data) > ARRAY_BYTES:
        raise UserError(f"{path}: an array of more than {ARRAY_BYTES >> 20} MiB; write one object per line (.jsonl)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it with iconv") from error


def _skipped(text: str, position: int) -> int:
    while position < len(text) and text[position] in WHITESPACE:
        position += 1
    return position


# ---- CSV


def csv_columns(path: Path, separator: str) -> list[str]:
    """The header of a CSV file. Errors: UserError when there is none, or it names a column twice."""
    return _Table(path, separator).header


def csv_rows(path: Path, separator: str) -> Iterator[Row]:
    """The rows below the header; blank lines are skipped. Errors: UserError naming row and line."""
    table = _Table(path, separator)
    number = 0
    while (fields := table.next_fields(f"row {number + 1}")) is not None:
        if not fields:
            continue
        number += 1
        where = f"{path}, row {number} (line {table.line})"
        if len(fields) != len(table.header):
            raise UserError(
                f"{where}: {counted(len(fields), 'value')}, and the header has {counted(len(table.header), 'column')}; "
                f'quote a value that holds a separator or a line end, and double the quotes in it (")'
            )
        yield where, {name: value or None for name, value in zip(table.header, fields, strict=True)}


class _Table:
    """A CSV file being read. header: the column names. line: where the last record begins."""

    def __init__(self, path: Path, separator: str) -> None:
        self.path, self.line, self._last, self._size = path, 1, 0, 0
        csv.field_size_limit(ROW_BYTES)  # of the process; nothing else in it reads CSV
        self._records = csv.reader(self._lines(), delimiter=separator, strict=True)
        header = self.next_fields("the header")
        while header == []:
            header = self.next_fields("the header")
        if header is None:
            raise UserError(f"{path}: empty; the first line names the columns, such as question{separator}answer")
        self.header = [name.strip() for name in header]
        if twice := sorted({name for name in self.header if self.header.count(name) > 1}):
            raise UserError(f"{path}: the header names column {listed(twice[:1])!r} twice; rename or remove one")
        other = next((mark for mark in ";\t," if mark != separator and mark in self.header[0]), None)
        if len(self.header) == 1 and other is not None:
            name = {"\t": "tabs: name it .tsv", ",": "commas: name it .csv", ";": "semicolons: write it with commas"}
            raise UserError(f"{path}: the columns are separated by {name[other]}")

    def next_fields(self, what: str) -> list[str] | None:
        """The next record; [] for a blank line, None at the end. Errors: UserError."""
        self.line, self._size = self._last + 1, 0
        try:
            return next(self._records, None)
        except csv.Error as error:
            where = f"{self.path}, {what} (line {self.line})"
            raise UserError(f"{where}: not CSV ({error}); correct or remove the row") from error

    def _lines(self) -> Iterator[str]:
        for number, line in lines(self.path):
            self._last, self._size = number, self._size + len(line)
            if self._size > ROW_BYTES:
                raise UserError(
                    f"{self.path}, line {self.line}: more than {ROW_BYTES >> 20} MiB in one row; close the quote"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}, line {number}: not UTF-8 text ({error}); convert it") from error
