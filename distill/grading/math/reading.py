"""The text of an answer → its value, or `Unreadable`; a text is never read in part.

`readings` gives every reading of a text by common conventions: `1,5` is a decimal or a pair of numbers, `(B) 12` an
option and its content. Two answers are the same if one reading of each is. A comma before three digits separates
thousands; in brackets, where it may separate items, only if these have a space or a semicolon between them.
"""

import json
import re

import sympy

from distill.grading.math.lexer import tokens
from distill.grading.math.notation import date, number_in_words, numeral_in_base, rewritten, time_of_day
from distill.grading.math.reader import Reader, named_set
from distill.grading.math.spelling import FONT, cleaned
from distill.grading.math.units import NUMBERS
from distill.grading.math.values import Labelled, Scalar, Sequence, Unreadable, Value, Words

LONGEST = 8000  # characters, before typesetting is removed: some of the patterns below take quadratic time
CURRENCY = {
    "$": "dollar",
    r"\$": "dollar",
    "\N{EURO SIGN}": "euro",
    "\N{POUND SIGN}": "gbp",
    "\N{YEN SIGN}": "yen",
    "\N{INDIAN RUPEE SIGN}": "rupee",
}
SIGN = r"(?:\\?\$|[\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{INDIAN RUPEE SIGN}])"
NAMED_SIGN = re.compile(r"\\(?:(pounds|textsterling)|(?:text)?euro)(?![a-zA-Z])\s*")
IN_WORDS = re.compile(
    r"(?:\\(?:text|mathrm)\{)?(\d{1,2})\s*(?:\\(?:text|mathrm)\{)?\s*\(([A-Za-z]{3,9})\)\s*\}?"
)  # 4 (four)
SIGN_AS_TEXT = re.compile(r"\\(?:text|mathrm)\{\s*(\\?\$)((?:[\d.,!\\]|\{,\})*)\s*\}")  # \text{\$}5, \text{\$5}
SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!)\s*(?=\d)")  # within a number, as LaTeX sets it
MARKED = re.compile(rf"\d+(?:{SEPARATOR.pattern}\d+)+")
SCALE = r"(?:thousand|million|billion|trillion|quadrillion|lakhs?|crores?|k|mn|mln|bn|tn)"
SHORT_SCALES = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion"}  # behind an amount only: $5M
BEFORE = re.compile(
    rf"({SIGN})\s*(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))(?:\s*(?:\\(?:text|mathrm)\{{\s*({SCALE})\s*\}}|({SCALE}|[KMB])(?![A-Za-z])))?"
)
AFTER = re.compile(rf"(\d)\s*({SIGN})(?![\d.\w])")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d]|,\d)")
SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
POINTED = re.compile(r"(?<![\d.,_])[1-9]\d{0,2}(?:(?:\.\d{3}){2,}|(?:'\d{3})+|(?:_\d{3})+)(?![\d.,'_])")
LAKHS = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}")  # 12,34,567
DECIMAL_COMMA = re.compile(r"(?<![\d.,_])(?<!_\{)(\d{1,3}(?:[ .]\d{3})+|\d+),(\d+)(?!\d|[.,]\d)")
RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|neq?|in|approx|equiv)(?![a-zA-Z])")
JOINED = re.compile(r"(?:,|;|and\b|or\b|\\(?:text|mathrm)\{\s*(?:and|or)\b)")  # several options
MIXED = re.compile(r"(-?\d+)(?:\s+and\s+|\s*\\text\{\s*and\s*\}\s*)(\d+/\d+|\\frac\s*\{?\d+\}?\s*\{?\d+\}?)")
CHOSEN = re.compile(r"C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")  # or a point
POINT = re.compile(r"([A-Z])'*\s*(\([^()=]*,[^()=]*\))")  # a name before its coordinates
OPTION = re.compile(
    r"\s*(?:\\(?:text|textbf|mathrm|mathbf|bf|rm)\{\s*\(?([A-J])\)?[).:]?\s*\}|\(([A-J])\))\s*[:.]?\s*(.*)", re.DOTALL
)
PROSE = re.compile(  # words only, none of which joins answers or is a number, a unit or a function
    r"(?!(?:.*\b)?(?:or|and|sin|cos|tan|log|ln|exp|union)\b)(?=.*\b[a-z]{2,3}\b)"
    r"[A-Za-z']{2,}(?:[\s,.;:-]+[A-Za-z']+)+|no|yes|all",
    re.IGNORECASE,
)
LIST = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]{3,})?(?:\s*,\s*[A-Za-z]{3,}(?: [A-Za-z]{3,})?)+")  # red, dark blue
TRAILING = re.compile(
    r"[\s,;]*\\?(?:text|mathrm)?\{?\s*for\s+(?:all|any|every|each)\s+(?:real\s+|integer\s+|positive\s+)*(?:numbers?\s+|integers?\s+)?\}?\s*"
    r"\$?(?:[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\{?[RZNQC]\}?|R))?)?\s*\$?\}?\s*$"
)


def readings(text: str) -> list[Value]:
    """Every reading of a text, the likeliest first. Errors: Unreadable where there is none."""
    if len(text) > LONGEST:
        raise Unreadable("too long")
    text = _listed(text)
    found: list[Value] = []
    reason = "not parseable"
    for each in dict.fromkeys((MARKED.sub(_marked, text), SEPARATOR.sub(",", text))):
        plain = re.sub(TRAILING, "", cleaned(_money(each)))
        if (repeated := IN_WORDS.fullmatch(plain)) and NUMBERS.get(repeated[2].lower()) == int(repeated[1]):
            plain = repeated[1]
        if (option := OPTION.fullmatch(plain)) and not JOINED.match(option[3]):
            return _option(option[1] or option[2], option[3].strip())
        for variant in _variants(plain):
            try:
                found.append(_read(variant))
            except Unreadable as error:
                reason = str(error)
    if not found:
        raise Unreadable(reason)
    return found


