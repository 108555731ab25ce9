"""`distill export`: the traces of a run, an import or a directory of parts → one JSONL or Parquet file.

Streamed: a group of rows is in memory at a time. A row of openr1 holds all answers to one problem, and those may lie
far apart in a store (`samples` was raised later), so they are sorted by prompt in a temporary database on the disk.

The file takes its name when it is complete.
"""

import json
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from distill.console import counted, say
from distill.durable import replacing
from distill.errors import UserError
from distill.traces.exported import SCHEMAS, Format, correctness, openr1_row, row_of
from distill.traces.parts import GROUP_ROWS, parts
from distill.traces.published import IMPORTED
from distill.traces.rows import without_tokens
from distill.traces.store import TraceStore, count_traces, read_traces
from distill.traces.trace import Trace, Verdict

FILE_TYPES = ("jsonl", "parquet")
Writer = Generator[None, list[dict[str, object]], None]  # takes groups of rows
Judged = tuple[Trace, list[Verdict]]


def file_type_of(out: Path, named: str | None) -> str:
    """`jsonl` or `parquet`: as named, or as the file's name ends. Errors: UserError."""
    kind = named or out.suffix.removeprefix(".")
    if kind not in FILE_TYPES:
        raise UserError(f"{out}: name a .jsonl or .parquet file, or give --file-type {' or '.join(FILE_TYPES)}")
    return kind


def stored_traces(source: Path, dropped: bool = False, note: Callable[[str], None] = say) -> Iterator[Judged]:
    """The traces of a run that its filters kept, of an import, or of a directory of parts.

    dropped: those that the filters dropped, too, or all of a run that was not filtered; a note says how many are stored
    that were not filtered. Errors: UserError.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; name a run, or what `distill import` made")
    kept = source / "filtered" / "kept"
    if (source / IMPORTED).is_file():
        folders = [source / "traces"]
    elif parts(source):
        folders = [source]
    elif parts(kept):
        folders = [kept, *([source / "filtered" / "dropped"] if dropped else [])]
        if dropped and (rest := len(TraceStore(source / "traces")) - sum(map(count_traces, folders))) > 0:
            note(f"note: {counted(rest, 'stored trace')} not filtered and not exported; run `distill filter` first")
    elif (source / "traces").is_dir() and dropped:
        return ((trace, []) for trace in TraceStore(source / "traces").iterate(tokens=False))
    elif (source / "traces").is_dir():
        raise UserError(f"{source}: not filtered yet; run `distill filter RECIPE`, or export every trace with --all")
    else:
        raise UserError(f"{source}: no traces here; name a run, or what `distill import` made")
    return (judged for folder in folders for judged in read_traces(folder, ids=False))


def export_traces(
    traces: Iterable[Judged], form: Format, out: Path, file_type: str, note: Callable[[str], None] = say
) -> tuple[int, int]:
    """Write the file; return the numbers of traces and rows in it.

    A text with half a surrogate pair is left out and counted: no reader of these files takes it. Errors: UserError when
    there is nothing to write; OSError when the disk is full.
    """
    encodable = _Encodable(traces)
    rows = _problems(encodable) if form == "openr1" else (row_of(trace, form) for trace, _ in encodable)
    first = list(islice(rows, GROUP_ROWS))
    if not first:
        raise UserError(f"{out}: nothing to export: no trace is kept; --all exports the dropped ones too")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with replacing(out) as file:
        write = _parquet(file, SCHEMAS[form]) if file_type == "parquet" else _jsonl(file)
        next(write)
        while first:
            write.send(first)
            written += len(first)
            first = list(islice(rows, GROUP_ROWS))
        write.close()
    if encodable.left_out:
        note(f"note: {counted(encodable.left_out, 'trace')} left out: the text holds half a surrogate pair")
    return encodable.taken, written


class _Encodable:
    """The traces whose text is UTF-8, without their tokens, and counts of both."""

    def __init__(self, traces: Iterable[Judged]) -> None:
        self.traces, self.taken, self.left_out = traces, 0, 0

    def __iter__(self) -> Iterator[Judged]:
        for trace, verdicts in self.traces:
            try:
                json.dumps([trace.messages, trace.prompt.to_dict(), trace.finish_reason], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                self.left_out += 1
                continue
            self.taken += 1
            yield trace, verdicts


def _problems(traces: Iterable[Judged]) -> Iterator[dict[str, object]]:
    """The rows of openr1, in the order in which their prompts appear first."""
    database = sqlite3.connect("")  # on the disk where it outgrows its cache, and deleted when it is closed
    try:
        database.execute("create table traces (prompt integer, trace text, correct integer)")
        numbers: dict[str, int] = {}
        for trace, verdicts in traces:
            number = numbers.setdefault(trace.prompt.id, len(numbers))
            text = json.dumps(without_tokens(trace).to_dict())
            database.execute("insert into traces values (?, ?, ?)", (number, text, correctness(verdicts)))
        stored = database.execute("select prompt, trace, correct from traces order by prompt, rowid")
        for _, group in groupby(stored, key=lambda row: row[0]):
            yield openr1_row(
                [(Trace.from_dict(json.loads(text)), None if said is None else bool(said)) for _, text, said in group]
            )
    finally:
        database.close()


def _jsonl(file: BinaryIO) -> Writer:
    while True:
        rows = yield
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _parquet(file: BinaryIO, schema: pa.Schema) -> Writer:
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        while True:
            rows = yield
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
