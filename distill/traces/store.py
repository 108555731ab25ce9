"""Traces on the disk: a ledger while they are made, sharded Parquet when they are done.

A directory holds `ledger.jsonl` (the newest traces, one fsynced line each) and `part-00000.parquet` … (at most
`parts.SHARD_ROWS` rows each). `compact()` turns the ledger into parts. A part takes its name in one step and the ledger
goes last, so a process killed in between leaves rows that are in both: every reader takes the first row of a key
(prompt id, sample) and skips the others. Readers without the run's lock may be overtaken by `compact`: they open the
ledger before they list the parts, so that each row is in one of the two.

Appending to Parquet directly was rejected because a file without its footer is unreadable, and one file per trace
because a run has hundreds of thousands.

Making Python objects of a large store takes minutes, so readings have different prices: `keys` reads two narrow
columns, `figures` the text and a few numbers, `iterate(tokens=False)` everything but token ids and log-probabilities,
which are most of the bytes, and iterating reads all. `split` copies columns, without making objects of them. No reader
but `keys` holds more of a trace than a hash of its key.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import pyarrow as pa

from distill.durable import replacing_directories, sync_directory
from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.traces.keys import Key, KeySet
from distill.traces.ledger import Ledger, Row
from distill.traces.parts import GROUP_ROWS, PartWriter, batches, parts, row_count
from distill.traces.rows import (
    SCHEMA,
    TEXT_COLUMNS,
    VERDICTS,
    rounded,
    table_of,
    trace_of,
    verdict_column,
    verdicts_of,
    with_all_columns,
    without_tokens,
)
from distill.traces.trace import FinishReason, ReasoningForm, Trace, Verdict, is_count, trace_digest

T = TypeVar("T")

COUNTS = ("completion_tokens", "prompt_tokens", "cached_tokens", "reasoning_tokens")
FIGURE_COLUMNS = ["id", "sample", "task", "text", "exact", "finish_reason", *COUNTS, "form"]
JUDGED_SCHEMA = SCHEMA.append(VERDICTS)


class Decision(NamedTuple):
    """Where `TraceStore.split` copies a trace: the index of the directory, and the verdicts that go with it."""

    key: Key
    place: int
    verdicts: Sequence[Verdict]


class Figures(NamedTuple):
    """What the summaries need of a trace. tokens: of the completion, 0 where their number is not known, like the other
    counts. counted: whether it is known; 0 beside a text is no count. digest: `Trace.digest`."""

    key: Key
    finish_reason: FinishReason
    tokens: int
    digest: str
    prompt_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    form: ReasoningForm | None
    task: str
    counted: bool


def decoded(directory: Path, traces: Iterator[T]) -> Iterator[T]:
    """Return the traces as they are. Every pass that makes objects of a directory's traces comes through here, which
    tests count."""
    return traces


class TraceStore:
    """The traces of one directory. Reading works at any time; appending needs the `with` block.

    One process writes at a time: the run directory's lock ensures that. Errors of all readers: UserError when a part or
    a line of the ledger is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ledger = Ledger(directory / "ledger.jsonl")
        self._open = False
        self._wanted: tuple[set[str], int] | None = None  # prompt ids and samples per prompt, of a part of the store

    def part_of(self, prompts: Iterable[Prompt], samples: int) -> "TraceStore":
        """The same directory, whose readers but `keys`, `tasks` and `omitted` see the first `samples` answers to these
        prompts only. A store holds others where counts were lowered, or prompts changed, after they were answered."""
        part = TraceStore(self.directory)
        part._wanted = {prompt.id for prompt in prompts}, samples
        return part

    @property
    def left_out(self) -> str | None:
        """A line about the stored traces that are not in this part of the store; None where all are."""
        total = len(TraceStore(self.directory))
        return (
            f"note: {total - len(self):,} of {total:,} stored traces are left out: their prompts or samples are no "
            f"longer in the recipe"
            if total > len(self)
            else None
        )

    def __enter__(self) -> "TraceStore":
        self.directory.mkdir(parents=True, exist_ok=True)
        sync_directory(self.directory.parent)
        self._ledger.__enter__()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._ledger.__exit__(kind, error, trace)

    @property
    def cut_off(self) -> int:
        """Bytes of a half-written trace that opening removed from the ledger; that trace is sampled again."""
        return self._ledger.cut_off

    def append(self, traces: Iterable[Trace]) -> None:
        """Store the traces durably, all or none.

        Errors: OSError when the disk is full; ValueError naming the field of a trace that cannot be stored.
        """
        rows = []
        for trace in traces:
            trace.check_tokens()
            rows.append(rounded(trace).to_dict())
        self._ledger.append(rows)

    def keys(self) -> set[Key]:
        """(prompt id, sample) of every stored trace. Reads only the two key columns of the parts."""
        recent = {_ledger_key(row) for row in self._ledger.rows()}  # first: `compact` moves them to a part
        return recent | self._part_keys()

    def figures(self) -> Iterator[Figures]:
        """Key, finish reason and length of every stored trace once, in order. Reads no token."""
        seen = KeySet()
        with self._ledger.reading() as recent:
            for batch in batches(self.directory, FIGURE_COLUMNS):
                for row in self._unseen(batch, seen).to_pylist():
                    key = (row["id"], row["sample"])
                    yield _figures(key, row["task"], row if row["exact"] is None else json.loads(row["exact"]))
            for row in self._new_rows(recent, seen):
                yield _figures(_ledger_key(row), row["prompt"]["task"], row)

    def tasks(self) -> set[str]:
        """The tasks of the stored traces. Reads only that column of the parts."""
        recent = {row["prompt"]["task"] for row in self._ledger.rows()}
        return recent | tasks_in(self.directory)

    def omitted(self) -> tuple[str, ...] | None:
        """`Trace.omitted` of the first stored trace, None without any. Reads one group of rows."""
        with self._ledger.reading() as recent:
            for batch in batches(self.directory, ["id", "omitted"]):
                for row in batch.slice(0, 1).to_pylist():
                    return tuple(row.get("omitted") or ())
            for _, row in recent:
                return tuple(row.get("omitted") or ())
        return None

    def is_empty(self) -> bool:
        """Whether no trace is stored. Opens no file."""
        with suppress(FileNotFoundError):
            if self._ledger.path.stat().st_size:
                return False
        return not parts(self.directory)

    def __len__(self) -> int:
        seen = KeySet()
        with self._ledger.reading() as recent:
            parts = sum(int(self._unseen(batch, seen).num_rows) for batch in batches(self.directory, ["id", "sample"]))
            return parts + sum(1 for _ in self._new_rows(recent, seen))

    def __iter__(self) -> Iterator[Trace]:
        """Every trace once: those of the parts, then those of the ledger, each in the order they were appended."""
        return self.iterate()

    def iterate(self, tokens: bool = True) -> Iterator[Trace]:
        """Every trace once, as iterating gives them. tokens: with token ids and log-probabilities."""
        return decoded(self.directory, self._traces(tokens))

    def compact(self) -> None:
        """Move the ledger's traces into Parquet. May be killed at any point and called again.

        Errors: OSError when the disk is full; the ledger is then still there, and so are the parts that were finished.
        """
        assert not self._open, "compact a store after its `with` block: the open ledger would go on under no name"
        assert self._wanted is None, "compact the whole store: a part of it would lose the rest"
        if self._ledger.path.exists():
            with PartWriter(self.directory, SCHEMA) as writer:
                seen = KeySet()
                for batch in batches(self.directory, ["id", "sample"]):
                    seen.add(_keys_of(batch))
                for table in self._ledger_tables(seen):
                    writer.write(table)
            self._ledger.path.unlink()
        if self.directory.exists():
            sync_directory(self.directory)

    def split(self, directories: Sequence[Path], decisions: Iterable[Decision]) -> None:
        """Copy every trace, with its verdicts, into one of `directories`, in place of what they hold.

        decisions: one for each trace, in the order of `iterate`. The parts are copied as columns. Every directory gets
        at least one part. Errors: OSError when the disk is full.
        """
        rest = iter(decisions)
        with replacing_directories(*directories) as new, ExitStack() as stack:
            writers = [stack.enter_context(PartWriter(path, JUDGED_SCHEMA, columns_at_least=True)) for path in new]
            for table in self._tables():
                here = list(islice(rest, table.num_rows))
                assert [decision.key for decision in here] == _keys_of(table), "a decision for each trace, in order"
                judged = table.append_column(VERDICTS, verdict_column(decision.verdicts for decision in here))
                for i, writer in enumerate(writers):
                    writer.write(judged.filter(pa.array([decision.place == i for decision in here], pa.bool_())))

    def _part_keys(self) -> set[Key]:
        return {key for batch in batches(self.directory, ["id", "sample"]) for key in _keys_of(batch)}

    def _traces(self, tokens: bool) -> Iterator[Trace]:
        seen = KeySet()
        with self._ledger.reading() as recent:
            for batch in batches(self.directory, None if tokens else TEXT_COLUMNS):
                yield from map(trace_of, self._unseen(batch, seen).to_pylist())
            for row in self._new_rows(recent, seen):
                trace = Trace.from_dict(row)
                yield trace if tokens else without_tokens(trace)

    def _tables(self) -> Iterator[pa.Table]:
        seen = KeySet()
        for batch in batches(self.directory):
            yield with_all_columns(pa.Table.from_batches([self._unseen(batch, seen)]))
        yield from self._ledger_tables(seen)

    def _ledger_tables(self, seen: KeySet) -> Iterator[pa.Table]:
        if self._ledger.path.exists():
            rows = self._new_rows(self._ledger.located_rows(), seen)
            traces = decoded(self.directory, map(Trace.from_dict, rows))
            while group := list(islice(traces, GROUP_ROWS)):
                yield table_of(group)

    def _new_rows(self, rows: Iterable[tuple[int, Row]], seen: KeySet) -> Iterator[Row]:
        for _, row in rows:
            if all(self._new([_ledger_key(row)], seen)):
                yield row

    def _unseen(self, batch: pa.RecordBatch, seen: KeySet) -> pa.RecordBatch:
        """The rows whose keys are new, of the part of the store that is read."""
        new = self._new(_keys_of(batch), seen)
        return batch if all(new) else batch.filter(pa.array(new, pa.bool_()))

    def _new(self, keys: Sequence[Key], seen: KeySet) -> list[bool]:
        new = seen.add(keys)
        if self._wanted is None:
            return new
        prompts, samples = self._wanted
        return [is_new and key[0] in prompts and key[1] < samples for key, is_new in zip(keys, new, strict=True)]


