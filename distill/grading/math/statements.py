"""What a response states as its answer in words, and what it says about its answer afterwards.

"The answer is …" and "Answer: …" state an answer, unless the words before say that it is wrong, supposed or asked, or
that the sentence is about something else ("the last digit of the answer is 3"). A statement under a condition ("if n =
3, the answer is 7") is one of two possible answers where another one has none.

After the answer a response may give another one ("After rechecking, the answer is 5"), or take it back ("Wait, that is
wrong"). `afterthought` finds both. What follows and is no answer (an approximation, a special case, "the answer is
reasonable") says nothing.
"""

import re
from collections import deque
from typing import NamedTuple

from distill.grading.math.guesses import SENTENCE_END, guess
from distill.grading.math.spelling import ENVIRONMENT, normalise
from distill.grading.math.units import NUMBERS
from distill.prompts.boxes import boxed_end

STATED = re.compile(
    r"\banswers?[*_]*(?:\s+(?:is|are)\b[*_]*[\s:]*|\s*[:=]\**\s*)|^[ \t]*A:[ \t]*(?=\S)"
    "|\u7b54\u6848[*_]*\\s*(?:\u662f|\u4e3a|:|\uff1a)+[*_\\s:\uff1a]*",
    re.IGNORECASE | re.MULTILINE,
)
STATEMENTS = 64  # of a response, the last: models repeat themselves
POINT_B = re.compile(r"^[ \t]*B:", re.MULTILINE)  # an "A:" before it names a point or an option
BEFORE, LONGEST_SENTENCE = 40, 400  # characters before a statement that say what it is about
QUALITY = r"(?:(?:the|an?|my|our|correct|right|best|final|most|plausible)\W+){0,4}"
REJECTED = re.compile(
    rf"(?:\b(?:incorrect|wrong|false|other|another|not|neither|than|tempting|rejected|eliminated|remaining)|n't)[^\w.!?\n]+"
    rf"{QUALITY}$"
    rf"|\b(?:some|many|people|students|others?|one|you|might|may|could)\b[^.\n]{{0,20}}"
    rf"\b(?:think|say|guess|believe|assume|claim|expect|suspect)\W+(?:that\W+)?{QUALITY}$",
    re.IGNORECASE,
)
SUPPOSED = re.compile(
    rf"\b(?:if|unless|whether|suppos(?:e|ing)|assum(?:e|ing)|imagine|pretend|when)\W+(?:that\W+)?{QUALITY}$",
    re.IGNORECASE,
)
ABOUT = re.compile(  # of the answer, to check the answer
    r"\b(?:of|(?:re|double[- ])?check(?:ing)?|verify(?:ing)?|confirm(?:ing)?|test(?:ing)?)[^\w,]+"
    r"(?:(?:the|this|that|my|our|your|final)\W+){0,2}$",
    re.IGNORECASE,
)
CONDITIONAL = re.compile(rf"\b(?:if|unless)\b[^,]*,\s*(?:then\W+)?{QUALITY}$", re.IGNORECASE)
CONTRAST = re.compile(r"(?<!\s)\s*,\s*(?:and\s+|but\s+)?not\s[^,]*$")  # "5, not 6"
DISPLAY = re.compile(r"(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$)", re.DOTALL)
OPENING = re.compile(
    r"(?:\W|\b(?:so|thus|hence|therefore|then|and|the|my|our|final|correct|right|which|this|that|gives?|means|finally|in|"
    r"conclusion|summary|overall|is|we|have|get|find|wait|oops|actually|sorry|correction|corrected|revised|updated)\b)*",
    re.IGNORECASE,
)
TURN = r"(?:wait|oops|actually|sorry|hmm+|no|hold on|scratch that|correction|on second thought|rather)"
LINK = r"(?:but|and|oh|so|then)"
BE = r"(?:is|should be|must be|has to be|ought to be|would be|becomes)"
LATER = re.compile(
    rf"\b(?P<answer>answer|correction)[*_]*(?:\s+{BE}\b[*_]*[\s:]*|\s*[:=]\**\s*)"
    rf"|\b{TURN}\b[^.!?\n]{{0,40}}?\b(?:it|that|this)(?:['\u2019]s|\s+{BE})\b[*_]*\s*"
    r"|\bit\s+should(?:\s+(?:actually|really|instead))?\s+be\b\s*",
    re.IGNORECASE,
)
CLAUSE = re.compile(rf"(?:^|[,;:\u2014\u2013])\W*(?:\b(?:{TURN}|{LINK})\b\W*)*$", re.IGNORECASE)  # its beginning
THE_ANSWER = re.compile(  # the words before "answer", where it is the one asked for: not "the second answer"
    r"(?:^|[^\w\s]|\b(?:the|my|our|so|hence|thus|then|therefore))[^\w\n]*"
    r"(?:(?:final|correct|right|corrected|revised|updated|actual|true|real|new|proper)\W+)*$",
    re.IGNORECASE,
)
SPECIAL = re.compile(  # the words before a later statement that make it no answer to the question
    r"\b(?:for|if|when|where|with|without|assuming|suppose|given|general|unless|otherwise|similarly|case|part|question|"
    r"example|approximate(?:ly)?|decimal|rounded|rounding|numerical(?:ly)?|estimated?)\b",
    re.IGNORECASE,
)
APPROXIMATE = re.compile(r"\\approx|\\sim|\\simeq|\u2248|~|\b(?:about|around|approximately|roughly|approx|nearly)\b")
FIRST_WORDS = re.compile(r"\s*(?:(?:actually|really|in fact|instead|now|indeed|simply|just|therefore)[\s,:]+)*")
_MINE = r"(?:that|this|it|(?:the|my)(?: (?:above|previous|boxed|first|earlier|final|original))? answer(?: above)?)"
RETRACTED = re.compile(
    r"\A\W{0,6}(?:is|was) (?:actually )?(?:wrong|incorrect|impossible|not (?:right|correct|possible|the answer))\b"
    rf"|(?:(?:\A|(?<=[.!?\n]))\W{{0,8}}(?:{LINK}\W{{1,8}})?(?:\b{TURN}\W{{1,8}}){{0,3}}"
    rf"|(?<=[,;:\u2014\u2013-])\s{{0,3}}(?:{LINK}\s{{1,3}})?(?:{TURN}\W{{1,8}}){{1,3}})"
    rf"{_MINE}(?:(?: (?:is|was)|['\u2019]s)(?: actually)? (?:wrong|incorrect|not (?:right|correct))"
    r"| (?:is|was)n['\u2019]t (?:right|correct))(?![\w-])"
    r"|\bI (?:have )?(?:made|see|found|spotted) (?:a|an|my) (?:\w+ )?(?:mistake|error)\b"
    r"|\bI (?:misread|miscounted|miscalculated|misinterpreted|misunderstood)\b",
    re.IGNORECASE,
)


