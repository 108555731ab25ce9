"""The layouts in which other people publish reasoning traces → conversations that end with an answer.

    generations          OpenR1-Math-220k: lists of answers to `problem`, with lists of their finish reasons
    messages             the ecosystem's own: `role` and `content`
    conversations        ShareGPT: `from` and `value`, a `system` column beside it (OpenThoughts)
    prompt, completion   TRL's: text, or lists of messages
    responses_create_params, response   rollouts as items of the Responses API (NeMo Gym)
    question, response   and the other pairs of columns in `FLAT`
    named by the recipe  a question, a reasoning without tags and an answer in columns of their own (s1K)

A column may hold its list as JSON text. A content may be text or a list of parts. The reasoning stands in the text
between tags (`distill.traces.tags`), or under a key or in a column of its own (`REASONING`), or in a part of type
`thinking`; all of it becomes `<think>…</think>` before the answer. A column counts where the answer has no reasoning.

Two kinds of trouble are kept apart. A row whose columns are none of these layouts is refused (`UserError`): the recipe
has to say what they mean. A row in a known layout that holds no usable answer (an empty text, a turn of a tool, an
image) is left out under a reason that is counted (`LeftOut`): in a published data set of 100,000 rows there are some,
and nobody can correct them.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from distill.chat import END_THINK, THINK
from distill.errors import UserError
from distill.prompts.columns import MEDIA, first_of, listed, parse_json, parsed, value_at
from distill.prompts.messages import ROLES, TEXT_PARTS
from distill.prompts.prompt import Message
from distill.traces.finish import finish_reason
from distill.traces.tags import LeftOut, tagged
from distill.traces.trace import FinishReason

Row = Mapping[str, object]

REASONING = (  # keys of an assistant's turn, and columns
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text"),
    *("reasoning_details", "reasoning_trace", "thinking_trace"),
)
REASONINGS = (*REASONING, "reasonings", "reasoning_contents", "reasoning_traces")  # columns, beside `generations` too
MODES = ("on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high")  # of a reasoning, no reasoning
EFFORT = {"effort", "summary", "generate_summary", "enabled", "exclude", "max_tokens"}  # keys of settings
EMPTY_BLOCK = re.compile(rf"\A\s*{THINK}\s*{END_THINK}\s*")
SYSTEM = ("system", "system_prompt", "system_message")  # columns, the first that has a text
BESIDE_QUESTION = ("context", "input")  # columns that a question of `FLAT` goes on in
FLAT = (  # columns of question, reasoning (None: between tags in the answer) and answer that need no naming
    ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
    ("question", "thinking_trajectories", "attempt"),
    ("problem", "message_thinking", "message_content"),
    ("question", None, "response"),
    ("problem", None, "response"),
    ("instruction", None, "response"),
    ("Question", "Complex_CoT", "Response"),
)
TOOLS = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")
THOUGHT_PARTS = (
    "thinking",
    "reasoning",
    "thought",
    "reasoning.text",
    "reasoning.summary",
    "reasoning_text",
    "summary_text",
)
SECRET_PARTS = ("reasoning.encrypted", "redacted_thinking")  # a reasoning that nobody can read
HEADS = (  # a known layout has one of these columns
    *("generations", "messages", "conversations", "completion", "responses_create_params"),
)
ALIGNED = (
    "finish_reasons",
    "is_reasoning_complete",
    "correctness_math_verify",
    "correctness_llama",
)  # to `generations`
COLUMNS = (  # that a row in a known layout may have
    *HEADS,
    *("problem", "question", "prompt", "finish_reason", "stop_reason", "response", *REASONINGS, *ALIGNED),
    *(*SYSTEM, *BESIDE_QUESTION),
    *dict.fromkeys(name for flat in FLAT for name in flat if name is not None),
)


@dataclass(frozen=True)
class Columns:
    """The columns that a recipe names, for rows in no known layout. beside: those in which the question goes on."""

    question: str | None = None
    reasoning: str | None = None
    response: str | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer. messages: those before it, the question last. text: with its reasoning in a think block. number: its
    place in a row of several. parts: reasoning and response, where they were published in two fields or between the
    tags of another model; None: the think tags of the text divide it."""

    messages: tuple[Message, ...]
    text: str
    finish_reason: FinishReason
    number: int = 0
    parts: tuple[str | None, str] | None = None


