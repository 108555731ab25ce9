"""Is this the right number, expression, set or interval? Find the final answer, read all of it, compare it exactly.

An answer that is not read completely, or whose equality is not decided exactly, is *unverifiable*: neither correct nor
wrong.

  extraction   finds the answer in a response; linear time, in the caller's process
  statements   answers stated in words, and what follows an answer
  guesses      the last formula or number of prose
  spelling     compares spellings without a parser
  notation, lexer               rewrite notations of whole answers; text → tokens
  expressions, operators, environments, quantities, lists, reader, reading
                                tokens → `values`, or `Unreadable`; never a part of the text
  regions, units                inequalities as sets; units with exact factors
  equality, scalars, relations, comparison
                                expressions and answers: equal, different, or not decided

Everything after extraction may take unbounded time (sympy simplifies) and runs in a worker that can be killed
(`distill.grading.pool`).

Why a reader of our own and not math-verify, which this grader used before: math-verify parses the longest fragment that
it finds (`x \\equiv 3 \\pmod 7` equals `x \\equiv 5 \\pmod 7`, `mgh` equals `mg`), compares sets without multiplicity
and numbers to six decimals, and drops units and bases. On 301 collected cases it graded 38 wrong answers correct, and
no option of it reports what it ignored. sympy, on which it is based, does the algebra here too.
"""

import re
from collections.abc import Iterator
from itertools import product

from distill.grading.grade import TAKEN_BACK, Answer, Ruling, TaskGrader
from distill.grading.math.comparison import equal
from distill.grading.math.extraction import final_answer, gold_answer
from distill.grading.math.guesses import guess
from distill.grading.math.lexer import FUNCTIONS
from distill.grading.math.reading import readings, with_decimal_points
from distill.grading.math.spelling import FONT, has_words, normalise
from distill.grading.math.values import Unreadable, Value, Words

INTEGER = re.compile(r"[+-]?\d{1,1000}")
SHORT = re.compile(r"(?<=[\w)}])\s+([A-Za-z]{2,3})(?=\s+[A-Za-z]|\W*$)")  # of "5 men", "5 hot dogs", "5 kN"
PROSE = 4  # words: a longer gold answer is prose, and only the same spelling of it is recognised

__all__ = ["FONT", "MathGrader", "final_answer", "gold_answer", "has_words", "judge", "normalise", "quick_judge"]


def quick_judge(gold: str, answer: Answer) -> Ruling | None:
    """Compare without a parser: identical strings, and integers."""
    if answer.method == TAKEN_BACK:
        return "unverifiable", TAKEN_BACK
    if not answer.marked:
        return None
    expected, given = normalise(gold), normalise(answer.text)
    if expected == given:
        return "correct", "identical"
    if INTEGER.fullmatch(expected) and INTEGER.fullmatch(given):
        return ("correct", "equal") if int(expected) == int(given) else ("wrong", "not equal")
    return None


def judge(gold: str, answer: str, marked: bool) -> Ruling:
    """Read both answers and compare them. Neither time nor memory is bounded here: call it in a worker process."""
    try:
        expected = readings(gold)
    except Unreadable as error:
        return "unverifiable", f"gold not read: {error}"
    if not marked:
        return _judge_guess(expected, answer)
    try:
        given = readings(answer)
    except Unreadable as error:
        return "unverifiable", f"answer not read: {error}"
    if any(isinstance(value, Words) for value in expected + given):
        expected, given = expected + spelled(gold), given + spelled(answer)
    verdicts = [equal(one, other) for one in expected for other in given]
    if True in verdicts:
        return "correct", "equal"
    if None in verdicts:
        words = any(isinstance(value, Words) for value in expected + given)
        return "unverifiable", "words, not mathematics" if words else "equality not decided"
    if any(equal(one, other) is not False for one, other in _otherwise(gold, answer, expected, given)):
        return "unverifiable", "equality not decided"
    return "wrong", "not equal"


def _otherwise(gold: str, answer: str, expected: list[Value], given: list[Value]) -> Iterator[tuple[Value, Value]]:
    """The pairs of less likely readings: two or three letters after a number are a word or unit and no product of
    variables ("5 men", "5 kN"), and the comma of "x = 1,5" is a decimal one."""
    golds, answers = (
        [] if text == plain else _read(text) for text, plain in ((_spelt(gold), gold), (_spelt(answer), answer))
    )
    yield from product(golds, given)
    yield from product(expected, answers)
    yield from product(golds, answers)


def _spelt(text: str) -> str:
    text = SHORT.sub(lambda match: match[0] if match[1] in FUNCTIONS else rf" \text{{{match[1]}}}", text)
    return with_decimal_points(text)


def spelled(text: str) -> list[Value]:
    """The word that a short text may be besides a product of variables: "yes", "odd"."""
    word = FONT.sub(r"\1", text).strip()
    return [Words(word.casefold())] if word.isalpha() and 2 <= len(word) <= 3 else []


def _judge_guess(expected: list[Value], line: str) -> Ruling:
    """Compare the last formula or number of a line that is not marked as the answer, or all of the line: correct or
    unverifiable. A formula that is not read counts by its last side: `\\text{Cost of 3} = 42`."""
    candidate = guess(line)
    given = [] if candidate is None else _read(candidate) or _read(candidate.rpartition("=")[2])
    if any(equal(one, other) for one in expected for other in given + _read(line)):
        return "correct", "equal"
    return "unverifiable", "no marked answer"


def _read(text: str) -> list[Value]:
    """The readings of a text; none where it is not read."""
    try:
        return readings(text)
    except Unreadable:
        return []


class MathGrader(TaskGrader):
    """Numbers, expressions, sets and intervals, by the functions above."""

    version = 4  # answers taken back or followed by another one; lists, inequalities, scales, commas, notations
    packages = ("sympy",)

    def prepare(self) -> None:
        """Import sympy and fill its caches."""
        judge("1", r"\frac{2}{3}", True)

    def gold(self, text: str) -> str:
        """The answer itself; see `gold_answer`."""
        return gold_answer(text)

    def find(self, response: str) -> Answer | None:
        """The final answer; see `final_answer`."""
        return final_answer(response)

    def rule(self, gold: str, answer: Answer) -> Ruling | None:
        """Compare by spelling; see `quick_judge`."""
        return quick_judge(gold, answer)

    def compare(self, gold: str, answer: str, marked: bool) -> Ruling:
        """Compare by reading; see `judge`."""
        return judge(gold, answer, marked)

    def reads_plainly(self, gold: str) -> bool | None:
        """True for an integer; a parser decides about everything else."""
        return True if INTEGER.fullmatch(normalise(gold)) else None

    def reads(self, gold: str) -> bool:
        """Whether all of it is read, as mathematics or as a few words."""
        try:
            values = readings(gold)
        except Unreadable:
            return False
        return not any(isinstance(value, Words) and len(value.text.split()) >= PROSE for value in values)
