"""The last formula or number of prose: a guess at the answer of a response that marks none.

A guess that equals the gold answer is graded correct, so only a formula or number that stands alone counts: it is no
part of a larger expression ("3:7", "2^7", "{3, 7}"), of a list ("3 and 7"), of a comparison ("more than 7") or of a
condition ("for n = 7"), no scale or bound follows it ("7 million", "7 or more"), and its sentence does not deny it ("7
is wrong"), suppose it ("suppose it is 7") or ask for it.
"""

import re

from distill.grading.math.units import SCALES, unit_of

SENTENCE_END = re.compile("\u3002|" r"!{3,}\**(?:\s|$)|[.!?]\**(?:\s|$)|(?<=[\w)}\]])\.(?=[A-Z])")
FORMULA = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
NUMERAL = re.compile(
    r"(?:[-\N{MINUS SIGN}]\s*)?(?:\\?\$|[\N{EURO SIGN}\N{POUND SIGN}])?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?:\s*(?:%|\\%|percent\b|pct\b|\N{DEGREE SIGN}|\N{EURO SIGN}))?"
)
BULLET = re.compile(r"^[-*\u2022]\s+")
LONGEST = 400  # characters that are looked at on each side of a guess
OTHER = re.compile(r"(?<!\s)(?:\s*,\s*(?:and\s+|but\s+)?|\s+(?:and|but)\s+)not\s+\W{0,4}\d[^,]*$")  # "5, not 6"
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|nor|neither)\b|n't\b)[^,;\d]*$|^\W*no\s*[,:]"
    r"|\b(?:suppos(?:e|ing)|assum(?:e|ing)|imagine|pretend)\b[^,;]*$"
    r"|\b(?:might|may|could)\s+(?:\w+\s+)?(?:be|guess|think|say|expect|suspect|believe)\b[^,;]*$"
    r"|\b(?:if|unless|whether)\s+(?:that\s+)?(?:it|this|that|(?:the|our|my)\s+(?:\w+\s+)?\w+)\s+(?:is|was|were)\W*$",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(
    r"(?<!who )(?<!that )(?<!which )\b(?:is|are|was|be|can|could|does|do|will|would|should)(?:n't|'t|not|\s+not)\b"
    r"|\b(?:wrong|incorrect|impossible|false|mistaken|contradict(?:s|ion)|too (?:big|small|large|low|high|many|few))\b",
    re.IGNORECASE,
)
VERBS = r"(?:equal|simplif|com(?:es|ing)|add|sum|reduc|evaluat|lead|round|amount)"
BOUND = re.compile(  # the last words before a number that is no answer by itself
    r"(?:\b(?:and|or|nor|than|between|least|most|over|under|above|below|exceeds?|exceeding|except|without|by|mod|"
    r"modulo|base|sqrt|log|ln|sin|cos|tan|times|plus|minus|versus|vs|steps?|case|part|equation|when|where|if|unless|until|"
    r"for (?:all|every|each))"
    r"|\b(?:multiples?|factors?|divisors?|powers?|roots?|squares?|cubes?|out|half|thirds?|quarters?|percent|most|"
    r"each|rest) of"
    rf"|\d\W*(?:(?!{VERBS})[a-z]+\s+)?to|\b[a-z] to|\bclos(?:e|er|est) to"
    r"|(?<!add )(?<!adds )(?<!adding )(?<!sum )(?<!sums )\bup to"
    r"|\d.*\bfor(?:\s+(?:the\s+|an?\s+)?[a-z]+(?=\s*$))?"  # 42 dollars for 3 people, 12 for side 3
    r"|\b(?:for|at|as|with|given|assuming|suppose) [a-z]\w{0,2}\s*=)\s*\W{0,3}$",
    re.IGNORECASE,
)
CONDITION = re.compile(r"\b(?:for|at|if|as|when|where|with|given|assuming|suppose)\s*$", re.IGNORECASE)
UNSOLVED = re.compile(r"(?:[\d)+*/^-]\s*[A-Za-z]|\b[A-Za-z]\s*[-+*/^]\s*[\w.]+)\s*=$")  # 3x = 7, x + 1 = 7
LISTED = re.compile(r"(?:[\d)\]}$]|\b[A-Za-z])\s*,$")  # the comma of "3, 7" and "x, 7"
UNIT = re.compile(r"([A-Za-z]{2,}|[A-Za-z](?=[\u00b2\u00b3^]))[\u00b2\u00b3]?(?![\w(])")  # 5cm, 5m\u00b2
GOES_ON = re.compile(
    r"\w|,\s*\d|\s*[+*/^=<>:\u00d7\u221a\\]|[-\u2212(\[{]|\s+-\s*(?:\d|[A-Za-z]\b)|\s+(?:and|or|to)\s+\W{0,3}\d"
    r"|\s+or\s+(?:more|fewer|less|greater|above|below|under|over|higher|lower)\b"
    r"|\s+(?:more|fewer|less|greater|larger|bigger|smaller|higher|lower)\s+than\b"
    r"|\s+times\s+(?:the|as|more|larger|greater|bigger|smaller|that|this|its|his|her|their|[b-z]\b|\W?\d)"
)
SCALE = re.compile(r"\s+([A-Za-z]+)")
ARROWS = ("->", "=>", "\u2192", "\u21d2", "\u2248", "~", "\u2014", "\u2013")