class Statement(NamedTuple):
    """A stated answer. begin, end: where its sentence names the answer, and where it ends. conditional: whether a
    condition precedes it."""

    text: str
    begin: int
    end: int
    conditional: bool = False


class Afterthought(NamedTuple):
    """What a response says after its answer. later: the last answer that it gives, spelled otherwise; "" for none.
    retracted: whether it takes the answer back, and gives none after that."""

    later: str = ""
    retracted: bool = False


def statements(text: str) -> list[Statement]:
    """The stated answers of a response, of its last `STATEMENTS`."""
    listed = max((match.start() for match in POINT_B.finditer(text)), default=-1)
    made = []
    for match in deque(STATED.finditer(text), STATEMENTS):
        if (match.start() < listed and match[0].lstrip()[:2] == "A:") or denied(text, match.start()):
            continue
        if ABOUT.search(text, max(0, match.start() - BEFORE), match.start()):
            continue
        content, end = _content(text, match.end())
        if content and not _asked(text, content, end):
            conditional = CONDITIONAL.search(sentence_before(text, match.start())) is not None
            made.append(Statement(content, match.start(), end, conditional))
    return made


def _content(text: str, start: int) -> tuple[str, int]:
    """What a statement states from `start` on: a display, a box, or the rest of its sentence; and where it ends."""
    if display := DISPLAY.match(text, start):
        return (display[1] or display[2] or "").strip(), display.end()
    if (box := boxed_end(text, start)) is not None:
        return text[start:box], box
    line = text[start : end if (end := text.find("\n", start)) >= 0 else len(text)]
    sentence = SENTENCE_END.split(line, maxsplit=1)[0]
    return CONTRAST.sub("", sentence), start + len(sentence)


