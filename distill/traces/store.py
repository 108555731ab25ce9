"""Traces on the disk: a ledger while they are made, sharded Parquet when they are done.

A directory holds `ledger.jsonl` (the newest traces, one fsynced line each) and `part-00000.parquet` … (zstd; at most
`SHARD_ROWS` rows each), which `datasets.load_dataset("parquet", data_files=…)` reads as they are. `compact()` turns the
ledger into parts. A part takes its name in one step and the ledger goes last, so a process killed in between leaves
rows that are in both: every reader takes the first row of a key (prompt id, sample) and passes over the others.

Appending to Parquet directly was rejected because a file without its footer is unreadable, and one file per trace
because a run has hundreds of thousands.

Two decisions on exactness:

- Log-probabilities are float32, the precision that engines compute them in. They are rounded once, when they are
  appended, so a trace reads the same before and after compaction.
- Parquet text is UTF-8, which cannot hold a lone surrogate. A trace that has one is stored a second time, whole, as
  ASCII JSON in the column `exact` (null for all others), and its text columns show U+FFFD; reading gives back the
  original.
"""

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill.durable import replacing, sync_directory
from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.traces.ledger import Ledger
from distill.traces.trace import Trace, Verdict

Key = tuple[str, int]

SHARD_ROWS = 4096  # some 400 MB of R1-sized traces
GROUP_ROWS = 128  # rows held in memory at once, when reading and when writing

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("text", pa.string()),
        ("reasoning", pa.string()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("teacher", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("top_logprobs", pa.list_(pa.list_(pa.struct([("token", pa.int32()), ("logprob", pa.float32())])))),
        ("exact", pa.string()),
        ("completion_tokens", pa.int32()),
    ]
)
_VERDICT = [("filter", pa.string()), ("keep", pa.bool_()), ("reason", pa.string()), ("evidence", pa.string())]
_JUDGED_SCHEMA = _SCHEMA.append(pa.field("verdicts", pa.list_(pa.struct(_VERDICT))))  # evidence: JSON


