"""LaTeX, and the ways in which people write formulas without it, as tokens. Every character belongs to one of them.

Kinds: `number` (digits, maybe a decimal), `letter` (one variable or constant, with its subscript), `function` (sin,
log, …), `command` (any other LaTeX command that is known), `operator` (one character), `word` (prose or a unit), `join`
("and", "or"), `opaque` (a symbol of several characters that is compared by its spelling: `\\dot{x}`, `dM/dt`). An
unknown command is `Unreadable`, unless it is a known one with letters stuck to it (`\\omegat`), which is how answers
look whose spaces were removed.
"""

import re

from distill.grading.math.spelling import FONT
from distill.grading.math.units import NUMBERS, PERCENT, SCALES, SYMBOLS, unit_of
from distill.grading.math.values import Token, Unreadable

FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg",
    "exp", "cis",
}  # fmt: skip
OF_NUMBERS = {"max", "min", "gcd", "lcm"}
FOREIGN = {"tg": "tan", "ctg": "cot", "cotg": "cot", "arctg": "arctan", "cosec": "csc"}
OF_A_LETTER = {"det", "deg", "dim"}  # their value is a name
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "abs": "abs"}
LETTERS = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "pi", "rho", "varrho", "sigma", "varsigma", "tau", "upsilon", "phi", "varphi", "chi",
    "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega",
    "ell", "hbar", "infty",
}  # fmt: skip
VARIANTS = [
    (f"var{name}", name) for name in ("epsilon", "theta", "rho", "phi", "sigma")
]  # one letter, unless both are used
COMMANDS = {
    "frac": "frac", "sqrt": "sqrt", "binom": "binom", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "in": "in", "cup": "cup",
    "cap": "cap",
    "setminus": "setminus", "backslash": "setminus", "emptyset": "emptyset", "varnothing": "emptyset", "pm": "pm",
    "mp": "mp", "times": "*", "cdot": "*", "div": "/", "approx": "approx", "simeq": "approx", "equiv": "equiv",
    "pmod": "pmod", "lfloor": "lfloor", "rfloor": "rfloor", "lceil": "lceil", "rceil": "rceil", "circ": "circ",
    "degree": "degree", "permille": "permille",
    "prime": "'", "lvert": "|", "rvert": "|", "vert": "|", "land": "and", "wedge": "and", 
    "lor": "or", "vee": "or", "angle": "angle", "to": "to", "colon": ":", "mathbb": "mathbb",
    "dot": "accent", "ddot": "accent",
    "hat": "accent", "bar": "accent", "vec": "accent", "tilde": "accent", "overline": "overline", "begin": "begin",
    "end": "end", "ast": "*", "iff": "iff", "sum": "sum", "prod": "prod", "int": "int", "lim": "lim", "mid": "mid",
    "bmod": "bmod", "mod": "bmod", "dots": "dots", "ldots": "dots", "cdots": "dots",
    "max": "max", "min": "min", "gcd": "gcd", "lcm": "lcm",
}  # fmt: skip
KNOWN = sorted(LETTERS | FUNCTIONS | COMMANDS.keys(), key=len, reverse=True)
PLAIN = {"sqrt": "sqrt", "pi": "pi", "infinity": "infty", "inf": "infty", "oo": "infty", "union": "cup"}

NUMBER = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?|\d+\.(?!\d)")
COMMAND = re.compile(r"\\([a-zA-Z]+)")
RUN = re.compile(r"[A-Za-z]+")
GROUP = re.compile(r"\{((?:[^{}\\]|\\[a-zA-Z]+ ?|\{[^{}]*\})*)\}|\\([a-zA-Z]+)|([A-Za-z0-9])")
OF_LETTER = re.compile(r"\s*(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])(?![A-Za-z]))")
FORMULA = re.compile(r"(?:[A-Z][a-z]?(?:_\d+)?)+")  # of a substance
DERIVATIVE = re.compile(
    r"\\frac\{\s*(?:d|\\mathrm\{d\})(\^\{?\d\}?)?\s*\\?([A-Za-z]\w*)\s*\}\{\s*(?:d|\\mathrm\{d\})\s*\\?([A-Za-z])(\^\{?\d\}?)?\s*\}"
)
DERIVATION = re.compile(
    r"\\frac\{\s*(?:d|\\mathrm\{d\})(?:\^\{?\d\}?)?\s*\}\{\s*(?:d|\\mathrm\{d\})\s*\\?[A-Za-z]"
)  # d/dx of what follows
TWO = {
    "**": "^",
    "<=": "<=",
    ">=": ">=",
    "!=": "!=",
    "==": "=",
    r"\{": "{set",
    r"\}": "set}",
    r"\|": "|",
    r"\%": "%",
    r"\#": "#",
}
ONE = set("+-*/^!|()[]{},;=<>:'%&_")
CONDITION = re.compile(  # what follows "12" in "12 for n = 5"
    r"(?:for|at|if|as|on|when|where|with|given|mod|by|in)\s+\\?[A-Za-z]+(?:_\w|_\{\w+\})?\s*(?:=|<|>|\\(?:in|[gl]eq?|ne|to)\b)"
)
LONGEST = 2000  # characters: a longer answer is prose or an attack