@dataclass(frozen=True)
class _Turn:
    """A turn as it is published: any values. finish: why it ended."""

    role: object
    content: object
    reasoning: object = None
    finish: object = None


def answers(row: Row, columns: Columns, where: str, empty: bool = False) -> Iterator[Answer | LeftOut]:
    """The answers in a row, or why one is left out. empty: whether an empty text is an answer.

    Errors: UserError for a row in no known layout, or whose lists have other lengths than `generations`.
    """
    conversations = _conversations(row, columns, where)
    for number in count():
        try:
            if (turns := next(conversations, None)) is None:
                return
            yield _answer(row, turns, number, where, empty, (columns.question, columns.response))
        except LeftOut as reason:
            yield reason


def _conversations(row: Row, columns: Columns, where: str) -> Iterator[list[_Turn]]:
    if columns.response:
        asked = [_column(row, columns.question or "question", where), *map(row.get, columns.beside)]
        question = _Turn("user", _joined(asked) if columns.beside else asked[0])
        reasoning = _column(row, columns.reasoning, where) if columns.reasoning else None
        yield [question, _Turn("assistant", _column(row, columns.response, where), reasoning)]
    elif (generations := _list(row.get("generations"), of=str)) is not None:
        _check_aligned(row, len(generations), where)
        question = _Turn(
            "user", _column(row, columns.question or ("problem" if "problem" in row else "question"), where)
        )
        for text in generations:
            yield [question, _Turn("assistant", text)]
    elif row.get("messages"):
        yield _turns(row["messages"], "messages", where)
    elif row.get("conversations"):
        yield _turns(row["conversations"], "conversations", where)
    elif row.get("prompt") and "completion" in row:
        prompt = _turns(row["prompt"], "prompt", where, text_role="user")
        if not (completion := _turns(row["completion"], "completion", where, text_role="assistant")):
            raise LeftOut("no answer at the end")
        yield [*prompt, *completion]
    elif isinstance(row.get("responses_create_params"), dict):
        yield _rollout(row, where)
    elif (flat := _flat(row)) is not None:
        yield from _conversations(row, flat, where)
    else:
        raise no_layout(row, where)


def is_known(columns: Collection[str]) -> bool:
    """Whether columns are those of a known layout."""
    return any(head in columns for head in HEADS) or _flat(columns) is not None


def _flat(columns: Collection[str]) -> Columns | None:
    for question, reasoning, response in FLAT:
        if {question, reasoning or question, response} <= set(columns):
            return Columns(question, reasoning, response, BESIDE_QUESTION)
    return None


def columns_read(columns: Collection[str]) -> set[str]:
    """The columns that are read of a row with these columns."""
    flat = not any(head in columns for head in HEADS) and _flat(columns) is not None
    return {name for name in COLUMNS if flat or name not in BESIDE_QUESTION}


def _joined(texts: Sequence[object]) -> object:
    """A question and what it goes on with, as paragraphs; the question alone where nothing else is text."""
    question, *others = texts
    more = [text.strip() for text in others if isinstance(text, str) and text.strip()]
    return "\n\n".join([question.strip(), *more]) if isinstance(question, str) and more else question


def _check_aligned(row: Row, length: int, where: str) -> None:
    """Raise UserError for a list about the generations that has another length: which is whose cannot be known."""
    for column in ALIGNED:
        listed = parsed(row.get(column))
        if isinstance(listed, list) and listed and len(listed) != length:
            raise UserError(
                f"{where}: {column} has length {len(listed)}, and there are {length} generations; correct or remove "
                f"the row"
            )


def _rollout(row: Row, where: str) -> list[_Turn]:
    """The turns of a rollout. Calls of tools and their results are text in the turns of assistant and user, with the
    tags that Qwen's chat templates put around them: a conversation has no other roles, and nothing is lost."""
    asked, response = row["responses_create_params"], row.get("response")
    assert isinstance(asked, dict)
    given, made = asked.get("input"), response.get("output") if isinstance(response, dict) else None
    turns = [_Turn("system", asked["instructions"])] if asked.get("instructions") else []
    turns += [_Turn("user", given)] if isinstance(given, str) else []
    items = [*(given if isinstance(given, list) else ()), *(made if isinstance(made, list) else ())]
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise UserError(f"{where}: item {number} of the rollout is a {type(item).__name__}, not an object")
        turn = _item(item, where)
        if turn.role == "assistant" and turns and turns[-1].role == "assistant":
            turns[-1] = _merged(turns[-1], turn)
        else:
            turns.append(turn)
    return [
        turn if turn.role != "assistant" or turn is turns[-1] else _Turn(turn.role, _with_thought(turn))
        for turn in turns
    ]


