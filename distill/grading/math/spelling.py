"""Spellings without a meaning of their own: what two texts may differ in and still say the same.

`normalise` is safe for comparing spellings: it only removes typesetting. `cleaned` prepares a text for the lexer:
Unicode becomes LaTeX, escapes that JSON or Python swallowed are repaired, and typesetting is removed.
"""

import re
import unicodedata

FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsc|texttt|emph|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|underline|mbox|hbox|operatorname|bf|rm)\*?\s*\{([^{}\\]*)\}"
)
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\*?\}")
SPELLINGS = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|(?<=\d)\\[,;: ](?=\d{3}(?!\d))|\\?\$"), ""),
    (re.compile(r"\\[,;: ]"), " "),  # "3\;4" is not "34"
    (re.compile(r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])"), r"\\frac"),
    (FONT, r"\1"),
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"_\{([A-Za-z0-9])\}"), r"_\1"),
    (re.compile(r"(?<![\d\s])\s+|(?<!\s)\s+(?![\d\s])"), ""),  # but "1 1/2" is not "11/2"
)
WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt)[A-Za-z]{4,}")  # fewer letters may be a product of variables

SYMBOLS = {
    "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{HYPHEN}": "-", "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": r"\div ", "\N{MIDDLE DOT}": r"\cdot ", "\N{DOT OPERATOR}": r"\cdot ",
    "\N{FRACTION SLASH}": "/",
    "\N{SQUARE ROOT}": r"\sqrt ", "\N{CUBE ROOT}": r"\sqrt[3] ", "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge ", "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ELEMENT OF}": r"\in ", "\N{UNION}": r"\cup ", "\N{INTERSECTION}": r"\cap ", "\N{EMPTY SET}": r"\emptyset ",
    "\N{PLUS-MINUS SIGN}": r"\pm ", "\N{MINUS-OR-PLUS SIGN}": r"\mp ", "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{IDENTICAL TO}": r"\equiv ", "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}", "\N{ANGLE}": r"\angle ",
    "\N{DOUBLE-STRUCK CAPITAL Z}": r"\mathbb{Z}", "\N{DOUBLE-STRUCK CAPITAL N}": r"\mathbb{N}",
    "\N{DOUBLE-STRUCK CAPITAL Q}": r"\mathbb{Q}", "\N{DOUBLE-STRUCK CAPITAL C}": r"\mathbb{C}",
    "\N{LEFT FLOOR}": r"\lfloor ", "\N{RIGHT FLOOR}": r"\rfloor ", "\N{LEFT CEILING}": r"\lceil ",
    "\N{RIGHT CEILING}": r"\rceil ", "\N{PRIME}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{MATHEMATICAL LEFT ANGLE BRACKET}": "(", "\N{MATHEMATICAL RIGHT ANGLE BRACKET}": ")",
    "\N{SET MINUS}": r"\setminus ",
    "\N{PER MILLE SIGN}": r"\permille ", "\N{FULLWIDTH COMMA}": ",", "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ", "\N{ASTERISK OPERATOR}": "*",
    "\N{FULLWIDTH PERCENT SIGN}": "%", "\N{FULLWIDTH LEFT PARENTHESIS}": "(", "\N{FULLWIDTH RIGHT PARENTHESIS}": ")",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
GREEK = {
    name: rf"\{name.casefold()} " if name.islower() else rf"\{name.title()} "
    for name in (  # noqa: SIM905  a list of words
        "alpha beta gamma delta epsilon zeta eta theta iota kappa mu nu xi pi rho sigma tau phi chi psi omega "
        "GAMMA DELTA THETA XI PI SIGMA PHI PSI OMEGA"
    ).split()
}
GREEK["lambda"] = r"\lambda "
for _name, _command in GREEK.items():
    _size = "SMALL" if _name.islower() else "CAPITAL"
    SYMBOLS[unicodedata.lookup(f"GREEK {_size} LETTER {_name.upper().replace('LAMBDA', 'LAMDA')}")] = _command
SYMBOLS |= {
    "\N{GREEK SMALL LETTER EPSILON}": r"\varepsilon ", "\N{GREEK LUNATE EPSILON SYMBOL}": r"\epsilon ",
    "\N{GREEK SMALL LETTER PHI}": r"\varphi ", "\N{GREEK PHI SYMBOL}": r"\phi ",
    "\N{GREEK THETA SYMBOL}": r"\vartheta ", "\N{GREEK RHO SYMBOL}": r"\varrho ",
    "\N{MICRO SIGN}": r"\mu ", "\N{LATIN SMALL LETTER H WITH STROKE}": r"\hbar ",
    "\N{PLANCK CONSTANT OVER TWO PI}": r"\hbar ", "\N{THEREFORE}": " ",
}  # fmt: skip

SWALLOWED = (  # a backslash and a letter, read as an escape
    (re.compile("\b(?=oxed|inom|egin|ar|eta|mod|f|igcup)"), r"\\b"),
    (re.compile("\f(?=rac|box|orall)"), r"\\f"),
    (re.compile("\t(?=ext|imes|frac|heta|an|au|o\b|riangle)"), r"\\t"),
    (re.compile("\r(?=ight|ho|angle|floor|ceil|m)"), r"\\r"),
    (re.compile("\x07(?=lpha|ngle|pprox|rc)"), r"\\a"),
    (re.compile("\x0b(?=ec|ar|ert|dots|ee)"), r"\\v"),
)
MARKS = re.compile(  # of the end of a proof, and of a conclusion
    r"^\s*\\therefore(?![a-zA-Z])|\\(?:blacksquare|square|Box|qed|checkmark)\s*$"
)
TYPESETTING = (
    (re.compile(r"(?<=\\\\)\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|px|in)\s*\]"), ""),  # of rows
    (re.compile(r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])"), ""),
    (re.compile(r",\s*\\!\s*|\{,\}\s*|,\s*\\,\s*(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lrm]?|limits|nolimits)(?![a-zA-Z])\s*\.?"), ""),
    (re.compile(r"\\[!]"), ""),
    (re.compile(r"(?<!\\)\\[,;: >]|(?<!\\)~|\\(?:h|v)?phantom\{[^{}]*\}"), " "),
    (re.compile(r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\Pr(?![a-zA-Z])"), "P"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:lbrace|lbrack)(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace|rbrack)(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\(?:text|mathrm)\{\s*\\?%\s*\}"), r"\\%"),
    (re.compile(r"(?<![\d.])\.{3,}"), r"\\ldots "),
    (re.compile(r"\\textcolor\{\w+\}|\\color\{\w+\}"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
)

_SPACE = r"(?:(?<!\\)\\[,;: >]|(?<!\\)~)"
_WIDE = rf"\\q?quad(?![a-zA-Z])|\\hspace\*?\{{[^{{}}]*\}}|{_SPACE}(?:\s*{_SPACE})+"
SPACING = re.compile(rf"(?<!\s)\s*(?:(?:(?:{_WIDE})\s*)+|(?<!\\)(?:\\[;: >]|~)\s*|(?<=\n)(?!\s))")
WIDE = re.compile(_WIDE)
NEAR = 200  # characters beside a space that decide what it means
_INFIX = (
    r"(?:[,;:=<>&|]|\\\\|\\(?:leq?|geq?|leqslant|geqslant|neq?|lt|gt|in|approx|equiv|to|mid|cdot|times|div|cup|cap|land|"
    r"lor|i?mplies|Rightarrow|iff)(?![a-zA-Z]))"
)
UNFINISHED = re.compile(rf"(?:{_INFIX}|[-+*/^(\[{{]|{FONT.pattern}|^\s*\(?[A-J][).:]?|\b(?:and|or|for|if))\s*$")
CONTINUED = re.compile(
    rf"(?:{_INFIX}|[)\]}}+*/^!']|-(?=\s|\\[,;: ]|\\q?quad)|{FONT.pattern}"
    r"|\\(?:text|mathrm|begin|end|pmod|bmod|mod|ldots|dots)(?![a-zA-Z])"
    r"|\(\s*(?:\\(?:text|mathrm|mod|bmod)|mod)|[A-Za-z]{2,}(?!\s*[=(])|d[a-z](?![a-zA-Z]))"
)
LABEL = re.compile(  # what begins another equation: "y =", "f(2) <"
    r"\\?[A-Za-z]+'*(?:_\w|_\{\w+\})?'*(?:\([^()]*\))?\s*(?:=|<|>|\\(?:leq?|geq?|neq?|in)(?![a-zA-Z]))"
)

UPRIGHT = re.compile(r"\\(?:mathrm|text)\{(?:[^{}\\]|[\^_]\{-?\d+\}|\\cdot(?![a-zA-Z]))*\}")  # with units and indices


def repaired(text: str) -> str:
    """Undo what reading LaTeX as an escaped string does: `\\boxed` became a backspace and "oxed"."""
    for pattern, replacement in SWALLOWED:
        text = pattern.sub(replacement, text)
    return text


def normalise(text: str) -> str:
    """Unify spellings without a meaning of their own: spacing, `\\left`, `\\dfrac`, `\\text{…}`, the minus sign."""
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def has_words(text: str) -> bool:
    """Whether the text has prose in it; words inside `\\text{…}` are part of the notation."""
    return bool(WORD.search(ENVIRONMENT.sub("", FONT.sub("", text))))


def cleaned(text: str) -> str:
    """The text in plain LaTeX without typesetting; white space is kept where it may mean something."""
    text = re.sub(r"\s{3,}", lambda match: "\n" if "\n" in match[0] else "  ", repaired(text))
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z{}])", r"\\", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+(?=(\\d?))", _superscript, text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: f"_{{{match[0].translate(SUBSCRIPTS)}}}", text)
    text = "".join(character if character.isascii() else _ascii(character) for character in text)
    text = re.sub(r"\\sqrt (\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = SPACING.sub(_separator, MARKS.sub("", text))
    for pattern, replacement in TYPESETTING:
        text = pattern.sub(replacement, text)
    return UPRIGHT.sub(_upright, text).strip()


def _separator(match: re.Match[str]) -> str:
    """What a space between two values means: a comma before another equation; a wide one is a space or, between two
    complete values, a command that is not read: it may be a comma or a sign of multiplication."""
    start, end, wide = match.start(), match.end(), WIDE.search(match[0])
    before, after = match.string[max(0, start - NEAR) : start], match.string[end : end + NEAR]
    if not before or not after or UNFINISHED.search(before) or CONTINUED.match(after):
        return " "
    if LABEL.match(after) and (wide or re.search(r"[=<>]|\\(?:leq?|geq?|neq?)", re.split("[,;]", before)[-1])):
        return ", "
    return r"\quad " if wide else " "


def _upright(match: re.Match[str]) -> str:
    """Without groups and commands: `\\mathrm{kg\\cdot m\\,s^{-2}}` is `\\mathrm{kg*m s^-2}`."""
    return re.sub(r"([\^_])\{(-?\d+)\}", r"\1\2", re.sub(r"\s*\\cdot\s*", "*", match[0]))


def _superscript(match: re.Match[str]) -> str:
    """Without braces where they are not needed: `\\text{cm²}` stays without a nested group."""
    exponent = match[0].translate(SUPERSCRIPTS)
    return f"^{exponent}" if len(exponent) == 1 and not match[1] else f"^{{{exponent}}}"


def _ascii(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    decomposed = unicodedata.decomposition(character).split()
    if decomposed[:1] == ["<fraction>"]:
        top, bottom = "".join(chr(int(code, 16)) for code in decomposed[1:]).split("\N{FRACTION SLASH}")
        return rf"\frac{{{top}}}{{{bottom}}}"
    if decomposed[:1] == ["<wide>"]:
        return chr(int(decomposed[1], 16))
    return character
