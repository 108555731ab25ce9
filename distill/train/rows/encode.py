"""Traces → token ids: what becomes a row, what is dropped, truncated, held out or refused. Everything is counted."""

import hashlib
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.chat import Chat
from distill.errors import UserError
from distill.prompts.prompt import Message
from distill.traces.trace import Trace
from distill.traces.wrapping import wrapped
from distill.train.rows.stored import COLUMNS, IDS, INDEX, Counts, TrainingSet, from_index

SURROGATE = re.compile("[\ud800-\udfff]")
CONVERSATIONS = 256  # tokenised per call: the tokenizer spreads them over the cores

Content = Literal["reasoning", "answer"]
Overlong = Literal["drop", "truncate", "raise"]


@dataclass(frozen=True)
class Source:
    """One of the trace sets that are mixed. plain: rows without a think block are expected. wrap: they get one, by the
    rule of `distill.traces.wrapping`."""

    name: str
    traces: Iterable[Trace]
    plain: bool = False
    wrap: bool = False


@dataclass(frozen=True)
class Encoding:
    """How traces become rows. max_length: tokens per row. overlong: what to do with longer rows.

    held_out: share of the prompts whose rows are evaluated and not trained.
    """

    max_length: int
    content: Content = "reasoning"
    overlong: Overlong = "drop"
    held_out: float = 0.0
    seed: int = 0


def conversation(trace: Trace, content: Content) -> list[Message]:
    """The messages that a student learns from a trace: whole, or (`answer`) with the reasoning removed."""
    if content == "reasoning":
        return trace.messages
    return [*trace.prompt.messages, {"role": "assistant", "content": trace.response}]


class Encoder:
    """Tokenises traces into `directory`, row by row; `finish` sorts the index.

    witnesses: the traces that the integrity gate compares token by token, each with the number of its source (two
    sources may hold samples of one prompt): the first row, the longest, and one at random.
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
        self._file = (directory / IDS).open("wb")

    def add(self, source: Source, number: int) -> Iterator[int]:
        """Encode a source, as number `number`. Yields the number of traces that were read, as it goes.

        Errors: UserError when a row has no supervised token, is too long under `raise`, or has no think block although
        its source should.
        """
        traces = iter(source.traces)
        while chunk := list(islice(traces, CONVERSATIONS)):
            group = self._wrapped(chunk) if source.wrap else chunk
            for trace in group:
                self._check(trace, source)
            rows = self.chat.training_rows([conversation(trace, self.encoding.content) for trace in group])
            for trace, (ids, prompt_tokens) in zip(group, rows, strict=True):
                self._row(trace, ids, prompt_tokens, number)
            yield len(chunk)

    def finish(self) -> TrainingSet:
        """The rows, ordered by source and key, so that the order in which a teacher finished has no effect.

        Errors: UserError when no row is left to train on.
        """
        self._file.close()
        limit = self.encoding.max_length
        if not self._rows and not self.counts.dropped_rows:
            if self.counts.undivided_rows:
                raise UserError(
                    f"no trace is left to train on: wrap finds reasoning before a \\boxed{{}} in none of "
                    f"{self.counts.undivided_rows:,} traces; set `plain: true` in train.data in its place"
                )
            raise UserError("there are no traces to train on: the trace sets of train.data are empty")
        if not self._rows:
            raise UserError(
                f"all {self.counts.dropped_rows} kept traces are longer than train.max_length {limit}; the shortest "
                f"has {self._shortest_dropped} tokens"
            )
        self._rows.sort(key=lambda row: (row[2], row[0], row[1]))
        columns = zip(COLUMNS, zip(*self._rows, strict=True), strict=True)
        index = pa.table({name: list(column) for name, column in columns})
        rows = from_index(self.directory, index, self.counts)
        if rows.truncated.all():
            raise UserError(
                f"all {len(rows)} rows are longer than train.max_length {limit} and truncated, so none teaches how to "
                f"end; raise max_length, or set train.overlong to `drop`"
            )
        if rows.held_out.all():
            raise UserError(
                f"train.val_size {self.encoding.held_out:g} holds out all {len(rows)} rows and leaves none to train"
            )
        pq.write_table(index, self.directory / INDEX, compression="zstd")
        return rows

    def close(self) -> None:
        """Remove what was written: the rows were refused."""
        self._file.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _wrapped(self, traces: list[Trace]) -> list[Trace]:
        """The traces with their reasoning between think tags, without those that are not divided; both are counted."""
        results = [wrapped(trace) for trace in traces]
        self.counts.undivided_rows += results.count(None)
        self.counts.wrapped_rows += sum(
            new is not None and new is not old for old, new in zip(traces, results, strict=True)
        )
        return [trace for trace in results if trace is not None]

    def _check(self, trace: Trace, source: Source) -> None:
        if any(SURROGATE.search(message["content"]) for message in conversation(trace, self.encoding.content)):
            raise UserError(
                f"trace {trace.prompt.id} sample {trace.sample} contains a lone surrogate (half a character), which "
                f"no tokenizer accepts: correct the file that its prompt or text came from"
            )
        if self.encoding.content == "reasoning" and trace.reasoning is None:
            if not source.plain:
                raise UserError(
                    f"trace {trace.prompt.id} sample {trace.sample} of {source.name} has no closed think block: set "
                    f"filter.format to drop such traces, or for this source in train.data `plain: true` if they are "
                    f"meant to teach answers without reasoning, `wrap: true` if the reasoning has no tags"
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
        held_out = is_held_out(trace.prompt.id, self.encoding.held_out, self.encoding.seed)
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


def is_held_out(prompt_id: str, share: float, seed: int) -> bool:
    """Decide by the prompt alone, so that all its samples fall on one side, and stay there when traces are added."""
    if not share:
        return False
    number = int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()[:8], "big")
    return number < share * 2**64
