"""Are two answers the same? True, False, or None where that is not decided.

The forms are those of `distill.grading.math.values`. The conventions follow the published graders of the data sets
(the normalizer of MATH, the graders of Qwen2.5-Math and Math-Verify) where a person would agree. Where the question
would have to decide, the verdict is None: a wrong answer graded correct is the worst error. Each is tested:

- A label is not compared (`x = 5` equals `5`), but two different labels leave the answers undecided.
- A bare list is a multiset, `{…}` is a set, `(…)` is ordered; `(a, b)` is an open interval beside an interval.
  Inequalities joined by "or" are a union; of several variables each has its own. Lists with labels, also
  `(x, y) = (1, 2)`, are compared label by label; beside values without labels they are equal only where the labels are
  in alphabetical order. Solutions of several unknowns (`x = 1, y = 4 or x = 3, y = 2`) are compared as wholes. A
  condition (`x = 4, x > 0`) leaves the answers undecided.
- What several letters make together (`m + n = 104`) equals the number; other equations beside their number are
  undecided.
- A unit on one side only is not compared; two units are, with their factors, derived ones in base units. A number that
  would be right in another unit, a letter that may be a unit (`0.05 m` beside `5 cm`, `5 m` beside `5`), years beside
  days, and the number of dozens (`7` beside `7 dozen`) are undecided.
- `5%` equals `5` and `0.05`: the normalizer of MATH drops the sign, Qwen2.5-Math's grader accepts both values, and such
  a question usually asks "what percent". Up to 1 the number alone is undecided: `0.5` beside `0.5%` may lack the sign
  or confuse a fraction with a percentage.
- `1,5` equals `1.5`, as for Math-Verify, and the list 1, 5: the digits would not agree by chance; after a relation
  (`x = 1,5`) it is undecided. A comma before exactly three digits separates thousands: `1,000` is never 1.
- The ratio `3:4` equals the quotient `3/4`, which is its definition. With two digits after the colon (`10:30`) it may
  be a time, and the quotient is undecided.
- A rounded decimal beside an exact number is undecided, also as a percentage and in another unit; `0.333...` repeats,
  and other digits with dots are cut off (`3.14...`).
- A base on one side only: the same digits are undecided, another value is wrong.
- A logarithm without a base is undecided unless every usual base (e, 10, 2) gives the same verdict.
- Two single words are different where they have different meanings of one kind (`odd`, `even`) or neither may be
  another form of the other (`distill.grading.math.words`); several words are never different.
- `n!!` is the double factorial, `\\sin^{-1}` the inverse function, `I`, `AB` and `VI` are names as well as products.
"""

from dataclasses import replace

import sympy

from distill.grading.math.equality import same
from distill.grading.math.lists import base_name, distinct_labels, enumerates, sorted_labels, ungrouped, unlabelled
from distill.grading.math.reader import ELLIPSIS
from distill.grading.math.regions import opaque
from distill.grading.math.relations import (
    Verdict,
    all_of,
    as_regions,
    equal_clocks,
    equal_comparisons,
    equal_congruences,
    equal_equations,
    equal_ratios,
    equal_regions,
    point_in,
    variables,
)
from distill.grading.math.scalars import as_fraction, equal_scalars
from distill.grading.math.values import (
    Clock,
    Comparison,
    Congruence,
    Equation,
    Labelled,
    Matrix,
    Ratio,
    Region,
    Scalar,
    Sequence,
    Value,
    Words,
)
from distill.grading.math.words import equal_words

LONGEST = 200  # items of a sequence
UNITS = {
    spelling: sympy.Symbol(f"unit {letter}")
    for letter in "ijk"
    for spelling in (letter, f"hat {letter}_", rf"hat \mathbf{letter}_", f"vec {letter}_")
}