def tokens(text: str) -> list[Token]:
    """The tokens of a cleaned text. Errors: Unreadable at the first character that belongs to none."""
    if len(text) > LONGEST:
        raise Unreadable("too long")
    for variant, name in VARIANTS:
        if not re.search(rf"\\{name}(?![a-z])", text):
            text = text.replace(rf"\{variant}", rf"\{name}")
    found: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        if text[position].isspace():
            position, spaced = position + 1, True
            continue
        new, position = _next(text, position, spaced, found)
        found += new
        spaced = False
    return found


def _next(text: str, position: int, spaced: bool, before: list[Token]) -> tuple[list[Token], int]:
    """The tokens that begin at `position`, and where the rest begins."""
    rest = text[position:]
    if match := DERIVATIVE.match(rest):
        name = "d{}{}/d{}{}".format(*(part or "" for part in (match[1], match[2], match[3], match[4])))
        return [Token("opaque", name, spaced)], position + match.end()
    if DERIVATION.match(rest):
        raise Unreadable("a derivative")
    if match := FONT.match(rest):
        behind = bool(before) and (before[-1].kind in ("number", "word") or before[-1].text in ("}", ")", "/"))
        if behind and len(match[1].strip()) == 1 and unit_of(match[1].strip()):
            return [Token("word", match[1].strip(), True)], position + match.end()  # an upright m is a metre
        return _font(match[1], spaced), position + match.end()
    for pair in (rest[:2], rest[:1]):
        if pair in TWO:
            return [Token("operator", TWO[pair], spaced)], position + 2
    if match := COMMAND.match(rest):
        return _command(match[1], text, position, position + match.end(), spaced)
    if text.startswith("\\\\", position):
        return [Token("operator", "\\\\", spaced)], position + 2
    if match := NUMBER.match(rest):
        return _subscripted("number", match[0], text, position + match.end(), spaced)
    if match := RUN.match(rest):
        return _run(match[0], text, position, position + match.end(), spaced, before)
    if rest[0] in ONE:
        return [Token("operator", rest[0], spaced)], position + 1
    raise Unreadable("unknown character")


def _subscripted(kind: "str", name: str, text: str, position: int, spaced: bool) -> tuple[list[Token], int]:
    """A number or a letter with the subscript that follows it."""
    subscript = ""
    if match := re.compile(r"\s*_\s*").match(text, position):
        group = GROUP.match(text, match.end())
        if group is None:
            raise Unreadable("a subscript without an end")
        if kind == "number" and group[3] and (digits := re.compile(r"\d+").match(text, match.end())):
            subscript, position = digits[0], digits.end()
        else:
            subscript = re.sub(r"[{}\s]|\\(?:text|mathrm|textbf|rm)(?![a-z])", "", group[0])
            position = group.end()
    token = Token("number" if kind == "number" else "letter" if kind == "letter" else "opaque", name, spaced, subscript)
    return [token], position


def _font(content: str, spaced: bool) -> list[Token]:
    """What stands in `\\text{…}`: a letter, a joining word, a formula without letters, or words."""
    inner = content.strip()
    if re.fullmatch(r"[A-Za-z]", inner):
        return [Token("letter", inner, spaced)]
    if inner.lower() in ("or", "and"):
        return [Token("join", inner.lower(), spaced)]
    if not re.search("[A-Za-z]", inner):
        return tokens(inner.rstrip("."))
    if "_" in inner and FORMULA.fullmatch(inner):
        return tokens(re.sub(r"_(\d+)", r"_{\1}", inner))
    if inner in OF_NUMBERS - {"min"}:  # minutes
        return [Token("command", inner, spaced)]
    if inner in FUNCTIONS or inner in FOREIGN:
        return [Token("function", FOREIGN.get(inner, inner), spaced)]
    return _words(inner)