def write_store(directory: Path, traces: Iterable[Trace]) -> None:
    """Write a whole store, its keys unique, in place of what was there. Errors: OSError when the disk is full."""
    rest = map(rounded, traces)
    with replacing_directories(directory) as (new,), PartWriter(new, SCHEMA) as writer:
        while group := list(islice(rest, GROUP_ROWS)):
            writer.write(table_of(group))


def write_traces(directory: Path, traces: Iterable[Trace], verdicts: Mapping[Key, list[Verdict]] | None = None) -> None:
    """Write a whole directory of parts, with a column `verdicts`, in place of what was there.

    No traces give one part without rows, so that the columns are known. Errors: OSError when the disk is full.
    """
    said, rest = verdicts or {}, map(rounded, traces)
    with replacing_directories(directory) as (new,), PartWriter(new, JUDGED_SCHEMA, columns_at_least=True) as writer:
        while group := list(islice(rest, GROUP_ROWS)):
            column = verdict_column(said.get(trace.key, ()) for trace in group)
            writer.write(table_of(group).append_column(VERDICTS, column))


def read_traces(directory: Path, ids: bool = True) -> Iterator[tuple[Trace, list[Verdict]]]:
    """Every trace of a directory of parts with its verdicts (none where the parts have no such column).

    ids: with token ids and log-probabilities. They are most of a trace's numbers; without them reading is many times
    as fast, and the number of tokens is there all the same. Errors: UserError when there are no parts, or one is
    damaged.
    """
    if not parts(directory):
        raise UserError(f"{directory}: no part-*.parquet here; run the stage that writes it first")
    return decoded(directory, _judged(directory, None if ids else [*TEXT_COLUMNS, VERDICTS.name]))


def count_traces(directory: Path) -> int:
    """The number of traces in a directory of parts, from their footers. Errors: UserError when one is damaged."""
    return row_count(directory)


def _judged(directory: Path, columns: Sequence[str] | None) -> Iterator[tuple[Trace, list[Verdict]]]:
    for batch in batches(directory, columns):
        for row in batch.to_pylist():
            yield trace_of(row), verdicts_of(row)


def tasks_in(directory: Path) -> set[str]:
    """The tasks of the traces in a directory of parts, from that column alone. Errors: UserError for a damaged part."""
    return {task for batch in batches(directory, ["task"]) for task in batch["task"].unique().to_pylist()}


def _figures(key: Key, task: str, row: Row) -> Figures:
    completion, prompt, cached, reasoning = (row.get(name) or 0 for name in COUNTS)
    digest = trace_digest(*key, row["text"])
    counted = is_count(row.get(COUNTS[0]), row["text"])
    return Figures(
        key, row["finish_reason"], completion, digest, prompt, cached, reasoning, row.get("form"), task, counted
    )


def _keys_of(table: pa.Table | pa.RecordBatch) -> list[Key]:
    return list(zip(table["id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def _ledger_key(row: Row) -> Key:
    return (row["prompt"]["id"], row["sample"])
