"""Is this the right letter? The final answer of a question with choices, as a letter."""

import re

from distill.grading.grade import Answer, Ruling, TaskGrader
from distill.grading.math import FONT, final_answer, gold_answer

LETTER = re.compile(r"\(?([A-J])\)?(?:[).:,]|\s|$)")


class ChoiceGrader(TaskGrader):
    """Compares letters; needs no parser."""

    def gold(self, text: str) -> str:
        """The gold letter, as a data set gives it."""
        return gold_answer(text)

    def find(self, response: str) -> Answer | None:
        """Find the final answer as a mathematical one is found."""
        return final_answer(response)

    def shown(self, answer: Answer) -> str:
        """The letter, so that votes count letters; the text where it holds none."""
        return letter(answer.text) or answer.text

    def rule(self, gold: str, answer: Answer) -> Ruling:
        """Compare two letters."""
        return judge_choice(gold, answer)

    def reads_plainly(self, gold: str) -> bool:
        """Whether the gold answer is a letter."""
        return re.fullmatch("[A-J]", gold.strip().upper()) is not None


def letter(text: str) -> str | None:
    """The letter that an answer begins with, as in `(B)`, `\\text{B}` or `B) 4 mol`."""
    match = LETTER.match(FONT.sub(r"\1", text).replace("\\", "").strip("*$ "))
    return match[1] if match else None


def judge_choice(gold: str, answer: Answer) -> Ruling:
    """Compare an answer with the gold letter. An answer that is not marked as one can only be right."""
    given = letter(answer.text)
    if given == gold.strip().upper():
        return "correct", "same letter"
    if not answer.marked:
        return "unverifiable", "no marked answer"
    return ("wrong", "another letter") if given else ("unverifiable", "not a letter")
