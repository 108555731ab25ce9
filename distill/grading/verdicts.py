"""What a judge says: its verdict, found in the text of its answer.

Judges are asked for one form and answer in others, so all that are in use are read, in four ranks. The first rank with
a verdict decides, because judges explain themselves: a verdict is followed by sentences about the response, which
mention its final answer, its result or its score.

    1. a JSON object
    2. a label with a colon, `Judgement: Yes` (also bold, in a heading, or with the verdict on the next line); `[[A]]`
    3. a line that is nothing but a verdict, at the beginning or the end; `the verdict is no` and `correct: yes`
    4. `\\boxed{No}`, `the final answer is correct`, `Result: pass`: words only, because a letter or a number there is
       as likely the response's answer

The reasoning of a judge that thinks is not searched: it weighs both verdicts.

A text without a verdict, or with two that differ, has none: guessing would be a statement about the answerer. Where the
last line is a verdict of the same rank it is the final one, whatever was said before. A verdict ends with its line or
with a mark, so that `Verdict: no doubt about it`, `Grade: A good answer` and `Grade: A-` are none. A label within
quotes is the response's, or the prompt's. A number has its sign, and ends as a number: `Score: 3-4`, `Score: 7,5`,
`Score: 80%` and `Score: >8` are none, and so is a score on another scale than that of `min_score` (`_score`).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from distill.prompts.boxes import boxed
from distill.prompts.prompt import END_THINK, THINK, outside_blocks

JUDGEMENT = "judge?ment|verdict|grade|decision|score|rating"  # names of a verdict, and of nothing else
QUALITY = "correct|correctness|equivalent"
OUTCOME = "final answer|result|correct|correctness|equivalent"  # said of the response as well

NUMBER = r"[-\u2212\u2013]?(?:\d+(?:\.\d+)?|\.\d+)"
OUT_OF = r"(?:[ \t]{0,4}(?:/|out of|of)[ \t]{0,4}\d+(?:\.\d+)?)?"
WORD = r"[A-Za-z]+(?:[ _][A-Za-z]+)?"
END = r"(?=[ \t]{0,80}(?:$|\n|[^\w\s/]))"  # not `Yes/No`, which repeats the question
WORD_END = r"(?![+\u2212]|-(?!-)|\|\w)"  # not `A-`, `Yes|No`; two hyphens are a dash
NUMBER_START = (  # not `>8`, but `<8>`
    r"(?:(?<![<>\u2264\u2265])(?<![<>\u2264\u2265][ =.\-\u2212\u2013])|(?<=<)(?=[^<>\n]{1,20}>))"
)
NUMBER_END = r"(?![-,.\u2212\u2013]\d)(?![ \t]?\\?%)"
TOKEN = rf"(?:{NUMBER_START}({NUMBER}{OUT_OF}){NUMBER_END}|({WORD}){WORD_END}){END}"
BOUND = re.compile(r"[\u2264\u2265]|[<>]=|<(?![^<>]*>)|>(?=[-\u2212\u2013.\d])")
GAP = r"[^\w\n]{0,8}?"  # lazy: the sign of a number is not part of it
SCALE = r"(?:[ \t]?[(\[][^()\[\]\n]{1,40}[)\]])?"  # such as (1-5) and (Yes/No)


def _label(names: str, separator: str) -> re.Pattern[str]:
    """A label and the verdict behind it, on the same line or the next."""
    return re.compile(
        rf"\b(?:{names})\b{SCALE}[^\w\n]{{0,6}}?{separator}{GAP}\n?{GAP}{TOKEN}", re.IGNORECASE | re.MULTILINE
    )


COLON = r"(?:is[ \t]?)?[:=\uFF1A]"
LABEL = _label(JUDGEMENT, COLON)
SENTENCE = _label(JUDGEMENT, r"is\b")
QUALITY_LABEL = _label(QUALITY, COLON)
OUTCOME_LABEL = _label(OUTCOME, rf"(?:is\b|{COLON})")
BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,40})\]\]")
FENCE = re.compile(r"```(?:json)?[ \t]{0,8}\n(.*?)```", re.DOTALL | re.IGNORECASE)
COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)[ \t]{0,8}\{([^{}]*)\}")
BOX = re.compile(r"\\(?:boxed|fbox)\{([^{}\n]{1,40})\}")
SCORE = re.compile(rf"({NUMBER})(?:[ \t]{{0,4}}(?:/|out of|of)[ \t]{{0,4}}(\d+(?:\.\d+)?))?")
TOP = re.compile(  # of a scale that a prompt names: `1-10`, `0 to 100`, `out of 5`
    r"(?:(?<=\d)[-\u2212\u2013]|/|\b(?:to|and|out of)[ \t])[ \t]{0,4}(\d+(?:\.\d+)?)(?![\w%]|\.\d)"
)
OTHER_SCALE = 10  # times `min_score`: a score or a maximum of so much belongs to another scale
QUOTES = ("'", '"', "`", "\u201c", "\u2018", "\u00ab", "\u201e", "\u300c")
LINE = 200  # characters of a line before and after a label, where quotes are looked for
MINUS = str.maketrans("\u2212\u2013", "--")
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
MARKUP = "*_`#>\"' \t!:()[]"
LONGEST = 200_000  # characters of an answer that are searched: a longer one does not end


class Words(NamedTuple):
    """How verdicts are spelled. accepted, rejected: in lower case. min_score: a number from it on is accepted; None
    where numbers are no verdicts. scale: the highest score; None where it is not known."""

    accepted: Sequence[str]
    rejected: Sequence[str]
    min_score: float | None = None
    scale: float | None = None


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
        first = _bare_text(next(iter(_lines(answer)), ""))
        match = LABEL.match(first) or SENTENCE.match(first) or QUALITY_LABEL.match(first)
        alone = first if match is None else _token(match) if not _bare_text(first[match.end() :]) else ""
        return _word(alone, words) or Reading(None, problem="the judge was cut off")
    answer = answer[-LONGEST:]
    plain = BOX.sub(r"\1", COMMAND.sub(r"\1", answer))
    for read in (_in_json, _labelled, _stated, _mentioned):
        if readings := read(plain if read in (_labelled, _stated) else answer, words):
            return _agreed(readings, "" if read is _in_json else plain, words)
    return Reading(None, problem="no verdict")


def _agreed(readings: list[Reading], answer: str, words: Words) -> Reading:
    """The verdict that all give; else that of the last line, if it is nothing but a word or has a label."""
    if len({reading.accepted for reading in readings}) == 1:
        return readings[-1]
    line = "".join(_lines(answer)[-1:])
    last = _labelled(line, words) or [reading for reading in _bare(line, words) if not _is_letter(reading)]
    if len({reading.accepted for reading in last}) == 1:
        return last[-1]
    return Reading(None, problem="contradictory verdicts")


def _labelled(text: str, words: Words) -> list[Reading]:
    """The verdicts behind labels, in the order of the text, and those in brackets."""
    return _readings((*_tokens(LABEL, text), *BRACKETS.findall(text)), words)


def _stated(text: str, words: Words) -> list[Reading]:
    """The verdicts that are lines of their own, and those of sentences about the judgement."""
    sentences = (*_tokens(SENTENCE, text), *_tokens(QUALITY_LABEL, text))
    return [*_readings(sentences, words), *_bare(text, words)]


def _mentioned(text: str, words: Words) -> list[Reading]:
    """The words in the last box and behind names of the response's outcome. Never a letter or a number."""
    if words.min_score is not None:
        return []
    content = COMMAND.sub(r"\1", boxed(text) or "")
    readings = _readings([content], words) or _readings(_tokens(OUTCOME_LABEL, text), words)
    return [reading for reading in readings if not _is_letter(reading)]