def equal(gold: Value, answer: Value) -> Verdict:
    """Whether an answer denotes the same as the gold answer."""
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Labelled):
            return _labelled(one, other)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return equal_words(gold, answer)
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Equation) and isinstance(other, Scalar):
            return _stated_by(one, other)
        if (
            isinstance(one, Sequence)
            and isinstance(other, (Scalar, Matrix))
            and distinct_labels(one)
            and one.brackets == "()"
        ):
            return equal(unlabelled(one), other)
    if type(gold) is type(answer):
        return _alike(gold, answer)
    verdicts = [_unlike(one, other) for one, other in ((gold, answer), (answer, gold))]
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _unlike(one: Value, other: Value) -> Verdict:
    """Two values of different forms, in one of their two orders."""
    if isinstance(one, Region) and isinstance(other, Sequence):
        return _same_region(one, other)
    if isinstance(one, Region) and isinstance(other, Scalar):
        return point_in(one, other)
    if isinstance(one, (Matrix, Sequence)) and isinstance(other, Scalar) and _may_be_vector(other.expression):
        return _in_components(one, other)
    if isinstance(one, Matrix):
        return _vector(one, other) if isinstance(other, Sequence) else False if isinstance(other, Scalar) else None
    if isinstance(one, Sequence) and isinstance(other, Scalar):
        return _one_of(one, other)
    if isinstance(one, Ratio) and isinstance(other, Scalar):
        if one.clock:
            return None
        if len(one.parts) != 2 or one.parts[1] == 0:
            return False
        return equal_scalars(Scalar(one.parts[0] / one.parts[1]), as_fraction(other))
    if isinstance(one, Ratio) and isinstance(other, Clock):
        return equal_clocks(one, other)
    if isinstance(one, Congruence) and isinstance(other, Scalar):
        return True if one.left is None and one.right == other.expression else None
    return None


def _stated_by(equation: Equation, scalar: Scalar) -> Verdict:
    """An equation that says what several letters or values of functions make together, `m + n = 104`, beside a number.
    With a single letter it may be one to solve, and with factors or zero a relation, as that of a line: never equal."""
    left, right = opaque(equation.left), opaque(equation.right)
    for number, other in ((left, right), (right, left)):
        if not number.free_symbols and other.free_symbols:
            if len(other.free_symbols) == 1:
                return None
            verdict, sums = same(number, scalar.expression), _sum_of_letters(other)
            if verdict is True and number == 0:
                return None if sums else False
            return None if verdict is True and not sums else verdict
    return False if not opaque(scalar.expression).free_symbols else None


def _sum_of_letters(expression: sympy.Expr) -> bool:
    """Whether an expression is `m + n`, `m - n`, or the absolute value of such a sum. `x - y + z` may be a plane's."""
    terms = (expression.args[0] if isinstance(expression, sympy.Abs) else expression).as_coefficients_dict()
    if len(terms) < 2 or not all(term.is_Symbol and abs(factor) == 1 for term, factor in terms.items()):
        return False
    plane = {str(term).rstrip("_") for term in terms} <= set("xyz") and set(terms.values()) != {1}
    return not plane or isinstance(expression, sympy.Abs)


def _alike(gold: Value, answer: Value) -> Verdict:
    """Two values of one form."""
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return equal_scalars(gold, answer)
    if isinstance(gold, Sequence) and isinstance(answer, Sequence):
        return _sequences(gold, answer)
    if isinstance(gold, Region) and isinstance(answer, Region):
        return equal_regions(gold, answer)
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return equal_equations(gold, answer)
    if isinstance(gold, Comparison) and isinstance(answer, Comparison):
        return equal_comparisons(gold, answer)
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        return equal_ratios(gold, answer)
    if isinstance(gold, Congruence) and isinstance(answer, Congruence):
        return equal_congruences(gold, answer)
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return gold.minutes == answer.minutes
    assert isinstance(gold, Matrix) and isinstance(answer, Matrix)
    if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
        column = len(gold.rows) == 1 == len(answer.rows[0]) or len(answer.rows) == 1 == len(gold.rows[0])
        return None if column else False
    return all_of(
        equal(a, b) for one, other in zip(gold.rows, answer.rows, strict=True) for a, b in zip(one, other, strict=True)
    )


# ---- sequences


