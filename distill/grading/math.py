"""Is this the right number, expression, set, interval…? Find the final answer and compare it.

The answer is found by plain scanning, in linear time, so that it may run in the caller's process. Comparing is done by
math-verify and may never end, so `judge` is called only in a worker that can be killed (`distill.grading.pool`).

Only text that the answerer *marked* as its answer can be wrong. Marks, the strongest first, inside `<answer>…</answer>`
where there is one:

  boxed       the last `\\boxed{…}`, braces balanced; boxes joined by commas or "and" are one answer
  tag         the whole of `<answer>…`, closed or cut off
  hashes      GSM8K's `#### 42`
  stated      "the answer is …", "Answer: …"
  bare        a response that is one line and nothing but an expression

Without a mark the last line's last expression is compared: if it equals the gold answer the trace is correct,
otherwise it is unverifiable, because "42 dollars for 3 people" would make 3 a wrong answer. Rejected: math-verify's own
extraction over the whole response, which falls back on any number anywhere, and so turns "no answer" into "wrong".

Reasoning is never searched: a box inside `<think>` is not an answer.
"""

import re

from distill.grading.grade import Answer, Ruling, TaskGrader
from distill.prompts.boxes import boxed, hashes

# ---- finding


def final_answer(response: str) -> Answer | None:
    """Find the answer of a completion. Reasoning is not searched, whether its block is closed or not."""
    scope = response.rpartition("</think>")[2].partition("<think>")[0].strip()
    tagged = scope.rpartition("<answer>")[2].partition("</answer>")[0].strip() if "<answer>" in scope else ""
    scope = tagged or scope
    for method, text in (
        ("boxed", boxed(scope)),
        ("tag", _one_line(scope) if tagged else None),
        ("hashes", hashes(scope)),
        ("stated", _stated(scope)),
        ("bare", _one_line(scope) if not has_words(scope) else None),
        ("last line", scope.splitlines()[-1] if scope else None),
    ):
        if text and not (method != "boxed" and CUT_OFF_BOX.search(text)):
            return Answer(_trim(text), method)
    return None


def gold_answer(gold: str) -> str:
    """Extract the answer: data sets give it alone, in a box at the end of a solution, or after `####`."""
    return _trim(boxed(gold) or hashes(gold) or gold)


CUT_OFF_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")  # in a text without a whole one
STATED = re.compile(r"\banswer[*_]*(?:\s+is\b[\s:*]*|\s*[:=][\s*]*)", re.IGNORECASE)


def _stated(text: str) -> str | None:
    """The text after the last "answer is" or "answer:", up to the end of its sentence."""
    ends = [match.end() for match in STATED.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].partition("\n")[0]
    return re.split(r"[.!?]\**(?:\s|$)", line, maxsplit=1)[0]


def _one_line(text: str) -> str | None:
    return text if text and "\n" not in text and len(text) <= 200 else None


def _trim(text: str) -> str:
    """Remove white space, Markdown's asterisks, a full stop and one pair of math delimiters from the ends."""
    text = text.strip().strip("*").strip()
    text = re.sub(r"(?<!\\right)\.$", "", text).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            return inner.strip()
    return text


# ---- comparing

FONT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\{([^{}\\]*)\}")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\*?\}")
SPELLINGS = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,!;: ]|\\?\$"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (FONT, r"\1"),
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"(?<!\d)\s+|\s+(?!\d)"), ""),  # but "1 1/2" is not "11/2"
)
WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt)[A-Za-z]{4,}")  # fewer letters may be a product of variables
NUMBER_WITH_UNIT = re.compile(r"(?:\\?\$\s*)?(-?[\d,]*\.?\d+)(?:\s+[A-Za-z]{3,})+")
INTEGER = re.compile(r"[+-]?\d{1,1000}")
LOCAL_NUMBER = re.compile(r"-?(?:\d{1,3}(?: \d{3})+(?:[.,]\d+)?|\d+,\d+)")  # 1 000 or 1,22: also a list, to LaTeX
SCALE = re.compile(r"\b(?:hundred|thousand|million|billion|trillion|dozen|percent|half|quarter)", re.IGNORECASE)