class TraceStore:
    """The traces of one directory. Reading works at any time; appending needs the `with` block.

    One process writes at a time: the run directory's lock sees to that.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ledger = Ledger(directory / "ledger.jsonl")
        self._open = False

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
        """Bytes of a half-written trace that opening took off the ledger; that trace is missing and will be redone."""
        return self._ledger.cut_off

    def append(self, traces: Iterable[Trace]) -> None:
        """Store the traces durably, all or none. Errors: OSError when the disk is full."""
        self._ledger.append(_rounded(trace).to_dict() for trace in traces)

    def keys(self) -> set[Key]:
        """(prompt id, sample) of every stored trace. Reads only the two key columns of the parts."""
        return self._part_keys() | {_ledger_key(row) for row in self._ledger.rows()}

    def is_empty(self) -> bool:
        """Whether no trace is stored. Opens no file."""
        ledger = self._ledger.path
        return not _parts(self.directory) and not (ledger.exists() and ledger.stat().st_size)

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[Trace]:
        """Every trace once: those of the parts, then those of the ledger, each in the order they were appended."""
        seen: set[Key] = set()
        for row in _part_rows(self.directory):
            trace = _trace(row)
            if trace.key not in seen:
                seen.add(trace.key)
                yield trace
        yield from self._ledger_traces(seen)

    def compact(self) -> None:
        """Move the ledger's traces into Parquet. May be killed at any point and called again.

        Errors: OSError when the disk is full; the ledger is then still there, and so are the parts that were finished.
        """
        assert not self._open, "compact a store after its `with` block: the open ledger would go on under no name"
        traces = self._ledger_traces(self._part_keys())
        _write_parts(self.directory, traces, _SCHEMA)
        self._ledger.path.unlink(missing_ok=True)
        if self.directory.exists():
            sync_directory(self.directory)

    def _part_keys(self) -> set[Key]:
        return {(row["id"], row["sample"]) for row in _part_rows(self.directory, ["id", "sample"])}

    def _ledger_traces(self, seen: set[Key]) -> Iterator[Trace]:
        for row in self._ledger.rows():
            key = _ledger_key(row)
            if key not in seen:
                seen.add(key)
                yield Trace.from_dict(row)


def write_traces(directory: Path, traces: Iterable[Trace], verdicts: Mapping[Key, list[Verdict]] | None = None) -> None:
    """Write a whole directory of Parquet parts, with a column `verdicts`, in place of what was there.

    It is written aside and renamed: a reader sees the old directory, for a moment none, then the new one, never a half.
    No traces give one part without rows, so that the columns are known.
    """
    new, old = directory.with_name(f".{directory.name}.new"), directory.with_name(f".{directory.name}.old")
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    new.mkdir(parents=True)
    try:
        _write_parts(new, map(_rounded, traces), _JUDGED_SCHEMA, verdicts or {})
        if not _parts(new):
            with replacing(_part(new, 0)) as file, _writer(file, _JUDGED_SCHEMA):
                pass
    except BaseException:
        shutil.rmtree(new)
        raise
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    sync_directory(directory.parent)
    if old.exists():
        shutil.rmtree(old)


def read_traces(directory: Path, ids: bool = True) -> Iterator[tuple[Trace, list[Verdict]]]:
    """Every trace of a directory of parts with its verdicts (none where the parts have no such column).

    ids: with token ids and log-probabilities. Most of a trace's numbers are in them; those who only look at texts read
    many times as fast without, and have the number of tokens all the same. Errors: UserError when there are no parts,
    or one is damaged.
    """
    if not _parts(directory):
        raise UserError(f"{directory}: no part-*.parquet here; run the stage that writes it first")
    for row in _part_rows(directory) if ids else _rows_without_ids(directory):
        found = row.pop("verdicts", None) or []
        yield _trace(row), [Verdict(v["filter"], v["keep"], v["reason"], json.loads(v["evidence"])) for v in found]


def count_traces(directory: Path) -> int:
    """Rows of a directory of parts, from their footers. Errors: UserError when one is damaged."""
    total = 0
    for path in _parts(directory):
        with _readable(path), pq.ParquetFile(path) as file:
            total += file.metadata.num_rows
    return total


# Parts


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number:05d}.parquet"


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*.parquet"))


def _part_rows(directory: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for path in _parts(directory):
        with _readable(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=columns):
                yield from batch.to_pylist()


def _rows_without_ids(directory: Path) -> Iterator[dict[str, Any]]:
    left_out = {"prompt_token_ids": (), "completion_token_ids": (), "logprobs": None, "top_logprobs": None}
    for path in _parts(directory):
        with _readable(path), pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in left_out]
            for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=[*names, "completion_token_ids"]):
                counts = pc.list_value_length(batch["completion_token_ids"]).to_pylist()
                for row, count in zip(batch.select(names).to_pylist(), counts, strict=True):
                    yield row | left_out | {"completion_tokens": count or row.get("completion_tokens")}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged ({reason}); delete it and run again, its traces will be redone") from error


def _write_parts(
    directory: Path,
    traces: Iterable[Trace],
    schema: pa.Schema,
    verdicts: Mapping[Key, list[Verdict]] | None = None,
) -> None:
    """Write the traces as parts numbered after those that are there. Each part is whole or absent."""
    rest = iter(traces)
    last = max((int(path.stem.removeprefix("part-")) for path in _parts(directory)), default=-1)
    for number in count(last + 1):
        shard = islice(rest, SHARD_ROWS)
        group = list(islice(shard, GROUP_ROWS))
        if not group:
            return
        with replacing(_part(directory, number)) as file, _writer(file, schema) as writer:
            while group:
                writer.write_table(pa.Table.from_pylist([_row(t, verdicts) for t in group], schema=schema))
                group = list(islice(shard, GROUP_ROWS))


def _writer(file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, schema, compression="zstd")


# One trace as a row of columns


def _row(trace: Trace, verdicts: Mapping[Key, list[Verdict]] | None) -> dict[str, Any]:
    prompt = trace.prompt
    row = {
        "id": prompt.id,
        "sample": trace.sample,
        "seed": trace.seed,
        "task": prompt.task,
        "answer": prompt.answer,
        "source": prompt.source,
        "messages": trace.messages,
        "text": trace.text,
        "reasoning": trace.reasoning,
        "response": trace.response,
        "finish_reason": trace.finish_reason,
        "teacher": trace.teacher,
        "prompt_token_ids": trace.prompt_token_ids,
        "completion_token_ids": trace.completion_token_ids,
        "logprobs": trace.logprobs,
        "top_logprobs": trace.top_logprobs,
        "exact": None,
        "completion_tokens": trace.completion_tokens,
    }
    if trace.top_logprobs is not None:
        row["top_logprobs"] = [[{"token": t, "logprob": p} for t, p in top] for top in trace.top_logprobs]
    if not _is_utf8(trace):
        row = _without_surrogates(row) | {"exact": json.dumps(trace.to_dict())}
    if verdicts is not None:
        row["verdicts"] = [v.to_dict() | {"evidence": json.dumps(v.evidence)} for v in verdicts.get(trace.key, [])]
    return row


def _trace(row: dict[str, Any]) -> Trace:
    if row["exact"] is not None:
        return Trace.from_dict(json.loads(row["exact"]))
    top = row["top_logprobs"]
    return Trace(
        prompt=Prompt(tuple(row["messages"][:-1]), row["task"], row["answer"], row["source"], row["id"]),
        sample=row["sample"],
        seed=row["seed"],
        text=row["text"],
        reasoning=row["reasoning"],
        response=row["response"],
        finish_reason=row["finish_reason"],
        teacher=row["teacher"],
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        completion_token_ids=tuple(row["completion_token_ids"]),
        logprobs=None if row["logprobs"] is None else tuple(row["logprobs"]),
        top_logprobs=None if top is None else tuple(tuple((c["token"], c["logprob"]) for c in alts) for alts in top),
        completion_tokens=row.get("completion_tokens"),  # older files have no such column
    )


def _ledger_key(row: dict[str, Any]) -> Key:
    return (row["prompt"]["id"], row["sample"])


def _rounded(trace: Trace) -> Trace:
    """The trace with its log-probabilities as float32 can hold them."""
    if trace.logprobs is not None:
        trace = replace(trace, logprobs=tuple(array("f", trace.logprobs)))
    if trace.top_logprobs is not None:
        trace = replace(trace, top_logprobs=tuple(tuple(_rounded_pairs(top)) for top in trace.top_logprobs))
    return trace


def _rounded_pairs(pairs: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    return zip((token for token, _ in pairs), array("f", [logprob for _, logprob in pairs]), strict=True)


def _is_utf8(trace: Trace) -> bool:
    prompt = trace.prompt
    texts = [prompt.answer or "", prompt.source, trace.text, trace.reasoning or "", trace.response]
    texts += [message["content"] for message in prompt.messages]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {key: _without_surrogates(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(inner) for inner in value]
    return value