def _item(item: Mapping[str, object], where: str) -> _Turn:
    match item.get("type", "message"):
        case "message":
            return _Turn(item.get("role"), item.get("content"), _reasoning_in(item))
        case "reasoning":
            return _Turn("assistant", "", item.get("content") or item.get("summary") or None)
        case "function_call":
            return _Turn("assistant", _call(item))
        case "function_call_output":
            return _Turn(
                "user", f"<tool_response>\n{_content(item.get('output'), 'result', empty=True)[1]}\n</tool_response>"
            )
    raise UserError(f"{where}: unknown item {item.get('type')!r} in the rollout; remove the row")


def _call(function: Mapping[str, object]) -> str:
    """A call of a tool as text: its name and arguments."""
    arguments = function.get("arguments")
    with suppress(ValueError):  # else it stays the text that the model wrote
        arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
    call = json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _calls(turn: Mapping[str, object]) -> list[str]:
    """The calls of a turn of the chat API as text: `tool_calls`, or the older `function_call`."""
    listed, single = _list(turn.get("tool_calls")) or [], turn.get("function_call")
    functions = [call.get("function", call) for call in listed if isinstance(call, dict)]
    return [_call(function) for function in (*functions, single) if isinstance(function, dict)]


def _merged(first: _Turn, second: _Turn) -> _Turn:
    texts = [_content(turn.content, "answer", empty=True)[1] for turn in (first, second)]
    thoughts = [_thought(turn.reasoning) for turn in (first, second) if turn.reasoning]
    return _Turn("assistant", "\n".join(filter(None, texts)), "\n".join(filter(None, thoughts)) or None)


def _with_thought(turn: _Turn) -> str:
    thought = _thought(turn.reasoning) if turn.reasoning else None
    return _with_reasoning(_content(turn.content, "answer", empty=True)[1], thought)


def _thought(reasoning: object) -> str | None:
    """The text of a reasoning under a key of its own; s1K has one trajectory in a list. Errors: LeftOut."""
    inside, text = _content(reasoning, "reasoning", separator="\n", empty=True)
    return "\n".join(filter(None, (inside, text))) or None


def no_layout(columns: Iterable[str], where: str) -> UserError:
    """The error for columns that are no known layout."""
    return UserError(
        f"{where}: no known layout of traces (messages, conversations, prompt and completion, generations) in the "
        f"columns {listed(columns)}; name them: `question`, `reasoning` and `response` "
        f"of the source, or --question, --reasoning and --response"
    )


def _turns(value: object, column: str, where: str, text_role: str | None = None) -> list[_Turn]:
    """The turns in a column. text_role: whose turn a plain text is; None where only a list is meant."""
    turns = _list(value)
    if turns is None:
        if text_role is None:
            raise UserError(
                f"{where}: column {column} is a {type(value).__name__}; it must be a list of turns, or such a list as "
                f"a JSON string"
            )
        return [_Turn(text_role, value)]
    made = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UserError(
                f"{where}: {column}[{number}] is a {type(turn).__name__}, not a turn with role and content, or from "
                f"and value"
            )
        role, content = first_of(turn, "role", "from"), first_of(turn, "content", "value")
        made.append(_Turn(role, content, _reasoning_in(turn), turn.get("finish_reason")))
        if ROLES.get(str(role)) == "assistant" and (calls := _calls(turn)):
            made[-1] = _merged(made[-1], _Turn("assistant", "\n".join(calls)))
    return made


def _reasoning_in(values: Mapping[str, object], keys: Iterable[str] = REASONING) -> object:
    """The reasoning under the first key that has one; None for none. A mode ("on", True) is none."""
    return next((value for key in keys if (value := values.get(key)) and not _is_mode(value)), None)


def _is_mode(value: object) -> bool:
    if isinstance(value, dict):
        return value.keys() <= EFFORT
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in MODES)


def _beside(row: Row, number: int, named: Collection[str | None]) -> object:
    """The reasoning in a column of its own: of this answer, where the row has several. named: columns that hold
    something else. Errors: LeftOut."""
    generations = _list(row.get("generations"), of=str)
    reasoning = _reasoning_in(row, (key for key in REASONINGS if key not in named))
    if generations is None or reasoning is None:
        return reasoning
    listed = parsed(reasoning)
    if isinstance(listed, list) and len(listed) == len(generations):
        return listed[number]
    if len(generations) > 1:
        raise LeftOut("reasoning of several answers")
    return reasoning


