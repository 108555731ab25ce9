"""What identifies a problem whatever its wording: its numbers, its names and its rare words.

A rephrased problem keeps its numbers, most of its names and some of its nouns; their order and all other words change.
So a text is a set of terms of three kinds:

    numbers   in one spelling: `1,000`, `1000.0` and `$1000` are equal, as are `twice`, `double` and 2, `2/5` and
              `two-fifths` (a numerator and a denominator). The second occurrence of a number is a term of its own.
    names     words that are written with a capital letter, and nowhere in the benchmarks without
    words     other words without their endings; function words are left out. Of scripts without spaces between words
              (Chinese, Japanese, Thai to Khmer): pairs of neighbouring characters

and two texts are compared kind by kind (`Index`). Rejected: n-grams of words, which a rephrasing leaves none of (and
which a prompt shorter than n never has); embeddings, which need a model and find problems *about* the same thing, whose
numbers differ, more alike than rephrasings.
"""

import re
import unicodedata
from bisect import bisect
from collections import Counter
from typing import Literal, NamedTuple

from distill.filters.symbols import symbols_of
from distill.filters.words import ANY_UNSPACED, UNSPACED

Kind = Literal["numbers", "names", "words"]
KINDS: tuple[Kind, ...] = ("numbers", "names", "words")

DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"\u3007": 0, "两": 2}
PLACES = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}
HAN_NUMBER = re.compile(rf"(?=.*[{''.join(DIGITS)}十])[{''.join([*DIGITS, *PLACES])}]+")
LETTER = rf"(?:(?!{UNSPACED})[^\W\d_])"
TOKEN = re.compile(rf"\d+(?:\.\d+)?|\\?{LETTER}+(?:'{LETTER}+)?|[{''.join([*DIGITS, *PLACES])}]+|{UNSPACED}")
SENTENCE_END = re.compile(r"[.!?:\n]")
SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
NUMBERS = {word: str(number) for number, word in enumerate([*UNITS.split(), "eighteen", "nineteen"])} | {
    **{word: str(10 * number) for number, word in enumerate(("twenty", "thirty", "forty", "fifty", "sixty"), 2)},
    **{word: str(10 * number) for number, word in enumerate(("seventy", "eighty", "ninety", "hundred"), 7)},
    **dict.fromkeys(("half", "halves", "twice", "double", "doubled", "doubles", "second", "couple", "pair"), "2"),
    **dict.fromkeys(("third", "thirds", "thrice", "triple", "tripled", "triples"), "3"),
    **dict.fromkeys(("quarter", "quarters", "fourth", "fourths", "quadruple"), "4"),
    **{
        f"{word}{end}": str(n)
        for n, word in enumerate(("fif", "six", "seven", "eigh", "nin", "ten"), 5)
        for end in ("th", "ths")
    },
    **dict.fromkeys(("once", "single", "first"), "1"),
    **{"dozen": "12", "dozens": "12", "decade": "10", "decades": "10", "thousand": "1000", "million": "1000000"},
}
STOP = frozenset(
    re.findall(
        r"\w+",
        "a about after all also an and any are as at be been before being but by can could did do does down each every "
        "for from had has have he her here him his how i if in into is it its just may me might more most much many "
        "must my no not of off on only or our out over per she should so some such than that the their them then "
        "there these they this those to up was we were what when where which who whom whose why will with would you "
        "your amount number total find calculate determine compute given",
    )
)
ENDINGS = ("ing", "ies", "es", "ed", "ly", "s", "e")


class Terms(NamedTuple):
    """The terms of a text by kind, each kind a set; its tokens in order, for copies; and term → how the text
    spells it. certain_names: the names that do not only begin a sentence, where any word has a capital letter. places:
    of the tokens in `text`, which is normalised."""

    numbers: frozenset[str]
    names: frozenset[str]
    certain_names: frozenset[str]
    words: frozenset[str]
    tokens: tuple[str, ...]
    spelled: dict[str, str]
    text: str
    places: tuple[int, ...]

    def of(self, kind: Kind) -> frozenset[str]:
        """The terms of one kind."""
        return {"numbers": self.numbers, "names": self.names, "words": self.words}[kind]

    def operators(self) -> list[str]:
        """The mathematical symbols before each token, and after the last."""
        before = [""] * (len(self.tokens) + 1)
        for place, symbol in symbols_of(self.text):
            before[bisect(self.places, place)] += symbol
        return before


def terms_of(text: str) -> Terms:
    """The terms of a text. names: every word with a capital letter; which are names is decided by the index."""
    text = SEPARATOR.sub("", unicodedata.normalize("NFKC", text).replace("\u2019", "'"))
    numbers: Counter[str] = Counter()
    names: set[str] = set()
    certain: set[str] = set()
    words: set[str] = set()
    tokens: list[str] = []
    places: list[int] = []
    spelled: dict[str, str] = {}
    before = -1  # end of a character without spaces that the next one may follow
    end = 0  # of the token before
    for match in TOKEN.finditer(text):
        token = match.group()
        begins = not tokens or SENTENCE_END.search(text, end, match.start()) is not None
        end = match.end()
        if (number := _number(token)) is None and ANY_UNSPACED.match(token):
            tokens += token
            places += range(match.start(), match.end())
            start = match.start() - (before == match.start())
            pairs = [text[i : i + 2] for i in range(start, match.end() - 1)]
            words.update(pairs or ([token] if not _continues(text, match.end()) else []))
            before = match.end()
            continue
        lower = token.lower().removesuffix("'s")
        tokens.append(number or lower)
        places.append(match.start())
        if number:
            numbers[number] += 1
        elif lower not in STOP:
            stem = stem_of(lower)
            words.add(stem)
            spelled.setdefault(stem, token)
            if token[0].isupper():
                names.add(stem)
                certain.update(() if begins else (stem,))
    repeated = (f"{number}#{n}" if n > 1 else number for number, count in numbers.items() for n in range(1, count + 1))
    kinds = frozenset(repeated), frozenset(names), frozenset(certain), frozenset(words)
    return Terms(*kinds, tuple(tokens), spelled, text, tuple(places))


def _continues(text: str, place: int) -> bool:
    return ANY_UNSPACED.match(text, place) is not None


def _number(token: str) -> str | None:
    """The number that a token spells in figures, in English or in Chinese; a single 一 is an article."""
    if token[0].isdecimal():
        return _plain(token)
    if token != "一" and HAN_NUMBER.match(token):
        return str(_han_value(token))
    return NUMBERS.get(token.lower().removesuffix("'s"))


def _han_value(numeral: str) -> int:
    """The value of a Chinese numeral: 二十五 is 25, 三万二千 is 32,000, 二〇二四 is 2024."""
    if not any(character in PLACES for character in numeral):
        return int("".join(str(DIGITS[character]) for character in numeral))
    total = section = digit = 0
    for character in numeral:
        if character in DIGITS:
            digit = DIGITS[character]
        elif PLACES[character] >= PLACES["万"]:
            total += max(section + digit, 1) * PLACES[character]
            section = digit = 0
        else:
            section += (digit or 1) * PLACES[character]
            digit = 0
    return total + section + digit


def _plain(number: str) -> str:
    """A number without zeros at its ends: digit by digit, because two long numbers may be the same float."""
    whole, _, decimals = number.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def stem_of(word: str) -> str:
    """A word without its ending, so that `sells`, `selling` and `sell` are one term. Crude, and the same for both."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word
