"""Are two sets of real numbers, equations, inequalities, ratios, congruences or times the same?

True, False, or None where that is not decided; the conventions are listed in `distill.grading.math.comparison`.
"""

from collections.abc import Iterable

import sympy

from distill.grading.math.environments import set_of
from distill.grading.math.equality import same
from distill.grading.math.values import (
    Clock,
    Comparison,
    Congruence,
    Equation,
    Ratio,
    Region,
    Scalar,
    Sequence,
    Unreadable,
)

Verdict = bool | None


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """False if any verdict is False, else None if any is None, else True."""
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = result if verdict else None
    return result


def equal_regions(gold: Region, answer: Region) -> Verdict:
    """Compare two sets of real numbers, interval by interval where they are unions of intervals."""
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
        ends = all_of((same(low, low2), same(high, high2)))
        verdicts.append(False if ends is not None and (left, right) != (left2, right2) else ends)
    return all_of(verdicts)


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


def equal_equations(gold: Equation, answer: Equation) -> Verdict:
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


def equal_comparisons(gold: Comparison, answer: Comparison) -> Verdict:
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


def equal_ratios(gold: Ratio, answer: Ratio) -> Verdict:
    """Compare two ratios up to a common factor; times of day part by part."""
    if len(gold.parts) != len(answer.parts):
        return None if gold.clock or answer.clock else False
    exact = all_of(map(same, gold.parts, answer.parts))
    if exact or gold.clock or answer.clock:
        return exact
    if 0 in (gold.parts[0], answer.parts[0]):
        return exact
    return all_of(same(a * answer.parts[0], b * gold.parts[0]) for a, b in zip(gold.parts, answer.parts, strict=True))


def equal_congruences(gold: Congruence, answer: Congruence) -> Verdict:
    """Compare the residues of two congruences with the same left side and modulus."""
    if gold.left != answer.left:
        return None
    if gold.modulus != answer.modulus:
        return None
    difference = sympy.expand(gold.right - answer.right)
    if difference.is_Integer and gold.modulus.is_Integer and gold.modulus > 0:
        return bool(difference % gold.modulus == 0)
    return None


def equal_clocks(ratio: Ratio, clock: Clock) -> Verdict:
    """`15:30` beside "3:30 pm": a time without its half of the day is undecided where only that is missing."""
    if not ratio.clock or len(ratio.parts) != 2 or not all(part.is_Integer for part in ratio.parts):
        return None
    minutes = 60 * int(ratio.parts[0]) + int(ratio.parts[1])
    if minutes >= 13 * 60:
        return minutes == clock.minutes
    return None if (minutes - clock.minutes) % 720 == 0 else False


def as_regions(sequence: Sequence) -> list[Region] | None:
    """The sets of numbers that an interval or a list of intervals or inequalities may mean; None for anything else.

    "x > 1, x > 2" is the union or the intersection; whichever of them says nothing ("x < 1, x > 2" have no number in
    common) is not meant, unless "and" or "or" is written.
    """
    try:
        if sequence.brackets != "":
            return [Region(set_of(sequence))]
        parts = [set_of(item) for item in sequence.items]
    except Unreadable:
        return None
    if len(variables(sequence)) > 1:
        return None
    union, common = Region(sympy.Union(*parts)), Region(sympy.Intersection(*parts))
    inequalities = all(isinstance(item, Region) and item.variable is not None for item in sequence.items)
    everything, nothing = union.points == sympy.S.Reals, common.points is sympy.S.EmptySet
    if not inequalities:
        return [union]
    if sequence.alternatives:
        return [union, common] if everything else [union]
    if nothing:
        return [union, common] if sequence.both else [union]
    return [common] if everything else [union, common]


def variables(sequence: Sequence) -> set[sympy.Expr]:
    """The variables whose values the items of a list bound."""
    return {item.variable for item in sequence.items if isinstance(item, Region) and item.variable is not None}


def point_in(region: Region, scalar: Scalar) -> Verdict:
    """A set beside a single number."""
    if isinstance(region.points, sympy.FiniteSet) and len(region.points) == 1:
        return same(next(iter(region.points)), scalar.expression)
    if region.points is sympy.S.EmptySet and scalar.expression == 0:
        return None  # how many there are
    return None if region.points in (sympy.S.Integers, sympy.S.Naturals, sympy.S.Rationals) else False
