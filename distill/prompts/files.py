"""Prompts from the rows of a file or a data set: which column means what, and which rows cannot be asked.

A row that cannot become a prompt is refused with its place, because a problem that is left out without a word changes a
score. What is legal but may not be meant (rows without a gold answer, the same problem twice) is counted, see
`PromptCounts`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.prompts.code_tests import BESIDE
from distill.prompts.columns import MEDIA, Row, has_column, listed, parsed, value_at
from distill.prompts.counts import PromptCounts
from distill.prompts.golds import ARGUMENTS, gold_of, gold_text, with_choices
from distill.prompts.messages import asked_text, conversation, turns_of
from distill.prompts.options import PLAIN, listed_options, options_of, right_letter
from distill.prompts.prompt import Message, Prompt
from distill.prompts.rows import columns_of, rows_of_file
from distill.prompts.selection import sampled
from distill.recipe.sources import OPTIONS, QUESTION
from distill.recipe.template import filled, placeholders

if TYPE_CHECKING:
    from distill.recipe.sources import FilePrompts, HubPrompts

__all__ = ["MEDIA", "PromptCounts", "gold_text", "read_file", "read_hub"]

DAY = re.compile(r"\d{4}-\d\d-\d\d")
MARKS = {  # what `extract` looks for
    "hash": "a line that begins with ####",
    "boxed": "a \\boxed{…}",
    "tests": "tests",
    "instructions": "instruction ids",
}
BESIDE_ANSWERS = {
    "tests": BESIDE,
    "instructions": (ARGUMENTS,),
}  # columns that are read beside the answer, by `extract`
PARTS = ("system", "system_prompt", "context", "input")  # columns that may be a part of the question
OPTION_COLUMNS = ("options", "choices")  # and of one with choices


@dataclass(frozen=True)
class _Candidate:
    """A row as a prompt. cut: whether turns after its question were cut off. unasked: its columns that may be a part of
    the question, and are not asked."""

    where: str
    prompt: Prompt
    cut: bool
    unasked: tuple[str, ...] = ()


def read_file(source: "FilePrompts", counts: PromptCounts) -> Iterator[Prompt]:
    """The prompts of the file, at most `source.limit` rows of it. Errors: UserError, see the module."""
    path = Path(source.path)
    rows = rows_of_file(path, (*required_columns(source), *optional_columns(source)), source.split)
    if (names := columns_of(path, source.split)) is not None:
        require_columns(source, names, str(path))
    # the last two parts of the path tell files apart, and put no home directory into a published data set
    return prompts_from_rows(rows, source, str(path), "/".join(path.absolute().parts[-2:]).lstrip("/"), counts)


def read_hub(source: "HubPrompts", counts: PromptCounts) -> Iterator[Prompt]:
    """The prompts of the split, at most `source.limit` rows of it. Errors: UserError when it cannot be loaded."""
    from distill.prompts.hub import load_dataset, rows_of_dataset

    name = source.dataset.rpartition("/")[2] if Path(source.dataset).is_absolute() else source.dataset
    if source.files:
        return _read_hub_files(source, name, counts)
    whole = f"{source.dataset} ({source.split})"
    dataset = load_dataset(source.dataset, source.subset, source.split, source.revision)
    require_columns(source, dataset.column_names, whole)
    wanted = {*required_columns(source), *optional_columns(source)}
    wanted |= {column.partition(".")[0] for column in wanted}
    chosen = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    return prompts_from_rows(rows_of_dataset(chosen, whole), source, whole, name, counts)


def _read_hub_files(source: "HubPrompts", name: str, counts: PromptCounts) -> Iterator[Prompt]:
    from distill.prompts.hub import files_of_dataset

    paths = files_of_dataset(source.dataset, source.files, source.revision)
    columns = (*required_columns(source), *optional_columns(source))
    for path in paths:
        if (names := columns_of(path)) is not None:
            require_columns(source, names, str(path))
    rows = (row for path in paths for row in rows_of_file(path, columns))
    return prompts_from_rows(rows, source, source.dataset, name, counts)


def required_columns(source: "FilePrompts | HubPrompts") -> list[str]:
    """The columns that every row needs."""
    options = (source.options,) if isinstance(source.options, str) else source.options or ()
    named = [name for name in placeholders(source.template or "") if name not in (QUESTION, OPTIONS)]
    columns = source.question, *source.choices, *options, source.labels, *named, source.date
    return list(dict.fromkeys(column for column in columns if column is not None))


def optional_columns(source: "FilePrompts | HubPrompts") -> list[str]:
    """The columns that a row may lack."""
    columns = (source.answer, source.system, *MEDIA, *BESIDE_ANSWERS.get(source.extract, ()), *_parts(source))
    return [column for column in columns if column is not None]


def _parts(source: "FilePrompts | HubPrompts") -> list[str]:
    """The columns that may be a part of the question, and that the source does not read."""
    read = {name.partition(".")[0] for name in (*required_columns(source), source.answer, source.system) if name}
    listing = OPTION_COLUMNS if source.task == "choice" and source.options is None and not source.choices else ()
    refused = PARTS[:2] if source.system is None else ()  # `system: null` says that none is sent
    return [name for name in (*PARTS, *listing) if name not in (*read, *refused)]


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
    return UserError(f"{where}: no column {column}; the columns are {listed(names)}: {fix}")


def prompts_from_rows(
    rows: Iterator[Row], source: "FilePrompts | HubPrompts", whole: str, name: str, counts: PromptCounts
) -> Iterator[Prompt]:
    """Turn rows into prompts. whole: what the rows come from, for messages; name: the prompts' `source`.

    Errors: UserError, lazily: for a row when it is read, for an answer column that no row has, or from which nothing
    can be extracted, at the end.
    """
    candidates: Iterable[_Candidate] = _candidates(rows, source, whole, name, counts)
    if source.shuffle_seed is not None:
        candidates = sampled(candidates, source.shuffle_seed, source.limit, lambda candidate: candidate.prompt)
    for candidate in candidates:
        counts.rows[name] += 1  # at once: a mixture may end before this source does
        if candidate.prompt.answer is None and source.answer is not None:
            counts.unanswered[name] += 1
            counts.first_unanswered.setdefault(name, candidate.where)
        if candidate.cut:
            counts.cut[name] += 1
        counts.unasked[name].update(candidate.unasked)
        if source.extract == "tests" and candidate.prompt.answer is not None:
            counts.note_function(name, candidate.where, candidate.prompt)
        yield candidate.prompt


def _candidates(
    rows: Iterator[Row], source: "FilePrompts | HubPrompts", whole: str, name: str, counts: PromptCounts
) -> Iterator[_Candidate]:
    """Rows as prompts: the first `limit`, or all where they are shuffled. Errors: UserError, at the
    end for an answer column that no row has or from which nothing is extracted."""
    read = answered = 0
    outside = counts.outside[name]
    answer_there = source.answer is None
    names: dict[str, None] = {}
    parts = _parts(source)
    first = source.limit if source.shuffle_seed is None else None
    for where, row in islice(_within(rows, source, name, counts), first):
        read += 1
        names |= dict.fromkeys(row)
        for column in required_columns(source):
            if not has_column(row, column):
                raise _no_column(source, column, row, where)
        answer_there = answer_there or has_column(row, source.answer or "")
        messages, cut = _messages(row, source, where)
        answer: str | None
        if source.options is not None:
            messages, answer = _with_options_of(row, source, where, messages)
        else:
            answer = _answer(row, source, where)
            if source.template is not None:
                messages = _templated(row, source, where, messages, ())
        answered += answer is not None
        if source.choices:
            messages, answer = _with_choices_of(row, source, where, messages, answer)
        unasked = tuple(column for column in parts if row.get(column))
        yield _Candidate(where, Prompt(messages, source.task, answer, name), cut, unasked)
    if not read and counts.outside[name] > outside:
        return  # one of several files may have nothing in the window; a note says so
    if not read:
        raise UserError(f"{whole}: no rows; give a source with at least one problem")
    if not answer_there and source.answer is not None:
        raise _no_column(source, source.answer, names, whole)
    if not answered and source.extract == "none" and source.answer is not None and source.answer not in names:
        raise UserError(
            f"{whole}: no row has a value at {source.answer}, inside column {source.answer.partition('.')[0]}; name "
            f"the right one under `prompts`, or set `answer: null` for problems without gold answers"
        )
    if not answered and source.extract != "none":
        raise UserError(
            f"{whole}: no row has {MARKS[source.extract]} in column {source.answer}; name the column that has one as "
            f"`answer`, or set another `extract`"
        )


def _within(rows: Iterator[Row], source: "FilePrompts | HubPrompts", name: str, counts: PromptCounts) -> Iterator[Row]:
    """The rows of the window; the others are counted. Errors: UserError for a row without a date, which might belong
    to it."""
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
        else:
            counts.outside[name] += 1


def _messages(
    row: dict[str, object], source: "FilePrompts | HubPrompts", where: str
) -> tuple[tuple[Message, ...], bool]:
    """The conversation that is asked, a system message first where there is one, and whether turns were cut off."""
    for column in MEDIA:
        if row.get(column) and column not in (source.question, source.answer, source.system, *source.choices):
            raise UserError(
                f"{where}: column {column} is not empty: teachers read text only; remove such rows, or the "
                f"column where it does not matter"
            )
    question, messages = value_at(row, source.question), list[Message]()
    system = value_at(row, source.system) if source.system else None
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": asked_text(system, source.system or "", where)})
    elif system is not None and not isinstance(system, str):
        raise UserError(f"{where}: column {source.system} is not text but {type(system).__name__}; correct the row")
    turns = turns_of(question)
    if turns is None:
        return (*messages, {"role": "user", "content": asked_text(question, source.question, where)}), False
    asked, cut = conversation(turns, source.question, where)
    return (*messages, *asked), cut > 0


def _answer(row: dict[str, object], source: "FilePrompts | HubPrompts", where: str) -> str | None:
    """The gold answer as text; None where it is missing. Errors: UserError."""
    if source.answer is None:
        return None
    try:
        return gold_of(value_at(row, source.answer), source.task, source.extract, row)
    except ValueError as error:
        raise UserError(f"{where}: column {source.answer} {error}; correct or remove the row") from error


def _with_options_of(
    row: dict[str, object], source: "FilePrompts | HubPrompts", where: str, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str]:
    """The question with its options, and the right one's letter. Errors: UserError."""
    assert source.options is not None and source.answer is not None
    try:
        options = options_of(row, source.options)
    except ValueError as error:
        raise UserError(f"{where}: {error}; correct or remove the row") from error
    labels = parsed(value_at(row, source.labels)) if source.labels else None
    try:
        answer = right_letter(value_at(row, source.answer), options, labels, source.answer_is)
    except ValueError as error:
        raise UserError(f"{where}: column {source.answer} {error}; correct or remove the row") from error
    return _templated(row, source, where, messages, options), answer