def _sequences(gold: Sequence, answer: Sequence) -> Verdict:
    if len(gold.items) > LONGEST or len(answer.items) > LONGEST:
        return None
    if "cases" in (gold.brackets, answer.brackets):
        # the same function may be cut at other places, so only the same pieces decide
        return True if gold.brackets == answer.brackets and _in_any_order(gold.items, answer.items) else None
    if ELLIPSIS in gold.items + answer.items:  # what the dots stand for is not known
        return True if gold.brackets == answer.brackets and _in_order(gold.items, answer.items) else None
    if "" in (gold.brackets, answer.brackets) and any(isinstance(item, Region) for item in gold.items + answer.items):
        return _lists_of_regions(gold, answer)
    if gold.grouped or answer.grouped:
        return _solutions(gold, answer)
    kinds = {gold.brackets, answer.brackets}
    ordered = [kind for kind in (gold.brackets, answer.brackets) if kind not in ("", "{}")]
    if ordered and distinct_labels(gold) and set(distinct_labels(gold)) == set(distinct_labels(answer)):
        return _in_any_order(gold.items, answer.items)
    if len(ordered) == 2:
        verdict = _in_order(gold.items, answer.items)
        if gold.brackets == answer.brackets:
            return verdict
        if len(gold.items) == len(answer.items) == 2 and ("(]" in kinds or "[)" in kinds):
            return False if verdict is not None or not kinds - {"(]", "[)"} else None
        return False if verdict is False else None
    if len(ordered) == 1:
        if any(not sequence.brackets and enumerates(sequence) for sequence in (gold, answer)):
            return None  # solutions beside an interval or a point
        if _in_order(gold.items, answer.items):
            return True if "{}" not in kinds and all(map(sorted_labels, (gold, answer))) else None
        return False if _in_any_order(gold.items, answer.items) is False else None
    if kinds == {"{}"}:
        return _in_any_order(_distinct(gold.items), _distinct(answer.items))
    if "{}" in kinds:
        verdict = _in_any_order(_distinct(gold.items), _distinct(answer.items))
        return verdict if len(gold.items) == len(answer.items) or not verdict else None
    free = [tuple(item for item in each.items if not isinstance(item, Comparison)) for each in (gold, answer)]
    if (len(free[0]) == len(gold.items)) != (len(free[1]) == len(answer.items)):
        return False if _in_any_order(*free) is False else None  # a = 1, b = 2, a < b
    verdict = _in_any_order(gold.items, answer.items)
    if verdict and gold.alternatives != answer.alternatives:
        names = {base_name(item.label) for item in gold.items if isinstance(item, Labelled)}
        relations = any(isinstance(item, Comparison) for item in gold.items) or len(names) > 1
        equations = any(isinstance(item, Equation) for item in gold.items) and (gold.both or answer.both)
        return None if relations or equations else True  # 1 and 2 is 1 or 2; x > y and y > 2 is not x > y or y > 2
    return verdict


def _solutions(gold: Sequence, answer: Sequence) -> Verdict:
    """Solutions of several unknowns each, beside such solutions or another list, which may have the same values."""
    verdict = _sequences(replace(gold, grouped=False), replace(answer, grouped=False))
    if verdict is not False or (gold.grouped and answer.grouped):
        return verdict
    return False if _sequences(ungrouped(gold), ungrouped(answer)) is False else None


def _lists_of_regions(gold: Sequence, answer: Sequence) -> Verdict:
    """Lists of sets, at least one of them with inequalities in it."""
    names = variables(gold), variables(answer)
    if max(map(len, names)) > 1:
        return _by_variable(gold, answer) if names[0] == names[1] else None
    joined_alike = gold.alternatives == answer.alternatives and gold.brackets == answer.brackets == ""
    if joined_alike and _in_any_order(gold.items, answer.items):
        return True
    one, other = as_regions(gold), as_regions(answer)
    if one is None or other is None:
        return None
    verdicts = [equal_regions(a, b) for a in one for b in other]
    verdict = verdicts[0] if len(verdicts) == 1 else False if set(verdicts) == {False} else None
    return None if verdict is False and (_with_condition(gold, answer) or _with_condition(answer, gold)) else verdict


