"""The integrity gate: before the first step, prove on real rows that the training is the intended one.

Most failed reasoning distillations fail silently in one of a few ways: the template deletes the reasoning, the mask is
all zeros or covers the prompt, the end token is not learnt (or the padding is), a control token in the middle of a
text becomes a learnt end of turn, the training prefix is not what inference will send. None of them shows in a loss
curve. So real rows are read back from the tensors that a step is given, decoded, and compared with the traces they came
from; properties of single tokens are checked on every row.

Real rows and not a made-up conversation, because templates treat `<think>`, empty responses and odd white space in ways
that a probe does not meet. Text is compared after NFC and with runs of white space collapsed, because tokenizers
normalise and templates trim; nothing else may differ.

A control token before the end of a row is refused and not dropped with a count. `distill.chat` encodes control tokens
inside a trace's text as plain text, so one that is still there was written by the chat template, into every row of its
kind; a student trained on the rest would have learnt the same template.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from distill.chat import END_THINK, THINK, Chat
from distill.errors import UserError
from distill.traces.trace import Trace
from distill.train.rows.batches import Batch, Row, collate
from distill.train.rows.encode import Content, conversation
from distill.train.rows.stored import TrainingSet

CHUNK = 1 << 24  # ids examined at once
REMEDY = "set train.chat_template to `chatml`, `llama3` or `gemma`, or to a training template of your own"


@dataclass(frozen=True)
class Limits:
    """What a model accepts: ids below `vocabulary`, rows of at most `context` tokens."""

    vocabulary: int
    context: int


def prove(
    rows: TrainingSet, witnesses: dict[str, tuple[int, Trace]], chat: Chat, content: Content, limits: Limits
) -> tuple[str, ...]:
    """Raise UserError at the first violation; otherwise return lines that say what was proved.

    witnesses: traces of some of the rows (`Encoder.witnesses`), which are compared token by token.
    """
    prove_every_row(rows, chat, limits)
    prove_control_tokens(rows, chat)
    numbers = {place: i for i, place in enumerate(zip(rows.sources.tolist(), rows.keys, strict=True))}
    compared = {numbers[source, trace.key]: trace for source, trace in witnesses.values()}
    traces, batch_rows = list(compared.values()), [rows[i] for i in compared]
    batch = collate(batch_rows)
    prove_mask(batch_rows, batch)
    for trace, row, targets in zip(traces, batch_rows, split(batch), strict=True):
        prove_prefix(trace, row, chat, content)
        prove_text(trace, targets, chat, content)

    counts = rows.counts
    reasoning = sum(len((trace.reasoning or "").strip()) for trace in traces) if content == "reasoning" else 0
    end = chat.tokenizer.convert_ids_to_tokens(rows.end())
    ended = f"{counts.rows - counts.truncated_rows:,} of {counts.rows:,} rows" if counts.truncated_rows else "all rows"
    return (
        f"integrity gate: {len(rows):,} rows, {len(compared)} of them token by token ({', '.join(witnesses)})",
        f"  supervised: exactly the completion, with {reasoning:,} characters of reasoning"
        if content == "reasoning"
        else "  supervised: exactly the response, without the reasoning (train.content is answer)",
        f"  supervised tokens: {counts.supervised:,} of {counts.tokens:,}; prompts are masked, nothing is padded",
        f"  end of turn: {ended} end in a supervised {end}, and no control token comes before it",
        "  training prefix: equal to the inference prompt, token by token",
        f"  limits: vocabulary {limits.vocabulary:,}; longest row {int(rows.lengths.max()):,} of {limits.context:,} "
        f"tokens of context",
        *([f"  reasoning between added tags: {counts.wrapped_rows:,} rows"] if counts.wrapped_rows else []),
        *([f"  without reasoning: {counts.plain_rows:,} rows, as train.data allows"] if counts.plain_rows else []),
    )


def prove_every_row(rows: TrainingSet, chat: Chat, limits: Limits) -> None:
    """Ids inside the vocabulary, lengths inside the context, an end token at every end. Errors: UserError."""
    largest = max(int(rows.ids[start : start + CHUNK].max()) for start in range(0, len(rows.ids), CHUNK))
    if largest >= limits.vocabulary:
        raise UserError(
            f"the tokenizer of {chat.where} gives id {largest} ({chat.tokenizer.convert_ids_to_tokens(largest)}), but "
            f"the model's vocabulary ends at {limits.vocabulary - 1}: tokenizer and weights belong to different "
            f"models, or the embedding must be resized to {largest + 1} rows first"
        )
    longest = int(rows.lengths.argmax())
    if rows.lengths[longest] > limits.context:
        raise UserError(
            f"trace {name(rows.keys[longest])} has {rows.lengths[longest]} tokens and the model's context is "
            f"{limits.context}, beyond which its RoPE was never trained: set train.max_length to {limits.context} "
            f"(longer rows are dropped and counted), or extend the context with train.max_position_embeddings, and "
            f"train.rope_theta for another RoPE base"
        )
    last_ids = rows.ids[rows.starts + rows.lengths - 1]
    unended = np.flatnonzero(~np.isin(last_ids, chat.stop_token_ids) & ~rows.truncated)
    if len(unended):
        raise UserError(
            f"trace {name(rows.keys[unended[0]])} does not end in an end token: the chat template of {chat.where} "
            f"closes an assistant's turn without a token that stops generation, so the student would never learn to "
            f"stop; {REMEDY}"
        )


def prove_control_tokens(rows: TrainingSet, chat: Chat) -> None:
    """No token that ends a turn, and no other special token, is supervised before the last one. Errors: UserError.

    The think tags are part of the format, also where a tokenizer marks them as special.
    """
    tokenizer = chat.tokenizer
    known = tokenizer.get_vocab()
    allowed = {known.get(THINK), known.get(END_THINK)}
    if tokenizer.unk_token_id != tokenizer.pad_token_id:  # an unknown character is no control token
        allowed.add(tokenizer.unk_token_id)
    control = np.array(sorted({*tokenizer.all_special_ids} - allowed | {*chat.stop_token_ids}), dtype=np.int32)
    order = np.argsort(rows.starts)
    starts, ends = rows.starts[order], rows.starts[order] + rows.lengths[order]
    lasts = np.where(rows.truncated[order], ends, ends - 1)
    refused: dict[int, int] = {}  # row → position of its first control token
    for start in range(0, len(rows.ids), CHUNK):
        positions = start + np.flatnonzero(np.isin(rows.ids[start : start + CHUNK], control))
        at = np.searchsorted(starts, positions, side="right") - 1
        inside = (positions >= starts[at] + rows.prompt_tokens[order][at]) & (positions < lasts[at])
        for position, row in zip(positions[inside].tolist(), order[at[inside]].tolist(), strict=True):
            refused.setdefault(row, position)
    if refused:
        row, position = next(iter(refused.items()))
        place = position - int(rows.starts[row]) - int(rows.prompt_tokens[row])
        token = chat.tokenizer.convert_ids_to_tokens(int(rows.ids[position]))
        raise UserError(
            f"trace {name(rows.keys[row])}: the control token {token} is supervised token {place + 1} of "
            f"{rows.supervised([row])}, before the end of the row, so the student would learn to end its turn there "
            f"({len(refused):,} of {len(rows):,} rows have one); the chat template of {chat.where} writes it: {REMEDY}"
        )


def prove_mask(rows: Sequence[Row], batch: Batch) -> None:
    """The tensors hold the rows, their supervised positions and nothing else. A failure is a bug: it asserts."""
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


def prove_prefix(trace: Trace, row: Row, chat: Chat, content: Content) -> None:
    """The row begins with the ids of the inference prompt. Errors: UserError."""
    prompt = chat.prompt_ids(conversation(trace, content)[:-1])
    if row.ids[: row.prompt_tokens].tolist() != prompt:
        raise UserError(
            f"trace {name(trace.key)}: the training row does not begin with the prompt that inference will send "
            f"(chat template of {chat.where}); {REMEDY}"
        )


def prove_text(trace: Trace, targets: list[int], chat: Chat, content: Content) -> None:
    """The supervised tokens decode to the trace's text, reasoning included. Errors: UserError."""
    learnt = squash(chat.restore(chat.decode(targets)))
    meant = squash(conversation(trace, content)[-1]["content"])
    reasoning = squash(trace.reasoning or "")
    if content == "reasoning" and reasoning not in learnt:
        raise UserError(
            f"the chat template of {chat.where} deletes the reasoning: {len(reasoning):,} characters inside <think> of "
            f"trace {name(trace.key)} never reach the student; {REMEDY}"
        )
    if learnt != meant:
        at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(learnt, meant, strict=False)))
        raise UserError(
            f"trace {name(trace.key)}: the supervised text differs from the trace's text from character {at} on "
            f"({learnt[at : at + 40]!r} instead of {meant[at : at + 40]!r}); the chat template of {chat.where} changes "
            f"the assistant's text; {REMEDY}"
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
    """NFC, with runs of white space collapsed to one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def name(key: tuple[str, int]) -> str:
    """A trace as messages name it."""
    return f"{key[0]} sample {key[1]}"
