"""The gold answer in a row: as it stands, taken out of a solution, or as test cases of a program."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from distill.prompts.boxes import boxed, hashes
from distill.prompts.code_tests import tests_of
from distill.prompts.columns import parsed
from distill.prompts.messages import wrong_text

Extract = Literal["none", "hash", "boxed", "tests", "instructions"]

LETTERS = "ABCDEFGHIJ"
ARGUMENTS = "kwargs"  # IFEval's column with the arguments of its instructions


def gold_of(value: object, task: str, extract: Extract, row: Mapping[str, object]) -> str | None:
    """The gold answer in the value of a row's answer column; None where there is none.

    Errors: ValueError, the end of a sentence about the column.
    """
    if extract == "tests":
        return tests_of(value, row)
    if extract == "instructions":
        return instructions_of(value, row)
    text = gold_text(value, task)
    if text is None or extract == "none":
        return text
    return hashes(text) if extract == "hash" else boxed(text)


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
        if wrong := wrong_text(answer):
            raise ValueError(wrong)
        return answer if answer.strip() else None
    if answer is None:
        return None
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"is {answer}, not a finite number")
    return json.dumps(answer, ensure_ascii=False, default=str, allow_nan=False)


def instructions_of(ids: object, row: Mapping[str, object]) -> str | None:
    """The instructions of a prompt, as JSON text: a list of objects with the `id` and the arguments of each.

    None where there are none. ids: names, or such a list. row: for the column `kwargs`, whose arguments that are null
    are left out. Errors: ValueError, the end of a sentence about the column.
    """
    ids, arguments = parsed(ids), parsed(row.get(ARGUMENTS))
    if ids in (None, [], ""):
        return None
    if isinstance(ids, list) and all(isinstance(each, dict) and isinstance(each.get("id"), str) for each in ids):
        return json.dumps(ids, ensure_ascii=False)
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ValueError("is not a list of instruction ids")
    arguments = [parsed(each) for each in arguments] if isinstance(arguments, list) else arguments
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise ValueError(f"has {len(ids)} instruction ids, and column {ARGUMENTS} is not a list of as many objects")
    instructions = []
    for name, given in zip(ids, arguments, strict=True):
        if not isinstance(given, dict):
            raise ValueError(f"has instruction {name}, whose arguments in column {ARGUMENTS} are not an object")
        instructions.append({"id": name} | {key: value for key, value in sorted(given.items()) if value is not None})
    return json.dumps(instructions, ensure_ascii=False)


def with_choices(question: str, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The question with its choices listed, and the right one's letter.

    The order is that of a hash, so that it is the same everywhere and says nothing about the answer.
    """

    def rank(choice: str) -> bytes:
        return hashlib.sha256(json.dumps([question, choice]).encode()).digest()

    choices = sorted([right, *wrong], key=rank)
    listed = "\n".join(f"{letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question.strip()}\n\n{listed}", LETTERS[choices.index(right)]
