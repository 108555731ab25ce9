"""Other people's traces → ours: the layouts in which reasoning traces are published, recognised by their columns.

    generations          OpenR1-Math-220k: lists of answers to `problem`, with lists of their finish reasons
    messages             the ecosystem's own; reasoning in the text, or in `reasoning_content`
    conversations        ShareGPT: `from` and `value`, a `system` column beside it (OpenThoughts)
    prompt, completion   TRL's: text, or lists of messages
    named by the recipe  a question, a reasoning without tags and an answer in columns of their own (s1K)

Whatever tags a publisher put around the reasoning become `<think>…</think>`: `<|begin_of_thought|>` (OpenThoughts,
Sky-T1), `<Thought>` (Marco-o1). Nothing else of a text is touched. What a row does not say is not made up: without a
finish reason a text counts as finished, because it was published as an answer; the filters look at its form.

A row that is none of these is the user's to mend, and the message says which columns it has.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.chat import split_reasoning
from distill.errors import UserError
from distill.fingerprint import digest
from distill.prompts.files import Row, rows_of_file
from distill.prompts.hub import load_dataset, rows_of_dataset
from distill.prompts.prompt import Message, Prompt
from distill.traces.store import read_traces
from distill.traces.trace import FinishReason, Trace

if TYPE_CHECKING:
    from distill.recipe.sources import FileTraces, HubTraces, TraceSource

TAGS = [  # theirs → ours; what stands around the answer goes
    (re.compile(r"<\|begin_of_thought\|>|<Thought>"), "<think>"),
    (re.compile(r"<\|end_of_thought\|>|</Thought>"), "</think>"),
    (re.compile(r"\s*<\|begin_of_solution\|>|\s*<Output>"), "\n\n"),
    (re.compile(r"\s*<\|end_of_solution\|>|\s*</Output>"), ""),
]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
GOLD = ("answer", "gtruth_answer", "ground_truth", "expected_answer")


def read_published(source: "TraceSource") -> Iterator[Trace]:
    """The traces of a source in the order they are published. Errors: UserError naming the row."""
    if source.kind == "run":
        kept = Path(source.path) / "filtered" / "kept"
        if not kept.is_dir():
            raise UserError(f"{source.path}: no run directory with kept traces (no filtered/kept in it)")
        yield from (trace for trace, _ in read_traces(kept))
        return
    rows, name = _rows(source)
    teacher = digest({"published": name})
    samples: Counter[str] = Counter()
    empty = True
    for where, row in islice(rows, source.limit):
        empty = False
        for messages, text, finish in conversations(row, source, where):
            if not messages:
                raise UserError(f"{where}: no question before the answer; mend or remove the row")
            prompt = Prompt(tuple(messages), source.task, _gold(row, source), name)
            reasoning, response = split_reasoning(text)
            yield Trace(prompt, samples[prompt.id], 0, text, reasoning, response, finish, teacher)
            samples[prompt.id] += 1
    if empty:
        raise UserError(f"{name}: no rows; give a source with at least one trace")


def _rows(source: "HubTraces | FileTraces") -> tuple[Iterator[Row], str]:
    """The rows and what they are called in a published data set: no home directory."""
    if source.kind == "file":
        path = Path(source.path)
        return rows_of_file(path), "/".join(path.absolute().parts[-2:]).lstrip("/")
    dataset = load_dataset(source.dataset, source.subset, source.split, source.revision)
    path = Path(source.dataset)
    return rows_of_dataset(
        dataset, f"{source.dataset} ({source.split})"
    ), path.name if path.is_absolute() else source.dataset


def conversations(
    row: dict[str, Any], source: "HubTraces | FileTraces", where: str
) -> Iterator[tuple[list[Message], str, FinishReason]]:
    """(messages before the answer, the answer with its reasoning, why it ended) of each answer in a row."""
    if source.response:
        question, response = _column(row, source.question or "question", where), _column(row, source.response, where)
        reasoning = _column(row, source.reasoning, where) if source.reasoning else None
        yield [_message("user", question, where)], _with_reasoning(response, reasoning, where), "stop"
    elif isinstance(row.get("generations"), list):
        question = _column(row, source.question or ("problem" if "problem" in row else "question"), where)
        for i, text in enumerate(row["generations"]):
            yield [_message("user", question, where)], _text(text, where), _finish(row, i)
    elif row.get("messages"):
        yield from _chat(
            [(m.get("role"), m.get("content"), m.get("reasoning_content")) for m in row["messages"]], where
        )
    elif row.get("conversations"):
        system = [("system", row["system"], None)] if row.get("system") else []
        yield from _chat(system + [(t.get("from"), t.get("value"), None) for t in row["conversations"]], where)
    elif row.get("prompt") and row.get("completion"):
        turns = [(turn, "user") for turn in _turns(row["prompt"])] + [
            (t, "assistant") for t in _turns(row["completion"])
        ]
        yield from _chat(
            [
                (t.get("role"), t.get("content"), t.get("reasoning_content"))
                if isinstance(t, dict)
                else (role, t, None)
                for t, role in turns
            ],
            where,
        )
    else:
        raise UserError(
            f"{where}: no layout of traces that is known (messages, conversations, prompt and completion, generations) "
            f"in the columns {', '.join(row)}: name `question`, `reasoning` and `response` of this source"
        )


def _chat(turns: list[tuple[Any, Any, Any]], where: str) -> Iterator[tuple[list[Message], str, FinishReason]]:
    """One answer: the last turn, which must be the assistant's; those before it are the question."""
    roles = [ROLES.get(str(role)) for role, _, _ in turns]
    if None in roles:
        raise UserError(f"{where}: a turn of {turns[roles.index(None)][0]!r}, who is none of {', '.join(ROLES)}")
    if roles[-1] != "assistant":
        raise UserError(f"{where}: the conversation does not end with an answer; mend or remove the row")
    before = [_message(str(role), text, where) for role, (_, text, _) in zip(roles[:-1], turns, strict=False)]
    yield before, _with_reasoning(turns[-1][1], turns[-1][2], where), "stop"


def _with_reasoning(text: Any, reasoning: Any, where: str) -> str:
    text = _text(text, where)
    if isinstance(reasoning, list):  # s1K: one trajectory in a list
        reasoning = "\n".join(map(str, reasoning))
    return f"<think>\n{str(reasoning).strip()}\n</think>\n\n{text.strip()}" if reasoning else text


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: an answer that is {'empty' if not text else type(text).__name__}; remove the row")
    for pattern, ours in TAGS:
        text = pattern.sub(ours, text)
    return str(text).strip()


def _message(role: str, content: Any, where: str) -> Message:
    if not isinstance(content, str) or not content.strip():
        raise UserError(
            f"{where}: a question that is {'empty' if not content else type(content).__name__}; remove the row"
        )
    return {"role": role, "content": content}


def _turns(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no column {name}; the columns are {', '.join(row)}")
    return row[name]


def _finish(row: dict[str, Any], i: int) -> FinishReason:
    reasons, complete = row.get("finish_reasons"), row.get("is_reasoning_complete")
    if isinstance(reasons, list) and i < len(reasons) and reasons[i]:
        return "length" if reasons[i] == "length" else "stop"
    if isinstance(complete, list) and i < len(complete):
        return "stop" if complete[i] else "length"
    return "stop"


def _gold(row: dict[str, Any], source: "HubTraces | FileTraces") -> str | None:
    name = source.answer or next((name for name in GOLD if row.get(name) is not None), None)
    value = row.get(name) if name else None
    return None if value is None else str(value)
