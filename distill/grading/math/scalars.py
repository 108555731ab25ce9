"""Are two single values the same: numbers, percentages, numbers in a base, quantities with a unit, expressions?

The conventions are listed in `distill.grading.math.comparison`.
"""

import re
from fractions import Fraction

import sympy

from distill.grading.math.equality import same
from distill.grading.math.expressions import UNKNOWN_BASE
from distill.grading.math.units import UNITS, Unit, may_convert
from distill.grading.math.values import Scalar

LETTERS = {name: unit for name, unit in UNITS.items() if len(name) == 1} | {
    "Omega": UNITS["ohm"], "mu": Unit(Fraction(1, 10**6)),
}  # fmt: skip
DIFFERENT_SCALES = {(("celsius",), ("fahrenheit",)), (("fahrenheit",), ("celsius",))}
DEGREES, RADIANS = (("angle", 1),), (("radian", 1),)


def equal_scalars(gold: Scalar, answer: Scalar) -> bool | None:
    """Whether two numbers, quantities or expressions are the same; None where that is not decided."""
    if gold.base != answer.base:
        return _bases(gold, answer)
    if gold.percent != answer.percent:
        plain, percentage = (answer, gold) if gold.percent else (gold, answer)
        hundredth = same(plain.expression, percentage.expression / 100)
        face = same(plain.expression, percentage.expression)
        if face and not hundredth and plain.expression.is_number and abs(plain.expression) <= 1:
            return None  # 0.5 beside 0.5%: a missing sign, or a fraction and a percentage
        return True if face or hundredth else None if None in (face, hundredth) else False
    if gold.unit is not None and answer.unit is not None:
        return _quantities(gold, answer, gold.unit, answer.unit)
    verdict = _numbers(gold, answer)
    if verdict is False and _may_be_one_quantity(gold, answer):
        return None
    unit = gold.unit or answer.unit
    if verdict is False and unit is not None:
        with_unit, without = (gold, answer) if gold.unit else (answer, gold)
        if unit.dimensions == DEGREES and same(with_unit.expression * sympy.pi / 180, without.expression):
            return True
        return None if _convertible(with_unit.expression, without.expression, unit) else False
    return verdict


def _may_be_one_quantity(gold: Scalar, answer: Scalar) -> bool:
    """Whether they are equal if letters that were read as variables are units: `0.05 m` beside `5 cm`, `5 m` beside
    `5`."""
    one, other = _as_quantity(gold), _as_quantity(answer)
    if one is None or other is None:
        return False
    if one[1] == Unit() or other[1] == Unit():
        return one[1] != other[1] and same(one[0], other[0]) is not False
    if one[1].dimensions != other[1].dimensions:
        return False
    return same(one[0] * _rational(one[1].factor), other[0] * _rational(other[1].factor)) is not False


def _as_quantity(scalar: Scalar) -> tuple[sympy.Expr, Unit] | None:
    """The number and the unit, which may be the product of the variables of an expression; None for a polynomial."""
    if scalar.unit is not None:
        return scalar.expression, scalar.unit
    number, unit = sympy.S.One, Unit()
    for factor in sympy.Mul.make_args(scalar.expression):
        base, exponent = factor.as_base_exp()
        if factor.is_number:
            number *= factor
        elif base.is_Symbol and base.name in LETTERS and exponent.is_Integer and abs(exponent) <= 9:
            unit = unit.times(LETTERS[base.name], int(exponent))
        else:
            return None
    return number, unit


def _numbers(gold: Scalar, answer: Scalar) -> bool | None:
    """Compare two expressions; a decimal that may be the rounded other is undecided."""
    one, other = gold.expression, answer.expression
    if one.has(UNKNOWN_BASE) or other.has(UNKNOWN_BASE):
        return _logarithms(one, other)
    if one.is_Symbol and other.is_Symbol and one.name != other.name and one.name.lower() == other.name.lower():
        return None  # A beside a
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


def _logarithms(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """With a logarithm whose base is not written: equal for every base, or different for all that are usual."""
    if same(one, other):
        return True
    bases = (sympy.S.One, sympy.log(10), sympy.log(2))
    verdicts = {same(one.xreplace({UNKNOWN_BASE: base}), other.xreplace({UNKNOWN_BASE: base})) for base in bases}
    return False if verdicts == {False} else None


def _constant_of_integration(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """Expressions that differ in the case of the letter C only."""
    names = [{s for s in side.free_symbols if re.fullmatch(r"[cC](_\w+)?", s.name)} for side in (one, other)]
    if not names[0] or len(names[0]) != len(names[1]) or names[0] == names[1]:
        return _other_constant(one, other)
    lower = {s: sympy.Symbol(s.name.lower(), real=True) for s in names[0] | names[1]}
    if any(len({lower[s] for s in side}) != len(side) for side in names):
        return False
    return same(one.xreplace(lower), other.xreplace(lower)) is True


def _other_constant(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """`x^2 + C` beside `x^2 + K`: an added letter that only one side has is undecided beside an added C."""
    for constant, side in ((one, other), (other, one)):
        letters, others = constant.free_symbols - side.free_symbols, side.free_symbols - constant.free_symbols
        if len(letters) == len(others) == 1 and {s.name for s in letters} <= {"C", "c"}:
            (letter,), (second,) = letters, others
            if constant.coeff(letter) == 1 and constant != letter and same(constant.xreplace({letter: second}), side):
                return None
    return False


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
    if (unit.words, other.words) in DIFFERENT_SCALES:
        return None
    if {unit.dimensions, other.dimensions} == {DEGREES, RADIANS}:
        degrees, radians = (gold, answer) if unit.dimensions == DEGREES else (answer, gold)
        factor = unit.factor if unit.dimensions == DEGREES else other.factor
        return same(degrees.expression * _rational(factor) * sympy.pi / 180, radians.expression)
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
