"""The integrity gate: before the first step, prove on real rows that what will be trained is what was meant.

Most failed reasoning distillations fail silently in one of a few ways: the template deletes the reasoning, the mask is
all zeros or covers the prompt, the end token is not learnt (or the padding is), the training prefix is not what
inference will send. None of them shows in a loss curve. So real rows are taken back out of the very tensors that a step
is given, decoded, and compared with the traces they came from; what concerns every row is checked on every row.

Real rows and not a made-up conversation, because templates treat `<think>`, empty responses and odd white space in ways
that a probe does not meet. Text is compared after NFC and with runs of white space as one, because tokenizers normalise
and templates trim; nothing else may differ.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from distill.chat import Chat
from distill.errors import UserError
from distill.traces.trace import Trace
from distill.train.batches import Batch, Row, collate
from distill.train.data import TrainingSet, conversation

CHUNK = 1 << 24  # ids looked at together
MEND = "set train.chat_template to `chatml` or `llama3`, or to a training template of your own"


@dataclass(frozen=True)
class Limits:
    """What a model can take: ids below `vocabulary`, rows of at most `context` tokens."""

    vocabulary: int
    context: int


def prove(
    rows: TrainingSet, witnesses: dict[str, tuple[int, Trace]], chat: Chat, content: str, limits: Limits
) -> list[str]:
    """Raise UserError at the first thing that would make the training pointless; else return lines that say what holds.

    witnesses: traces among the rows' own (`Encoder.witnesses`). They are looked at token by token.
    """
    prove_every_row(rows, chat, limits)
    numbers = {place: i for i, place in enumerate(zip(rows.sources.tolist(), rows.keys, strict=True))}
    found = {numbers[source, trace.key]: trace for source, trace in witnesses.values()}
    traces, batch_rows = list(found.values()), [rows[i] for i in found]
    batch = collate(batch_rows)
    prove_mask(batch_rows, batch)
    for trace, row, targets in zip(traces, batch_rows, split(batch), strict=True):
        prove_prefix(trace, row, chat, content)
        prove_text(trace, targets, chat, content)

    counts = rows.counts
    reasoning = sum(len((trace.reasoning or "").strip()) for trace in traces) if content == "reasoning" else 0
    end = chat.tokenizer.convert_ids_to_tokens(rows.end())
    some = f"{counts.rows - counts.truncated_rows:,} of {counts.rows:,} rows end" if counts.truncated_rows else None
    return [
        f"integrity gate, on {len(rows):,} rows and, token by token, on {' '.join(witnesses)}:",
        f"  what is learnt is exactly the completion, {reasoning:,} characters of reasoning included"
        if content == "reasoning"
        else "  what is learnt is exactly the response; the reasoning is left out, as train.content says",
        f"  {some or 'every row ends'} in a supervised {end}; prompts are masked, and nothing is padded",
        f"  {counts.supervised:,} of {counts.tokens:,} tokens are supervised",
        "  the training prefix is the inference prompt, id for id",
        f"  ids fit the vocabulary of {limits.vocabulary:,}, the longest row ({int(rows.lengths.max()):,} tokens) the "
        f"context of {limits.context:,}",
        *([f"  {counts.plain_rows:,} rows have no reasoning, as train.data says"] if counts.plain_rows else []),
    ]


def prove_every_row(rows: TrainingSet, chat: Chat, limits: Limits) -> None:
    largest = max(int(rows.ids[start : start + CHUNK].max()) for start in range(0, len(rows.ids), CHUNK))
    if largest >= limits.vocabulary:
        raise UserError(
            f"the tokenizer of {chat.where} gives id {largest} ({chat.tokenizer.convert_ids_to_tokens(largest)}) but "
            f"the model's vocabulary ends at {limits.vocabulary - 1}: tokenizer and weights are not of one model, or "
            f"the embedding must be resized to {largest + 1} rows first"
        )
    longest = int(rows.lengths.argmax())
    if rows.lengths[longest] > limits.context:
        raise UserError(
            f"trace {name(rows.keys[longest])} has {rows.lengths[longest]} tokens and the model's context is "
            f"{limits.context}, beyond which its RoPE was never trained: set train.max_length to {limits.context} "
            f"(longer rows are dropped and counted), or say how the model is extended: train.max_position_embeddings, "
            f"and train.rope_theta if the base of its rotary embedding is to grow"
        )
    last_ids = rows.ids[rows.starts + rows.lengths - 1]
    unended = np.flatnonzero(~np.isin(last_ids, chat.stop_token_ids) & ~rows.truncated)
    if len(unended):
        raise UserError(
            f"trace {name(rows.keys[unended[0]])} does not end in an end token: the chat template of {chat.where} "
            f"closes an assistant's turn with nothing that stops generation, so the student would never learn to stop; "
            f"{MEND}"
        )


def prove_mask(rows: Sequence[Row], batch: Batch) -> None:
    """The tensors hold the rows, their supervised positions and nothing else. A failure is our bug: it asserts."""
    starts = np.cumsum((0, *(len(row.ids) for row in rows))).tolist()
    ids, positions = batch.input_ids_t.tolist(), batch.position_ids_t.tolist()
    expected = [
        start + t for start, row in zip(starts, rows, strict=False) for t in range(row.prompt_tokens, len(row.ids))
    ]
    assert (batch.positions_s + 1).tolist() == expected, "the mask does not cover exactly the completions"
    assert len(ids) == starts[-1] and batch.lengths == tuple(len(row.ids) for row in rows)
    for row, start, stop in zip(rows, starts, starts[1:], strict=False):
        assert ids[start:stop] == row.ids.tolist(), "the collator changed a row"
        assert positions[start:stop] == list(range(stop - start)), "positions do not restart with a row"
    assert sum(len(targets) for targets in split(batch)) == len(expected)


def prove_prefix(trace: Trace, row: Row, chat: Chat, content: str) -> None:
    prompt = chat.prompt_ids(conversation(trace, content)[:-1])
    if row.ids[: row.prompt_tokens].tolist() != prompt:
        raise UserError(
            f"trace {name(trace.key)}: the training row does not begin with the prompt that inference will send "
            f"(chat template of {chat.where}); {MEND}"
        )


def prove_text(trace: Trace, targets: list[int], chat: Chat, content: str) -> None:
    learnt = squash(chat.restore(chat.decode(targets)))
    meant = squash(conversation(trace, content)[-1]["content"])
    reasoning = squash(trace.reasoning or "")
    if content == "reasoning" and reasoning not in learnt:
        raise UserError(
            f"the chat template of {chat.where} deletes the reasoning: of trace {name(trace.key)}, {len(reasoning):,} "
            f"characters inside <think> never reach the student; {MEND}"
        )
    if learnt != meant:
        at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(learnt, meant, strict=False)))
        raise UserError(
            f"trace {name(trace.key)}: what the student would learn is not the trace's text, from character {at} on "
            f"({learnt[at : at + 40]!r} instead of {meant[at : at + 40]!r}); the chat template of {chat.where} changes "
            f"the assistant's text; {MEND}"
        )


def split(batch: Batch) -> list[list[int]]:
    """The supervised token ids of each row, taken from the batch's tensors."""
    ends = np.cumsum(batch.lengths)
    row_s = np.searchsorted(ends, batch.positions_s.numpy(), side="right")
    targets: list[list[int]] = [[] for _ in batch.lengths]
    for row, target in zip(row_s.tolist(), batch.targets_s.tolist(), strict=True):
        targets[row].append(target)
    return targets


def squash(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def name(key: tuple[str, int]) -> str:
    return f"{key[0]} sample {key[1]}"
