"""Are two single values the same: numbers, percentages, numbers in a base, quantities with a unit, expressions?

The conventions are listed in `distill.grading.math.comparison`.
"""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import sympy

from distill.grading.math.equality import same
from distill.grading.math.expressions import UNKNOWN_BASE
from distill.grading.math.units import DERIVED, SYMBOLS, UNITS, Dimensions, Unit, may_convert
from distill.grading.math.values import Scalar

RARE = {  # letters that are units only beside a unit: they are common names of variables
    **{name: UNITS[name] for name in "CFTHl"}, "M": Unit(Fraction(1000)).times(UNITS["mol"]).times(UNITS["m"], -3),
}  # fmt: skip
LETTERS = {name: unit for name, unit in UNITS.items() if len(name) == 1 and name not in RARE} | {
    "Omega": UNITS["ohm"], "mu": Unit(Fraction(1, 10**6)),
}  # fmt: skip
SPELLED = {"Omega": "ohm", "mu": "u"}
DIFFERENT_SCALES = {(("celsius",), ("fahrenheit",)), (("fahrenheit",), ("celsius",))}
DEGREES, RADIANS = (("angle", 1),), (("radian", 1),)
# C, F, T and H may be degrees, tons and hours
DOUBTFUL = {DERIVED[name] for name in ("charge", "capacitance", "field", "inductance")}
YEAR = Fraction(31_557_600)  # seconds
MONTHS = Fraction(1, 10)  # by how much days and months differ at most: 28 days, 30 days, 360 days
TONNE = Unit(Fraction(1000), (("mass", 1),))
TONS = (Fraction("907.18474"), Fraction("1016.0469088"))  # in kilograms: the other units of that name
PAIRS = {"pair": 2, "couple": 2}
THOUSANDS = {"k": 1000, "K": 1000, "M": 10**6, "B": 10**9}


def equal_scalars(gold: Scalar, answer: Scalar) -> bool | None:
    """Whether two numbers, quantities or expressions are the same; None where that is not decided."""
    if gold.base != answer.base:
        return _bases(gold, answer)
    if gold.percent != answer.percent:
        return _percentage(answer, gold) if gold.percent else _percentage(gold, answer)
    if gold.unit is not None and answer.unit is not None:
        return _quantities(gold, answer, gold.unit, answer.unit)
    verdict = _numbers(gold, answer)
    if verdict is False and (_may_be_one_quantity(gold, answer) or _as_stated(gold, answer)):
        return None
    if verdict is False and (_abbreviated(gold, answer) or _abbreviated(answer, gold)):
        return None
    unit = gold.unit or answer.unit
    if verdict is False and unit is not None:
        with_unit, without = (gold, answer) if gold.unit else (answer, gold)
        if unit.dimensions == DEGREES:
            angle = _numbers(with_unit, without, sympy.pi / 180 * _rational(unit.factor))
            if angle is not False:
                return angle
        return None if _convertible(with_unit.expression, without.expression, unit) else False
    return verdict


def as_fraction(scalar: Scalar) -> Scalar:
    """A percentage as a number: `33.3%` is 0.333; any other scalar is itself. A whole percentage may be rounded."""
    if not scalar.percent:
        return scalar
    decimals = 0 if scalar.decimals is None and scalar.expression.is_Integer else scalar.decimals
    return replace(
        scalar,
        expression=scalar.expression / 100,
        decimals=None if decimals is None else decimals + 2,
        percent=False,
    )


def _percentage(plain: Scalar, percentage: Scalar) -> bool | None:
    hundredth = _numbers(plain, as_fraction(percentage))
    face = _numbers(plain, percentage)
    if face and not hundredth and plain.expression.is_number and abs(plain.expression) <= 1:
        return None  # 0.5 beside 0.5%: a missing sign, or a fraction and a percentage
    return True if face or hundredth else None if None in (face, hundredth) else False


def _as_stated(gold: Scalar, answer: Scalar) -> bool:
    """Whether one is the number that the other scales by a word: `7` beside `7 dozen`, which may count dozens."""
    return any(
        one.stated is not None and other.stated is None and same(one.stated, other.expression) is not False
        for one, other in ((gold, answer), (answer, gold))
    )


