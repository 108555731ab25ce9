"""Prompts from the rows of a file or a data set: which column means what, and which rows cannot be asked.

A row that cannot become a prompt is refused with its place, because a problem that is left out without a word changes a
score. What is legal but may not be meant (rows without a gold answer, the same problem twice) is counted, see
`PromptCounts`.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.prompts.prompt import Message, Prompt
from distill.prompts.rows import Row, columns_of, has_column, rows_of_file, value_at

if TYPE_CHECKING:
    from distill.recipe.sources import FilePrompts, HubPrompts

LETTERS = "ABCDEFGHIJ"
DAY = re.compile(r"\d{4}-\d\d-\d\d")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns of rows that are not text alone
ROLES = ("system", "user", "assistant")


@dataclass
class PromptCounts:
    """What was read. seen: prompt id → how often. rows: source → rows read. unanswered: source → rows without a gold
    answer where one is asked for."""

    seen: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """One line for each thing that may not be meant."""
        notes = [
            f"{source}: {count:,} of {self.rows[source]:,} problems have no gold answer"
            for source, count in self.unanswered.items()
        ]
        if repeated := self.seen.total() - len(self.seen):
            notes.append(f"{repeated:,} of {self.seen.total():,} prompts repeat an earlier one and are read once")
        return notes


def read_file(source: "FilePrompts", counts: PromptCounts) -> Iterator[Prompt]:
    """The prompts of the file, at most `source.limit` rows of it. Errors: UserError, see the module."""
    path = Path(source.path)
    rows = rows_of_file(path, (*required_columns(source), *optional_columns(source)))
    if (names := columns_of(path)) is not None:
        require_columns(source, names, str(path))
    # the last two parts of the path tell files apart, and put no home directory into a published data set
    return prompts_from_rows(rows, source, str(path), "/".join(path.absolute().parts[-2:]).lstrip("/"), counts)


def required_columns(source: "FilePrompts | HubPrompts") -> list[str]:
    """The columns that every row needs."""
    columns = source.question, *source.choices, source.date
    return list(dict.fromkeys(column for column in columns if column is not None))


def optional_columns(source: "FilePrompts | HubPrompts") -> list[str]:
    """The columns that a row may lack."""
    return [column for column in (source.answer, source.system, *MEDIA) if column is not None]


def require_columns(source: "FilePrompts | HubPrompts", names: Iterable[str], where: str) -> None:
    """Raise UserError when a source whose rows all have the same columns lacks a required one, or the answer."""
    columns = dict.fromkeys(names)
    for column in (*required_columns(source), *([source.answer] if source.answer else [])):
        if not has_column(columns, column):
            raise _no_column(source, column, columns, where)


def _no_column(source: "FilePrompts | HubPrompts", column: str, names: Iterable[str], where: str) -> UserError:
    fix = "name the right one under `prompts`"
    if column == source.answer:
        fix += ", or set `answer: null` for problems without gold answers"
    return UserError(f"{where}: no column {column}; the columns are {', '.join(names) or '(none)'}: {fix}")


def prompts_from_rows(
    rows: Iterator[Row], source: "FilePrompts | HubPrompts", whole: str, name: str, counts: PromptCounts
) -> Iterator[Prompt]:
    """Turn rows into prompts. whole: what the rows come from, for messages; name: the prompts' `source`.

    Errors: UserError, lazily: for a row when it is read, for an answer column that no row has at the end.
    """
    read = unanswered = 0
    answer_there = source.answer is None
    names: dict[str, None] = {}
    for where, row in islice(_within(rows, source), source.limit):
        read += 1
        names |= dict.fromkeys(row)
        for column in required_columns(source):
            if not has_column(row, column):
                raise _no_column(source, column, row, where)
        answer_there = answer_there or has_column(row, source.answer or "")
        messages = _messages(row, source, where)
        answer = _answer(row, source, where)
        if source.choices:
            messages, answer = _with_choices_of(row, source, where, messages, answer)
        unanswered += answer is None and source.answer is not None
        yield Prompt(messages, source.task, answer, name)
    if not read:
        raise UserError(f"{whole}: no rows; give a source with at least one problem")
    if not answer_there and source.answer is not None:
        raise _no_column(source, source.answer, names, whole)
    counts.rows[name] += read
    if unanswered:
        counts.unanswered[name] += unanswered


def _within(rows: Iterator[Row], source: "FilePrompts | HubPrompts") -> Iterator[Row]:
    """The rows of the window. Errors: UserError for a row without a date, which might belong to it."""
    if source.date is None or (source.since is None and source.until is None):
        yield from rows
        return
    first, last = source.since or "", source.until or "9"
    for where, row in rows:
        if not has_column(row, source.date):
            raise _no_column(source, source.date, row, where)
        day = str(value_at(row, source.date))[:10]  # compared as text, which is right for the year first
        if not DAY.fullmatch(day):
            raise UserError(f"{where}: column {source.date} is {day!r}, not a date like 2024-08-01; correct the row")
        if first <= day <= last:
            yield where, row


def _messages(row: dict[str, object], source: "FilePrompts | HubPrompts", where: str) -> tuple[Message, ...]:
    """The conversation that is asked: a system message where there is one, and the question."""
    for column in MEDIA:
        if row.get(column) and column not in (source.question, source.answer, source.system, *source.choices):
            raise UserError(
                f"{where}: column {column} is not empty: teachers read text only; remove such rows, or the "
                f"column where it does not matter"
            )
    question, messages = value_at(row, source.question), list[Message]()
    system = value_at(row, source.system) if source.system else None
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": _text(system, source.system or "", where)})
    elif system is not None and not isinstance(system, str):
        raise UserError(f"{where}: column {source.system} is not text but {type(system).__name__}; correct the row")
    if isinstance(question, list):
        messages += conversation(question, source.question, where)
    else:
        messages.append({"role": "user", "content": _text(question, source.question, where)})
    return tuple(messages)


def conversation(turns: Sequence[object], column: str, where: str) -> list[Message]:
    """A question given as a list of messages, which ends with the user's. Errors: UserError."""
    messages = list[Message]()
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or role not in ROLES:
            raise UserError(
                f"{where}: column {column} is a list, but not of messages (role: {' or '.join(ROLES)}; content: text)"
            )
        messages.append({"role": str(role), "content": _text(turn.get("content"), f"{column}.content", where)})
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: column {column} does not end with a message of the user; correct or remove the row")
    return messages


