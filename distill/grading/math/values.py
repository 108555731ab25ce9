"""The forms of an answer: a number or expression, a sequence, an interval, a relation, words.

Each class is one form. Expressions are sympy's and exact: decimals are rationals, and nothing is a float.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import sympy

from distill.grading.math.units import Unit


class Unreadable(ValueError):
    """A text that is not read completely, or denotes a number too large to build; the message is a countable reason."""


@dataclass(frozen=True)
class Scalar:
    """A number or an expression.

    decimals: digits after the point where the text is a decimal number, else None. base: of a number such as `204_5`,
    whose value `expression` is; `digits` as written. truncated: dots follow its digits. stated: the number before a
    word that scales it, the 7 of `7 dozen`.
    """

    expression: sympy.Expr
    decimals: int | None = None
    percent: bool = False
    unit: Unit | None = None
    base: int | None = None
    digits: str = ""
    approximate: bool = False
    truncated: bool = False
    stated: sympy.Expr | None = None


@dataclass(frozen=True)
class Sequence:
    """Values in brackets or separated by commas.

    brackets: "" for a bare list, "{}" for a set, "cases" for the (value, condition) pairs of a definition by cases,
    else both brackets. alternatives, both: joined by "or", by "and". grouped: the items are sequences, each of them one
    solution of several unknowns, as in `x = 1, y = 4 or x = 3, y = 2`.
    """

    items: tuple["Value", ...]
    brackets: str = ""
    alternatives: bool = False
    both: bool = False
    grouped: bool = False


@dataclass(frozen=True)
class Region:
    """A set of real numbers, and the variable that is said to be in it, if any."""

    points: sympy.Set
    variable: sympy.Expr | None = None


@dataclass(frozen=True)
class Comparison:
    """A chain of inequalities or one `≠`, in at least two variables: `sides[i] relations[i] sides[i + 1]`."""

    sides: tuple[sympy.Expr, ...]
    relations: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """`label = value`: the label is a symbol, a function of symbols or a name, in normal form."""

    label: str
    value: "Value"
    side: sympy.Expr | None = None  # the label as an expression, where it is one


@dataclass(frozen=True)
class Equation:
    """`left = right` where neither side is a label only."""

    left: sympy.Expr
    right: sympy.Expr


@dataclass(frozen=True)
class Congruence:
    """`left ≡ right (mod modulus)`; left is None for a bare residue."""

    left: sympy.Expr | None
    right: sympy.Expr
    modulus: sympy.Expr


@dataclass(frozen=True)
class Ratio:
    """`3:2:1`. clock: it may be a time of day."""

    parts: tuple[sympy.Expr, ...]
    clock: bool = False


@dataclass(frozen=True)
class Clock:
    """A time of day. minutes: since midnight."""

    minutes: int


@dataclass(frozen=True)
class Matrix:
    """Rows of values."""

    rows: tuple[tuple["Value", ...], ...]


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics, in lower case and single spaces. capitals: as written, where it is nothing but
    capital letters: a name, an order, a product or a Roman numeral."""

    text: str
    capitals: str = ""


Value: TypeAlias = (
    Scalar | Sequence | Region | Comparison | Labelled | Equation | Congruence | Ratio | Clock | Matrix | Words
)


@dataclass(frozen=True)
class Token:
    """A piece of text. kind: see `distill.grading.math.lexer`; spaced: white space precedes it."""

    kind: Literal["number", "letter", "function", "command", "operator", "word", "join", "opaque", "end"]
    text: str
    spaced: bool = False
    subscript: str = field(default="")