def _templated(
    row: dict[str, object],
    source: "FilePrompts | HubPrompts",
    where: str,
    messages: tuple[Message, ...],
    options: Sequence[str],
) -> tuple[Message, ...]:
    """The messages, the last with the source's template around its question. Errors: UserError."""

    *before, last = messages
    texts = {QUESTION: last["content"].strip(), OPTIONS: listed_options(options)}

    def text_of(name: str) -> str:
        if name in texts:
            return texts[name]
        value = value_at(row, name)
        if isinstance(lines := parsed(value), list) and lines and all(isinstance(line, str) for line in lines):
            return "\n".join(line.strip() for line in lines)
        if value is None or isinstance(value, list | dict):
            what = "empty" if value in (None, []) else f"a {type(value).__name__}"
            raise UserError(f"{where}: column {name} is {what}; the template needs its text")
        return str(value)

    text = filled(source.template or PLAIN, text_of)
    return (*before, {"role": last["role"], "content": text})


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
    if answer.strip() in (choice.strip() for choice in wrong):
        raise UserError(f"{where}: the right answer is among the wrong choices too; correct or remove the row")
    *before, question = messages
    text, letter = with_choices(question["content"], answer, wrong)
    return (*before, {"role": question["role"], "content": text}), letter


def _text_of_choice(value: object, column: str, where: str) -> str:
    if value is None or value == "" or isinstance(value, list | dict):
        what = "empty" if not value else f"a {type(value).__name__}"
        raise UserError(f"{where}: column {column} is {what}; a question with choices needs all of them")
    return str(value)
