"""Traces → token ids, which of them are learnt, and which rows make up which step.

A row is token ids and the length of its prompt. That number is the mask, because what is learnt is the end of the row:
the completion and the token that closes it. No -100 is stored, so no pass over a mask can get it wrong.

Rows are padded on the right, by length and never by id (R1's published pad token *is* its end token). Attention is
causal, so a real token never sees the padding behind it: no attention mask is built, and torch keeps its fast path.

Which rows make up step k is a pure function of k and the seed (`Order`): resuming needs no state of a loader, and a row
that made a loss explode is named after the fact. Rejected: a DataLoader with workers. Rows are token ids in memory, and
padding sixteen of them costs microseconds.

Shapes: b rows of a batch, t tokens of its longest row, s supervised tokens of the batch.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from distill.chat import Chat
from distill.errors import UserError
from distill.prompts.prompt import Message
from distill.traces.trace import Trace

SURROGATE = re.compile("[\ud800-\udfff]")
WINDOW = 8  # batches of a window in which rows are sorted by length: more saves little padding and shuffles less


@dataclass(frozen=True)
class Row:
    """One conversation as token ids. `ids[prompt_tokens:]` is supervised: the completion and its end token."""

    key: tuple[str, int]
    ids: np.ndarray  # int32 [length]
    prompt_tokens: int

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Batch:
    """Rows, padded. `targets_s[i]` is what the model must say at the flat position `positions_s[i]` of [b, t]."""

    input_ids_bt: torch.Tensor  # int64
    positions_s: torch.Tensor  # int64, into the flattened [b·t]
    targets_s: torch.Tensor  # int64


@dataclass
class Encoded:
    """The training set: rows in the order of their keys, what was dropped, and the traces the gate will look at."""

    rows: list[Row] = field(default_factory=list)
    dropped_rows: int = 0
    dropped_tokens: int = 0
    witnesses: dict[str, Trace] = field(default_factory=dict)  # "first", "longest", "random"

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def supervised(self) -> int:
        return sum(row.supervised for row in self.rows)


def conversation(trace: Trace, content: str) -> list[Message]:
    """What the student learns of a trace: all of it, or (`answer`, the control) the response without its reasoning."""
    if content == "reasoning":
        return trace.messages
    return [*trace.prompt.messages, {"role": "assistant", "content": trace.response}]


def encode(traces: Iterable[Trace], chat: Chat, content: str, max_length: int, seed: int) -> Encoded:
    """Tokenise every trace once. Rows longer than `max_length` tokens are dropped and counted, never cut: half a
    reasoning teaches not to finish.

    Raises UserError when a row has nothing to learn from, or when no row is left.
    """
    data, shortest, longest = Encoded(), 0, 0
    draw = random.Random(seed)
    for trace in traces:
        messages = conversation(trace, content)
        if any(SURROGATE.search(message["content"]) for message in messages):
            raise UserError(
                f"trace {trace.prompt.id} sample {trace.sample} holds half a character (a lone surrogate), which no "
                f"tokenizer takes: mend the file that its prompt or text came from"
            )
        ids, prompt_tokens = chat.training_ids(messages)
        if prompt_tokens >= len(ids):
            raise UserError(
                f"trace {trace.prompt.id} sample {trace.sample} has no supervised token: the chat template of "
                f"{chat.where} renders nothing for the assistant; set train.chat_template"
            )
        if len(ids) > max_length:
            data.dropped_rows += 1
            data.dropped_tokens += len(ids)
            shortest = min(shortest or len(ids), len(ids))
            continue
        data.rows.append(Row(trace.key, np.asarray(ids, dtype=np.int32), prompt_tokens))
        data.witnesses.setdefault("first", trace)
        if len(ids) > longest:
            longest, data.witnesses["longest"] = len(ids), trace
        if draw.random() * len(data.rows) < 1:  # a reservoir of one: every row is equally likely
            data.witnesses["random"] = trace
    if not data.rows:
        raise UserError(
            f"all {data.dropped_rows} kept traces are longer than train.max_length {max_length}; the shortest has "
            f"{shortest} tokens"
        )
    data.rows.sort(key=lambda row: row.key)  # the order in which a teacher happened to finish decides nothing
    return data


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows on the right and list the supervised positions. Position p predicts token p + 1."""
    width = max(len(row.ids) for row in rows)
    input_ids_bt = np.full((len(rows), width), pad_id, dtype=np.int64)
    positions: list[np.ndarray] = []
    for b, row in enumerate(rows):
        input_ids_bt[b, : len(row.ids)] = row.ids
        positions.append(np.arange(row.prompt_tokens, len(row.ids)) + (b * width - 1))
    positions_s = np.concatenate(positions)
    targets_s = input_ids_bt.reshape(-1)[positions_s + 1]
    return Batch(torch.from_numpy(input_ids_bt), torch.from_numpy(positions_s), torch.from_numpy(targets_s))


class Order:
    """Which rows make up which optimiser step, for ever, from the seed alone.

    Every epoch is a permutation of its own. Inside windows of a few batches rows are sorted by length, so that a batch
    carries little padding; then the batches are shuffled, so that lengths do not come in waves.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, accumulation: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        batches = -(-len(self.lengths) // batch_size)
        self.steps_per_epoch = -(-batches // accumulation)
        self._epoch = lru_cache(maxsize=1)(self._shuffle)

    def step(self, number: int) -> list[list[int]]:
        """The batches (lists of row indices) of optimiser step `number`, from 0. An epoch's last may be smaller."""
        epoch, place = divmod(number, self.steps_per_epoch)
        return self._epoch(epoch)[place * self.accumulation : (place + 1) * self.accumulation]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self.lengths))
        batches: list[list[int]] = []
        for window in cut(order, WINDOW * self.batch_size):
            by_length = window[np.argsort(self.lengths[window], kind="stable")]
            batches.extend(batch.tolist() for batch in cut(by_length, self.batch_size))
        draw.shuffle(batches)
        return batches


def cut(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
