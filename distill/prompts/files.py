"""Prompts from a JSONL or Parquet file.

Read row by row with our own few lines and not with `datasets`, because a user whose file has one bad line must be told
which one, and `datasets` says "An error occurred while generating the dataset". Whatever is wrong with a row is a
`UserError` that names the file and the line (Parquet: the row).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.prompts.prompt import Prompt

if TYPE_CHECKING:
    from distill.recipe.sources import FilePrompts, HubPrompts

LETTERS = "ABCDEFGHIJ"

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its columns


def read_file(source: "FilePrompts") -> Iterator[Prompt]:
    """The prompts of the file, at most `source.limit` rows of it. Errors: UserError, see the module."""
    path = Path(source.path)
    rows = rows_of_file(path, wanted_columns(source))
    # the last two parts of the path tell files apart, and put no home directory into a published data set
    return prompts_from_rows(rows, source, str(path), "/".join(path.absolute().parts[-2:]).lstrip("/"))


def rows_of_file(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Every row of a JSONL or Parquet file. columns: those that must be there; None: all that are. UserError."""
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: not a file of rows; give a {' or '.join(readers)} file")
    if not path.is_file():
        raise UserError(f"{path}: no such file; a path is relative to where the command runs")
    return readers[path.suffix](path, columns)


def wanted_columns(source: "FilePrompts | HubPrompts") -> list[str]:
    columns = source.question, source.answer, *source.choices, source.date
    return list(dict.fromkeys(column for column in columns if column is not None))


def require_columns(wanted: Sequence[str], there: Iterable[str], where: str) -> None:
    there = list(there)
    for column in wanted:
        if column not in there:
            names = ", ".join(there) or "(none)"
            raise UserError(f"{where}: no column {column}; the columns are {names}: name the right one under `prompts`")


def prompts_from_rows(
    rows: Iterator[Row], source: "FilePrompts | HubPrompts", whole: str, name: str
) -> Iterator[Prompt]:
    """Turn rows into prompts. whole: what the rows come from, for messages; name: the prompts' `source`."""
    empty = True
    for where, row in islice(_within(rows, source), source.limit):
        empty = False
        question = row[source.question]
        if wrong := _wrong_question(question):
            raise UserError(f"{where}: column {source.question} {wrong}; mend or remove the row")
        answer = None if source.answer is None else _as_text(row[source.answer])
        if source.choices:
            if answer is None:
                raise UserError(
                    f"{where}: column {source.answer} is empty; a question with choices needs the right one"
                )
            question, answer = with_choices(question, answer, [str(row[column]) for column in source.choices])
        yield Prompt.from_question(question, answer, source.task, name)
    if empty:
        raise UserError(f"{whole}: no rows; give a source with at least one problem")


def _within(rows: Iterator[Row], source: "FilePrompts | HubPrompts") -> Iterator[Row]:
    """The rows of the window. Dates are compared as text, which is right for the year first."""
    if source.date is None or (source.since is None and source.until is None):
        return rows
    first, last = source.since or "", source.until or "9"
    return ((where, row) for where, row in rows if first <= str(row[source.date])[:10] <= last)


def with_choices(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The question with its choices listed, and the right one's letter. The order is a hash's, so that it is the same
    everywhere and says nothing."""

    def rank(choice: str) -> bytes:
        return hashlib.sha256(json.dumps([question, choice]).encode()).digest()

    choices = sorted([right, *wrong], key=rank)
    listed = "\n".join(f"{letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question.strip()}\n\n{listed}", LETTERS[choices.index(right)]


def _wrong_question(question: Any) -> str | None:
    if question is None or question == "":
        return "is empty"
    if not isinstance(question, str):
        return f"is not text but {type(question).__name__}"
    if not question.strip():
        return "is blank"
    try:
        question.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which no tokenizer takes"
    return None


def _as_text(answer: Any) -> str | None:
    """Text stays as it is, null is no answer, anything else (a number, a list of tests) becomes its JSON."""
    if answer is None or isinstance(answer, str):
        return answer
    return json.dumps(answer, ensure_ascii=False, default=str)


def _jsonl_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # broken JSON or broken UTF-8
                raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: not a JSON object; each line is one {{column: value}} object")
            require_columns(columns or (), row, where)
            yield where, row


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            require_columns(columns or (), file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=None if columns is None else list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason}); download or write it again") from error
