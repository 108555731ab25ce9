"""Hostile expressions: no hang, no false verdict, and the pool grades on afterwards."""

import pytest
from hostile_expressions import KINDS, hostile

from distill.grading import Grader
from distill.prompts.prompt import Prompt


@pytest.mark.parametrize("count", [2 * len(KINDS), pytest.param(500, marks=pytest.mark.slow)])
def test_no_hostile_expression_hangs_or_gets_a_false_verdict(count: int) -> None:
    pairs = list(hostile(count))
    assert len({pair.kind for pair in pairs}) == len(KINDS) >= 15
    items = [(i, Prompt.from_question("q", pair.gold), rf"\boxed{{{pair.answer}}}") for i, pair in enumerate(pairs)]
    with Grader(workers=2, timeout=1.0) as grader:
        grades = dict(grader.grade(items))
        [(_, alive)] = grader.grade([(0, Prompt.from_question("q", "0.5"), r"\boxed{\frac12}")])
    assert len(grades) == count
    false = [
        (pair.kind, pair.gold[:80], pair.answer[:80])
        for i, pair in enumerate(pairs)
        if grades[i].verdict == pair.forbidden
    ]
    assert false == []
    assert alive.verdict == "correct"
    decided = {pair.kind for i, pair in enumerate(pairs) if grades[i].verdict != "unverifiable"}
    assert {"equal_factorial", "many_digits", "tiny_numbers", "close_numbers"} <= decided, "else the test tests nothing"
