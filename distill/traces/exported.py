"""Rows that `distill export` writes: four layouts that other tools read, which come back as the same traces.

    messages            messages: role and content, the answer last
    sharegpt            conversations: from (system, human, gpt) and value
    prompt-completion   prompt and completion: lists of messages
    openr1              one row a problem: problem, generations and the lists aligned to them, messages of the first

An answer stands in a row exactly as it was sampled, its reasoning in `<think>`. Beside it stands the column `distill`,
with the rest of the trace. It makes importing exact: an answer that begins with `[THINK]` or a blank line is not read
as another publisher's tags, the prompt keeps its id. `reasoning` and `response` are in it only where splitting the text
gives others. Rejected: columns of their own for these values, which trainers would take for theirs (`source`,
`reasoning`).

Anyone can write a column `distill` into a file, so it decides nothing that matters beyond its row. The prompt's id is
computed again from the prompt: two questions under one id would vote together. A task that runs code of the file
(`RUNNING`) is read only where the source names it, and a task that is not the source's own is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast, get_args

import pyarrow as pa

from distill.chat import split_reasoning
from distill.errors import UserError
from distill.prompts.prompt import Message, Prompt, Task
from distill.traces.trace import Trace, Verdict

Format = Literal["messages", "sharegpt", "prompt-completion", "openr1"]
Values = Mapping[str, object]

MARK = "distill"  # column
TASKS = get_args(Task)
RUNNING: tuple[Task, ...] = ("code", "gym")  # graders run tests or scorers that the gold answer names
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_MARK = pa.struct(
    [
        *((name, pa.string()) for name in ("id", "task", "source", "finish_reason", "teacher")),
        *(("reasoning", pa.string()), ("response", pa.string()), ("split", pa.bool_())),
        *(("seed", pa.int64()), ("completion_tokens", pa.int32())),
    ]
)
SCHEMAS: dict[Format, pa.Schema] = {
    "messages": pa.schema([("messages", _TURNS), ("answer", pa.string()), (MARK, _MARK)]),
    "sharegpt": pa.schema(
        [
            ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
            ("answer", pa.string()),
            (MARK, _MARK),
        ]
    ),
    "prompt-completion": pa.schema(
        [("prompt", _TURNS), ("completion", _TURNS), ("answer", pa.string()), (MARK, _MARK)]
    ),
    "openr1": pa.schema(
        [
            *(("problem", pa.string()), ("answer", pa.string()), ("source", pa.string()), ("uuid", pa.string())),
            *(("generations", pa.list_(pa.string())), ("finish_reasons", pa.list_(pa.string()))),
            ("is_reasoning_complete", pa.list_(pa.bool_())),
            ("correctness_math_verify", pa.list_(pa.bool_())),
            *(("messages", _TURNS), (MARK, pa.list_(_MARK))),
        ]
    ),
}


def row_of(trace: Trace, form: Format) -> dict[str, object]:
    """The row of one trace, in a layout other than openr1."""
    rest = {"answer": trace.prompt.answer, MARK: mark_of(trace)}
    if form == "sharegpt":
        turns = [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in trace.messages]
        return {"conversations": turns, **rest}
    if form == "prompt-completion":
        return {"prompt": trace.messages[:-1], "completion": trace.messages[-1:], **rest}
    return {"messages": trace.messages, **rest}


def openr1_row(traces: Sequence[tuple[Trace, bool | None]]) -> dict[str, object]:
    """The row of one prompt's traces, each with whether it is correct. At least one."""
    first = traces[0][0]
    return {
        "problem": first.prompt.messages[-1]["content"],
        "answer": first.prompt.answer,
        "source": first.prompt.source,
        "uuid": first.prompt.id,
        "generations": [trace.text for trace, _ in traces],
        "finish_reasons": [trace.finish_reason for trace, _ in traces],
        "is_reasoning_complete": [trace.reasoning is not None for trace, _ in traces],
        "correctness_math_verify": [correct for _, correct in traces],
        "messages": first.messages,
        MARK: [mark_of(trace) for trace, _ in traces],
    }


