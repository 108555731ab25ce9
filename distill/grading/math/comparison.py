"""Are two answers the same? True, False, or None where that is not decided.

The forms are those of `distill.grading.math.values`. Conventions, each of which is a test:

- A label counts for nothing (`x = 5` is `5`), but two different labels do.
- A bare list is a multiset, `{…}` is a set, `(…)` is ordered; `(a, b)` is an open interval beside an interval.
- A unit that only one side has is not compared; two units are, with their factors. A letter that would make them
  equal as a unit leaves them undecided (`0.05 m` beside `5 cm`). A number that would be right in
  another unit is undecided.
- A percentage equals its number and its hundredth. A rounded decimal beside an exact number is undecided.
- A base that only one side has: the same digits are undecided, another value is wrong.
"""

from collections.abc import Iterable

import sympy

from distill.grading.math.equality import same
from distill.grading.math.reader import set_of
from distill.grading.math.scalars import equal_scalars
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

Verdict = bool | None
LONGEST = 200  # items of a sequence


def equal(gold: Value, answer: Value) -> Verdict:
    """Whether an answer denotes the same as the gold answer."""
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Labelled):
            return _labelled(one, other)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _words(gold, answer)
    if type(gold) is type(answer):
        return _alike(gold, answer)
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Region) and isinstance(other, Sequence):
            return _same_region(one, other)
        if isinstance(one, Matrix) and isinstance(other, Sequence):
            return _vector(one, other)
        if isinstance(one, Sequence) and isinstance(other, Scalar):
            return _one_of(one, other)
        if isinstance(one, Ratio) and isinstance(other, Scalar):
            quotient = len(one.parts) == 2 and one.parts[1] != 0 and same(one.parts[0] / one.parts[1], other.expression)
            return None if quotient is None or one.clock else bool(quotient)
        if isinstance(one, Congruence) and isinstance(other, Scalar):
            return True if one.left is None and one.right == other.expression else None
        if isinstance(one, (Equation, Comparison)) and isinstance(other, (Scalar, Sequence)):
            return False if not isinstance(other, Sequence) and isinstance(one, Equation) else None
        if isinstance(one, Region) and isinstance(other, Scalar):
            return _point(one, other)
        if isinstance(one, Matrix) and isinstance(other, Scalar):
            return False
    return None


def _alike(gold: Value, answer: Value) -> Verdict:
    """Two values of one form."""
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return equal_scalars(gold, answer)
    if isinstance(gold, Sequence) and isinstance(answer, Sequence):
        return _sequences(gold, answer)
    if isinstance(gold, Region) and isinstance(answer, Region):
        return _regions(gold, answer)
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return _equations(gold, answer)
    if isinstance(gold, Comparison) and isinstance(answer, Comparison):
        return _comparisons(gold, answer)
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        return _ratios(gold, answer)
    if isinstance(gold, Congruence) and isinstance(answer, Congruence):
        return _congruences(gold, answer)
    assert isinstance(gold, Matrix) and isinstance(answer, Matrix)
    if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
        column = len(gold.rows) == 1 == len(answer.rows[0]) or len(answer.rows) == 1 == len(gold.rows[0])
        return None if column else False
    return _all(
        equal(a, b) for one, other in zip(gold.rows, answer.rows, strict=True) for a, b in zip(one, other, strict=True)
    )


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    """False if one is, else None if one is, else True."""
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = result if verdict else None
    return result


# ---- sequences


def _sequences(gold: Sequence, answer: Sequence) -> Verdict:
    if len(gold.items) > LONGEST or len(answer.items) > LONGEST:
        return None
    kinds = {gold.brackets, answer.brackets}
    ordered = [kind for kind in (gold.brackets, answer.brackets) if kind not in ("", "{}")]
    if len(ordered) == 2:
        verdict = _in_order(gold.items, answer.items)
        if gold.brackets == answer.brackets:
            return verdict
        if len(gold.items) == len(answer.items) == 2 and ("(]" in kinds or "[)" in kinds):
            return False if verdict is not None or not kinds - {"(]", "[)"} else None
        return False if verdict is False else None
    if len(ordered) == 1:
        if _in_order(gold.items, answer.items):
            return True if "{}" not in kinds else None
        return False if _in_any_order(gold.items, answer.items) is False else None
    if kinds == {"{}"}:
        return _in_any_order(_distinct(gold.items), _distinct(answer.items))
    if "{}" in kinds:
        verdict = _in_any_order(_distinct(gold.items), _distinct(answer.items))
        return verdict if len(gold.items) == len(answer.items) or not verdict else None
    return _in_any_order(gold.items, answer.items)