def _abbreviated(short: Scalar, other: Scalar) -> bool:
    """Whether the letter after a number may stand for thousands: `5k` beside `5000`, `50K` (kelvin) beside `50000`."""
    if other.unit is not None or not other.expression.is_number:
        return False
    if short.unit is not None:
        return short.unit == UNITS["K"] and same(1000 * short.expression, other.expression) is not False
    letters = {letter for letter in short.expression.free_symbols if letter.name in THOUSANDS}
    if len(letters) != 1 or letters != short.expression.free_symbols:
        return False
    (letter,) = letters
    number = short.expression.coeff(letter)
    if not number.is_number or short.expression != number * letter:
        return False
    return same(number * THOUSANDS[letter.name], other.expression) is not False


def _may_be_one_quantity(gold: Scalar, answer: Scalar) -> bool:
    """Whether they are equal if letters that were read as variables are units: `0.05 m` beside `5 cm`, `5 m` beside
    `5`, `5 mA` beside `5\\text{ mA}`."""
    for number, unit in _as_quantities(gold, answer.unit is not None):
        for other_number, other in _as_quantities(answer, gold.unit is not None):
            if Unit() in (unit, other):
                equal = unit != other and same(number, other_number) is not False
            else:
                scaled = number * _rational(unit.factor), other_number * _rational(other.factor)
                equal = unit.dimensions == other.dimensions and same(*scaled) is not False
            if equal:
                return True
    return False


def _as_quantities(scalar: Scalar, beside_unit: bool) -> list[tuple[sympy.Expr, Unit]]:
    """The number and the unit, which may be the product of the variables of an expression, or two of them a prefix and
    a symbol. None for a polynomial. beside_unit: whether the other scalar has a unit, and rare ones may be meant."""
    if scalar.unit is not None:
        return [(scalar.expression, scalar.unit)]
    letters = LETTERS | RARE if beside_unit else LETTERS
    number, powers = sympy.S.One, {}
    for factor in sympy.Mul.make_args(scalar.expression):
        base, exponent = factor.as_base_exp()
        if factor.is_number:
            number *= factor
        elif base.is_Symbol and exponent.is_Integer and abs(exponent) <= 9:
            powers[base.name] = int(exponent)
        else:
            return []
    found = []
    if powers.keys() <= letters.keys():
        product = Unit()
        for name, exponent in powers.items():
            product = product.times(letters[name], exponent)
        found.append((number, product))
    if len(powers) == 2 and set(powers.values()) == {1}:
        names = ("".join(SPELLED.get(name, name) for name in pair) for pair in permutations(powers))
        found += [(number, UNITS[name]) for name in names if name in UNITS and name not in SYMBOLS]
    return found


def _numbers(
    gold: Scalar, answer: Scalar, factor: sympy.Expr = sympy.S.One, its_factor: sympy.Expr = sympy.S.One
) -> bool | None:
    """Compare two expressions times their factors; a decimal that may be the rounded other is undecided."""
    one, other = gold.expression * factor, answer.expression * its_factor
    if one.has(UNKNOWN_BASE) or other.has(UNKNOWN_BASE):
        return _logarithms(one, other)
    if one.is_Symbol and other.is_Symbol and one.name != other.name and one.name.lower() == other.name.lower():
        return None  # A beside a
    verdict = same(one, other)
    if verdict is True or not (one.is_number and other.is_number):
        return _constant_of_integration(one, other) if verdict is False else verdict
    ratio = factor / its_factor
    return None if _rounded(gold, answer, ratio) or _rounded(answer, gold, 1 / ratio) else verdict