def correctness(verdicts: Sequence[Verdict]) -> bool | None:
    """Whether an answer is correct, as the filter or its publisher says; None where neither knows."""
    for verdict in verdicts:
        if verdict.filter == "correct" and verdict.reason in ("correct", "wrong"):
            return verdict.reason == "correct"
        if verdict.reason in ("labelled correct", "labelled incorrect"):
            return verdict.reason == "labelled correct"
    return None


def mark_of(trace: Trace) -> dict[str, object]:
    """The column `distill` of a trace."""
    split = split_reasoning(trace.text) == (trace.reasoning, trace.response)
    return {
        "id": trace.prompt.id,
        "task": trace.prompt.task,
        "source": trace.prompt.source,
        "finish_reason": trace.finish_reason,
        "teacher": trace.teacher,
        "reasoning": None if split else trace.reasoning,
        "response": None if split else trace.response,
        "split": split,
        "seed": trace.seed,
        "completion_tokens": trace.completion_tokens,
    }


def is_exported(row: Values) -> bool:
    """Whether `distill export` wrote a row, or a list of such rows' columns is in it."""
    return isinstance(row.get(MARK), dict | list)


def read_exported(row: Values, where: str, task: Task | None = None) -> Iterator[Trace]:
    """The traces in a row that `distill export` wrote.

    task: the one that the source names; None: it names none. Errors: UserError for a row that was changed since, and
    for one of a task that the source does not allow.
    """
    try:
        yield from _traces(row, where, task)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{where}: the column {MARK} does not fit the others ({error!r}); export again, or remove this column"
        ) from error


def _allowed_task(marked: object, task: Task | None, where: str) -> Task:
    """The task of a row. Errors: UserError, see the module."""
    if marked not in TASKS:
        raise UserError(f"{where}: unknown task {marked!r} in column {MARK}; expected one of {', '.join(TASKS)}")
    marked = cast(Task, marked)
    if marked in RUNNING and marked != task:
        raise UserError(
            f"{where}: task {marked}, whose grader runs what the file contains; if you trust the file, set `task: "
            f"{marked}` of this source (`distill import --task {marked}`)"
        )
    if task not in (None, marked, *RUNNING):
        raise UserError(
            f"{where}: task {marked}, and the source says {task}; set `task: {marked}` of this source (`distill import "
            f"--task {marked}`), or leave it out"
        )
    return marked


def _traces(row: Values, where: str, allowed: Task | None) -> Iterator[Trace]:
    marks = row[MARK]
    if "generations" in row:
        prompt, texts = _messages(row["messages"])[:-1], row["generations"]
    elif "prompt" in row:
        prompt, texts = _messages(row["prompt"]), [_messages(row["completion"])[-1]["content"]]
    else:
        *prompt, last = _messages(row["messages"] if "messages" in row else row["conversations"])
        texts = [last["content"]]
    listed = marks if isinstance(marks, list) else [marks]
    if not isinstance(texts, list):
        raise TypeError("generations is not a list")
    for text, mark in zip(texts, listed, strict=True):
        task = _allowed_task(mark["task"], allowed, where)
        answer, source = row["answer"], mark["source"]
        if answer is not None and not isinstance(answer, str):
            raise TypeError("answer is not text")
        if not isinstance(source, str):
            raise TypeError("source is not text")
        reasoning, response = split_reasoning(text) if mark["split"] else (mark["reasoning"], mark["response"])
        yield Trace(
            Prompt(tuple(prompt), task, answer, source),
            0,
            mark["seed"],
            text,
            reasoning,
            response,
            mark["finish_reason"],
            mark["teacher"],
            completion_tokens=mark["completion_tokens"],
        )


def _messages(turns: object) -> list[Message]:
    if not isinstance(turns, list):
        raise TypeError("its turns are not a list")
    roles = {speaker: role for role, speaker in SPEAKERS.items()}
    messages: list[Message] = [
        {"role": turn["role"], "content": turn["content"]}
        if "role" in turn
        else {"role": roles[turn["from"]], "content": turn["value"]}
        for turn in turns
    ]
    if not all(message["role"] in SPEAKERS and isinstance(message["content"], str) for message in messages):
        raise TypeError("a turn is not text by system, user or assistant")
    return messages