def _text(value: object, column: str, where: str) -> str:
    """The text of a column that is asked. Errors: UserError when it is none, empty, or damaged."""
    if not isinstance(value, str):
        problem = "is empty" if value is None else f"is not text but {type(value).__name__}"
    else:
        problem = _wrong_text(value) or ("" if value.strip() else "is blank" if value else "is empty")
    if problem:
        raise UserError(f"{where}: column {column} {problem}; correct or remove the row")
    assert isinstance(value, str)
    return value


def _wrong_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which no tokenizer takes"
    control = next((c for c in text if (c < " " and c not in "\t\n\r") or c == "\x7f"), None)
    if control is None:
        return None
    latex = " (LaTeX in JSON needs two backslashes: \\\\frac)" if control in "\b\f" else ""
    return f"holds the control character U+{ord(control):04X}{latex}"


def _answer(row: dict[str, object], source: "FilePrompts | HubPrompts", where: str) -> str | None:
    """The gold answer as text; None where it is missing. Errors: UserError."""
    if source.answer is None:
        return None
    try:
        return gold_text(value_at(row, source.answer), source.task)
    except ValueError as error:
        raise UserError(f"{where}: column {source.answer} {error}; correct or remove the row") from error


def gold_text(answer: object, task: str) -> str | None:
    """A gold answer as text; None where it is null or blank.

    A number becomes its JSON, and so do the lists and objects that tests of code are. Errors: ValueError, the end of a
    sentence about the column.
    """
    if isinstance(answer, list) and task in ("math", "choice"):
        if len(answer) > 1:
            raise ValueError(f"is a list of {len(answer)}, and a problem has one gold answer")
        answer = answer[0] if answer else None
    if isinstance(answer, str):
        if wrong := _wrong_text(answer):
            raise ValueError(wrong)
        return answer if answer.strip() else None
    if answer is None:
        return None
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"is {answer}, not a finite number")
    return json.dumps(answer, ensure_ascii=False, default=str, allow_nan=False)


def _with_choices_of(
    row: dict[str, object],
    source: "FilePrompts | HubPrompts",
    where: str,
    messages: tuple[Message, ...],
    answer: str | None,
) -> tuple[tuple[Message, ...], str]:
    if answer is None:
        raise UserError(f"{where}: column {source.answer} is empty; a question with choices needs the correct choice")
    wrong = [_text_of_choice(value_at(row, column), column, where) for column in source.choices]
    if answer in wrong:
        raise UserError(f"{where}: the right answer is among the wrong choices too; correct or remove the row")
    *before, question = messages
    text, letter = with_choices(question["content"], answer, wrong)
    return (*before, {"role": question["role"], "content": text}), letter


def _text_of_choice(value: object, column: str, where: str) -> str:
    if value is None or value == "" or isinstance(value, list | dict):
        what = "empty" if not value else f"a {type(value).__name__}"
        raise UserError(f"{where}: column {column} is {what}; a question with choices needs all of them")
    return str(value)


def with_choices(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The question with its choices listed, and the right one's letter.

    The order is that of a hash, so that it is the same everywhere and says nothing about the answer.
    """

    def rank(choice: str) -> bytes:
        return hashlib.sha256(json.dumps([question, choice]).encode()).digest()

    choices = sorted([right, *wrong], key=rank)
    listed = "\n".join(f"{letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question.strip()}\n\n{listed}", LETTERS[choices.index(right)]
