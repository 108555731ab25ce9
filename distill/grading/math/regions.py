"""Inequalities in one variable → the real numbers that satisfy them, exactly; None where that is not decided."""

import sympy
from sympy.core.function import AppliedUndef

from distill.grading.math.values import Comparison, Region

DEGREE = 8  # of the polynomials whose roots are isolated


def region_of(comparison: Comparison) -> Region | None:
    """The solution of a chain of inequalities in one variable with known coefficients; None for any other."""
    sides = [opaque(side) for side in comparison.sides]
    variables = set().union(*(side.free_symbols for side in sides))
    if len(variables) != 1:
        return None
    (variable,) = variables
    points: sympy.Set = sympy.S.Reals
    for left, relation, right in zip(sides, comparison.relations, sides[1:], strict=False):
        if left.has(sympy.oo, -sympy.oo) or right.has(sympy.oo, -sympy.oo):
            if relation in ("<", ">"):
                continue  # every real number is below ∞
            return None
        solved = _solved(left - right, relation, variable)
        if solved is None:
            return None
        points = sympy.Intersection(points, solved)
    return Region(points, variable)


def opaque(expression: sympy.Expr) -> sympy.Expr:
    """The expression with symbols for functions of which nothing is known."""
    unknown = {call: sympy.Symbol(str(call), real=True) for call in expression.atoms(AppliedUndef)}
    return expression.xreplace(unknown)


def _solved(difference: sympy.Expr, relation: str, variable: sympy.Symbol) -> sympy.Set | None:
    """The solution of `difference relation 0`."""
    if difference.has(sympy.Abs):
        return _absolute(difference, relation, variable)
    try:
        polynomial = sympy.Poly(difference, variable)
    except sympy.PolynomialError:
        return None
    if polynomial.degree() == 1:
        slope, constant = polynomial.all_coeffs()
        if not (slope.is_real and slope.is_nonzero and constant.is_real):
            return None
        root, positive = -constant / slope, slope.is_positive
        if relation == "!=":
            return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(root))
        closed = relation in ("<=", ">=")
        if (relation[0] == ">") == positive:
            return sympy.Interval(root, sympy.oo, not closed, True)
        return sympy.Interval(-sympy.oo, root, True, not closed)
    if not 2 <= polynomial.degree() <= DEGREE or not polynomial.domain.is_ZZ | polynomial.domain.is_QQ:
        return None
    return sympy.Union(*_polynomial(polynomial, relation))


def _absolute(difference: sympy.Expr, relation: str, variable: sympy.Symbol) -> sympy.Set | None:
    """The solution of `a|f(x)| + b relation 0`."""
    bars = difference.atoms(sympy.Abs)
    size = sympy.Dummy("size", real=True)
    inner = next(iter(bars)).args[0]
    replaced = difference.xreplace(dict.fromkeys(bars, size))
    if len(bars) != 1 or replaced.has(variable) or inner.has(sympy.Abs):
        return None
    sizes = _solved(replaced, relation, size)
    if not isinstance(sizes, sympy.Interval):
        return None
    bound = sizes.start if sizes.end is sympy.oo else sizes.end
    sign, strict = (">", sizes.left_open) if sizes.end is sympy.oo else ("<", sizes.right_open)
    if not (bound.is_real and bound.is_positive):
        return None
    above = _solved(inner - bound, sign + "=" * (not strict), variable)
    below = _solved(inner + bound, {"<": ">", ">": "<"}[sign] + "=" * (not strict), variable)
    if above is None or below is None:
        return None
    return sympy.Union(above, below) if sign == ">" else sympy.Intersection(above, below)


def _polynomial(polynomial: sympy.Poly, relation: str) -> list[sympy.Set]:
    from sympy.solvers.inequalities import solve_poly_inequality

    return list(solve_poly_inequality(polynomial, relation))