def _rounded(exact: Scalar, decimal: Scalar, ratio: sympy.Expr) -> bool:
    """Whether a decimal may be the other number, rounded or cut off. ratio: of the other's unit to the decimal's. Of
    two decimals neither is rounded, unless it says so, or is a conversion and has more digits of one quantity."""
    places = decimal.decimals
    if places is None and ratio.is_Rational and min(ratio.p, ratio.q) > 1 and decimal.expression.is_Integer:
        places = 0 if abs(decimal.expression) >= 10 else None  # 62 mph beside 100 km/h
    if places is None:
        return False
    digit = sympy.Integer(10) ** -places
    if exact.decimals is not None and not decimal.approximate:
        finer = sympy.Integer(10) ** -exact.decimals * ratio
        if ratio == 1 or not digit <= finer:
            return False
    error = (sympy.Abs(exact.expression) * ratio - sympy.Abs(decimal.expression)) / digit
    if not error.is_comparable:
        return True
    half = sympy.Rational(1001, 2000)
    same_sign = sympy.Abs(exact.expression * ratio - decimal.expression) <= 2 * digit
    return bool(same_sign and -half <= error <= (2 * half if decimal.truncated else half))


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
    factors = _rational(unit.factor), _rational(other.factor)
    if {unit.dimensions, other.dimensions} == {DEGREES, RADIANS}:
        radian = sympy.pi / 180
        return _numbers(
            gold,
            answer,
            factors[0] * (radian if unit.dimensions == DEGREES else 1),
            factors[1] * (radian if other.dimensions == DEGREES else 1),
        )
    if unit.words != other.words:
        symbols = not all(map(str.islower, unit.words + other.words))  # MB and Mb, MB and GB
        different = not (symbols or unit.dimensions or other.dimensions) and _numbers(gold, answer) is False
        return False if different else None
    if unit.dimensions != other.dimensions:
        return _different_dimensions(gold, answer, unit, other)
    if unit.factor == other.factor:
        return _numbers(gold, answer)
    verdict = _numbers(gold, answer, *factors)
    if verdict is False and TONNE in (unit, other):
        for ton in TONS:
            one, second = (_rational(ton if each == TONNE else each.factor) for each in (unit, other))
            verdict = None if _numbers(gold, answer, one, second) is not False else verdict
    return verdict


def _different_dimensions(gold: Scalar, answer: Scalar, unit: Unit, other: Unit) -> bool | None:
    """Two quantities that cannot be equal, unless a unit is not what it was read as: months have no certain length, an
    angle no certain dimension, and two products may be one that was written carelessly."""
    both = {unit.dimensions, other.dimensions}
    fluid_ounce = UNITS["oz"] in (unit, other) and DERIVED["volume"] in both
    if () in both or both & DOUBTFUL or fluid_ounce:
        return None
    if _without(unit.dimensions, "angle", "radian") == _without(other.dimensions, "angle", "radian"):
        return None
    one, second = _in_seconds(unit), _in_seconds(other)
    if one.dimensions == second.dimensions:
        a, b = gold.expression * _rational(one.factor), answer.expression * _rational(second.factor)
        return None if not (a.is_comparable and b.is_comparable) or abs(a - b) <= MONTHS * abs(b) else False
    if min(len(unit.dimensions), len(other.dimensions)) > 1 and _numbers(gold, answer) is not False:
        return None
    return False


def _without(dimensions: Dimensions, *bases: str) -> Dimensions:
    return tuple(pair for pair in dimensions if pair[0] not in bases)


def _in_seconds(unit: Unit) -> Unit:
    """A unit whose years are seconds."""
    years = dict(unit.dimensions).get("calendar", 0)
    rest = Unit(unit.factor, _without(unit.dimensions, "calendar"), unit.words)
    return rest.times(Unit(YEAR, (("time", 1),)), years)


def _convertible(with_unit: sympy.Expr, without: sympy.Expr, unit: Unit) -> bool:
    """Whether a number without unit may be the same quantity in another unit."""
    if not (with_unit.is_Rational and without.is_Rational) or 0 in (with_unit, without):
        return False
    ratio = with_unit / without
    if len(unit.words) == 1 and ratio * PAIRS.get(unit.words[0], 0) == 1:
        return True
    return may_convert(Fraction(int(ratio.p), int(ratio.q)), unit)


def _rational(factor: Fraction) -> sympy.Expr:
    return sympy.Rational(factor.numerator, factor.denominator)