def _list(value: object, of: type = dict) -> list[object] | None:
    """A list, or one that is kept as JSON text; None for anything else. of: what a list in JSON text consists of."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parse_json(value)
        except ValueError:
            return None
        if not (isinstance(value, list) and all(isinstance(item, of | None) for item in value)):
            return None  # a text that happens to be JSON, such as "[1, 2, 3]"
    return value if isinstance(value, list) else None


def _answer(
    row: Row, turns: list[_Turn], number: int, where: str, empty: bool, named: Collection[str | None]
) -> Answer:
    """The last turn as the answer to those before it. named: the columns of question and answer that a recipe names.

    Errors: LeftOut; UserError for an unknown role.
    """
    if any(row.get(column) for column in MEDIA):
        raise LeftOut("not text alone")
    roles = [_role(turn, where) for turn in turns]
    if not roles or roles[-1] != "assistant":
        raise LeftOut("no answer at the end")
    if "user" not in roles or roles[-2] != "user":
        raise LeftOut("no question before the answer")
    messages: list[Message] = [
        {
            "role": role,
            "content": _with_reasoning(
                _content(turn.content, "question" if role == "user" else role)[1],
                _thought(turn.reasoning) if turn.reasoning else None,
            ),
        }
        for role, turn in zip(roles[:-1], turns, strict=False)
    ]
    system = next((text for key in SYSTEM if isinstance(text := row.get(key), str) and text.strip()), None)
    if system and roles[0] != "system":
        messages.insert(0, {"role": "system", "content": system})
    thought, text = _content(turns[-1].content, "answer", empty=empty and turns[-1].content is not None)
    if turns[-1].reasoning:
        thought = _thought(turns[-1].reasoning)
    text, parts = tagged(text)
    if thought or (not (plain := EMPTY_BLOCK.sub("", text)).startswith(THINK) and END_THINK not in plain):
        thought = thought or _thought(_beside(row, number, named))
        text = EMPTY_BLOCK.sub("", text) if thought else text
    whole = _with_reasoning(text, thought)
    if thought and whole != text:
        parts = thought.strip(), text
    return Answer(tuple(messages), whole, finish_reason(row, number, turns[-1].finish, where), number, parts)


def _role(turn: _Turn, where: str) -> str:
    role = turn.role if isinstance(turn.role, str) else None
    if role in TOOLS:
        raise LeftOut("turns of tools")
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {turn.role!r}; expected one of {', '.join(ROLES)}")
    return ROLES[role]


def _content(content: object, what: str, separator: str = "", empty: bool = False) -> tuple[str | None, str]:
    """(reasoning in parts of its own, text) of a turn. what: its name in a reason. empty: whether the text may be.

    Errors: LeftOut.
    """
    parts = content if isinstance(content, list) else [content]
    texts, thoughts = list[str](), list[str]()
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and kind in THOUGHT_PARTS:
            value = next((part[key] for key in (*THOUGHT_PARTS, "text", "content") if part.get(key)), None)
            thoughts.append(_content(value, "reasoning", empty=empty)[1])
        elif kind in SECRET_PARTS:
            continue
        elif part is not None:
            raise LeftOut(
                f"{what} of type {kind}" if isinstance(kind, str) else f"{what} of type {type(part).__name__}"
            )
    text = separator.join(texts)
    if not text.strip() and not empty:
        raise LeftOut(f"empty {what}")
    return ("\n".join(thoughts) or None), text


def _with_reasoning(text: str, reasoning: str | None) -> str:
    if reasoning is None or not reasoning.strip():
        return text
    head, closed, _ = text.partition(END_THINK)
    if closed and reasoning.strip() == head.strip().removeprefix(THINK).strip():
        return text  # it stands in both fields
    if closed and text.lstrip().startswith(THINK):
        if reasoning.strip() not in text:
            raise LeftOut("two reasonings")
        return text
    return f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{text}"


def _column(row: Row, name: str, where: str) -> object:
    if name.partition(".")[0] not in row and name not in row:
        raise UserError(f"{where}: no column {name}; the columns are {listed(row)}")
    return value_at(row, name)
