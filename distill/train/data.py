"""Traces → rows of token ids, made once and kept on the disk.

A row is token ids and the length of its prompt. That number is the mask, because what is learnt is the end of the row:
the completion and the token that closes it. No -100 is stored, so no pass over a mask can get it wrong.

800,000 traces of a reasoner are 26 GB of ids, so they lie in a file that is mapped, not read: all ranks of a machine
share its pages. The file is a cache: it carries the fingerprint of what it was made from, and is made again when that
differs. It is written aside and renamed when the integrity gate has passed.

    tokens/ids.bin         int32, the rows one after the other
    tokens/index.parquet   of every row: its trace, its source, lengths of row and prompt, whether held out
    tokens/rows.json       fingerprint, what was dropped, what the gate proved
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.chat import Chat
from distill.durable import write_whole
from distill.errors import UserError
from distill.prompts.prompt import Message
from distill.traces.trace import Trace
from distill.train.batches import Row

SURROGATE = re.compile("[\ud800-\udfff]")
TOGETHER = 256  # conversations tokenised at once: the tokenizer spreads them over the cores

Overlong = Literal["drop", "truncate", "raise"]


@dataclass(frozen=True)
class Source:
    """One of the trace sets that are mixed. plain: rows without a think block are meant to be there."""

    name: str
    traces: Iterable[Trace]
    plain: bool = False


@dataclass(frozen=True)
class Encoding:
    """How traces become rows. max_length: tokens of a row; overlong: what happens to a longer one.

    held_out: share of the prompts whose rows are not trained but scored.
    """

    max_length: int
    content: Literal["reasoning", "answer"] = "reasoning"
    overlong: Overlong = "drop"
    held_out: float = 0.0
    seed: int = 0


@dataclass
class Counts:
    """Of rows and tokens, before and after."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0  # that were cut off
    held_out_rows: int = 0
    plain_rows: int = 0  # without a think block


@dataclass
class TrainingSet:
    """Rows on the disk, in the order of their sources and keys. Indexing gives a `Row`, read when it is used."""

    ids: np.ndarray  # int32, mapped
    keys: list[tuple[str, int]]
    starts: np.ndarray  # int64 [rows], into ids
    lengths: np.ndarray  # int32 [rows]
    prompt_tokens: np.ndarray  # int32 [rows]
    sources: np.ndarray  # int16 [rows]
    held_out: np.ndarray  # bool [rows]
    truncated: np.ndarray  # bool [rows]
    counts: Counts
    proved: list[str] = field(default_factory=list)  # the integrity gate's lines

    def __post_init__(self) -> None:
        supervised = self.lengths - self.prompt_tokens
        self.places = np.cumsum(supervised) - supervised

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Row:
        start = int(self.starts[i])
        ids = self.ids[start : start + int(self.lengths[i])]
        return Row(self.keys[i], ids, int(self.prompt_tokens[i]), int(self.sources[i]), int(self.places[i]))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def end(self) -> int:
        """The token that closes a row; those that were cut have none."""
        return int(self[int(np.argmin(self.truncated))].ids[-1])

    def supervised(self, rows: Iterable[int]) -> int:
        some = np.fromiter(rows, dtype=np.int64)
        return int((self.lengths[some] - self.prompt_tokens[some]).sum())

    def tokens(self, rows: Iterable[int]) -> int:
        return int(self.lengths[np.fromiter(rows, dtype=np.int64)].sum())


def conversation(trace: Trace, content: str) -> list[Message]:
    """What the student learns of a trace: all of it, or (`answer`, the control) the response without its reasoning."""
    if content == "reasoning":
        return trace.messages
    return [*trace.prompt.messages, {"role": "assistant", "content": trace.response}]