def _variants(plain: str) -> list[str]:
    """The text with its numbers written in the ways that they may be meant."""
    variants = [_merged(plain), plain]
    if ";" in plain or ", " in plain:
        variants.append(_merged(plain, everywhere=True))
    if ";" in plain or not RELATION.search(plain):  # "x = 1,5" may be two solutions
        variants.append(with_decimal_points(plain))
    number = re.sub(r"\\text\{[^{}]*\}\s*$", "", plain).strip()
    if LAKHS.fullmatch(number):
        variants.append(plain.replace(",", ""))
    if mixed := MIXED.fullmatch(number):
        variants.append(f"{mixed[1]} {mixed[2]}")
    if chosen := CHOSEN.fullmatch(plain):
        variants.append(rf"\binom{{{chosen[1]}}}{{{chosen[2]}}}")
    if point := POINT.fullmatch(plain):
        variants.append(f"{point[1]} = {point[2]}")
    return list(dict.fromkeys(variants))


def with_decimal_points(text: str) -> str:
    """The text with a point for every comma between two digits, in brackets only where semicolons separate items."""

    def pointed(match: re.Match[str]) -> str:
        if THOUSANDS.fullmatch(match[0]) or (";" not in text and _in_brackets(text[: match.start()])):
            return match[0]
        return f"{re.sub('[ .]', '', match[1])}.{match[2]}"

    return DECIMAL_COMMA.sub(pointed, text)


def _marked(match: re.Match[str]) -> str:
    """A number that LaTeX sets with commas inside it: `1{,}234` has thousands, `12{,}34` decimals."""
    first, *rest = parts = SEPARATOR.split(match[0])
    if (all(len(part) == 3 for part in rest) and len(first) <= 3 and first[0] != "0") or LAKHS.fullmatch(
        ",".join(parts)
    ):
        return "".join(parts)
    return f"{first}.{rest[0]}" if len(rest) == 1 else ",".join(parts)


def _option(letter: str, content: str) -> list[Value]:
    """`(B) 12`: the option and its content, either of which may be compared; a labelled value keeps two options apart.

    Errors: Unreadable where the content is not read.
    """
    name = _read(letter)
    if not content:
        return [name]
    value = _read(content)
    return [Labelled(f"option {letter}", value), name]


def _listed(text: str) -> str:
    """The content of a JSON list of strings, as some data sets give their answers."""
    if text.startswith('["') and text.endswith('"]'):
        try:
            items = json.loads(text)
        except json.JSONDecodeError:
            return text
        return ", ".join(map(str, items))
    return text


def _money(text: str) -> str:
    """Amounts with their currency as a unit after them; dollar signs that are math delimiters are removed."""
    text = NAMED_SIGN.sub(lambda match: "\N{POUND SIGN}" if match[1] else "\N{EURO SIGN}", text)
    text = re.sub(SIGN_AS_TEXT, r"\1\2", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)

    def behind(match: re.Match[str]) -> str:
        scale = match[3] or match[4] or ""
        return rf"{match[2]}\text{{{SHORT_SCALES.get(scale, scale)} {CURRENCY[match[1]]}}}"

    text = BEFORE.sub(behind, text)
    return AFTER.sub(lambda match: rf"{match[1]}\text{{ {CURRENCY[match[2]]}}}", text)


def _merged(text: str, everywhere: bool = False) -> str:
    """The text with separators of thousands removed, in brackets only if everywhere."""

    def whole(match: re.Match[str]) -> str:
        inside = not everywhere and _in_brackets(match.string[: match.start()])
        return match[0] if inside else re.sub("[, ]", "", match[0])

    text = POINTED.sub(lambda match: re.sub("[.'_]", "", match[0]), text)
    return SPACED.sub(whole, THOUSANDS.sub(whole, text))


def _in_brackets(before: str) -> bool:
    return any(before.count(opening) > before.count(closing) for opening, closing in ("()", "[]", (r"\{", r"\}")))


def _read(text: str) -> Value:
    text = re.sub(r"\\(?:boxed|fbox)\s*(?=\{)", "", text).strip().rstrip(",;").strip()
    if (special := time_of_day(text) or date(text)) is not None:
        return special
    if (numeral := numeral_in_base(text)) is not None:
        value, base, digits = numeral
        return Scalar(sympy.Integer(value), base=base, digits=digits)
    text = re.sub(r"(?<!\.\.)\.+$", "", rewritten(text).rstrip(",; "))
    if not text:
        raise Unreadable("empty")
    words = FONT.sub(r"\1", text).strip()
    if (points := named_set(words.casefold())) is not None:
        return points
    if (number := number_in_words(words)) is not None:
        return Scalar(sympy.Rational(number.numerator, number.denominator), digits="plain")
    if re.fullmatch("[A-Z]{2,}", words):
        return Words(words.casefold(), words)
    if LIST.fullmatch(words):
        return Sequence(tuple(Words(item.strip().casefold()) for item in words.split(",")))
    if PROSE.fullmatch(text):
        return Words(" ".join(re.findall(r"[a-z']+", text.casefold())))
    return Reader(tokens(text)).whole()
