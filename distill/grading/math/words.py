"""Words beside words and expressions: are `odd` and `even`, `gray` and `grey`, `Yes` and `Ja` different answers?

Words with the same spelling are equal. Two single words are different where they have different meanings of one kind
(`KINDS`), where one is the other's opposite by its prefix, and where both are names of things with little spelling in
common. Everything else may be a synonym, another form or another language: not decided.
"""

import sympy

from distill.grading.math.expressions import symbol
from distill.grading.math.notation import roman_numeral
from distill.grading.math.relations import Verdict
from distill.grading.math.values import Scalar, Value, Words

ALIKE = ({"yes", "true"}, {"no", "false"}, {"none", "undefined", "does not exist", "no", "impossible"})
_KINDS = """
yes true | no false
odd | even | neither | both
positive | negative
rational | irrational
convergent converges converge | divergent diverges diverge
increasing increases increase | decreasing decreases decrease | constant
greater larger bigger more | less smaller fewer | equal same
maximum max | minimum min
concave | convex
always | sometimes | never
monday | tuesday | wednesday | thursday | friday | saturday | sunday
january | february | march | april | may | june | july | august | september | october | november | december
north | south | east | west
none nothing | all every
correct right | incorrect wrong
possible | impossible
"""
KINDS = [[frozenset(group.split()) for group in line.split(" | ")] for line in _KINDS.strip().splitlines()]
CLOSED = frozenset(word for kind in KINDS for group in kind for word in group)
OPPOSITES = ("un", "in", "im", "ir", "il", "non", "non-", "dis")
STEM = 4  # letters at the beginning that two forms of a word share at least


def equal_words(gold: Value, answer: Value) -> Verdict:
    """Whether words are the same as words or as an expression; at least one of the two is `Words`."""
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Words) and isinstance(other, Scalar):
            return True if one.capitals and _capitals(one.capitals, other) else None
    if not (isinstance(gold, Words) and isinstance(answer, Words)):
        return None
    if gold.text == answer.text or {gold.text, answer.text} == {"dne", "does not exist"}:
        return True
    if " " in gold.text + answer.text or any({gold.text, answer.text} <= group for group in ALIKE):
        return None
    if "dne" in (gold.text, answer.text) or (gold.capitals and sorted(gold.text) == sorted(answer.text)):
        return None  # AB and BA: a product or a segment, or an order
    if gold.capitals and answer.capitals:
        return False
    return False if _different(gold.text, answer.text) else None


def _different(one: str, other: str) -> bool:
    """Whether two single words certainly have different meanings."""
    for kind in KINDS:
        groups = [group for group in kind if one in group or other in group]
        if groups and {one, other} <= frozenset().union(*kind):
            return len(groups) == 2
    if any({one, other} == {prefix + word, word} for prefix in OPPOSITES for word in (one, other)):
        return True
    if one in CLOSED or other in CLOSED:
        return False  # Montag, correct
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return common < max(STEM, 0.6 * min(len(one), len(other))) and not _one_letter_apart(one, other)


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether two words of four letters or more differ in one letter: gray and grey."""
    return len(one) == len(other) >= 4 and sum(a != b for a, b in zip(one, other, strict=True)) == 1


def _capitals(letters: str, scalar: Scalar) -> bool:
    """Whether capital letters are a Roman numeral or a product that is the same as an expression."""
    number = roman_numeral(letters)
    if number is not None and scalar.expression == number:
        return True
    return scalar.unit is None and scalar.expression == sympy.Mul(*map(symbol, letters))
