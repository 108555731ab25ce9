"""Repetition: loops of characters, phrases or paragraphs, R1-Zero's other flaw, which a student learns at once.

A loop repeats the words that stand one period before it. Its period is among the most frequent distances between two
occurrences of the same few words; for each such distance the longest run of words that equal those one period before
is measured, in linear time and for any period. A phrase must come at least `PHRASES` times in a row (a longer one
`LONG_PHRASES` times) and fill `SPAN` words, so that a list of like items, or "wait, wait, wait", is none. Runs without
words (`2 × 2 × 2 ×`, the same formula on every line, rows of a table) are legitimate mathematics and must be longer.

Paragraphs may also come back at intervals, in an endless cycle of doubts: the same line at least `LINES` times, which
together have `LINE_SPAN` words. Twice is no loop: an answer repeats its reasoning. Code in closed fences may repeat its
lines, and lists their values (`False, False,`); only a loop of `SYMBOLS` words counts there.

Rejected: the share of repeated n-grams, as web corpora are filtered: mathematical reasoning repeats its terms, and no
threshold separates the two; the ratio of compression, for the same reason, and it names no evidence.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from distill.filters.base import OK, Candidate, Example, TraceFilter
from distill.filters.words import FENCE, UNSPACED, words_of
from distill.traces.trace import Verdict

GRAM = 3  # words by which an earlier occurrence is recognised
DISTANCES = 16  # frequent distances that are tried as periods
PHRASES, LONG_PHRASES = 4, 3  # repetitions in a row, of any phrase and of one of at least LONG words
LONG = 8
SPAN, EQUATIONS, SUMS, SYMBOLS = 20, 40, 100, 200  # words that a loop fills: of words, equations, a sum, other symbols
TABLES = 400  # of the rows of a table
LINES, LINE_SPAN = (
    3,
    150,
)  # occurrences of a line or paragraph, and words of all of them: the cases of a proof are alike
OPERATORS = frozenset(("+", "-", "*", "×", "·", r"\times", r"\cdot"))
LINE = "So the tens are added first and then the ones, and the carry goes to the tens, which gives the sum of both."
CODE = re.compile(rf"{FENCE}.*?^[ \t]*\1", re.DOTALL | re.MULTILINE)  # closed: lines of a program may be equal
CHARACTERS = re.compile(r"(\S{1,12}?)\1{23,}")  # 24 times without white space
UNBROKEN = re.compile(r"\S{24,}")  # the only places where that may be: most words are shorter
RULE = re.compile(r"[-=_*#.~|+:\u2500-\u257f]+\Z")  # lines of a table and the like are decoration
DIGITS, SUM = 100, 400  # characters of a run of digits or signs, or of one letter; of a sum without spaces
LETTERS = re.compile(rf"(?<![\\\w])[^\W\d_]{{2,}}|{UNSPACED}")  # words; LaTeX commands are none
VALUES = re.compile(r"\b(?:[Tt]rue|[Ff]alse|None|null|nan|NaN)\b")  # of a list in a program: no words


class Loop(NamedTuple):
    """What is repeated. unit: one period. times: how often it comes. span: words, or characters, of all of them."""

    reason: str
    unit: str
    times: int
    span: int


class Repetition(TraceFilter):
    """Drop traces that loop: a character or syllable, a phrase, or whole paragraphs over and over."""

    name = "repetition"
    version = 2  # fences that are indented or of tildes, lists of values
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "no loop",
        "characters": "a few characters over and over, without white space",
        "phrase": "the same words several times in a row",
        "paragraph": "the same line or paragraph again and again",
    }
    examples = (
        Example(OK, "<think>\n20 + 22 = 42\n</think>\nThe answer is \\boxed{42}."),
        Example(
            OK, "<think>\nWait, wait, wait. 2 × 2 × 2 × 2 × 2 × 2 × 2 × 2 = 256 and 1/3 = 0.33333333333333333333\n"
        ),
        Example(OK, "| a | b |\n|" + "-" * 80 + "|\n" + "| 1 | 0 |\n" * 12),
        Example("characters", "<think>\nSo the answer is " + "4" * 200),
        Example("characters", "<think>\nSo the answer is ha" + "ha" * 30 + "\n</think>\n42"),
        Example("characters", "<think>\n" + "!" * 120),
        Example("phrase", "<think>\nThe sum is 42. " + "Let me check that again. " * 5 + "\n</think>\n42"),
        Example("phrase", "<think>\n" + "wait " * 30 + "\n</think>\n42"),
        Example("phrase", "<think>\n" + "我需要再检查一下。" * 6 + "\n</think>\n42"),
        Example(
            "paragraph",
            "<think>\n" + "\n".join(f"{LINE}\n{n}" for n in ("No.", "Hm.", "But wait.", "Or?", "So.", "Ah.", "Well.")),
        ),
    )

    def judge(self, candidate: Candidate) -> Verdict:
        """Look for the first loop. The evidence has what is repeated, how often, and the length of all of it."""
        text = candidate.trace.text
        loop = next(_loops(text), None)
        if loop is None:
            return self.verdict(OK)
        return self.verdict(loop.reason, unit=loop.unit[:120], times=loop.times, span=loop.span)


def _loops(text: str) -> Iterator[Loop]:
    yield from _characters(text)
    code = [match[0] for match in CODE.finditer(text)]
    prose = CODE.sub("\n", text) if code else text
    yield from _phrases(prose)
    yield from _paragraphs(prose)
    for block in code:
        yield from _phrases(block, SYMBOLS)


def _characters(text: str) -> Iterator[Loop]:
    for match in (match for part in UNBROKEN.finditer(text) for match in CHARACTERS.finditer(part[0])):
        run, unit = match[0], match[1]
        values = VALUES.search(unit) is not None
        is_plain = len(unit) == 1 or values or not LETTERS.search(unit * 2)
        if RULE.fullmatch(unit) or (is_plain and len(run) < (SUM if values or OPERATORS & {*unit} else DIGITS)):
            continue
        yield Loop("characters", unit, len(run) // len(unit), len(run))


def _phrases(text: str, shortest: int = SPAN) -> Iterator[Loop]:
    words = words_of(text)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    ids = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
    for period, count in _frequent_distances(ids, len(numbers)):
        if count + GRAM + period < SPAN:
            continue
        start, length = _longest_run(ids[period:] == ids[:-period])
        span, unit = length + period, words[start : start + period]
        least = max(shortest, _least_span(unit))
        times = LONG_PHRASES if period >= LONG else PHRASES
        if span >= period * times and span >= least:
            yield Loop("phrase", " ".join(unit), span // period, span)


def _least_span(unit: list[str]) -> int:
    """The number of words that a loop of this unit fills at least: legitimate repetitions are shorter."""
    if "|" in unit:
        return TABLES
    if "=" not in unit and not OPERATORS.isdisjoint(unit):
        return SUMS if LETTERS.search(" ".join(unit)) else SYMBOLS
    if LETTERS.search(VALUES.sub("", " ".join(unit))):
        return SPAN
    return EQUATIONS if "=" in unit and len(unit) > GRAM else SYMBOLS


def _frequent_distances(ids: npt.NDArray[np.int64], vocabulary: int) -> Iterator[tuple[int, int]]:
    """Distances between an occurrence of a gram and the previous one, with their numbers: the most frequent first, and
    of equally frequent ones the one that comes first. ids: of words, each below `vocabulary`."""
    if len(ids) <= GRAM:
        return
    grams = np.zeros(len(ids) - GRAM + 1, np.int64)
    for offset in range(GRAM):
        grams = grams * vocabulary + ids[offset : offset + len(grams)]
    order = np.argsort(grams, kind="stable")
    again = np.flatnonzero(grams[order][1:] == grams[order][:-1])
    places, earlier = order[again + 1], order[again]
    distances = (places - earlier)[np.argsort(places)]
    values, first, counts = np.unique(distances, return_index=True, return_counts=True)
    for place in np.lexsort((first, -counts))[:DISTANCES]:
        yield int(values[place]), int(counts[place])


def _longest_run(equal: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Start and length of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.astype(np.int8), [0]))))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(starts[longest]), int(lengths[longest])


def _paragraphs(text: str) -> Iterator[Loop]:
    lines = Counter(" ".join(line.split()) for line in text.splitlines())
    for line, times in lines.items():
        span = times * len(line.split())
        if times >= LINES and span >= LINE_SPAN and len(LETTERS.findall(line)) > GRAM:
            yield Loop("paragraph", line, times, span)
