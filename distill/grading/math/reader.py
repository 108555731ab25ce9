"""Tokens → an answer: lists, relations, sets, intervals, matrices and quantities, whole or `Unreadable`."""

import re

import sympy

from distill.grading.math.expressions import Expressions, Operand, checked
from distill.grading.math.regions import region_of
from distill.grading.math.units import NUMBERS, PERCENT, POWERS, SCALES, Unit, unit_of, word_unit
from distill.grading.math.values import (
    Comparison,
    Congruence,
    Equation,
    Labelled,
    Matrix,
    Ratio,
    Region,
    Scalar,
    Sequence,
    Unreadable,
    Value,
    Words,
)

RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "approx", "equiv"}
NUMBER_SETS = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals}
NOTHING = re.compile(
    r"(?:there (?:are|is) )?no ?(?:real |integer |such |valid )*(?:solutions?|values?|roots?)(?: exists?)?"
)


class Reader(Expressions):
    """Reads answers: lists, relations, sets, quantities."""

    def whole(self) -> Value:
        """The whole text. Errors: Unreadable where a token is left."""
        if self.tokens and all(token.kind in ("word", "join") for token in self.tokens):
            text = " ".join(token.text.casefold() for token in self.tokens)
            if NOTHING.fullmatch(text):
                return Region(sympy.S.EmptySet)
            if len(self.tokens) > 1 or text not in NUMBERS:
                return Words(text)
        items, alternatives = self._items(spread=True)
        if self.position < len(self.tokens):
            raise Unreadable("not parseable")
        return items[0] if len(items) == 1 else Sequence(tuple(items), "", alternatives)

    def group(self) -> Value:
        """What stands in brackets: one value, a sequence, an interval or a matrix."""
        opening = self.next.text
        self.position += 1
        if opening == "{set":
            if self.take("set}"):
                return Region(sympy.S.EmptySet)
            items, _ = self._items(spread=True)
            self.expect("set}")
            return Sequence(tuple(items), "{}")
        items, alternatives = self._items(spread=False)
        closing = self.next.text
        self.position += 1
        if opening == "{":
            if closing != "}":
                raise Unreadable("not parseable")
            return items[0] if len(items) == 1 else Sequence(tuple(items), "", alternatives)
        if closing not in (")", "]") or self.tokens[self.position - 1].kind != "operator":
            raise Unreadable("not parseable")
        if len(items) == 1:
            if (opening, closing) not in (("(", ")"), ("[", "]")):
                raise Unreadable("not parseable")
            return items[0]
        if opening + closing in ("(]", "[)") and len(items) != 2:
            raise Unreadable("not parseable")
        return Sequence(tuple(items), opening + closing)

    def _items(self, spread: bool) -> tuple[list[Value], bool]:
        """Values up to a closing bracket or the end, and whether "or" joins them. spread: ± gives two of them."""
        items: list[Value] = []
        alternatives = False
        while True:
            if not spread:
                items.append(self._item())
            else:
                start, tokens_before, outer = self.position, list(self.tokens), self.signs
                self.signs = 0
                item = self._item()
                if self.signs > 1:
                    raise Unreadable("several plus-minus signs")
                items += item.items if isinstance(item, Sequence) and not item.brackets else [item]
                if self.signs:
                    self.position, self.tokens, self.sign = start, tokens_before, -1
                    items.append(self._item())
                    self.sign = 1
                self.signs = outer
            separated = False
            while (self.next.kind == "operator" and self.next.text in (",", ";")) or self.next.kind == "join":
                alternatives |= self.next.text == "or"
                self.position, separated = self.position + 1, True
            if not separated or (self.next.kind == "end" and items):
                return items, alternatives

    def _item(self) -> Value:
        """A chain of relations between quantities."""
        start = self.position
        approximate = self.take("approx")
        values = [self._part()]
        spans = [(start, self.position)]
        relations: list[str] = []
        while self.next.kind in ("operator", "command") and self.next.text in RELATIONS:
            relations.append(self.next.text)
            self.position += 1
            begin = self.position
            values.append(self._part())
            spans.append((begin, self.position))
        if approximate and not relations and isinstance(values[0], Scalar):
            scalar = values[0]
            return Scalar(scalar.expression, scalar.decimals or 0, scalar.percent, scalar.unit, approximate=True)
        if not relations:
            if isinstance(values[0], Scalar) and self.take("pmod"):
                return Congruence(None, values[0].expression, self._modulus())
            return values[0]
        labels = [self._label(*span) for span in spans]
        return self._related(values, relations, labels)

    def _modulus(self) -> sympy.Expr:
        return self._argument()

    def _related(self, values: list[Value], relations: list[str], labels: list[str | None]) -> Value:
        if "approx" in relations:
            first = relations.index("approx")
            if first == 0 and labels[0] is not None and len(values) == 2:
                relations = ["="]
            elif any(relation not in ("=", "approx") for relation in relations):
                raise Unreadable("not parseable")
            else:
                values, relations, labels = values[: first + 1], relations[:first], labels[: first + 1]
            if not relations:
                return values[0]
        if set(relations) == {"="}:
            return self._equal(values, labels)
        if relations == ["in"]:
            return _member(values[0], values[1])
        if relations == ["equiv"]:
            self.expect("pmod")
            return Congruence(_expression(values[0]), _expression(values[1]), self._modulus())
        if set(relations) <= {"<", ">", "<=", ">=", "!="}:
            comparison = Comparison(tuple(map(_expression, values)), tuple(relations))
            return region_of(comparison) or comparison
        raise Unreadable("not parseable")

    def _equal(self, values: list[Value], labels: list[str | None]) -> Value:
        """`x = 5`, `2 + 4 = 6`, `y = 2x + 1`: a labelled value, a value with its derivation, or an equation."""
        if len(values) == 2 and labels[0] is None and labels[1] is not None:
            values, labels = values[::-1], labels[::-1]
        last = values[-1]
        if labels[0] is not None:
            stated = [value for value in values[1:-1] if isinstance(value, Scalar) and value.digits == "plain"]
            if any(isinstance(last, Scalar) and value.expression != last.expression for value in stated):
                raise Unreadable("contradictory equation")
            first = values[0]
            side = first.expression if isinstance(first, Scalar) else None
            return Labelled(labels[0], last, side)
        sides = [_expression(value) for value in values]
        if all(side.is_number for side in sides):
            if all(sympy.simplify(side - sides[-1]) == 0 for side in sides[:-1]):
                return last
            raise Unreadable("contradictory equation")
        if len(sides) != 2:
            raise Unreadable("not parseable")
        return Equation(sides[0], sides[1])

    def _label(self, start: int, end: int) -> str | None:
        """The tokens as a label, if they are a symbol, a function of symbols, a name or a tuple of symbols."""
        part = self.tokens[start:end]
        called = len(part) == 4 and part[0].kind == "letter" and part[1].text == "("
        if not called and any(token.kind in ("number", "function", "join", "end") for token in part):
            return None
        text = "".join(f"{token.text}_{token.subscript}" if token.subscript else token.text for token in part)
        kinds = "".join(
            {"letter": "a", "opaque": "a", "word": "w", "command": "c", "number": "1"}.get(t.kind, t.text) for t in part
        )
        if not part or (part[0].text in ("e", "i", "pi", "infty") and not part[0].subscript):
            return None
        symbols = r"a'*"
        forms = (symbols, r"a'*\((?:a|1)(?:,a)*\)", r"\(a(?:,a)+\)", r"a(?::a)+", r"ca+", r"w+a?", r"\{a(?:,a)+\}")
        if any(re.fullmatch(form, kinds) for form in forms) or re.fullmatch(r"[A-Z]{2,4}", text):
            return text
        return None

    def _part(self) -> Value:
        """A quantity, a ratio, or a union, intersection or difference of sets."""
        value = self._quantity()
        if self.next.text == ":" and isinstance(value, Scalar):
            parts = [value.expression]
            numbers = [self.tokens[self.position - 1]]
            while self.take(":"):
                parts.append(_expression(self._quantity()))
                numbers.append(self.tokens[self.position - 1])
            plain = all(number.kind == "number" for number in numbers)
            clock = plain and all(len(number.text) == 2 for number in numbers[1:]) and len(parts) <= 3
            return Ratio(tuple(parts), clock)
        while self.next.kind == "command" and self.next.text in ("cup", "cap", "setminus"):
            operation = self.next.text
            self.position += 1
            left, right = set_of(value), set_of(self._quantity())
            if operation == "cup":
                value = Region(sympy.Union(left, right))
            else:
                value = Region(sympy.Intersection(left, right) if operation == "cap" else sympy.Complement(left, right))
        return value

    def _quantity(self) -> Value:
        """A scalar with its unit, or anything that stands in brackets."""
        token = self.next
        if token.kind == "command":
            if token.text == "emptyset":
                self.position += 1
                return Region(sympy.S.EmptySet)
            if token.text == "mathbb":
                return self._number_set()
            if token.text == "begin":
                return self._matrix()
            if token.text == "angle":
                return self._angle()
        if token.kind == "word":
            return self._words()
        if (special := self._literal()) is not None:
            return special
        start = self.position
        operand: Operand = self.sum()
        if isinstance(operand, (Sequence, Region, Matrix)):
            return operand
        if self.next.text == "begin" and operand.is_number:
            raise Unreadable("not parseable")
        decimals = self._decimals(start)
        plain = all(t.kind == "number" or t.text == "-" for t in self.tokens[start : self.position])
        return self._with_unit(operand, decimals, "plain" if plain else "")

    def _literal(self) -> Scalar | None:
        """Numbers that are no expression: with a base, and `1 1/2`."""
        start = self.position
        minus = self.take("-")
        first, second, slash, third = (self.peek(ahead) for ahead in range(4))
        sign = -1 if minus else 1
        if first.kind == "number" and first.subscript:
            self.position += 1
            if not (first.subscript.isdigit() and 2 <= int(first.subscript) <= 36 and first.text.isdigit()):
                raise Unreadable("unknown base")
            base = int(first.subscript)
            try:
                number = int(first.text, base)
            except ValueError as error:
                raise Unreadable("digits beyond the base") from error
            return Scalar(sympy.Integer(sign * number), base=base, digits=first.text.lstrip("0") or "0")
        digits = all(token.kind == "number" and token.text.isdigit() for token in (first, second, third))
        if digits and slash.text == "/" and second.spaced:
            top, bottom = int(second.text), int(third.text)
            if not 0 < top < bottom:
                raise Unreadable("ambiguous mixed number")
            self.position += 4
            value = sympy.Integer(first.text) + sympy.Rational(top, bottom)
            return self._with_unit(sign * value, None, "")
        self.position = start
        return None

    def _decimals(self, start: int) -> int | None:
        """Digits after the point of the decimal number that was just read, None for any other expression."""
        part = self.tokens[start : self.position]
        if part and part[0].text == "-":
            part = part[1:]
        if len(part) != 1 or part[0].kind != "number" or "." not in part[0].text:
            return None
        mantissa, _, exponent = part[0].text.lower().partition("e")
        return len(mantissa.partition(".")[2]) - int(exponent or 0)

    def _with_unit(self, value: sympy.Expr, decimals: int | None, digits: str) -> Scalar:
        """The scalar with the percent sign, degree sign or unit that follows it."""
        if self.take("%") or (self.next.kind == "word" and self.next.text.lower() in PERCENT):
            if self.next.kind == "word" and self.next.text.lower() in PERCENT:
                self.position += 1
            return Scalar(value, decimals, percent=True)
        if degrees := self._degrees():
            self.position += degrees
            return Scalar(value, decimals, unit=unit_of("degree"))
        while self.next.kind == "word" and self.next.text.lower() in SCALES:
            value, decimals = value * SCALES[self.next.text.lower()], None
            self.position += 1
        unit = self._unit()
        return Scalar(value, decimals, unit=unit, digits=digits)

    def _unit(self) -> Unit | None:
        """Words and their powers after a number; None where none follow."""
        unit, exponent, pending, seen = Unit(), 1, 1, False
        while self.next.kind in ("word", "operator"):
            text = self.next.text
            follows = self.peek(1).kind == "word"
            if self.next.kind == "word":
                self.position, seen = self.position + 1, True
                if text.lower() in ("per", "a", "an", "each") and follows:
                    exponent = -1 if text.lower() == "per" else exponent
                    continue
                if text.lower() in POWERS and follows:
                    pending = POWERS[text.lower()]
                    continue
                if text.lower() in ("th", "of", "the"):
                    continue
                powers = {"squared": 2, "cubed": 3}
                own = self._unit_power() if self.next.text == "^" else powers.get(self.next.text.lower(), 1)
                self.position += self.next.text.lower() in powers
                unit = unit.times(word_unit(text), exponent * pending * own)
                pending = 1
            elif seen and text in ("/", "*") and follows:
                self.position += 1
                exponent = -1 if text == "/" else exponent
            else:
                break
        return unit if seen and unit != Unit() else None

    def _unit_power(self) -> int:
        self.expect("^")
        exponent = self._exponent()
        if not (exponent.is_Integer and abs(exponent) <= 9):
            raise Unreadable("not parseable")
        return int(exponent)

    def _words(self) -> Value:
        """A number in words with its unit, or the words up to a separator or relation."""
        word = self.next.text.lower()
        if word in NUMBERS:
            self.position += 1
            return self._with_unit(sympy.Integer(NUMBERS[word]), None, "plain")
        text: list[str] = []
        while self.next.kind == "word":
            text.append(self.next.text.casefold())
            self.position += 1
        if self.next.kind == "letter" and self.peek(1).text == "=":
            text.append(self.next.text)
            self.position += 1
        return Words(" ".join(text))

    def _angle(self) -> Value:
        """`\\angle ABC` as a name."""
        self.position += 1
        name = ""
        while self.next.kind == "letter":
            name += self.next.text
            self.position += 1
        if not name:
            raise Unreadable("not parseable")
        return Words(f"angle {name}")

    def _number_set(self) -> Value:
        self.position += 1
        name = self.next.text
        if name == "{":
            name = self.peek(1).text
            self.position += 2
            self.expect("}")
        else:
            self.position += 1
        if name not in NUMBER_SETS:
            raise Unreadable("unknown set")
        return Region(NUMBER_SETS[name])

    def _matrix(self) -> Value:
        """`\\begin{pmatrix}…\\end{pmatrix}` and its like."""
        self.position += 1
        name = self._environment()
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix"):
            raise Unreadable("unknown environment")
        if name == "array" and self.next.text == "{":
            while not self.take("}"):
                if self.next.kind == "end":
                    raise Unreadable("not parseable")
                self.position += 1
        rows: list[list[Value]] = [[]]
        while not self.take("end"):
            rows[-1].append(self._part())
            if self.take("\\\\"):
                if self.next.text != "end":
                    rows.append([])
            elif not self.take("&") and self.next.text != "end":
                raise Unreadable("not parseable")
        if self._environment() != name or len({len(row) for row in rows}) != 1:
            raise Unreadable("not parseable")
        return Matrix(tuple(map(tuple, rows)))

    def _environment(self) -> str:
        self.expect("{")
        name = ""
        while self.next.kind in ("letter", "word"):
            name += self.next.text
            self.position += 1
        self.expect("}")
        return name


def _expression(value: Value) -> sympy.Expr:
    """The value as an expression. Errors: Unreadable where it has a unit or is none."""
    if isinstance(value, Scalar) and value.unit is None and value.base is None:
        return checked(value.expression / 100) if value.percent else value.expression
    raise Unreadable("not parseable")


def set_of(value: Value) -> sympy.Set:
    """The value as a set of real numbers. Errors: Unreadable."""
    if isinstance(value, Region):
        return value.points
    if isinstance(value, Sequence):
        try:
            if value.brackets == "{}":
                return sympy.FiniteSet(*map(_expression, value.items))
            if value.brackets[:1] in ("(", "[") and len(value.items) == 2:
                low, high = map(_expression, value.items)
                return sympy.Interval(low, high, value.brackets[0] == "(", value.brackets[1] == ")")
        except (ValueError, NotImplementedError) as error:  # sympy's, for ends that are not real numbers
            raise Unreadable("not an interval") from error
    raise Unreadable("not a set")


def _member(left: Value, right: Value) -> Value:
    """`x ∈ S`."""
    return Region(set_of(right), _expression(left))