def _asked(text: str, content: str, end: int) -> bool:
    return content.rstrip("*_ ").endswith("?") or text.startswith("?", end)


def sentence_before(text: str, place: int) -> str:
    """The beginning of the sentence that `place` is in."""
    return SENTENCE_END.split(text[max(0, place - LONGEST_SENTENCE) : place])[-1].rpartition("\n")[2]


def denied(text: str, place: int) -> bool:
    """Whether the words before a statement say that its answer is not the right one ("a common wrong answer is"), or
    only suppose it."""
    start = max(0, place - BEFORE)
    return REJECTED.search(text, start, place) is not None or SUPPOSED.search(text, start, place) is not None


def replaces(text: str, statement: Statement) -> bool:
    """Whether a statement after a box says the answer anew: a formula and no word, in a sentence that begins with the
    statement. "The answer is correct", "for n = 3 the answer is 6" and "the answer is about 3.14" do not."""
    if APPROXIMATE.search(statement.text):
        return False
    number = re.search(r"[\d\\=+*/^]|\bpi\b", statement.text) or len(trim(statement.text)) == 1
    opening = sentence_before(text, statement.begin)
    return bool(number) and is_formula(statement.text) and OPENING.fullmatch(opening) is not None


def afterthought(text: str, answer: str, end: int) -> Afterthought:
    """What a response says about its answer after `end`."""
    later, place = "", -1
    for match in deque(LATER.finditer(text, end), STATEMENTS):
        if given := _later(text, match):
            later, place = given, match.start()
    retraction = next(reversed(list(RETRACTED.finditer(text[end:]))), None)
    if retraction and end + retraction.start() > place:
        return Afterthought(retracted=True)
    return Afterthought("" if normalise(later) == normalise(answer) else later)


def _later(text: str, match: re.Match[str]) -> str:
    """The answer that a sentence after the answer gives; "" for none."""
    before = sentence_before(text, match.start())
    if denied(text, match.start()) or SPECIAL.search(before):
        return ""
    if match["answer"] is None:
        if CLAUSE.search(before) is None:
            return ""
    elif ABOUT.search(before) or not (THE_ANSWER.search(before) or match["answer"].lower() == "correction"):
        return ""
    content, end = _content(text, match.end())
    if len(content) > LONGEST_SENTENCE or _asked(text, content, end) or APPROXIMATE.search(content):
        return ""
    content = FIRST_WORDS.sub("", content, count=1)
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", ENVIRONMENT.sub("", content)))
    if not words or (len(words) == 1 and words[0].lower() in NUMBERS):
        number = re.search(r"[\d\\=+*/^]", content) or words or len(trim(content)) == 1
        return trim(content) if number else ""
    candidate = guess(content)
    return candidate if candidate and trim(content).lstrip("$\\([*").startswith(candidate.lstrip("$")) else ""


def is_formula(text: str) -> bool:
    """Return whether a stated text can replace a box: an expression, perhaps with a unit, without prose."""
    trimmed = trim(text)
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", ENVIRONMENT.sub("", trimmed)))
    return bool(trimmed) and len(trimmed) <= 200 and len(words) <= 1


def trim(text: str) -> str:
    """Remove white space, Markdown's asterisks, a full stop, quotes and one pair of math delimiters from the ends."""
    text = text.strip().strip("*").strip()
    text = re.sub(r"(?<!\\right)(?<!\.\.)\.$", "", text).strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`" and text.count(text[0]) == 2:
        text = text[1:-1].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner.strip() and opening not in inner:
            return inner.strip()
    return text