def _bare(text: str, words: Words) -> list[Reading]:
    """The first line and the last one, where they are nothing but a verdict."""
    lines = _lines(text)
    return _readings(dict.fromkeys((*lines[:1], *lines[-1:])), words)


def _tokens(label: re.Pattern[str], text: str) -> list[str]:
    return [_token(match) for match in label.finditer(text) if not _is_quoted(match)]


def _token(match: re.Match[str]) -> str:
    return match[1] or match[2]


def _is_quoted(match: re.Match[str]) -> bool:
    """Whether a label and its verdict are a quotation within a line: of the response, or of the judge's prompt."""
    text, start, end = match.string, match.start(), match.end()
    line_start = max(text.rfind("\n", max(0, start - LINE), start) + 1, start - LINE, 0)
    before, after = text[line_start:start], text[end : end + LINE].partition("\n")[0]
    if not _bare_text(before) and not _bare_text(after):
        return False  # a line of its own
    opened = any(before.count(mark) % 2 for mark in '"`') or before.count("\u201c") > before.count("\u201d")
    closed = any(mark in match[0] for mark in '"`\u201d')
    return not closed and (opened or before.rstrip("*_ ").endswith(QUOTES))


def _readings(tokens: Iterable[str], words: Words) -> list[Reading]:
    return [reading for token in tokens if (reading := _word(token, words)) is not None]


