"""Tokens → an answer: lists, relations, sets, intervals, matrices and quantities, whole or `Unreadable`."""

import re
from dataclasses import replace

import sympy

from distill.grading.math.environments import expression_of, set_of
from distill.grading.math.expressions import Operand, symbol
from distill.grading.math.lists import Piece, listed, loosest
from distill.grading.math.quantities import Quantities
from distill.grading.math.regions import region_of
from distill.grading.math.units import NUMBERS
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

SUCH_THAT = ("mid", "|", ":")
RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "approx", "equiv"}
NUMBER_SETS = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals}
NOTHING = re.compile(
    r"(?:there (?:are|is) )?no ?(?:real |integer |such |valid )*(?:solutions?|values?|roots?)(?: exists?)?"
    r"|(?:the )?empty set"
)
EVERY = re.compile(
    r"(?:x is )?(?:all|any|every|the set of(?: all)?)(?: of)?(?: the)? (?:(positive|negative|non-?negative|nonzero) )?"
    r"(?:(reals?)(?: numbers?| values?)?|(integers?)|(natural) numbers?|(rational) numbers?)(?: of)?(?: x)?"
)
SIGNED = {
    "positive": sympy.Interval.open(0, sympy.oo), "negative": sympy.Interval.open(-sympy.oo, 0),
    "nonnegative": sympy.Interval(0, sympy.oo), "nonzero": sympy.Complement(sympy.S.Reals, sympy.FiniteSet(0)),
}  # fmt: skip
ELLIPSIS = Words("…")
ARTICLES = re.compile(r"(?:a|an|the) (?=\w)")
LARGEST = 200  # integers of a set that is given by bounds


