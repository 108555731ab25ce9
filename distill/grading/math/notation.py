"""Notations that the reader does not know, rewritten as text that it knows, before there are tokens.

A rewriting is here, and not a rule of the grammar, where it concerns how a whole answer is written (dates, times,
numbers in words, French intervals) or a pattern that means something else to the grammar (`1.2 x 10^3`, `0.333...`,
`C_{10}^5`). Each keeps the value exactly; what it does not recognise stays as it is.
"""

import re
from fractions import Fraction

from distill.grading.math.units import NUMBERS, ORDINALS, PARTS, TENS
from distill.grading.math.values import Clock, Unreadable, Words

REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\\dot (\d)(?!\d)|\\(?:overline|bar)\s(\d)|\((\d+)\))"
    r"(?:(\d*)\\dot\{(\d)\})?"
)
ELLIPSIS = re.compile(r"(\d*\.\d*?)(?:(\d)\2\2+|(\d{2,}?)\3+)\s*(?:\\[lc]?dots|\.{2,})\s*$")
LONGEST = 100  # characters of a text whose repeating digits are looked for
TRUNCATED = re.compile(r"(\d*\.\d+)\s*(?:\\[lc]?dots|\.{2,})\s*$")

_RELATION = r"(?:<=|>=|<|>|\\(?:leq?|geq?|lt|gt)(?![a-zA-Z]))"
_TRANSPOSED = r"(?:T|\\top|\\intercal|\\(?:mathrm|mathsf|text)\{T\})"
_REWRITINGS = {  # pattern: replacement
    r"(?<=\d)\s*x\s*(?=10\s*\^)": r"\\times ",  # 1.2 x 10^3
    r"(?<=\d)\s*\^\s*\{?\s*(?:\\(?:text|mathrm)\{)?\s*(st|nd|rd|th)\s*\}?\}?(?![a-z])": r"\\text{\1}",  # 5^{th}
    r"(?<!\\)\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}": r"\\binom{\1}{\2}",
    r"(?<!\\)\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}": r"\\frac{\1}{\2}",
    r"(?<![\w})])(?:\{\})?[\^_]\{?(\d+)\}?\s*C\s*_\{?(\d+)\}?": r"\\binom{\1}{\2}",  # ^{10}C_5
    r"\^(\d+)\s*/\s*_(\d+)": r"\\frac{\1}{\2}",  # the text of a small fraction: ^1/_2
    rf"(\([^()]*,[^()]*\))\s*\^\s*\{{?\s*{_TRANSPOSED}\s*\}}?\s*$": r"\1",  # (1, 2)^T
    r"(?<=\d)\s+(m|km|cm|ft|mi)\s*/\s*(s|h|hr|min|sec)(\^2|\^\{2\})?(?![a-zA-Z])": r"\\text{ \1/\2\3}",  # 3 m/s
    r"(?<=\d)\s*\\text\{ (\w+/\w+)\^\{2\}\}": r"\\text{ \1^2}",
    r"^\s*(?:\\text\{\s*(?i:negative|minus)\s*\}|(?i:negative|minus)(?![a-zA-Z]))\s*(?=[\d.]|\\(?:frac|sqrt|pi))": "-",
    r"^\s*\\text\{\s*(?!(?i:.*\b(?:no|not|never|than|except|excluding|wrong|incorrect|false|least|most)\b))"
    r"([A-Za-z][A-Za-z ]*?)\s*(?::\s*\}|\}\s*:)\s*(?=\S)": r"\\text{\1} = ",
    r"^\s*(?:USD|US|EUR|GBP|INR|Rs\.?)\s*(?=[\d.])": "",
    r"^\s*<([^<>=]*,[^<>=]*)>\s*$": r"(\1)",
    rf"^\s*(?={_RELATION})": "x",  # "≤ 5": what is meant is clear
    r"^\s*(\d+)\s+(?:to|\\text\{\s*to\s*\})\s+(\d+)\s*$": r"\1:\2",
}
REWRITINGS = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITINGS.items()]
MODULUS = re.compile(r"\(?\s*(?:\\b?mod(?![a-z])|\\(?:text|mathrm)\{\s*mod\s*\}|(?<![\\a-z])mod\b)\s*(\d+|[a-z])\s*\)?")
OVER_ALL = re.compile(r"((?:(?!\\over)[^=<>,;&])*)\\over(?![a-zA-Z])((?:(?!\\over)[^=<>,;&])*)")
OVER = re.compile(r"\\frac\{([^{}]*)d([a-z])\}(\{(?:[^{}]|\{[^{}]*\})*\})")  # of an integral: dx over something
CHOSEN = re.compile(r"C_\{?(\d+)\}?\^\{?(\d+)\}?")  # C_{10}^5: of 10 things, 5
DIGITS = re.compile(r"\(?\s*(?:\\(?:text|mathrm)\{)?\s*([0-9A-Z]{2,}|\d)\s*\}?\s*\)?\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
PREFIXED = re.compile(r"0([xXbB])([0-9a-fA-F]+)")
NAMED_BASE = re.compile(
    r"([0-9A-Z]+)[\s(}]*(?:\\(?:text|mathrm)\{[\s(]*)?(?:in\s+)?"
    r"(?:base[\s-]*(?:\}\s*)?(\w+)|(binary|octal|hexadecimal)(?: notation)?)[\s)}]*"
)
NAMES_OF_BASES = {"binary": 2, "octal": 8, "hexadecimal": 16}
BASE_WORD = re.compile(r"_\s*\{?\s*\\(?:text|mathrm)\{\s*(\w+)\s*\}\s*\}?")

MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
]  # fmt: skip
MONTH = "|".join(f"{month}|{month[:3]}" for month in MONTHS)
NUMERIC_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[/-]\d{1,2}[/-]\d{4}")
DAY = r"(\d{1,2})(?:\s*(?:st|nd|rd|th))?"
DATE = re.compile(rf"(?:({MONTH})\.?\s+{DAY}|{DAY}\s+(?:of\s+)?({MONTH})\.?)(?:,?\s+(\d{{4}}))?", re.IGNORECASE)
TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?\s*([ap])\.?\s?m\.?", re.IGNORECASE)
FONTS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")

