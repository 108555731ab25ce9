"""The mathematical symbols of a text: with other operators, the same words and numbers are another problem."""

import re
import unicodedata

COMMANDS = frozenset(  # of LaTeX, for symbols
    re.findall(
        r"\w+",
        "div pm mp cdot times ast cap cup setminus le leq ge geq lt gt ne neq equiv approx sim cong sqrt in ni notin "
        "subset subseteq supset supseteq land lor wedge vee lnot neg to gets rightarrow leftarrow leftrightarrow "
        "Rightarrow Leftarrow Leftrightarrow implies iff int oint sum prod partial nabla oplus otimes perp parallel "
        "mid nmid lfloor lceil circ overline vec hat bar binom infty forall exists gcd lcm mod bmod pmod",
    )
)
SPELLINGS = {"leq": "le", "geq": "ge", "neq": "ne", "rightarrow": "to", "\u2212": "-", "\u2217": "*"}
SYMBOLS = "".join(
    re.escape(chr(code))
    for code in range(0x80, 0x2C00)
    if unicodedata.category(chr(code)) == "Sm" or chr(code) in "€£¥°·\u2032\u2033"
)
TOKEN = re.compile(  # a number, a word, a command or a symbol; brackets count beside numbers and operators
    r"\d+(?:\.\d+)?|\\?[^\W\d_]+|(?<!\w)-|-(?![^\W\d_])|(?<=\d)!"
    r"|[(\[](?=-?\d)|(?<=[*/^+-])\(|(?<=\d)[)\]]|\)(?=\s?[*/^=+-])"
    rf"|[+*/^<>=|%&~¬±×÷{SYMBOLS}]"
)
MARKUP = re.compile(  # marks of lists and quotations, stress, tags, dashes between words
    r"^[ \t]*(?:[-*+>]|#+)[ \t]+(?=\W?\W?[^\W\d_]{2})|\*\*|</?[A-Za-z]{2,}/?>"
    r"|(?<=\s)[-\u2013\u2014]{1,3}(?=\s[^\W\d_]{2})",
    re.MULTILINE,
)
DELIMITERS = re.compile(r"\\[()\[\]]")  # of formulas: `\(x\)` is `$x$`


def symbols_of(text: str) -> list[tuple[int, str]]:
    """The symbols of a text that are no words, each in its one spelling, with their places."""
    for pattern in (MARKUP, DELIMITERS):
        text = pattern.sub(lambda match: " " * len(match[0]), text)
    matches = ((match.start(), match[0]) for match in TOKEN.finditer(text))
    return [(place, SPELLINGS.get(token, token)) for place, token in matches if not token[-1].isalnum()]