class Reader(Quantities):
    """Reads answers: lists, relations, sets, quantities."""

    def whole(self) -> Value:
        """The whole text. Errors: Unreadable where a token is left."""
        if self.tokens and all(token.kind in ("word", "join") for token in self.tokens):
            text = " ".join(token.text.casefold() for token in self.tokens)
            if (points := named_set(text)) is not None:
                return points
            if text in ("infinity", "positive infinity", "negative infinity"):
                return Scalar(-sympy.oo if text[0] == "n" else sympy.oo)
            names = text.split(" and ")
            if len(names) > 1 and all(len(name.split()) <= 2 for name in names):
                return Sequence(tuple(map(Words, names)))
            if len(self.tokens) > 1 or text not in NUMBERS:
                return Words(ARTICLES.sub("", text, count=1) if ARTICLES.match(text) else text)
        pieces = self._pieces(spread=True)
        if self.position < len(self.tokens):
            raise Unreadable("not parseable")
        return listed(pieces)

    def group(self) -> Value:
        """What stands in brackets: one value, a sequence, an interval or a matrix."""
        opening = self.next.text
        self.position += 1
        if opening == "{set":
            if self.take("set}"):
                return Region(sympy.S.EmptySet)
            if self.next.kind == "letter" and self.peek(1).text in (*SUCH_THAT, "in"):
                return self._described()
            pieces = self._pieces(spread=True)
            self.expect("set}")
            return listed(pieces, "{}")
        pieces = self._pieces(spread=False)
        closing = self.next.text
        self.position += 1
        if opening == "{":
            if closing != "}":
                raise Unreadable("not parseable")
            return listed(pieces)
        if closing not in (")", "]") or self.tokens[self.position - 1].kind != "operator":
            raise Unreadable("not parseable")
        items = tuple(value for _, value in pieces)
        if len(items) == 1:
            if (opening, closing) not in (("(", ")"), ("[", "]")):
                raise Unreadable("not parseable")
            return items[0]
        if opening + closing in ("(]", "[)") and len(items) != 2:
            raise Unreadable("not parseable")
        return Sequence(items, opening + closing)

    def _described(self) -> Region:
        """`x \\in (0, 9) \\mid x < 1`: a set by the conditions that its members satisfy."""
        variable = symbol(self.next.text, self.next.subscript)
        self.position += 1
        domain = set_of(self._quantity()) if self.take("in") else sympy.S.Reals
        self.expect(*SUCH_THAT)
        self.bars += 1  # a bar ends a condition and begins no absolute value
        conditions = listed(self._pieces(spread=False), "{}")
        self.bars -= 1
        self.expect("set}")
        assert isinstance(conditions, Sequence)
        if not all(isinstance(each, Region) and each.variable == variable for each in conditions.items):
            raise Unreadable("a condition that is no inequality")
        sets = [each.points for each in conditions.items if isinstance(each, Region)]
        described = sympy.Union(*sets) if conditions.alternatives else sympy.Intersection(*sets)
        points = sympy.Intersection(domain, described)
        if isinstance(points, sympy.Range) and points.is_finite_set and points.size <= LARGEST:
            points = sympy.FiniteSet(*points)
        return Region(points, variable)

    def _pieces(self, spread: bool) -> list[Piece]:
        """Values up to a closing bracket or the end, each with what separates it from the one before. spread: ± gives
        two of them."""
        pieces: list[Piece] = []
        separator = ","
        while True:
            start, tokens_before, outer = self.position, list(self.tokens) if spread else [], self.signs
            if spread:
                self.signs = 0
            pieces.append((separator, self.item()))
            if spread and self.signs > 1:
                raise Unreadable("several plus-minus signs")
            if spread and self.signs:
                self.position, self.tokens, self.sign = start, tokens_before, -1
                pieces.append(("pm", self.item()))
                self.sign = 1
            if spread:
                self.signs = outer
            separators: list[str] = []
            while (self.next.kind == "operator" and self.next.text in (",", ";")) or self.next.kind == "join":
                separators.append(self.next.text)
                self.position += 1
            if not separators or self.next.kind == "end":
                return pieces
            separator = loosest(separators)

    def item(self) -> Value:
        """A chain of relations between quantities."""
        start = self.position
        approximate = self.take("approx")
        values = [self.part()]
        spans = [(start, self.position)]
        relations: list[str] = []
        while self.next.kind in ("operator", "command") and self.next.text in RELATIONS:
            relations.append(self.next.text)
            self.position += 1
            begin = self.position
            values.append(self.part())
            spans.append((begin, self.position))
        if approximate and not relations and isinstance(values[0], Scalar):
            scalar = values[0]
            return replace(scalar, decimals=scalar.decimals or 0, approximate=True)
        if not relations:
            if isinstance(values[0], Scalar) and self.take("pmod"):
                return Congruence(None, values[0].expression, self._modulus())
            return values[0]
        labels = [self._label(*span) for span in spans]
        if labels[0] is not None and any(self._ends_in_a_label(labels[0], *span) for span in spans[1:-1]):
            raise Unreadable("two equations without a separator")
        return self._related(values, relations, labels)

    def _modulus(self) -> sympy.Expr:
        return self.argument()

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
            return Congruence(expression_of(values[0]), expression_of(values[1]), self._modulus())
        if set(relations) <= {"<", ">", "<=", ">=", "!="}:
            comparison = Comparison(tuple(map(expression_of, values)), tuple(relations))
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
            first, names = values[0], labels[0].strip("()").split(",")
            point = labels[0][0] == "(" and isinstance(last, Sequence) and last.brackets == "()"
            if point and isinstance(last, Sequence) and len(last.items) == len(names) == len(set(names)):
                return Sequence(tuple(map(Labelled, names, last.items)), "()")  # (x, y) = (1, 2)
            side = first.expression if isinstance(first, Scalar) else None
            return Labelled(labels[0], last, side)
        sides = [expression_of(value) for value in values]
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
        core = [token for token in part if token.text != "'"]
        called = len(core) == 4 and core[0].kind == "letter" and core[1].text == "("
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

    def _ends_in_a_label(self, first: str, start: int, end: int) -> bool:
        """Whether the middle of a chain may be two sides, the `3 y` of `x = 3 y = 2`: a number, and the label of
        another equation. first: the label of the chain; the `2r` of `C = 2r = 10` is none."""
        for cut in range(start + 1, end):
            value, name = self.tokens[start:cut], self._label(cut, end)
            if any(t.kind in ("word", "opaque", "function") or (t.kind == "letter" and t.text != "pi") for t in value):
                return False
            if name is None or not (value[-1].kind in ("number", "letter") or value[-1].text in (")", "}", "!")):
                continue
            spaced = self.tokens[cut].spaced and value[-1].kind != "letter" and first[0].islower() == name[0].islower()
            return spaced or abs(ord(first[0]) - ord(name[0])) <= 1
        return False

    def part(self) -> Value:
        """A quantity, a ratio, or a union, intersection or difference of sets."""
        value = self._quantity()
        if self.next.text == ":" and isinstance(value, Scalar):
            parts = [value.expression]
            numbers = [self.tokens[self.position - 1]]
            while self.take(":"):
                parts.append(expression_of(self._quantity()))
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
                return self.environment()
            if token.text == "dots":
                self.position += 1
                return ELLIPSIS
            if token.text == "angle":
                return self._angle()
        if token.kind == "word":
            return self._words()
        if (special := self.literal()) is not None:
            return special
        if token.text == "-" and self.peek(1).text == "begin":
            self.position += 1
            return self.scaled(sympy.S.NegativeOne, self.environment())
        start = self.position
        operand: Operand = self.sum()
        if isinstance(operand, (Sequence, Region, Matrix)):
            return operand
        if self.next.text == "begin":
            return self.scaled(operand, self.environment())
        decimals = self.decimals(start)
        if decimals is not None and self.take("dots"):
            percent = self.take("%")
            return Scalar(operand, decimals, percent, approximate=True, truncated=True)
        plain = all(t.kind == "number" or t.text == "-" for t in self.tokens[start : self.position])
        return self.with_unit(operand, decimals, "plain" if plain else "")

    def _words(self) -> Value:
        """A number in words with its unit, or the words up to a separator or relation."""
        word = self.next.text.lower()
        if word in NUMBERS:
            self.position += 1
            return self.with_unit(sympy.Integer(NUMBERS[word]), None, "plain")
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


def named_set(text: str) -> Region | None:
    """The set that words name: "no real solutions", "all positive integers". None for other words."""
    if NOTHING.fullmatch(text):
        return Region(sympy.S.EmptySet)
    match = EVERY.fullmatch(text)
    if match is None:
        return None
    sign, real, integer, natural, _ = match.groups()
    numbers = (
        sympy.S.Reals if real else sympy.S.Integers if integer else sympy.S.Naturals if natural else sympy.S.Rationals
    )
    return Region(sympy.Intersection(numbers, SIGNED[sign.replace("-", "")]) if sign else numbers)


def _member(left: Value, right: Value) -> Value:
    """`x ∈ S`."""
    return Region(set_of(right), expression_of(left))