POWERS = {"thousand": 1000, "million": 10**6, "billion": 10**9}


def rewritten(text: str) -> str:
    """The text in notations that the reader knows. Errors: Unreadable for a repeating decimal that is none."""
    for pattern, replacement in REWRITINGS:
        text = pattern.sub(replacement, text)
    if r"\equiv" in text:
        text = MODULUS.sub(r"\\pmod{\1}", text)
    if (over := OVER_ALL.fullmatch(text)) and all(half.count("{") == half.count("}") for half in over.groups()):
        text = rf"\frac{{{over[1]}}}{{{over[2]}}}"
    if r"\int" in text:
        text = OVER.sub(lambda match: rf"\frac{{{match[1].strip() or 1}}}{match[3]} d{match[2]}", text)
    text = CHOSEN.sub(_chosen, BASE_WORD.sub(_base_word, _french(text)))
    if len(text) <= LONGEST and text.rstrip().endswith(("dots", "..")):
        text = ELLIPSIS.sub(lambda match: rf"{match[1]}\overline{{{match[2] or match[3]}}}", text)
        text = TRUNCATED.sub(r"\1\\dots", text)
    return REPEATING.sub(_repeating, text)


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, fixed = match[1] or "0", match[2]
    cycle = match[3] or match[4] or match[5] or match[6]
    if match[8]:
        cycle += match[7] + match[8]
    elif match[7]:
        raise Unreadable("not parseable")
    scale = 10 ** len(fixed)
    top = int(whole + fixed) * (10 ** len(cycle) - 1) + int(cycle)
    return rf"(\frac{{{top}}}{{{scale * (10 ** len(cycle) - 1)}}})"


def _french(text: str) -> str:
    """Open ends that are brackets turned outward, `]1, 2]`, as parentheses; other brackets stay."""
    brackets = [match.start() for match in re.finditer(r"(?<!sqrt)[\[\]]", text)]
    depth, turned = 0, False
    for place in brackets:
        depth += 1 if text[place] == "[" else -1
        turned |= not 0 <= depth <= 1
    if not (turned or depth) or len(brackets) % 2 or r"\sqrt[" in text:
        return text
    characters = list(text)
    for left, right in zip(brackets[::2], brackets[1::2], strict=True):
        inside = text[left + 1 : right]
        if not re.fullmatch(r"[^,;()]+[,;][^,;()]+", inside):
            return text
        characters[left] = "(" if text[left] == "]" else "["
        characters[right] = ")" if text[right] == "[" else "]"
    return "".join(characters)


def _chosen(match: re.Match[str]) -> str:
    of, taken = int(match[1]), int(match[2])
    return rf"\binom{{{of}}}{{{taken}}}" if 2 <= taken < of else match[0]


def _base_word(match: re.Match[str]) -> str:
    base = NUMBERS.get(match[1].lower())
    return match[0] if base is None else f"_{{{base}}}"