def _with_condition(condition: Sequence, value: Sequence) -> bool:
    """Whether a list may be a value and a condition: `(1, 2), t > 0`."""
    free = [item for item in condition.items if not (isinstance(item, Region) and item.variable is not None)]
    return len(free) == 1 < len(condition.items) and equal(free[0], value) is not False


def _by_variable(gold: Sequence, answer: Sequence) -> Verdict:
    """Lists of inequalities in the same variables, several of them: compared variable by variable."""
    if gold.alternatives != answer.alternatives:
        return None
    lists = [[item for item in each.items if isinstance(item, Region)] for each in (gold, answer)]
    if [len(gold.items), len(answer.items)] != list(map(len, lists)):
        return None
    return all_of(
        _lists_of_regions(*(replace(gold, items=tuple(r for r in each if r.variable == name)) for each in lists))
        for name in variables(gold)
    )


def _in_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> Verdict:
    if len(gold) != len(answer):
        return False
    return all_of(equal(a, b) for a, b in zip(gold, answer, strict=True))


def _in_any_order(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> Verdict:
    """Compare as multisets: each item is matched with one that is equal to it, or has the same label."""
    if len(gold) != len(answer):
        return False
    labels = [[item.label for item in items if isinstance(item, Labelled)] for items in (gold, answer)]
    if min(map(len, labels)) == 0 and len({base_name(label) for each in labels for label in each}) > 1:
        one, other = Sequence(gold), Sequence(answer)
        if all(map(sorted_labels, (one, other))) and _in_order(gold, answer):
            return True
        unordered = _in_any_order(unlabelled(one).items, unlabelled(other).items)
        return False if unordered is False else None  # m = 3, n = 5 beside 5, 3
    if set(labels[0]) == set(labels[1]) and len(set(labels[0])) == len(labels[0]) == len(labels[1]) == len(gold) > 1:
        by_label = {item.label: item for item in answer if isinstance(item, Labelled)}
        verdict = all_of(equal(item, by_label[item.label]) for item in gold if isinstance(item, Labelled))
        if verdict is not False or len(set(map(base_name, labels[0]))) > 1:
            return verdict
        values = [tuple(item.value for item in items if isinstance(item, Labelled)) for items in (gold, answer)]
        return False if _in_any_order(*values) is False else None  # roots in another order, or another solution
    rest, unsure = list(answer), _may_be_torn(gold, answer)
    for item in gold:
        verdicts = [equal(item, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _may_be_torn(gold: tuple[Value, ...], answer: tuple[Value, ...]) -> bool:
    """Whether the same values may belong to other names: lists with several names, some of them for several values, are
    certain only in one order."""
    names = [[item.label if isinstance(item, Labelled) else None for item in items] for items in (gold, answer)]
    several = [each for each in names if len({base_name(name) for name in each if name}) > 1]
    if not any(None in each or len(set(each)) < len(each) for each in several):
        return False
    return names[0] != names[1] or not _in_order(gold, answer)


def _distinct(items: tuple[Value, ...]) -> tuple[Value, ...]:
    kept: list[Value] = []
    for item in items:
        if not any(equal(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


def _one_of(sequence: Sequence, scalar: Scalar) -> Verdict:
    """A single value beside a sequence: different, unless the sequence offers alternatives or repeats one value."""
    sequence = ungrouped(sequence)
    if sequence.brackets == "cases":
        return None if scalar.expression.free_symbols else False  # |x|, or a constant
    names = {str(letter) for letter in scalar.expression.free_symbols}
    values = [item for item in sequence.items if not isinstance(item, (Region, Comparison))]
    conditions = len(values) < len(sequence.items) or any(isinstance(v, Labelled) and v.label in names for v in values)
    if conditions and any(equal(item, scalar) is not False for item in values):
        return None  # x = 4, x > 0
    verdicts = [equal(item, scalar) for item in sequence.items]
    units = [item.unit for item in sequence.items if isinstance(item, Scalar) and item.unit is not None]
    if len(units) == len(sequence.items) and len({unit.dimensions for unit in units}) == 1 < len(set(units)):
        return None  # 2 hours, 30 minutes
    if len(sequence.items) == 1:
        return verdicts[0] if sequence.brackets == "{}" else None
    if all(verdict is not False for verdict in verdicts):
        return None
    return None if sequence.alternatives and any(verdict is not False for verdict in verdicts) else False


def _vector(matrix: Matrix, sequence: Sequence) -> Verdict:
    rows = [item.items for item in sequence.items if isinstance(item, Sequence)]
    if len(rows) == len(sequence.items) and {len(row) for row in rows} == {len(matrix.rows[0])}:
        return _alike(matrix, Matrix(tuple(rows)))
    if len(matrix.rows) == 1 or len(matrix.rows[0]) == 1:
        entries = tuple(entry for row in matrix.rows for entry in row)
        verdict = _in_order(entries, sequence.items)
        return verdict if sequence.brackets in ("()", "[]") else None if verdict else verdict
    return None


def _may_be_vector(expression: sympy.Expr) -> bool:
    return bool(expression.free_symbols) or not expression.is_real


def _in_components(vector: Matrix | Sequence, scalar: Scalar) -> Verdict:
    """A vector beside an expression, which may be a sum of unit vectors: `i + 2j`. Never different: a letter may be a
    vector or a matrix."""
    entries = vector.items if isinstance(vector, Sequence) else tuple(entry for row in vector.rows for entry in row)
    if isinstance(vector, Sequence) and not (vector.brackets == "()" and all(isinstance(e, Scalar) for e in entries)):
        return _one_of(vector, scalar)
    rest = scalar.expression.xreplace(
        {symbol: UNITS[str(symbol)] for symbol in scalar.expression.free_symbols if str(symbol) in UNITS}
    ).subs(sympy.I, UNITS["i"])
    found = []
    for unit in dict.fromkeys(UNITS.values()):
        found.append(Scalar(rest.coeff(unit)))
        rest = sympy.expand(rest - found[-1].expression * unit)
    if rest != 0 or not 2 <= len(entries) <= 3 or any(part.expression != 0 for part in found[len(entries) :]):
        return None
    return True if _in_order(entries, tuple(found[: len(entries)])) else None


# ---- labels


def _labelled(one: Labelled, other: Value) -> Verdict:
    if isinstance(other, Labelled):
        if one.label == other.label:
            return equal(one.value, other.value)
        turned = _turned(one, other)
        if turned is not None:
            return turned
        renamed = _renamed(one, other)
        if renamed is not None:
            return renamed
        equation, second = _as_equation(one), _as_equation(other)
        if equation is not None and second is not None and (one.side or other.side):
            verdict = equal_equations(equation, second)
            if verdict is True:
                return True
        return False if equal(one.value, other.value) is False else None
    if isinstance(other, Equation):
        equation = _as_equation(one)
        return None if equation is None else equal_equations(equation, other)
    if isinstance(other, (Region, Comparison)) and isinstance(one.value, Scalar):
        point = one.value
        return point_in(other, point) if isinstance(other, Region) else None
    return equal(one.value, other)


def _turned(one: Labelled, other: Labelled) -> Verdict:
    """`a:b = 2:3` beside `b:a = 3:2`. None where the labels are no such pair."""
    names, order = one.label.split(":"), other.label.split(":")
    if not (isinstance(one.value, Ratio) and isinstance(other.value, Ratio) and sorted(names) == sorted(order)):
        return None
    if not len(set(names)) == len(names) == len(one.value.parts) == len(other.value.parts):
        return None
    return equal(one.value, Ratio(tuple(other.value.parts[order.index(name)] for name in names)))


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


# ---- sets, relations


def _same_region(region: Region, sequence: Sequence) -> Verdict:
    """A set of numbers beside an interval, or a list of its numbers, of intervals or of inequalities."""
    sequence = ungrouped(sequence)
    if sequence.brackets == "" and isinstance(region.points, sympy.FiniteSet):
        return _in_any_order(tuple(map(Scalar, region.points)), _distinct(sequence.items))
    meant = as_regions(sequence)
    if meant is None:
        return False if all(isinstance(item, Scalar) for item in sequence.items) else None
    verdicts = [equal_regions(region, each) for each in meant]
    return verdicts[0] if len(verdicts) == 1 else False if set(verdicts) == {False} else None
