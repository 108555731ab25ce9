"""Are two expressions equal? Decided exactly, or not at all.

`True` needs a proof: rational arithmetic, a canonical form, or sympy's algebra (minimal polynomials for constants).
`False` needs a proof too: for constants a difference whose leading digits are certain; for expressions with variables a
difference at each of several points. Everything else is None: agreement to many digits proves nothing, nor does a
difference at some points only, which may come from a branch of a root or a logarithm.

Rejected: comparing rounded decimals, which makes all constants of nature equal to 0; and sympy's `==` alone, which
compares spellings.
"""

import sympy

from distill.grading.math.expressions import applied
from distill.grading.math.regions import opaque

DIGITS = 30
EXPANDABLE = 40  # powers up to which expressions are expanded
FRACTIONS = [  # where variables are tried: positive, small and large, no special values
    (3, 7), (5, 11), (2, 13), (8, 17), (11, 23), (9, 19), (4, 29), (12, 31),
    (13, 5), (17, 7), (29, 11), (23, 9), (31, 13), (41, 17), (37, 8), (43, 19),
]  # fmt: skip
PARAMETERS = set("klmnt")
INTEGERS = [(value, 1) for value in (2, 7, 5, 11, 3, 8, 13, 17, 4, 19, 6, 23, 9, 10, 29, 31)]


def same(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """Whether two expressions are equal for all positive values of their variables; None where that is not decided."""
    if one == other:
        return True
    if one.has(sympy.oo, -sympy.oo) or other.has(sympy.oo, -sympy.oo):
        return False if one.is_number and other.is_number else None
    if one.is_Rational and other.is_Rational:
        return False
    unknown = applied(one) or applied(other)
    difference = opaque(one) - opaque(other)
    if difference == 0:
        return True
    symbols = sorted(difference.free_symbols, key=str)
    if not symbols:
        verdict = _constants(difference)
        return None if verdict is False and _renamed(one, other) else verdict
    different = _differ(difference, symbols, FRACTIONS)
    if different:
        counted = _counts(difference) and _differ(difference, symbols, INTEGERS) is False
        return None if unknown or counted or _renamed(one, other) else False
    return True if different is False and _vanishes(difference) else None


def _constants(difference: sympy.Expr) -> bool | None:
    """Whether a constant is zero."""
    if _certain(difference) is not None:
        return False
    return True if _vanishes(difference) else None


def _certain(constant: sympy.Expr) -> sympy.Expr | None:
    """The value of a constant whose leading digits are certain to differ from zero, else None."""
    value = constant.evalf(DIGITS, maxn=400)
    parts = value.as_real_imag()
    for part in parts:
        if part.is_Rational and part != 0:
            return value
        if part.is_Float and part != 0 and part._prec > 1:
            return value
        if not part.is_number or part.has(sympy.nan, sympy.zoo, sympy.oo):
            raise ArithmeticError("not finite")
    return None


def _counts(difference: sympy.Expr) -> bool:
    """Whether letters may stand for integers only: they are rounded, count signs, or turn by whole angles."""
    turned = difference.atoms(sympy.sin, sympy.cos, sympy.tan)
    return (
        difference.has(sympy.floor, sympy.ceiling)
        or any(power.base == -1 and power.exp.free_symbols for power in difference.atoms(sympy.Pow))
        or any(function.args[0].has(sympy.pi) and function.free_symbols for function in turned)
    )


def _renamed(one: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether both are the same but for a letter that stands for any integer: its name (2k and 2n; 2m may be metres),
    or the sign and the whole turns of an angle (pi/4 + n pi and 5 pi/4 - n pi)."""
    own, its = one.free_symbols - other.free_symbols, other.free_symbols - one.free_symbols
    turns = one.has(sympy.pi)
    if len(own) == len(its) == 1 and (one.is_Add or len(one.free_symbols) == 1):
        parameter, name = next(iter(own)), str(*its)
        if name not in PARAMETERS or not (one.is_Add or turns or "m" not in (name, str(parameter))):
            return False
        other = other.xreplace({its.pop(): parameter})
    elif turns and one.free_symbols == other.free_symbols and len(one.free_symbols) == 1:
        parameter = next(iter(one.free_symbols))
    else:
        return False
    if str(parameter) not in PARAMETERS:
        return False
    if sympy.expand(one - other) == 0:
        return True
    turn = one.coeff(parameter)
    if not turn.has(sympy.pi) or not sympy.expand(one - turn * parameter).is_number:
        return False
    differences = [sympy.expand(one - turned) for turned in (other, other.xreplace({parameter: -parameter}))]
    return any(difference.is_number and (difference / turn).is_Integer for difference in differences)


def _differ(difference: sympy.Expr, symbols: list[sympy.Symbol], values: list[tuple[int, int]]) -> bool | None:
    """True: different at every point; False: at none; None: at some, or it could not be evaluated. values: that the
    variables take, as fractions."""
    outcomes = set()
    large = any(
        power.exp.is_Integer and abs(power.exp) > 500
        for power in difference.atoms(sympy.Pow)
        if power.base.free_symbols
    )
    if large or len(symbols) > len(values):
        return None
    for offset in range(0, len(values), 4):
        turned = values[offset:] + values[:offset]
        point = {symbol: sympy.Rational(*value) for symbol, value in zip(symbols, turned, strict=False)}
        try:
            outcomes.add(_certain(difference.subs(point)) is not None)
        except ArithmeticError:  # not finite there: the other points decide
            continue
    return outcomes.pop() if len(outcomes) == 1 else None


def _vanishes(difference: sympy.Expr) -> bool:
    """Whether algebra proves that the difference is zero."""
    if any(power.exp.is_Integer and abs(power.exp) > EXPANDABLE for power in difference.atoms(sympy.Pow)):
        return bool(sympy.powsimp(difference) == 0)
    if sympy.expand(difference) == 0 or sympy.cancel(sympy.together(difference)) == 0:
        return True
    trigonometric = difference.has(sympy.sin, sympy.cos, sympy.tan, sympy.cot, sympy.sec, sympy.csc)
    if trigonometric and sympy.trigsimp(sympy.expand_trig(difference)) == 0:
        return True
    if sympy.expand_log(sympy.expand(difference)) == 0:
        return True
    if sympy.simplify(difference) == 0:
        return True
    return difference.is_number and _algebraic_zero(difference)


def _algebraic_zero(constant: sympy.Expr) -> bool:
    """Whether the minimal polynomial proves that an algebraic number is zero. No proof for other constants: they stay
    undecided."""
    try:
        variable = sympy.Symbol("x")
        return bool(sympy.minimal_polynomial(constant, variable) == variable)
    except (NotImplementedError, sympy.polys.polyerrors.NotAlgebraic):
        return False