class Encoder:
    """Tokenises traces into `directory`, row by row; `finish` sorts the index.

    witnesses: the traces that the integrity gate looks at, each with the number of its source, as two sources may hold
    samples of one prompt: the first row, the longest, one at random.
    """

    def __init__(self, directory: Path, chat: Chat, encoding: Encoding) -> None:
        self.directory, self.chat, self.encoding = directory, chat, encoding
        self.counts = Counts()
        self.witnesses: dict[str, tuple[int, Trace]] = {}
        self._rows: list[tuple[str, int, int, int, int, int, bool, bool]] = []
        self._draw = random.Random(encoding.seed)
        self._tokens = self._longest = self._shortest_dropped = 0
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._file = (directory / "ids.bin").open("wb")

    def add(self, source: Source, number: int) -> Iterator[int]:
        """Encode a source, as number `number`. Yields how many traces were taken in, as they are.

        Raises UserError when a row has nothing to learn from, is too long where that is refused, or has no think block
        where it should.
        """
        traces = iter(source.traces)
        while some := list(islice(traces, TOGETHER)):
            for trace in some:
                self._check(trace, source)
            rows = self.chat.training_rows([conversation(trace, self.encoding.content) for trace in some])
            for trace, (ids, prompt_tokens) in zip(some, rows, strict=True):
                self._row(trace, ids, prompt_tokens, number)
            yield len(some)

    def finish(self) -> TrainingSet:
        """The rows, in the order of source and key: the order in which a teacher happened to finish decides nothing.

        Raises UserError when no row is left to train.
        """
        self._file.close()
        limit = self.encoding.max_length
        if not self._rows:
            raise UserError(
                f"all {self.counts.dropped_rows} kept traces are longer than train.max_length {limit}; the shortest "
                f"has {self._shortest_dropped} tokens"
            )
        self._rows.sort(key=lambda row: (row[2], row[0], row[1]))
        names = ("id", "sample", "source", "start", "length", "prompt_tokens", "held_out", "truncated")
        index = pa.table(
            {name: list(column) for name, column in zip(names, zip(*self._rows, strict=True), strict=True)}
        )
        rows = from_index(self.directory, index, self.counts)
        if rows.held_out.all():
            raise UserError(
                f"train.val_size {self.encoding.held_out:g} holds out all {len(rows)} rows and leaves none to train"
            )
        pq.write_table(index, self.directory / "index.parquet", compression="zstd")
        return rows

    def close(self) -> None:
        """Remove what was written: the rows were refused."""
        self._file.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _check(self, trace: Trace, source: Source) -> None:
        if any(SURROGATE.search(message["content"]) for message in conversation(trace, self.encoding.content)):
            raise UserError(
                f"trace {trace.prompt.id} sample {trace.sample} holds half a character (a lone surrogate), which no "
                f"tokenizer takes: mend the file that its prompt or text came from"
            )
        if self.encoding.content == "reasoning" and trace.reasoning is None:
            if not source.plain:
                raise UserError(
                    f"trace {trace.prompt.id} sample {trace.sample} of {source.name} has no closed think block: set "
                    f"filter.format to drop such traces, or `plain: true` for this source in train.data if they are "
                    f"meant to teach answers without reasoning"
                )
            self.counts.plain_rows += 1

    def _row(self, trace: Trace, ids: list[int], prompt_tokens: int, source: int) -> None:
        limit, counts = self.encoding.max_length, self.counts
        if prompt_tokens >= len(ids):
            raise UserError(
                f"trace {trace.prompt.id} sample {trace.sample} has no supervised token: the chat template of "
                f"{self.chat.where} renders nothing for the assistant; set train.chat_template"
            )
        truncated = len(ids) > limit and self.encoding.overlong == "truncate" and prompt_tokens < limit
        if truncated:
            counts.truncated_rows += 1
            counts.truncated_tokens += len(ids) - limit
            ids = ids[:limit]
        elif len(ids) > limit:
            if self.encoding.overlong == "raise":
                raise UserError(
                    f"trace {trace.prompt.id} sample {trace.sample} has {len(ids)} tokens, more than train.max_length "
                    f"{limit}, and train.overlong is `raise`: raise max_length, or set overlong to `drop` or `truncate`"
                )
            counts.dropped_rows += 1
            counts.dropped_tokens += len(ids)
            self._shortest_dropped = min(self._shortest_dropped or len(ids), len(ids))
            return
        held_out = is_held_out(trace.prompt.id, self.encoding)
        self._rows.append(
            (trace.prompt.id, trace.sample, source, self._tokens, len(ids), prompt_tokens, held_out, truncated)
        )
        self._file.write(np.asarray(ids, dtype=np.int32).tobytes())
        self._tokens += len(ids)
        counts.rows += 1
        counts.tokens += len(ids)
        counts.supervised += len(ids) - prompt_tokens
        counts.held_out_rows += held_out
        if not truncated:
            self._witness((source, trace), len(ids))

    def _witness(self, witness: tuple[int, Trace], length: int) -> None:
        self.witnesses.setdefault("first", witness)
        if length > self._longest:
            self._longest, self.witnesses["longest"] = length, witness
        if self._draw.random() * self.counts.rows < 1:  # a reservoir of one: every row is equally likely
            self.witnesses["random"] = witness


def is_held_out(prompt_id: str, encoding: Encoding) -> bool:
    """By the prompt alone, so that all its samples fall on one side, and stay there when traces are added."""
    if not encoding.held_out:
        return False
    number = int.from_bytes(hashlib.sha256(f"{encoding.seed}\0{prompt_id}".encode()).digest()[:8], "big")
    return number < encoding.held_out * 2**64


def store(rows: TrainingSet, directory: Path, fingerprint: str) -> None:
    """Write the cache's last file, which says that it is whole and what it was made from."""
    about = {"fingerprint": fingerprint, "counts": asdict(rows.counts), "proved": rows.proved}
    write_whole(directory / "rows.json", json.dumps(about, indent=1, ensure_ascii=False))


def load(directory: Path, fingerprint: str | None = None) -> TrainingSet | None:
    """The rows of a cache that was made from the same things (whatever they are, without a fingerprint), else None."""
    try:
        about: dict[str, Any] = json.loads((directory / "rows.json").read_text(encoding="utf-8"))
        if fingerprint not in (None, about["fingerprint"]):
            return None
        index = pq.read_table(directory / "index.parquet")
        return from_index(directory, index, Counts(**about["counts"]), about["proved"])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):  # half of a copied directory: it is made again
        return None


def from_index(directory: Path, index: pa.Table, counts: Counts, proved: Sequence[str] = ()) -> TrainingSet:
    column = {name: index[name].to_numpy() for name in index.column_names if name != "id"}
    ids = np.memmap(directory / "ids.bin", dtype=np.int32, mode="r")
    if len(ids) != column["length"].sum():
        raise ValueError("ids.bin has another length than its index says")
    return TrainingSet(
        ids=ids,
        keys=list(zip(index["id"].to_pylist(), column["sample"].tolist(), strict=True)),
        starts=column["start"],
        lengths=column["length"],
        prompt_tokens=column["prompt_tokens"],
        sources=column["source"],
        held_out=column["held_out"].astype(bool),
        truncated=column["truncated"].astype(bool),
        counts=counts,
        proved=list(proved),
    )