def _words(text: str) -> list[Token]:
    """Words and the numbers, powers and slashes between them."""
    pieces: list[Token] = []
    for match in re.finditer(r"[A-Za-z][A-Za-z'\-]*|\d+(?:\.\d+)?|\^-|[\^/,.()*]|\S", text):
        piece = match[0]
        if piece[0].isalpha():
            joins = piece.lower() in ("or", "and")
            pieces.append(Token("join" if joins else "word", piece.lower() if joins else piece, True))
        elif piece[0].isdigit():
            pieces.append(Token("number", piece, True))
        elif piece in ("^", "/", ",", "(", ")", "*", "^-"):
            pieces += [Token("operator", character, True) for character in piece]
        elif piece != ".":
            raise Unreadable("unknown character")
    return pieces


def _command(name: str, text: str, start: int, position: int, spaced: bool) -> tuple[list[Token], int]:
    """A LaTeX command; where it is unknown, the longest known one that it begins with."""
    if name in OF_A_LETTER and (letter := OF_LETTER.match(text, position)):
        return [Token("opaque", f"{name} {letter[1] or letter[2]}", spaced)], letter.end()
    name = FOREIGN.get(name, name)
    if name not in LETTERS and name not in FUNCTIONS and name not in COMMANDS:
        known = next((prefix for prefix in KNOWN if name.startswith(prefix) and len(prefix) > 1), None)
        if known is None:
            raise Unreadable("unknown command")
        name, position = known, start + 1 + len(known)
    if name in LETTERS:
        return _subscripted("letter", name, text, position, spaced)
    if name in FUNCTIONS:
        return [Token("function", name, spaced)], position
    meaning = COMMANDS[name]
    if meaning in ("and", "or"):
        return [Token("join", meaning, spaced)], position
    if meaning == "accent":
        group = GROUP.match(text, position)
        if group is None:
            raise Unreadable("an accent over nothing")
        return _subscripted("opaque", f"{name} {group[0].strip('{} ')}", text, group.end(), spaced)
    single = meaning in ("*", "/", "|", ":", "'") or meaning[0] in "<>!"
    return [Token("operator" if single else "command", meaning, spaced)], position


def _run(run: str, text: str, start: int, position: int, spaced: bool, before: list[Token]) -> tuple[list[Token], int]:
    """Letters without a backslash: a word, a function, a constant, a unit, or a product of variables."""
    lower, after_number = run.lower(), bool(before) and before[-1].kind == "number"
    if spaced and before and CONDITION.match(text, start):
        raise Unreadable("a condition")
    if lower in ("or", "and") and (spaced or len(run) == len(text) or before):
        return [Token("join", lower, spaced)], position
    if run in OF_NUMBERS and text.startswith("(", position):
        return [Token("command", run, spaced)], position
    if run in FUNCTIONS or run in ALIASES:
        return [Token("function", ALIASES.get(run, run), spaced)], position
    if run in PLAIN:
        name = PLAIN[run]
        return [Token("command" if name in COMMANDS else "letter", name, spaced)], position
    if run in LETTERS and len(run) > 2:
        return _subscripted("letter", run, text, position, spaced)
    closing = bool(before) and (before[-1].kind in ("number", "word") or before[-1].text in (")", "}", "^", "/"))
    if lower in PERCENT or (closing and (run in SYMBOLS or lower in SCALES)):
        return [Token("word", run, spaced)], position
    if (spaced and after_number and lower in ("sq", "cu")) or (run == "per" and closing):
        return [Token("word", run, spaced)], position
    rate = len(before) > 1 and before[-1].text in ("/", "*") and before[-2].kind == "word" and unit_of(run)
    if rate:  # the hour of km/h
        return [Token("word", run, spaced)], position
    if after_number and run in ("th", "st", "nd", "rd"):
        return [Token("word", "th", spaced)], position
    if lower in NUMBERS or len(run) >= 4 or (len(run) == 3 and unit_of(run) and closing):
        if joined := re.fullmatch(r"([A-Za-z])(or|and)([A-Za-z])", run):
            return [Token("letter", joined[1], spaced), Token("join", joined[2]), Token("letter", joined[3])], position
        return [Token("word", run, spaced)], position
    if lower.startswith("or") and after_number and len(run) <= 3:
        return [Token("join", "or", spaced)], start + 2
    for name in ("sqrt", "pi", "sin", "cos", "tan", "log", "ln"):
        if run.startswith(name) and len(run) > len(name):
            kind = "command" if name == "sqrt" else "letter" if name == "pi" else "function"
            return [Token(kind, name, spaced)], start + len(name)  # type: ignore[arg-type]  # one of the kinds
    letters: list[Token] = [Token("letter", letter, spaced and not i) for i, letter in enumerate(run[:-1])]
    last, position = _subscripted("letter", run[-1], text, position, spaced and len(run) == 1)
    return letters + last, position
