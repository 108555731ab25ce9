"""Is this the right letter? The final answer of a question with choices, as a letter."""

import re

from distill.grading.math import FONT, Answer

Verdict = tuple[str, str]

LETTER = re.compile(r"\(?([A-J])\)?(?:[).:,]|\s|$)")


def judge_choice(gold: str, answer: Answer) -> Verdict:
    """A letter with anything behind it, as in `(B)` or `B) 4 mol`. What is no marked answer can only be right."""
    text = FONT.sub(r"\1", answer.text).replace("\\", "").strip("*$ ")
    match = LETTER.match(text)
    if match and match[1] == gold.strip().upper():
        return "correct", "same letter"
    if not answer.marked:
        return "unverifiable", "no marked answer"
    return ("wrong", "another letter") if match else ("unverifiable", "not a letter")