def guess(line: str) -> str | None:
    """The last formula or number of a line's last sentence that has one; None where it does not stand alone or is
    denied. The number of "5, not 6" is 5."""
    for sentence, asked in reversed(_sentences(line)):
        text = BULLET.sub("", OTHER.sub("", sentence).strip())
        formulas = list(FORMULA.finditer(text))
        numerals = list(NUMERAL.finditer(text, formulas[-1].end() if formulas else 0))
        if not formulas and not numerals:
            continue
        if asked:
            return None
        match = (numerals or formulas)[-1]
        content = match[0] if numerals else next(part for part in match.groups() if part)
        before = text[max(0, match.start() - LONGEST) : match.start()].replace("\u2019", "'")
        after = text[match.end() : match.end() + LONGEST].replace("\u2019", "'")
        if DENIED_BEFORE.search(before) or DENIED_AFTER.search(after) or not _stands_alone(before, match[0], after):
            return None
        return None if "=" in content and CONDITION.search(before) else content.strip()
    return None


def _sentences(line: str) -> list[tuple[str, bool]]:
    """The sentences of a line, and whether each is a question."""
    ends = [(end.start(), end.end(), "?" in end[0]) for end in SENTENCE_END.finditer(line)]
    starts = [0, *(end for _, end, _ in ends)]
    return [
        (line[start:end], asked or line[start:end].endswith("?"))
        for start, (end, _, asked) in zip(starts, [*ends, (len(line), 0, False)], strict=True)
    ]


def _stands_alone(before: str, match: str, after: str) -> bool:
    """Whether a formula or number is no part of something larger. before, after: the rest of its sentence."""
    left, right = re.sub(r"(?:\*\*|__|[\"'`]|(?<=\s)\*)$", "", before), re.sub(r"^(?:\*\*?|__|[\"'`])", "", after)
    if (unit := UNIT.match(right)) and unit_of(unit[1]):
        right = right[unit.end() :]
    if (scale := SCALE.match(right)) and scale[1].lower() in SCALES:
        return False
    if BOUND.search(left) or GOES_ON.match(right) or re.match(r"[-\u2212]\s", match):
        return False
    joined = left.rstrip()
    if not joined:
        return True
    if joined[-1].isalpha():
        return joined != left and not (match[0] in "-\u2212" and re.search(r"\b[A-Za-z]$", joined) is not None)
    if joined[-1] == "=":
        return UNSOLVED.search(joined) is None
    if joined[-1] == ",":
        return LISTED.search(joined) is None
    if joined[-1] == ":":
        return re.search(r"[\d)]\s*:$", joined) is None
    return joined.endswith(ARROWS)