def _in_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> Verdict:
    if len(gold) != len(answer):
        return False
    return _all(equal(a, b) for a, b in zip(gold, answer, strict=True))


def _in_any_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> Verdict:
    """Compare as multisets: each item is matched with one that is equal to it."""
    if len(gold) != len(answer):
        return False
    rest, unsure = list(answer), False
    for item in gold:
        verdicts = [equal(item, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _distinct(items: tuple[Value, ...]) -> tuple[Value, ...]:
    kept: list[Value] = []
    for item in items:
        if not any(equal(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


def _one_of(sequence: Sequence, scalar: Scalar) -> Verdict:
    """A single value beside a sequence: different, unless the sequence offers alternatives or repeats one value."""
    verdicts = [equal(item, scalar) for item in sequence.items]
    if len(sequence.items) == 1:
        return verdicts[0] if sequence.brackets == "{}" else None
    if all(verdict is not False for verdict in verdicts):
        return None
    return None if sequence.alternatives and any(verdict is not False for verdict in verdicts) else False


def _vector(matrix: Matrix, sequence: Sequence) -> Verdict:
    if len(matrix.rows) == 1 or len(matrix.rows[0]) == 1:
        entries = tuple(entry for row in matrix.rows for entry in row)
        verdict = _in_order(entries, sequence.items)
        return verdict if sequence.brackets in ("()", "[]") else None if verdict else verdict
    return None


# ---- labels, words


def _labelled(one: Labelled, other: Value) -> Verdict:
    if isinstance(other, Labelled):
        if one.label == other.label:
            return equal(one.value, other.value)
        renamed = _renamed(one, other)
        if renamed is not None:
            return renamed
        equation, second = _as_equation(one), _as_equation(other)
        if equation is not None and second is not None and (one.side or other.side):
            verdict = _equations(equation, second)
            if verdict is True:
                return True
        return False if equal(one.value, other.value) is False else None
    if isinstance(other, Equation):
        equation = _as_equation(one)
        return None if equation is None else _equations(equation, other)
    if isinstance(other, (Region, Comparison)) and isinstance(one.value, Scalar):
        point = one.value
        return _point(other, point) if isinstance(other, Region) else None
    return equal(one.value, other)


def _renamed(one: Labelled, other: Labelled) -> Verdict:
    """`W(n) = …` beside `W(x) = …`: the arguments' names are free. None where the labels are no such pair."""
    (name, _, argument), (second, _, renamed) = one.label.partition("("), other.label.partition("(")
    if name != second or not (len(argument) == len(renamed) == 2 and argument[0].isalpha() and renamed[0].isalpha()):
        return None
    if isinstance(one.value, Scalar) and isinstance(other.value, Scalar):
        old, new = (sympy.Symbol(letter, real=True) for letter in (renamed[0], argument[0]))
        if new in other.value.expression.free_symbols:
            return None
        return same(one.value.expression, other.value.expression.xreplace({old: new}))
    return None


def _as_equation(labelled: Labelled) -> Equation | None:
    if labelled.side is None or not isinstance(labelled.value, Scalar) or labelled.value.unit is not None:
        return None
    return Equation(labelled.side, labelled.value.expression)


def _words(gold: Value, answer: Value) -> Verdict:
    """Words are compared by their spelling; only two single words can be different."""
    if isinstance(gold, Words) and isinstance(answer, Words):
        if gold.text == answer.text:
            return True
        return False if " " not in gold.text + answer.text else None
    return None


# ---- sets, relations


def _regions(gold: Region, answer: Region) -> Verdict:
    one, other = gold.points, answer.points
    if one == other:
        return True
    pieces, others = _pieces(one), _pieces(other)
    if pieces is None or others is None:
        return None
    if len(pieces) != len(others):
        return False
    verdicts = []
    for (low, high, left, right), (low2, high2, left2, right2) in zip(pieces, others, strict=True):
        ends = _all((same(low, low2), same(high, high2)))
        verdicts.append(False if ends is not None and (left, right) != (left2, right2) else ends)
    return _all(verdicts)


Piece = tuple[sympy.Expr, sympy.Expr, bool, bool]


def _pieces(points: sympy.Set) -> list[Piece] | None:
    """A set of real numbers as its intervals from left to right; None where it is no union of intervals and points."""
    parts = points.args if isinstance(points, sympy.Union) else (points,)
    pieces: list[Piece] = []
    for part in parts:
        if isinstance(part, sympy.FiniteSet):
            pieces += [(point, point, False, False) for point in part]
        elif isinstance(part, sympy.Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif part is sympy.S.Reals:
            pieces.append((-sympy.oo, sympy.oo, True, True))
        elif part is not sympy.S.EmptySet:
            return None
    if len(pieces) > 1 and not all(piece[0].is_number for piece in pieces):
        return None
    return sorted(pieces, key=lambda piece: sympy.N(piece[0], 30)) if len(pieces) > 1 else pieces


def _same_region(region: Region, sequence: Sequence) -> Verdict:
    """A set of numbers beside a list or an interval."""
    if sequence.brackets == "":
        finite = isinstance(region.points, sympy.FiniteSet)
        return None if finite else False
    try:
        return _regions(region, Region(set_of(sequence)))
    except Unreadable:
        return None


def _point(region: Region, scalar: Scalar) -> Verdict:
    """A set beside a single number."""
    if isinstance(region.points, sympy.FiniteSet) and len(region.points) == 1:
        return same(next(iter(region.points)), scalar.expression)
    if region.points is sympy.S.EmptySet and scalar.expression == 0:
        return None  # how many there are
    return None if region.points in (sympy.S.Integers, sympy.S.Naturals, sympy.S.Rationals) else False


def _equations(gold: Equation, answer: Equation) -> Verdict:
    """Equal if the sides' differences are proportional; different if polynomials have other zeros."""
    if same(gold.left, answer.left) and same(gold.right, answer.right):
        return True
    one, other = gold.left - gold.right, answer.left - answer.right
    if same(one, other) or same(one, -other):
        return True
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    try:
        first, second = sympy.Poly(one, *symbols), sympy.Poly(other, *symbols)
    except sympy.PolynomialError:
        return same(gold.right, answer.right) if gold.left == answer.left else _proportional(one, other)
    if not (first.domain.is_ZZ or first.domain.is_QQ) or not (second.domain.is_ZZ or second.domain.is_QQ):
        return _proportional(one, other)
    if first.is_ground or second.is_ground:
        return None
    return bool(_radical(first) == _radical(second)) or (None if _radical(first).total_degree() > 2 else False)


def _radical(polynomial: sympy.Poly) -> sympy.Poly:
    """The product of the different factors: polynomials have the same zeros if theirs are equal."""
    return polynomial.to_field().sqf_part().monic()


def _proportional(one: sympy.Expr, other: sympy.Expr) -> Verdict:
    if other == 0:
        return None
    ratio = sympy.simplify(one / other)
    return True if ratio.is_number and ratio.is_nonzero else None


def _comparisons(gold: Comparison, answer: Comparison) -> Verdict:
    """Chains of inequalities in several variables, in either direction; a single one is compared by its difference."""
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
    reverse = Comparison(answer.sides[::-1], tuple(turned[relation] for relation in answer.relations[::-1]))
    for other in (answer, reverse):
        if gold.relations == other.relations and all(map(same, gold.sides, other.sides)):
            return True
    if len(gold.relations) == len(answer.relations) == 1:
        one = gold.sides[0] - gold.sides[1]
        for other in (answer, reverse):
            if other.relations == gold.relations:
                ratio = sympy.simplify((other.sides[0] - other.sides[1]) / one) if one != 0 else sympy.S.Zero
                if ratio.is_number and ratio.is_positive:
                    return True
        return None
    names = {frozenset(gold.sides), frozenset(answer.sides)}
    strict = set(gold.relations) in ({"<"}, {">"}) and set(answer.relations) in ({"<"}, {">"})
    return False if strict and len(names) == 1 else None


def _ratios(gold: Ratio, answer: Ratio) -> Verdict:
    if len(gold.parts) != len(answer.parts):
        return None if gold.clock or answer.clock else False
    exact = _all(map(same, gold.parts, answer.parts))
    if exact or gold.clock or answer.clock:
        return exact
    if 0 in (gold.parts[0], answer.parts[0]):
        return exact
    return _all(same(a * answer.parts[0], b * gold.parts[0]) for a, b in zip(gold.parts, answer.parts, strict=True))


def _congruences(gold: Congruence, answer: Congruence) -> Verdict:
    if gold.left != answer.left:
        return None
    if gold.modulus != answer.modulus:
        return None
    difference = sympy.expand(gold.right - answer.right)
    if difference.is_Integer and gold.modulus.is_Integer and gold.modulus > 0:
        return bool(difference % gold.modulus == 0)
    return None