def numeral_in_base(text: str) -> tuple[int, int, str] | None:
    """(value, base, digits) of a numeral in a base that has letters, brackets or a prefix: `FF_{16}`, `(101)_2`,
    `0xff`. None for any other text. Errors: Unreadable for digits that the base does not have."""
    if match := PREFIXED.fullmatch(text):
        base, digits = (16 if match[1] in "xX" else 2), match[2].upper()
    elif match := DIGITS.fullmatch(text):
        base, digits = int(match[2] or match[3]), match[1]
        if not digits.isdigit() and max(int(digit, 36) for digit in digits) >= base:
            return None  # a symbol with a subscript
    elif match := NAMED_BASE.fullmatch(text):
        name, digits = match[2] or match[3], match[1]
        number = int(name) if name.isdigit() else (NUMBERS | NAMES_OF_BASES).get(name.lower())
        if number is None:
            return None
        base = number
    else:
        return None
    if not 2 <= base <= 36:
        raise Unreadable("unknown base")
    try:
        return int(digits, base), base, digits.lstrip("0") or "0"
    except ValueError as error:
        raise Unreadable("digits beyond the base") from error


def date(text: str) -> Words | None:
    """A date as words in one order; None for any other text."""
    plain = FONTS.sub(r"\1", text).strip()
    if NUMERIC_DATE.fullmatch(plain):
        return Words(f"date {plain}")
    if match := DATE.fullmatch(plain):
        month = next(i for i, name in enumerate(MONTHS) if name.startswith((match[1] or match[4]).lower()))
        return Words(" ".join(filter(None, ("date", MONTHS[month], str(int(match[2] or match[3])), match[5]))))
    return None


def time_of_day(text: str) -> Clock | None:
    """A time that says which half of the day it is in; None for any other text."""
    match = TIME.fullmatch(FONTS.sub(r"\1", text).strip())
    if match is None or not 1 <= int(match[1]) <= 12 or int(match[2] or 0) > 59:
        return None
    hour = int(match[1]) % 12 + (12 if match[3].lower() == "p" else 0)
    return Clock(60 * hour + int(match[2] or 0))


def number_in_words(text: str) -> Fraction | None:
    """The value of a number that is spelled out: "twenty-one", "one hundred and five", "two thirds", "two and a half",
    "first", "minus three". None for any other text."""
    text = text.strip().lower()
    if sign := re.match(r"(?:minus|negative)\s+(?!(?:minus|negative)\b)", text):
        positive = number_in_words(text[sign.end() :])
        return None if positive is None else -positive
    if text == "half" or text in ORDINALS:
        return Fraction(1, 2) if text == "half" else Fraction(ORDINALS[text])
    if mixed := re.fullmatch(r"(.*[a-z])[\s-]+and[\s-]+(.*)", text):
        whole, part = _whole_number(_words(mixed[1])), _part(mixed[2])
        if whole is not None and part is not None:  # "one hundred and three quarters" may be 103 of them
            return None if mixed[1].endswith(("hundred", *POWERS)) or part >= 1 else whole + part
    if (part := _part(text)) is not None:
        return part
    whole = _whole_number(_words(text))
    return None if whole is None else Fraction(whole)


def _words(text: str) -> list[str]:
    text = re.sub(r"^a(?= (?:hundred|thousand|million))", "one", text)
    words = [word for word in re.split(r"[\s-]+", text) if word != "and"]
    return words if len(words) <= 12 else []


def _part(text: str) -> Fraction | None:
    """The value of "two thirds", "five thirty-seconds", "a half". "twenty-third" is a place, no part."""
    counted, _, name = text.rpartition(" ")
    if name not in PARTS:
        counted, _, name = text.rpartition("-")
    if name not in PARTS or not counted:
        return None
    words = _words(counted)
    top = 1 if words in (["a"], ["one"]) else _whole_number(words)
    place = not name.endswith("s") and words[-1:] and words[-1] in (*TENS, "hundred", *POWERS)
    return None if top is None or place else Fraction(top, PARTS[name])


def _whole_number(words: list[str]) -> int | None:
    if not words:
        return None
    total = group = 0
    previous = 0
    for word in words:
        if word in POWERS and group:
            total, group, previous = total + group * POWERS[word], 0, 0
        elif word == "hundred" and 0 < group < 20:
            group, previous = group * 100, 100
        elif word in TENS and previous in (0, 100):
            group, previous = group + TENS[word], 10
        elif word in NUMBERS and (previous in (0, 100) or (previous == 10 and 0 < NUMBERS[word] < 10)):
            group, previous = group + NUMBERS[word], 1
        else:
            return None
    return total + group


def roman_numeral(text: str) -> int | None:
    """The value of a Roman numeral of at least two letters; None for any other text."""
    if not re.fullmatch(r"M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})", text) or len(text) < 2:
        return None
    values = [dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))[letter] for letter in text]
    return sum(-v if v < after else v for v, after in zip(values, [*values[1:], 0], strict=True))
