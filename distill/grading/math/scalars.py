"""Are two single values the same: numbers, percentages, numbers in a base, quantities with a unit, expressions?

The conventions are listed in `distill.grading.math.comparison`.
"""

from fractions import Fraction

import sympy

from distill.grading.math.equality import same
from distill.grading.math.units import UNITS, Unit, may_convert
from distill.grading.math.values import Scalar


def equal_scalars(gold: Scalar, answer: Scalar) -> bool | None:
    """Whether two numbers, quantities or expressions are the same; None where that is not decided."""
    if gold.base != answer.base:
        return _bases(gold, answer)
    if gold.percent != answer.percent:
        plain, percentage = (answer, gold) if gold.percent else (gold, answer)
        hundredth = same(plain.expression, percentage.expression / 100)
        face = same(plain.expression, percentage.expression)
        return True if face or hundredth else None if None in (face, hundredth) else False
    if gold.unit is not None and answer.unit is not None:
        return _quantities(gold, answer, gold.unit, answer.unit)
    verdict = _numbers(gold, answer)
    if verdict is False and _may_be_one_quantity(gold, answer):
        return None
    unit = gold.unit or answer.unit
    if verdict is False and unit is not None:
        with_unit, without = (gold, answer) if gold.unit else (answer, gold)
        if unit.dimensions == (("angle", 1),) and same(with_unit.expression * sympy.pi / 180, without.expression):
            return True
        return None if _convertible(with_unit.expression, without.expression, unit) else False
    return verdict


def _may_be_one_quantity(gold: Scalar, answer: Scalar) -> bool:
    """Whether they are equal if a letter that was read as a variable is a unit: `0.05 m` beside `5 cm`."""
    one, other = _as_quantity(gold), _as_quantity(answer)
    if one is None or other is None or one[1].dimensions != other[1].dimensions:
        return False
    return same(one[0] * _rational(one[1].factor), other[0] * _rational(other[1].factor)) is not False


def _as_quantity(scalar: Scalar) -> tuple[sympy.Expr, Unit] | None:
    """The number and the unit, which may be the only variable in an expression."""
    if scalar.unit is not None:
        return scalar.expression, scalar.unit
    letters = list(scalar.expression.free_symbols)
    unit = UNITS.get(letters[0].name) if len(letters) == 1 else None
    return None if unit is None else (scalar.expression / letters[0], unit)


def _numbers(gold: Scalar, answer: Scalar) -> bool | None:
    """Compare two expressions; a decimal that may be the rounded other is undecided."""
    one, other = gold.expression, answer.expression
    verdict = same(one, other)
    if verdict is True or not (one.is_number and other.is_number):
        return _constant_of_integration(one, other) if verdict is False else verdict
    for exact, rounded in ((gold, answer), (answer, gold)):
        if rounded.decimals is None or (exact.decimals is not None and not rounded.approximate):
            continue
        error = sympy.Abs(exact.expression - rounded.expression) * 10**rounded.decimals
        if not error.is_comparable or error <= sympy.Rational(1001, 2000):
            return None
    return verdict


def _constant_of_integration(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """Expressions that differ in the case of the letter C only."""
    small, large = sympy.Symbol("c", real=True), sympy.Symbol("C", real=True)
    a, b = one.free_symbols, other.free_symbols
    if not ({small, large} <= a | b and len({small, large} & a) == len({small, large} & b) == 1):
        return False
    return same(one.xreplace({large: small}), other.xreplace({large: small})) is True


def _bases(gold: Scalar, answer: Scalar) -> bool | None:
    if gold.unit or answer.unit or gold.percent or answer.percent:
        return None
    if gold.expression == answer.expression:
        return True
    for based, other in ((gold, answer), (answer, gold)):
        if based.base is not None and other.base is None and str(other.expression) == based.digits:
            return None
    return False


def _quantities(gold: Scalar, answer: Scalar, unit: Unit, other: Unit) -> bool | None:
    if unit.words != other.words:
        return False if _numbers(gold, answer) is False and not (unit.dimensions or other.dimensions) else None
    if unit.dimensions != other.dimensions:
        return None if bool(unit.dimensions) != bool(other.dimensions) else False
    if unit.factor == other.factor:
        return _numbers(gold, answer)
    return same(gold.expression * _rational(unit.factor), answer.expression * _rational(other.factor))


def _convertible(with_unit: sympy.Expr, without: sympy.Expr, unit: Unit) -> bool:
    """Whether a number without unit may be the same quantity in another unit."""
    if not (with_unit.is_Rational and without.is_Rational) or 0 in (with_unit, without):
        return False
    ratio = with_unit / without
    return may_convert(Fraction(int(ratio.p), int(ratio.q)), unit)


def _rational(factor: Fraction) -> sympy.Expr:
    return sympy.Rational(factor.numerator, factor.denominator)
