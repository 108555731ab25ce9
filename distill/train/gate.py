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
from itertools import takewhile

from distill.chat import Chat
from distill.errors import UserError
from distill.traces.trace import Trace
from distill.train.data import Batch, Encoded, Row, collate, conversation

MEND = "set train.chat_template to `chatml` or `llama3`, or to a training template of your own"


def prove(data: Encoded, chat: Chat, content: str, vocabulary: int, context: int, pad_id: int) -> list[str]:
    """Raise UserError at the first thing that would make the training pointless; else return lines that say what holds.

    vocabulary: rows of the model's embedding. context: the longest position the model knows, in tokens.
    """
    by_key = {row.key: row for row in data.rows}
    traces = list({trace.key: trace for trace in data.witnesses.values()}.values())
    rows = [by_key[trace.key] for trace in traces]
    batch = collate(rows, pad_id)

    prove_every_row(data.rows, chat, vocabulary, context)
    prove_mask(rows, batch, pad_id)
    for trace, row, targets in zip(traces, rows, split(batch), strict=True):
        prove_prefix(trace, row, chat, content)
        prove_text(trace, targets, chat, content)

    reasoning = sum(len((trace.reasoning or "").strip()) for trace in traces) if content == "reasoning" else 0
    width = max(len(row.ids) for row in data.rows)
    end = chat.tokenizer.convert_ids_to_tokens(int(data.rows[0].ids[-1]))
    return [
        f"integrity gate, on {len(data.rows):,} rows and, token by token, on {' '.join(data.witnesses)}:",
        f"  what is learnt is exactly the completion, {reasoning:,} characters of reasoning included"
        if content == "reasoning"
        else "  what is learnt is exactly the response; the reasoning is left out, as train.content says",
        f"  every row ends in a supervised {end}; prompt and padding are masked",
        f"  {data.supervised:,} of {data.tokens:,} tokens are supervised",
        "  the training prefix is the inference prompt, id for id",
        f"  ids fit the vocabulary of {vocabulary:,}, the longest row ({width:,} tokens) the context of {context:,}",
    ]


def prove_every_row(rows: Sequence[Row], chat: Chat, vocabulary: int, context: int) -> None:
    largest = max(int(row.ids.max()) for row in rows)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer of {chat.where} gives id {largest} ({chat.tokenizer.convert_ids_to_tokens(largest)}) but "
            f"the model's vocabulary ends at {vocabulary - 1}: tokenizer and weights are not of one model, or the "
            f"embedding must be resized to {largest + 1} rows first"
        )
    longest = max(rows, key=lambda row: len(row.ids))
    if len(longest.ids) > context:
        raise UserError(
            f"trace {name(longest.key)} has {len(longest.ids)} tokens and the model's context is {context}: set "
            f"train.max_length to {context} (longer rows are dropped and counted), or extend the model, in its "
            f"config.json: max_position_embeddings and the RoPE base"
        )
    for row in rows:
        if int(row.ids[-1]) not in chat.stop_token_ids:
            raise UserError(
                f"trace {name(row.key)} does not end in an end token: the chat template of {chat.where} closes an "
                f"assistant's turn with nothing that stops generation, so the student would never learn to stop; {MEND}"
            )


def prove_mask(rows: Sequence[Row], batch: Batch, pad_id: int) -> None:
    """The tensors hold the rows, their supervised positions and nothing else. A failure is our bug: it asserts."""
    width = batch.input_ids_bt.shape[1]
    expected = [b * width + t for b, row in enumerate(rows) for t in range(row.prompt_tokens, len(row.ids))]
    assert (batch.positions_s + 1).tolist() == expected, "the mask does not cover exactly the completions"
    for b, row in enumerate(rows):
        ids_t = batch.input_ids_bt[b].tolist()
        assert ids_t[: len(row.ids)] == row.ids.tolist(), "the collator changed a row"
        assert all(i == pad_id for i in ids_t[len(row.ids) :]), "something other than padding follows a row"
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
    row_s = (batch.positions_s // batch.input_ids_bt.shape[1]).tolist()
    targets: list[list[int]] = [[] for _ in range(batch.input_ids_bt.shape[0])]
    for b, target in zip(row_s, batch.targets_s.tolist(), strict=True):
        targets[b].append(target)
    return targets


def squash(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def name(key: tuple[str, int]) -> str:
    return f"{key[0]} sample {key[1]}"
