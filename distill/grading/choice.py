"""Is this the right letter? The final answer of a question with choices, as a letter."""

import re

from distill.grading.math import FONT, Answer

Verdict = tuple[str, str]

LETTER = re.compile(r"\(?([A-J])\)?(?:[).:,]|\s|$)")


def letter(text: str) -> str | None:
    """The letter that an answer begins with, as in `(B)`, `\\text{B}` or `B) 4 mol`."""
    match = LETTER.match(FONT.sub(r"\1", text).replace("\\", "").strip("*$ "))
    return match[1] if match else None


def judge_choice(gold: str, answer: Answer) -> Verdict:
    """What is no marked answer can only be right."""
    given = letter(answer.text)
    if given == gold.strip().upper():
        return "correct", "same letter"
    if not answer.marked:
        return "unverifiable", "no marked answer"
    return ("wrong", "another letter") if given else ("unverifiable", "not a letter")
