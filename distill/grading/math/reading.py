"""An answer's text → what it denotes, or `Unreadable`: never a part of it.

`readings` gives every reading that a text has by common conventions: `1,234` is a number or a pair of numbers, `1,5` a
decimal or a pair, `(B) 12` an option and its content. What is the same under one reading of each is the same answer.
"""

import json
import re

import sympy

from distill.grading.math.lexer import tokens
from distill.grading.math.reader import NOTHING, Reader
from distill.grading.math.spelling import cleaned
from distill.grading.math.values import Region, Unreadable, Value, Words

CURRENCY = {
    "$": "dollar",
    r"\$": "dollar",
    "\N{EURO SIGN}": "euro",
    "\N{POUND SIGN}": "gbp",
    "\N{YEN SIGN}": "yen",
    "\N{INDIAN RUPEE SIGN}": "rupee",
}
SIGN = r"(?:\\?\$|[\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{INDIAN RUPEE SIGN}])"
BEFORE = re.compile(rf"({SIGN})\s*(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))(\s*(?:thousand|million|billion|trillion))?")
AFTER = re.compile(rf"(\d)\s*({SIGN})(?![\d.\w])")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)")
SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
DECIMAL_COMMA = re.compile(r"(-?)(\d{1,3}(?:\.\d{3})+|\d+),(\d+)")
REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\\dot (\d)(?!\d)|\\(?:overline|bar)\s(\d))(?:(\d*)\\dot\{(\d)\})?"
)
OPTION = re.compile(
    r"\s*(?:\\(?:text|textbf|mathrm|mathbf|bf|rm)\{\s*\(?([A-J])\)?[).:]?\s*\}|\(([A-J])\))\s*[:.]?\s*(.*)", re.DOTALL
)
PROSE = re.compile(  # words only, none of which joins answers or is a number, a unit or a function
    r"(?!(?:.*\b)?(?:or|and|sin|cos|tan|log|ln|exp|union)\b)(?=.*\b[a-z]{2,3}\b)"
    r"[A-Za-z']{2,}(?:[\s,.;:-]+[A-Za-z']+)+|no|yes|all",
    re.IGNORECASE,
)
TRAILING = re.compile(
    r"[\s,;]*\\?(?:text|mathrm)?\{?\s*for\s+(?:all|any|every|each)\s+(?:real\s+|integer\s+|positive\s+)*(?:numbers?\s+|integers?\s+)?\}?\s*"
    r"\$?(?:[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\{?[RZNQC]\}?|R))?)?\s*\$?\}?\s*$"
)


def read(text: str) -> Value:
    """Read a whole text. Errors: Unreadable where a part of it is not understood."""
    return _read(cleaned(_money(text)))


def readings(text: str) -> list[Value]:
    """Every reading of a text, the likeliest first. Errors: Unreadable where there is none."""
    plain = re.sub(TRAILING, "", cleaned(_money(_listed(text))))
    variants = [plain]
    merged = _merged(plain)
    if merged != plain:
        variants.insert(0, merged)
    number = re.sub(r"\\text\{[^{}]*\}\s*$", "", plain).strip()
    if decimal := DECIMAL_COMMA.fullmatch(number):
        variants.append(f"{decimal[1]}{decimal[2].replace('.', '')}.{decimal[3]}{plain[len(number) :]}")
    if option := OPTION.fullmatch(plain):
        letter = option[1] or option[2]
        variants = [letter, *([option[3]] if option[3].strip() else [])]
    found: list[Value] = []
    reason = "not parseable"
    for variant in variants:
        try:
            found.append(_read(variant))
        except Unreadable as error:
            reason = str(error)
    if not found or (len(variants) > 1 and option and len(found) < len(variants)):
        raise Unreadable(reason)
    return found


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
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)

    def behind(match: re.Match[str]) -> str:
        return rf"{match[2]}\text{{{(match[3] or '').strip()} {CURRENCY[match[1]]}}}"

    text = BEFORE.sub(behind, text)
    return AFTER.sub(lambda match: rf"{match[1]}\text{{ {CURRENCY[match[2]]}}}", text)


def _merged(text: str) -> str:
    """The text with separators of thousands removed, outside of brackets."""

    def whole(match: re.Match[str]) -> str:
        before = text[: match.start()]
        inside = any(before.count(opening) > before.count(closing) for opening, closing in ("()", "[]", (r"\{", r"\}")))
        return match[0] if inside else re.sub("[, ]", "", match[0])

    return SPACED.sub(whole, THOUSANDS.sub(whole, text))


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, fixed = match[1] or "0", match[2]
    cycle = match[3] or match[4] or match[5]
    if match[7]:
        cycle += match[6] + match[7]
    elif match[6]:
        raise Unreadable("not parseable")
    scale = 10 ** len(fixed)
    top = int(whole + fixed) * (10 ** len(cycle) - 1) + int(cycle)
    return rf"(\frac{{{top}}}{{{scale * (10 ** len(cycle) - 1)}}})"


def _read(text: str) -> Value:
    text = re.sub(r"\\(?:boxed|fbox)\s*(?=\{)", "", text)
    text = REPEATING.sub(_repeating, text).strip().rstrip(".,;").strip()
    if not text:
        raise Unreadable("empty")
    if NOTHING.fullmatch(text.casefold()):
        return Region(sympy.S.EmptySet)
    if PROSE.fullmatch(text):
        return Words(" ".join(re.findall(r"[a-z']+", text.casefold())))
    return Reader(tokens(text)).whole()
