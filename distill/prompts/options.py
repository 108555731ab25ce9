"""Questions with options: the columns that hold them, the letter of the right one, and the text that is asked.

Data sets publish the options of a question in three forms, all read here: a list in one column (MMLU, MMLU-Pro), a list
with a list of labels beside it (ARC), a column for each option (C-Eval). The right option is published as its letter,
its label, its index from 0, or its text. A number that is both an index and the text of an option, as a CSV file may
hold, has two meanings: such a row is refused. The options keep the order in which they are published, so that scores
can be compared with others' scores; only `choices`, whose right option comes first or last, is shuffled
(`golds.with_choices`).
"""

import re
from collections.abc import Mapping, Sequence

from distill.prompts.columns import parsed, value_at
from distill.prompts.golds import LETTERS

PLAIN = "{{question}}\n\n{{options}}"


def options_of(row: Mapping[str, object], columns: str | Sequence[str]) -> list[str]:
    """The options of a row. columns: one column with all of them, or one for each.

    Errors: ValueError, the end of a sentence about the row.
    """
    if isinstance(columns, str):
        values = parsed(value_at(row, columns))
        if not isinstance(values, list):
            raise ValueError(f"column {columns} is {_kind(values)}, not a list of options")
    else:
        values = [value_at(row, column) for column in columns]
    if not 2 <= len(values) <= len(LETTERS):
        raise ValueError(f"the number of options is {len(values)}; a question has 2 to {len(LETTERS)}")
    for number, value in enumerate(values):
        if value is None or isinstance(value, list | dict):
            raise ValueError(f"option {LETTERS[number]} is {_kind(value)}, not text")
    return [str(value).strip() for value in values]


def right_letter(answer: object, options: Sequence[str], labels: object) -> str:
    """The letter of the right option. labels: published beside the options, None without any.

    Errors: ValueError, the end of a sentence about the answer.
    """
    if labels is not None:
        names = [str(label).strip() for label in labels] if isinstance(labels, list) else []
        if len(names) != len(options) or len(set(names)) != len(names):
            raise ValueError(f"has {len(options)} options, and its labels are not as many different ones")
        if str(answer).strip() not in names:
            raise ValueError(f"is {answer!r}, which is none of the labels {', '.join(names)}")
        return LETTERS[names.index(str(answer).strip())]
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise ValueError(f"is {_kind(answer)}, neither the letter, the index nor the text of an option")
    if isinstance(answer, int):
        if not 0 <= answer < len(options):
            raise ValueError(f"is {answer}, and the {len(options)} options have the indices 0 to {len(options) - 1}")
        return LETTERS[answer]
    return _letter_of_text(answer.strip(), options)


def _letter_of_text(answer: str, options: Sequence[str]) -> str:
    letters = LETTERS[: len(options)]
    meanings = {letters[number] for number, option in enumerate(options) if option == answer}
    if re.fullmatch(rf"\(?[{letters}]\)?", answer):
        meanings.add(answer.strip("()"))
    if answer.isascii() and answer.isdecimal() and int(answer) < len(options):
        meanings.add(letters[int(answer)])
    if len(meanings) != 1:
        what = "may mean several options" if meanings else "is no option"
        raise ValueError(
            f"is {answer[:40]!r}, which {what}: expected a letter from A to {letters[-1]}, an index or an option's text"
        )
    return meanings.pop()


def listed_options(options: Sequence[str]) -> str:
    """The options, a line each, with their letters."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
