"""Questions with options: the columns that hold them, the letter of the right one, and the text that is asked.

Data sets publish the options of a question in these forms: a list in one column (MMLU, MMLU-Pro), an object with their
letters (MedQA), a list with a list of labels beside it (ARC), a column for each option (C-Eval). The right option is
published as its letter, its label, its index from 0, or its text. A number that is both an index and the text of an
option, as a CSV file may hold, and a letter that is also an option's text have two meanings: such a row is refused,
unless the source says what its answer column has (`answer_is`). The options keep the order in which they are published,
so that scores can be compared with others' scores; only `choices`, whose right option comes first or last, is shuffled
(`golds.with_choices`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from distill.prompts.columns import parsed, value_at
from distill.prompts.golds import LETTERS

Form = Literal["letter", "index", "text"]
PLAIN = "{{question}}\n\n{{options}}"


def options_of(row: Mapping[str, object], columns: str | Sequence[str]) -> list[str]:
    """The options of a row. columns: one column with all of them, or one for each.

    Errors: ValueError, the end of a sentence about the row.
    """
    if isinstance(columns, str):
        values = _in_order(parsed(value_at(row, columns)))
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


def _in_order(values: object) -> object:
    """The options of an object by their letters, as a list; any other value as it is. A null after the last is none:
    Arrow gives every row all keys that one has."""
    if not isinstance(values, dict):
        return values
    letters = {str(key).strip().upper(): value for key, value in values.items()}
    present = [letter for letter in sorted(letters) if letters[letter] is not None]
    if len(letters) != len(values) or "".join(present) != LETTERS[: len(present)]:
        return values
    return [letters[letter] for letter in present]


def right_letter(answer: object, options: Sequence[str], labels: object, form: Form | None = None) -> str:
    """The letter of the right option. labels: published beside the options, None without any. form: of the answer;
    None: any that only one option fits.

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
    if isinstance(answer, int) and form is None:
        form = "index"
    meanings = {LETTERS[number] for each, number in _meanings(str(answer).strip(), options) if form in (each, None)}
    if len(meanings) == 1:
        return meanings.pop()
    if isinstance(answer, int) and form == "index":
        raise ValueError(f"is {answer}, and the {len(options)} options have the indices 0 to {len(options) - 1}")
    shown, last = repr(str(answer).strip()[:40]), LETTERS[len(options) - 1]
    if meanings and form is None:
        raise ValueError(
            f"is {shown}, which may mean several options: say what the column has with `answer_is: letter`, "
            f"`answer_is: index` or `answer_is: text`"
        )
    if meanings:
        raise ValueError(f"is {shown}, the text of several options")
    wanted = {"letter": f"a letter from A to {last}", "index": "an index from 0", "text": "an option's text"}
    expected = wanted[form] if form else f"{wanted['letter']}, an index or an option's text"
    raise ValueError(f"is {shown}, which is no option: expected {expected}")


def _meanings(answer: str, options: Sequence[str]) -> Iterator[tuple[Form, int]]:
    """The options that an answer may mean, by their numbers, and as what."""
    letters = LETTERS[: len(options)]
    yield from (("text", number) for number, option in enumerate(options) if option == answer)
    if re.fullmatch(rf"\(?[{letters}]\)?", answer):
        yield "letter", letters.index(answer.strip("()"))
    elif answer not in options and re.fullmatch(rf"\(?[{letters}][).:]?", answer.upper()):
        yield "letter", letters.index(answer.upper().strip("().:"))
    if answer.isascii() and answer.isdecimal() and int(answer) < len(options):
        yield "index", int(answer)


def listed_options(options: Sequence[str]) -> str:
    """The options, a line each, with their letters."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
