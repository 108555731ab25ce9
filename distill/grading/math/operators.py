"""Commands with arguments: fractions and roots, and sums, products, integrals and limits, which are evaluated.

An operator whose value sympy does not find, or only under conditions, becomes a symbol that is named after it: equal to
the same operator in any name of its variable, and otherwise undecided. The value of a definite integral counts only if
numerical integration agrees with it. sympy may need for ever; that is why comparing runs in a worker.
"""

import sympy

from distill.grading.math.expressions import Expressions, checked, number, power
from distill.grading.math.values import Unreadable

TERMS = 2000  # of a sum or product that is added up
AGREEMENT = 1e-8  # relative, of an integral's value with numerical integration


class Operators(Expressions):
    """The rules of commands with arguments."""

    def command(self, name: str) -> sympy.Expr:
        """The value of a command: a fraction, a root, a sum, an integral, …"""
        if name == "frac":
            top, bottom = self.argument(), self.argument()
            if bottom == 0:
                raise Unreadable("undefined")
            return checked(top / bottom)
        if name == "sqrt":
            index: sympy.Expr = sympy.Integer(2)
            if self.take("["):
                index = number(self.sum())
                self.expect("]")
            if self.next.kind == "number" and len(self.next.text) > 1:
                raise Unreadable("ambiguous root")
            radicand = number(self._primary())
            if index.is_Integer and index % 2 == 1 and radicand.is_negative:
                return -power(-radicand, 1 / index)
            return power(radicand, 1 / index)
        if name == "binom":
            top, bottom = self.argument(), self.argument()
            if top.is_number and (not (top.is_Integer and bottom.is_Integer) or not 0 <= top <= 20_000):
                raise Unreadable("number too large")
            return sympy.binomial(top, bottom)
        if name in ("lfloor", "lceil"):
            inner = number(self.sum())
            self.expect("rfloor" if name == "lfloor" else "rceil")
            return sympy.floor(inner) if name == "lfloor" else sympy.ceiling(inner)
        if name in ("gcd", "lcm", "max", "min"):
            return self._of_numbers(name)
        if name == "overline":
            inner = self.argument()
            if not inner.is_number or inner.is_real:
                raise Unreadable("a line over other than a complex number")
            return sympy.conjugate(inner)
        if name in ("sum", "prod"):
            return self._series(name)
        if name == "int":
            return self._integral()
        if name == "lim":
            return self._limit()
        raise Unreadable("not parseable")

    def _of_numbers(self, name: str) -> sympy.Expr:
        """`\\gcd(4, 6)`, `\\max(1, 2)`."""
        self.expect("(", "{set")
        values = [number(self.sum())]
        while self.take(","):
            values.append(number(self.sum()))
        self.expect(")", "set}")
        whole = name in ("gcd", "lcm")
        if not all(value.is_Integer if whole else value.is_number and value.is_extended_real for value in values):
            raise Unreadable("not parseable")
        functions = {"gcd": sympy.gcd, "lcm": sympy.lcm}
        if whole:
            return functions[name](values)
        return sympy.Max(*values) if name == "max" else sympy.Min(*values)

    def _bound(self, *separators: str) -> tuple[sympy.Symbol, sympy.Expr]:
        """`_{k=1}`, `_{x \\to 0}`: the variable, which stays bound, and the value after the separator."""
        self.expect("_")
        self.expect("{")
        name = self.next
        self.position += 1
        if name.kind != "letter" or name.subscript or name.text in ("pi", "e", "infty"):
            raise Unreadable("not parseable")
        self.expect(*separators)
        sign = -1 if self.take("-") else 1
        self.take("+")
        value = sign * (number(self._primary()) if separators == ("to",) else number(self.sum()))
        self.bound.append(name.text)
        return sympy.Symbol(name.text, real=True), value

    def _series(self, name: str) -> sympy.Expr:
        """`\\sum_{k=1}^{n} f(k)`; what is summed or multiplied is one product."""
        variable, first = self._bound("=")
        self.expect("}")
        self.expect("^")
        bound = self.bound.pop()
        last = self.argument()
        self.bound.append(bound)
        term = number(self.product())
        self.bound.pop()
        count = last - first + 1
        if count.is_Integer and 0 <= count <= TERMS:
            total = sympy.S.Zero if name == "sum" else sympy.S.One
            for index in range(int(count)):
                each = checked(term.subs(variable, first + index))
                total = checked(total + each if name == "sum" else total * each)
            return total
        if name == "sum":
            value = sympy.summation(term, (variable, first, last))
            if _is_found(value):
                return checked(sympy.simplify(value))
        return _named(name, variable, term, first, last)

    def _integral(self) -> sympy.Expr:
        """`\\int_a^b f(x)\\,dx`. Errors: Unreadable for one without limits."""
        self.expect("_")
        low = self.argument()
        self.expect("^")
        high = self.argument()
        end = self._differential()
        variable = self.tokens[end + 1].text
        inner = type(self)(self.tokens[self.position : end])
        inner.bound = [*self.bound, variable]
        integrand = number(inner.sum()) if inner.tokens else sympy.S.One
        if inner.position < len(inner.tokens):
            raise Unreadable("not parseable")
        self.position = end + 2
        symbol = sympy.Symbol(variable, real=True)
        value = sympy.integrate(integrand, (symbol, low, high))
        if _is_found(value) and (not value.is_number or _agrees(value, sympy.Integral(integrand, (symbol, low, high)))):
            return checked(value)
        return _named("int", symbol, integrand, low, high)

    def _differential(self) -> int:
        """The place of the `d` of the `dx` that ends an integrand."""
        depth = 0
        for place in range(self.position, len(self.tokens) - 1):
            token, after = self.tokens[place], self.tokens[place + 1]
            if token.kind == "operator":
                depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            if depth == 0 and token.kind == after.kind == "letter" and token.text == "d" and not after.subscript:
                return place
        raise Unreadable("an integral without a differential")

    def _limit(self) -> sympy.Expr:
        """`\\lim_{x \\to a} f(x)`; from both sides where none is given."""
        variable, target = self._bound("to")
        side = "+-"
        if self.take("^"):
            side = "+" if self.take("+") else "-"
            if side == "-":
                self.expect("-")
        self.expect("}")
        body = number(self.product())
        self.bound.pop()
        try:
            value = sympy.limit(body, variable, target, side if target.is_finite else "+-")
        except (ValueError, NotImplementedError) as error:  # different from the two sides, or unknown
            raise Unreadable("a limit that is not known") from error
        return checked(value) if _is_found(value) else _named("lim", variable, body, target)


def _is_found(value: sympy.Basic) -> bool:
    """Whether an operator was evaluated, and without conditions."""
    left = (sympy.Sum, sympy.Integral, sympy.Limit, sympy.Product, sympy.Piecewise, sympy.AccumBounds, sympy.nan)
    return isinstance(value, sympy.Expr) and not value.has(*left)


def _agrees(value: sympy.Expr, integral: sympy.Integral) -> bool:
    exact, numerical = sympy.N(value, 15), integral.evalf(15)
    if not (exact.is_real and numerical.is_real):
        return False
    return bool(abs(exact - numerical) <= AGREEMENT * max(1, abs(exact)))


def _named(name: str, variable: sympy.Symbol, body: sympy.Expr, *limits: sympy.Expr) -> sympy.Symbol:
    """The operator as a symbol, without the name of its variable; the space in it keeps it from being different."""
    inner = body.xreplace({variable: sympy.Symbol("#", real=True)})
    return sympy.Symbol(f"{name} {inner} {limits}", real=True)
