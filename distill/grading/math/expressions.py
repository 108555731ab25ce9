"""Tokens → exact sympy expressions: sums, products, powers, functions, fractions and what stands in brackets.

A recursive descent that consumes every token or raises `Unreadable`. Where conventions differ it does not guess:
`1/2x`, `\\sqrt12`, a mixed number with an improper fraction, and `\\log` without a base (an unknown positive constant
divides it). Nothing of a size that could stall sympy is built: see `power` and `factorial`.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from math import log2
from typing import TypeAlias

import sympy
from sympy.core.function import AppliedUndef

from distill.grading.math.values import Matrix, Region, Scalar, Sequence, Token, Unreadable, Value

Operand: TypeAlias = "sympy.Expr | Sequence | Region | Matrix"

BITS = 40_000  # of the largest number that is built: 12,000 digits
DEPTH = 60  # of brackets
END = Token("end", "")
COMPLEX = {"z", "w"}  # letters that usually stand for complex numbers; all others are real
CALLED = set("fghFGHPQRSTW")  # letters that before brackets are functions and no factors
SIMPLE = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh,
    "tanh": sympy.tanh, "ln": sympy.log, "exp": sympy.exp, "abs": sympy.Abs,
    "cis": lambda angle: sympy.cos(angle) + sympy.I * sympy.sin(angle),
}  # fmt: skip
INVERSES = {name: f"arc{name}" for name in ("sin", "cos", "tan")}  # `\\sin^{-1} x`: never the reciprocal
UNKNOWN_BASE = sympy.Symbol("ln(base)", positive=True)
CLOSING = {"(": ")", "[": "]", "{": "}", "{set": "set}"}
STARTS = {"frac", "sqrt", "binom", "lfloor", "lceil", "overline", "gcd", "lcm", "max", "min"}
OPERATORS = {"sum", "prod", "int", "lim"}


def symbol(name: str, subscript: str = "") -> sympy.Expr:
    """The variable or constant of a name."""
    if not subscript:
        constant = {"e": sympy.E, "i": sympy.I, "pi": sympy.pi, "infty": sympy.oo}.get(name)
        if constant is not None:
            return constant
    full = f"{name}_{subscript}" if subscript else name
    return sympy.Symbol(full) if name in COMPLEX else sympy.Symbol(full, real=True)


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """The power. Errors: Unreadable where it is a number of more than `BITS` bits."""
    if base.is_number and exponent.is_number:
        size = abs(sympy.N(exponent, 5)) if exponent.is_finite else 0
        if size > 10 and base.is_finite and base not in (0, 1, -1):
            magnitude = abs(sympy.N(base, 5))
            bits = abs(log2(magnitude)) if 1e-300 < magnitude < 1e300 else 1000.0
            if base.is_Rational:
                bits = float(max(abs(base.p).bit_length(), base.q.bit_length()))
            if size > 10**7 or bits * float(size) > BITS:
                raise Unreadable("number too large")
        if base == 0 and not exponent.is_positive:
            raise Unreadable("undefined")
        if base.is_negative and exponent.is_Rational and exponent.q % 2 == 1 and exponent.q > 1:
            raise Unreadable("ambiguous root of a negative number")  # (-8)^{1/3}: -2, or the principal value
    elif exponent.is_Rational and abs(exponent) > 10**6:
        raise Unreadable("number too large")
    return checked(base**exponent)


def factorial(argument: sympy.Expr) -> sympy.Expr:
    """The factorial. Errors: Unreadable beyond 3000, for negative and for broken numbers."""
    if argument.is_number and not (argument.is_Integer and 0 <= argument <= 3000):
        raise Unreadable("number too large" if argument.is_Integer and argument > 0 else "undefined")
    return sympy.factorial(argument)


def remainder(value: sympy.Expr, modulus: sympy.Expr) -> sympy.Expr:
    """`a mod b` of integers. Errors: Unreadable for other expressions."""
    if not (value.is_Integer and modulus.is_Integer and modulus > 0):
        raise Unreadable("a remainder of other than numbers")
    return value % modulus


def double_factorial(argument: sympy.Expr) -> sympy.Expr:
    """The product of every second number. Errors: Unreadable beyond 3000 and for all but natural numbers."""
    if not (argument.is_Integer and 0 <= argument <= 3000):
        raise Unreadable("number too large" if argument.is_Integer and argument > 0 else "undefined")
    return sympy.factorial2(argument)


def checked(expression: sympy.Expr) -> sympy.Expr:
    """The expression. Errors: Unreadable where it is undefined, or a number that is too large."""
    if expression.has(sympy.nan, sympy.zoo):
        raise Unreadable("undefined")
    if expression.is_Rational and max(abs(expression.p).bit_length(), expression.q.bit_length()) > 4 * BITS:
        raise Unreadable("number too large")
    return expression


class Expressions(ABC):
    """A position in a list of tokens, and the rules of arithmetic. sign: what `\\pm` means in this reading."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position = tokens, 0
        self.sign, self.signs = 1, 0  # signs: how many ± were met
        self.bound: list[str] = []  # names that a sum, product, integral or limit binds
        self.depth = self.bars = self.arguments = 0

    @property
    def next(self) -> Token:
        """The next token."""
        return self.peek(0)

    def peek(self, ahead: int) -> Token:
        """A token further on."""
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def take(self, *texts: str) -> bool:
        """Consume the next token if it is an operator or command of one of these texts."""
        if self.next.kind in ("operator", "command") and self.next.text in texts:
            self.position += 1
            return True
        return False

    def expect(self, *texts: str) -> None:
        """Consume one of these. Errors: Unreadable where another token comes."""
        if not self.take(*texts):
            raise Unreadable("not parseable")

    @abstractmethod
    def group(self) -> Value:
        """What stands between brackets, read by the rules for whole answers."""

    @abstractmethod
    def command(self, name: str) -> sympy.Expr:
        """The value of a command whose name was just consumed."""

    def sum(self) -> Operand:
        """`a + b - c`, with signs in front."""
        total = self._signed()
        while self.next.kind in ("operator", "command") and self.next.text in ("+", "-", "pm", "mp"):
            total = number(total) + number(self._signed())
        return total if isinstance(total, (Sequence, Region, Matrix)) else checked(total)

    def _signed(self) -> Operand:
        sign, signed = 1, False
        while self.next.kind in ("operator", "command") and self.next.text in ("+", "-", "pm", "mp"):
            text, signed = self.next.text, True
            self.position += 1
            if text in ("pm", "mp"):
                self.signs += 1
            sign *= {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}[text]
        value = self.product()
        return sign * number(value) if signed else value

    def product(self) -> Operand:
        """Factors with and without a sign between them; `/` divides by the one factor that follows."""
        value, divided = self._factor(), False
        while True:
            if self.take("*"):
                value, divided = checked(number(value) * self._operand()), False
            elif self.take("/"):
                divisor = self._operand()
                if divisor == 0:
                    raise Unreadable("undefined")
                value, divided = checked(number(value) / divisor), True
            elif self.take("bmod"):
                value, divided = remainder(number(value), self._operand()), False
            elif self._factor_follows():
                if divided:
                    raise Unreadable("ambiguous division")
                value = checked(number(value) * number(self._factor()))
            else:
                return value

    def _operand(self) -> sympy.Expr:
        """A factor after an explicit sign, which may have a minus of its own."""
        minus = self.take("-")
        value = number(self._factor())
        return -value if minus else value

    def _factor_follows(self) -> bool:
        token = self.next
        if token.kind in ("letter", "function", "opaque"):
            return True
        if token.kind == "number":  # after a factorial or the imaginary unit: 5!5!, i4
            before = self.tokens[self.position - 1]
            return before.text == "!" or (before.text == "i" and before.kind == "letter" and not before.subscript)
        if token.kind == "command":
            return token.text in STARTS | OPERATORS
        return token.kind == "operator" and (token.text in ("(", "[", "{") or (token.text == "|" and not self.bars))

    def _factor(self) -> Operand:
        """A primary with its factorials and powers."""
        mixed = self._mixed()
        value: Operand = self._primary() if mixed is None else mixed
        while True:
            if self.next.text == "!" and self.next.kind == "operator":
                value = self._factorial(number(value))
            elif self.next.text == "^" and self.next.kind == "operator" and not self._degrees():
                self.position += 1
                value = power(number(value), self._exponent())
            elif self.arguments and self._degrees():
                self.position += self._degrees()
                value = number(value) * sympy.pi / 180
            else:
                return value

    def _factorial(self, argument: sympy.Expr) -> sympy.Expr:
        """`n!`, `n!!` (every second factor) and so on. Errors: Unreadable for three signs and more."""
        count = 0
        while self.next.text == "!" and self.next.kind == "operator":
            self.position, count = self.position + 1, count + 1
        if count > 2:
            raise Unreadable("ambiguous factorial")
        return factorial(argument) if count == 1 else double_factorial(argument)

    def _degrees(self) -> int:
        """How many tokens are a degree sign here."""
        if self.next.kind == "command" and self.next.text == "degree":
            return 1
        if self.next.text == "^":
            if self.peek(1).text in ("circ", "degree"):
                return 2
            if self.peek(1).text == "{" and self.peek(2).text in ("circ", "degree") and self.peek(3).text == "}":
                return 4
        return 0

    def _exponent(self) -> sympy.Expr:
        minus = self.take("-")
        if not minus:
            self.take("+")
        value = number(self._primary())
        if self.next.kind == "operator" and self.next.text == "^" and not self._degrees():
            self.position += 1
            value = power(value, self._exponent())
        return -value if minus else value

    def _mixed(self) -> sympy.Expr | None:
        """`2\\frac{1}{2}` as a mixed number; None where no such thing begins here."""
        whole, after = self.next, self.peek(1)
        if not (whole.kind == "number" and whole.text.isdigit() and not whole.subscript and after.text == "frac"):
            return None
        start = self.position
        self.position += 2
        top, bottom = self.argument(), self.argument()
        if top.is_Integer and bottom.is_Integer:
            if not 0 < top < bottom:
                raise Unreadable("ambiguous mixed number")
            return sympy.Integer(whole.text) + top / bottom
        self.position = start
        return None

    def _primary(self) -> Operand:
        token = self.next
        self.position += 1
        if token.kind == "number":
            if token.subscript:
                raise Unreadable("a base within an expression")
            return sympy.Rational(Fraction(token.text.rstrip(".")))
        if token.kind == "opaque":
            return sympy.Symbol(f"{token.text}_{token.subscript}")
        if token.kind == "letter":
            return self._letter(token)
        if token.kind == "function":
            return self._function(token.text)
        if token.kind == "command":
            return self.command(token.text)
        if token.kind == "operator":
            if token.text in CLOSING:
                return self._bracket()
            if token.text == "|":
                self.bars += 1
                inner = number(self.sum())
                self.expect("|")
                self.bars -= 1
                return sympy.Abs(inner)
        raise Unreadable("not parseable")

    def _bracket(self) -> Operand:
        self.position -= 1
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable("nested too deeply")
        bars, self.bars = self.bars, 0
        value = self.group()
        self.bars = bars
        self.depth -= 1
        if isinstance(value, Scalar) and not (value.percent or value.unit or value.base or value.approximate):
            return value.expression
        if isinstance(value, (Sequence, Region, Matrix)):
            return value
        raise Unreadable("not parseable")

    def _letter(self, token: Token) -> sympy.Expr:
        """A variable, or a function with its arguments: `f(x)`, `I(0)`, `f'(2)`."""
        name, primes = token.text, 0
        while self.next.text == "'" and self.next.kind == "operator":
            self.position, primes = self.position + 1, primes + 1
        if name in self.bound and not token.subscript and not primes:
            return sympy.Symbol(name, real=True)
        if token.subscript and any(each in token.subscript for each in self.bound):
            if token.subscript not in self.bound or primes:
                raise Unreadable("an index that varies")
            return sympy.Function(f"{name}_")(sympy.Symbol(token.subscript, real=True))
        constant = not token.subscript and name in ("e", "i", "pi", "infty")
        argument = self.peek(1)
        alone = self.next.text == "(" and self.peek(2).text == ")"
        called = self.next.text == "(" and (
            name in CALLED or primes > 0 or (alone and argument.kind == "number" and not constant)
        )
        full = (f"{name}_{token.subscript}" if token.subscript else name) + "'" * primes
        if not called:
            return symbol(name, token.subscript) if not primes else sympy.Symbol(full)
        self.position += 1
        arguments = [number(self.sum())]
        while self.take(","):
            arguments.append(number(self.sum()))
        self.expect(")")
        return sympy.Function(full)(*arguments)

    def _function(self, name: str) -> sympy.Expr:
        """`\\sin x`, `\\sin^2 x`, `\\log_2 8`, `exp(x)`: without brackets the argument is one product."""
        base: sympy.Expr | None = None
        exponent: sympy.Expr | None = None
        for _ in range(2):
            if self.take("_"):
                base = self.argument()
            elif self.next.text == "^" and exponent is None:
                self.position += 1
                exponent = self._exponent()
        inverse = exponent == -1 and name in INVERSES
        if (exponent == -1 and not inverse) or (exponent is not None and name in ("log", "ln", "lg")):
            raise Unreadable("ambiguous power of a function")
        self.arguments += 1
        argument = self._function_argument()
        self.arguments -= 1
        if name in ("log", "lg"):
            divisor = sympy.log(10) if name == "lg" else UNKNOWN_BASE if base is None else sympy.log(base)
            value = checked(sympy.log(argument) / divisor)
        else:
            value = checked(SIMPLE[INVERSES[name] if inverse else name](argument))
        return value if exponent is None or inverse else power(value, exponent)

    def _function_argument(self) -> sympy.Expr:
        if self.next.text in ("(", "[", "{") and self.next.kind == "operator":
            return number(self._primary())
        minus = self.take("-")
        value = number(self._factor())
        while self.next.kind in ("letter", "opaque") or (self.next.kind == "command" and self.next.text in STARTS):
            value *= number(self._factor())
        return -value if minus else value

    def argument(self) -> sympy.Expr:
        """The argument of a command: a group, or one digit or letter."""
        token = self.next
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit() and not token.subscript:
            self.tokens[self.position] = Token("number", token.text[1:])
            return sympy.Integer(token.text[0])
        return number(self._primary())


def number(value: Operand) -> sympy.Expr:
    """The operand as an expression. Errors: Unreadable for a sequence, a set or a matrix."""
    if isinstance(value, (Sequence, Region, Matrix)):
        raise Unreadable("not parseable")
    return value


def applied(expression: sympy.Basic) -> bool:
    """Whether an expression has parts that are compared by their spelling: functions of which nothing is known."""
    return bool(expression.atoms(AppliedUndef)) or any("/" in str(s) or " " in str(s) for s in expression.free_symbols)