def normalise(text: str) -> str:
    """Unify spellings without a meaning of their own: spacing, `\\left`, `\\dfrac`, `\\text{…}`, the minus sign."""
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def has_words(text: str) -> bool:
    """Whether the text has prose in it; words inside `\\text{…}` are part of the notation."""
    return bool(WORD.search(ENVIRONMENT.sub("", FONT.sub("", text))))


def without_unit(text: str) -> str:
    """Turn `42 dollars` into `42`; return anything else, `5 million` included, unchanged."""
    number = NUMBER_WITH_UNIT.fullmatch(text)
    return number[1] if number and not SCALE.search(text) else text


def quick_judge(gold: str, answer: Answer) -> Ruling | None:
    """Compare without a parser: identical strings, integers, and single words, which a parser takes for products."""
    expected, given = normalise(gold), normalise(answer.text)
    if expected == given:
        return "correct", "identical"
    if INTEGER.fullmatch(expected) and INTEGER.fullmatch(given):
        if int(expected) == int(given):
            return "correct", "equal"
        return ("wrong", "not equal") if answer.marked else None
    expected, given = (FONT.sub(r"\1", text).strip().casefold() for text in (gold, answer.text))
    if expected.isalpha() and given.isalpha() and has_words(expected) and has_words(given):
        if expected == given:
            return "correct", "same word"
        if sorted(expected) != sorted(given):  # else they may be one product after all
            return "wrong", "another word"
    return None


def judge(gold: str, answer: str, marked: bool) -> Ruling:
    """Compare by math-verify. Call it in a process that can be killed: neither time nor memory is bounded here."""
    from math_verify import verify

    gold, answer = without_unit(gold), without_unit(answer)
    words = has_words(answer)
    expected = _parsed(gold, loose=False)
    if not expected:
        return "unverifiable", "gold not parseable"
    given = _parsed(answer, loose=words or not marked)
    if given and verify(expected, given, timeout_seconds=None, raise_on_error=True):
        return "correct", "equal"
    if not marked:
        return "unverifiable", "no marked answer"
    if words or has_words(gold):
        return "unverifiable", "words, not mathematics"
    if not given:
        return "unverifiable", "answer not parseable"
    return "wrong", "not equal"


def _parsed(text: str, loose: bool) -> list[object]:
    """Parse with math-verify. loose: as prose with mathematics in it."""
    from math_verify import parse

    readings = [text] if loose else [_fenced(text), text] if LOCAL_NUMBER.fullmatch(text) else [_fenced(text)]
    items = [item for reading in readings for item in parse(reading, parsing_timeout=None)]
    return [item for item in items if not isinstance(item, str)]  # a string is text that was not parsed


def _fenced(text: str) -> str:
    """Put LaTeX into a box, as math-verify's extraction needs it, unless it has delimiters of its own."""
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if (dollars and dollars % 2 == 0) or re.search(r"\\[(\[]", text):
        return text
    return r"\boxed{" + re.sub(r"\\?\$", "", text) + "}"


class MathGrader(TaskGrader):
    """Numbers, expressions, sets and intervals, by the functions above."""

    def prepare(self) -> None:
        """Import sympy and fill its caches."""
        judge("1", "2", True)

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
        """Compare by math-verify; see `judge`."""
        return judge(gold, answer, marked)

    def reads_plainly(self, gold: str) -> bool | None:
        """True for an integer and for a single word; False for prose, of which only the same spelling is recognised."""
        text = without_unit(gold)
        word = FONT.sub(r"\1", text).strip()
        if INTEGER.fullmatch(normalise(text)) or (word.isalpha() and has_words(word)):
            return True
        return False if has_words(text) else None

    def reads(self, gold: str) -> bool:
        """Whether math-verify reads anything in it."""
        return bool(_parsed(without_unit(gold), loose=False))
