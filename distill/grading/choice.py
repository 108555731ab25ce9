"""Is this the right letter? The final answer of a question with choices.

A mark counts where it names exactly one choice: `\\boxed{B}`, "Answer: (b)", `B) 4 mol`, "Option D". The last such mark
is the answer, so an equation in a box before "The answer is (A)" does not hide it. A mark that names several choices
("A or C"), or only may name one (the article in "A stable cation", the pronoun in "I cannot tell"), is unverifiable.
"""

import re

from distill.grading.grade import Answer, Ruling, TaskGrader
from distill.grading.math import FONT, gold_answer
from distill.grading.math.extraction import scope_of
from distill.prompts.boxes import boxed, last_box_end

NAMED = r"(?:(?:the\s+)?(?:option|choice|answer)\s*:?\s*)?"
WHOLE = re.compile(rf"{NAMED}[\[({{]?\s*([A-Ja-j])\s*[\])}}]?\s*[.:,]?", re.IGNORECASE)
HEAD = re.compile(rf"{NAMED}(?:[\[(]\s*([A-Ja-j])\s*[\])]|([A-J])\s*[).:](?!\w))\s*\S.*", re.IGNORECASE | re.DOTALL)
REMARKED = re.compile(  # "C because D is wrong", "C - 4 mol", "C (4 mol)", "C only"
    r"([A-J])(?:,?\s+(?:because|since|only)\b.*|\s+[-\N{EN DASH}\N{EM DASH}]\s+\S.*|\s*\([^()]{2,}\)\.?)", re.DOTALL
)
STATED = re.compile(
    r"\b(?:answers?|choice|option)[*_]*(?:\s+(?:is|are|would be|must be|should be)\b[*_]*[\s:]*|\s*[:=]\**\s*)"
    "|\u7b54\u6848[*_]*\\s*(?:\u662f|\u4e3a|:|\uff1a)+[*_\\s:\uff1a]*",
    re.IGNORECASE,
)
CHOSEN = re.compile(
    r"(?:I\s+(?:think|would\s+choose|choose|pick|would\s+say|believe)\s+(?:it\s+is|it's|that\s+it\s+is)?\s*)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"\n|(?<=[\w)*])[.!?]\**(?=\s|$)")
SEVERAL = re.compile(r"\(?\b[A-J]\b\)?\s*(?:,|/|&|\+|\bor\b|\band\b)\s*(?:and\s+|or\s+)?\(?\b[A-J]\b\)?")


class ChoiceGrader(TaskGrader):
    """Compares letters; needs no parser."""

    def gold(self, text: str) -> str:
        """The gold letter, as a data set gives it."""
        answer = gold_answer(text)
        return letter(answer) or answer

    def find(self, response: str) -> Answer | None:
        """The last mark that names one choice, else the last mark, else the last line."""
        scope, tagged = scope_of(response)
        if not scope:
            return None
        marks = list(_marks(scope, tagged))
        for answer in reversed(marks):
            if letter(answer.text) or SEVERAL.search(_plain(answer.text)):
                return answer
        return marks[-1] if marks else Answer(scope.splitlines()[-1].strip(), "last line")

    def shown(self, answer: Answer) -> str:
        """The letter, so that votes count letters; the text where it names none or several."""
        return letter(answer.text) or answer.text

    def rule(self, gold: str, answer: Answer) -> Ruling:
        """Compare two letters."""
        return judge_choice(gold, answer)

    def reads_plainly(self, gold: str) -> bool:
        """Whether the gold answer is a letter."""
        return re.fullmatch("[A-J]", gold.strip().upper()) is not None


def _marks(scope: str, tagged: bool) -> list[Answer]:
    """The marked answers of a response, in order."""
    marks = [(0, Answer(scope, "tag"))] if tagged and len(scope) <= 200 else []
    if (box := boxed(scope)) is not None:
        marks.append((last_box_end(scope), Answer(box, "boxed")))
    for match in STATED.finditer(scope):
        text = SENTENCE_END.split(scope[match.end() : match.end() + 400], maxsplit=1)[0]
        if text and r"\boxed" not in text:
            marks.append((match.end(), Answer(CHOSEN.sub("", text, count=1).strip(), "stated")))
    if not marks and len(scope) <= 200 and "\n" not in scope and letter(scope):
        marks.append((0, Answer(scope, "bare")))
    return [answer for _, answer in sorted(marks, key=lambda mark: mark[0])]


def _plain(text: str) -> str:
    """The text without fonts, delimiters and Markdown."""
    for _ in range(3):
        text = FONT.sub(r"\1", text)
    return re.sub(r"\\[()\[\],;: ]|\\(?:left|right)|[\\$*\"`]", " ", text).strip()


def letter(text: str) -> str | None:
    """The choice that an answer names, as in `(B)`, `\\text{b}`, "Option B" or `B) 4 mol`; None for none or several."""
    plain = _plain(text)
    if SEVERAL.search(plain):
        return None
    match = WHOLE.fullmatch(plain) or HEAD.fullmatch(plain) or REMARKED.fullmatch(plain)
    return next(group for group in match.groups() if group).upper() if match else None


def judge_choice(gold: str, answer: Answer) -> Ruling:
    """Compare an answer with the gold letter. An answer that is not marked as one can only be right."""
    given = letter(answer.text)
    if given == gold.strip().upper():
        return "correct", "same letter"
    if not answer.marked:
        return "unverifiable", "no marked answer"
    if given:
        return "wrong", "another letter"
    return "unverifiable", "several letters" if SEVERAL.search(_plain(answer.text)) else "not a letter"