def _is_letter(reading: Reading) -> bool:
    return len(reading.said or "") == 1


def _in_json(text: str, words: Words) -> list[Reading]:
    """The verdicts in the last JSON object that is the answer, in a fence, or a line of it."""
    candidates = [text.strip(), *FENCE.findall(text), *(line for line in _lines(text) if line.startswith("{"))]
    for candidate in reversed(candidates):
        if not candidate.strip().startswith("{"):
            continue
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, Mapping) and (readings := _of_object(value, words)):
            return readings
    return []


def _of_object(value: Mapping[str, object], words: Words) -> list[Reading]:
    lowered = {str(key).lower(): item for key, item in value.items()}
    readings = (_of_value(lowered[key], words) for key in KEYS if key in lowered)
    return [reading for reading in readings if reading is not None]


def _of_value(item: object, words: Words) -> Reading | None:
    match item:
        case bool():
            return Reading(item, json.dumps(item)) if words.min_score is None else None
        case int() | float() if words.min_score is not None:
            return _score(float(item), None, str(item), words)
        case str() | int() | float():
            return _word(str(item), words)
    return None


def _word(token: str, words: Words) -> Reading | None:
    """The verdict that a token is; None where it is none."""
    said = " ".join(_bare_text(token).replace("_", " ").split())
    if words.min_score is not None:
        number = None if BOUND.match(token.strip()) else SCORE.fullmatch(said)
        top = float(number[2]) if number and number[2] else None
        return _score(float(number[1].translate(MINUS)), top, said, words) if number else None
    if len(said) == 1 and said.islower():
        return None  # the article, not the letter
    for accepted, spellings in ((True, words.accepted), (False, words.rejected)):
        if said.lower() in {spelling.lower().replace("_", " ") for spelling in spellings}:
            return Reading(accepted, said)
    return None


def _score(number: float, top: float | None, said: str, words: Words) -> Reading | None:
    """The verdict of a number; None where it is on another scale than `min_score`. top: the M of `N/M`."""
    least = words.min_score
    if least is None or not math.isfinite(number) or (top is not None and number > top):
        return None
    if words.scale is not None:
        differs = number > words.scale or top not in (None, words.scale)
    else:
        differs = (top is not None and top < least) or max(number, top or number) >= OTHER_SCALE * least > 0
    return None if differs else Reading(number >= least, said)


def scale_of(prompt: str, min_score: float | None) -> float | None:
    """The highest score that a judge's prompt names; None where it names none that suits `min_score`, or several."""
    if min_score is None or min_score <= 0:
        return None
    tops = {float(top) for top in TOP.findall(prompt)}
    tops = {top for top in tops if min_score <= top < OTHER_SCALE * min_score}
    return tops.pop() if len(tops) == 1 else None


def _bare_text(line: str) -> str:
    """A line without markup and the dot at its end. A dot at the beginning is part of a number."""
    return line.strip(MARKUP).rstrip(MARKUP + ".")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
