"""What a judge says: its verdict, found in the text of its answer.

Judges are asked for one form and answer in others, so all that are in use are read: `Judgement: Yes` (also bold, in a
heading, or with the verdict on the next line), `[[A]]`, a JSON object, `\\boxed{No}`, and a verdict that is a line of
its own at the beginning or the end. The reasoning of a judge that thinks is not searched: it weighs both verdicts.

A text without a verdict, or with two that differ, has none: guessing would be a statement about the answerer. Where the
last line states a verdict it is the final one, whatever was said before. A verdict ends with its line or with a mark,
so that `Verdict: no doubt about it` and `Grade: A good answer` are none.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from distill.prompts.boxes import boxed
from distill.prompts.prompt import END_THINK, THINK, outside_blocks

NAMES = "judge?ment|verdict|grade|decision|final answer|correct|correctness|equivalent|score|rating|result"
TOKEN = r"-?\d+(?:\.\d+)?(?:\s*/\s*\d+)?|[A-Za-z]+(?:[ _][A-Za-z]+)?"
END = r"(?=\s*(?:$|\n|[^\w\s/]))"  # not `Yes/No`, which repeats the question
LABEL = re.compile(
    rf"\b(?:{NAMES})\b[^\w\n]{{0,6}}?(?:is\b|:|\uFF1A|=)[^\w\n]{{0,8}}\n?[^\w\n-]{{0,8}}({TOKEN}){END}", re.IGNORECASE
)
BRACKETS = re.compile(r"\[\[\s*([^\[\]\n]{1,40}?)\s*\]\]")
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
KEYS = (
    "judgement",
    "judgment",
    "verdict",
    "grade",
    "decision",
    "correct",
    "is_correct",
    "equivalent",
    "score",
    "rating",
)
MARKUP = "*_`#>\"' \t.!:()[]"
LONGEST = 200_000  # characters of an answer that are searched: a longer one does not end


class Words(NamedTuple):
    """How verdicts are spelled. accepted, rejected: in lower case. min_score: a number from it on is accepted; None
    where numbers are no verdicts."""

    accepted: Sequence[str]
    rejected: Sequence[str]
    min_score: float | None = None


class Reading(NamedTuple):
    """accepted: the verdict, None where there is none. said: as the judge spelled it. problem: why there is none."""

    accepted: bool | None
    said: str | None = None
    problem: str | None = None


def read_verdict(text: str, words: Words, finished: bool = True) -> Reading:
    """The verdict in a judge's text. finished: whether it ended by itself, not at a token limit."""
    reasoning, closed, answer = text.partition(END_THINK)
    answer = outside_blocks(answer if closed else reasoning)
    if not closed and THINK in text:
        return Reading(None, problem="no verdict" if finished else "the judge was cut off")
    if not finished and not closed:  # it may be a reasoning without tags, which states verdicts that it then rejects
        first = next(iter(_lines(answer)), "").strip(MARKUP)
        match = LABEL.match(first)
        alone = first if match is None else match[1] if not first[match.end() :].strip(MARKUP) else ""
        return _word(alone, words) or Reading(None, problem="the judge was cut off")
    answer = answer[-LONGEST:]
    for readings in (_in_json(answer, words), _labelled(answer, words), _boxed(answer, words), _bare(answer, words)):
        if readings:
            return _agreed(readings, answer, words)
    return Reading(None, problem="no verdict")


def _agreed(readings: list[Reading], answer: str, words: Words) -> Reading:
    """The verdict that all give; else that of the last line."""
    if len({reading.accepted for reading in readings}) == 1:
        return readings[-1]
    last = list(_stated(_lines(answer)[-1], words))
    if len({reading.accepted for reading in last}) == 1:
        return last[-1]
    return Reading(None, problem="contradictory verdicts")


def _stated(line: str, words: Words) -> Iterator[Reading]:
    """The verdicts on a line: labelled, in brackets, or the line itself."""
    yield from _labelled(line, words) or _bare(line, words)


def _labelled(text: str, words: Words) -> list[Reading]:
    tokens = [match[1] for match in (*LABEL.finditer(text), *BRACKETS.finditer(text))]
    return [reading for token in tokens if (reading := _word(token, words)) is not None]


def _boxed(text: str, words: Words) -> list[Reading]:
    content = boxed(text)
    content = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", content) if content else ""
    reading = _word(content, words)
    return [] if reading is None else [reading]


def _bare(text: str, words: Words) -> list[Reading]:
    """The first line and the last one, where they are nothing but a verdict."""
    lines = _lines(text)
    readings = [_word(line.strip(MARKUP), words) for line in dict.fromkeys((*lines[:1], *lines[-1:]))]
    return [reading for reading in readings if reading is not None]


def _in_json(text: str, words: Words) -> list[Reading]:
    """The verdict in the last JSON object that is the answer, in a fence, or a line of it."""
    candidates = [text.strip(), *FENCE.findall(text), *(line for line in _lines(text) if line.startswith("{"))]
    for candidate in reversed(candidates):
        if not candidate.strip().startswith("{"):
            continue
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, Mapping) and (reading := _of_object(value, words)) is not None:
            return [reading]
    return []


def _of_object(value: Mapping[str, object], words: Words) -> Reading | None:
    lowered = {str(key).lower(): item for key, item in value.items()}
    for key in KEYS:
        item = lowered.get(key)
        if isinstance(item, bool):
            return None if words.min_score is not None else Reading(item, json.dumps(item))
        if isinstance(item, str | int | float) and (reading := _word(str(item), words)) is not None:
            return reading
    return None


def _word(token: str, words: Words) -> Reading | None:
    """The verdict that a token is; None where it is none."""
    said = " ".join(token.strip(MARKUP).replace("_", " ").split())
    number = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?", said)
    if words.min_score is not None:
        return Reading(float(number[1]) >= words.min_score, said) if number else None
    if len(said) == 1 and said.islower():
        return None  # the article, not the letter
    for accepted, spellings in ((True, words.accepted), (False, words.rejected)):
        if said.lower() in {spelling.lower().replace("_", " ") for spelling in spellings}:
            return Reading(accepted, said)
    return None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
