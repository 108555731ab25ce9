"""The procedural problems: right answers, values that stay small, and two splits that share nothing."""

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from distill.prompts.arithmetic import (
    MAX_STEPS,
    MAX_VALUE,
    Problem,
    belongs,
    draw_problem,
    expression,
    is_heldout,
    problems,
    running_values,
    windows,
)

CHAINS = st.lists(st.integers(-99, 99).filter(bool), min_size=3, max_size=6).map(lambda c: (abs(c[0]), *c[1:]))


def test_a_problem_worked_by_hand() -> None:
    problem = Problem((23, 45, -12), "What is 23 + 45 - 12?")
    assert problem.expression == "23 + 45 - 12"
    assert problem.values == (23, 68, 56)
    assert problem.steps == ["23 + 45 = 68", "68 - 12 = 56"]
    assert problem.answer == "56"


def test_windows_of_a_chain_by_hand() -> None:
    # The working shows 10→30→25→26, so 10+20-5 and 30-5+1; the expression shows 10 + 20 - 5 and 20 - 5 + 1.
    shown = set(windows((10, 20, -5, 1)))
    assert shown == {(10, 20, -5, 1), (10, 20, -5), (30, -5, 1), (20, -5, 1)}


@given(CHAINS, st.randoms(use_true_random=False))
def test_held_out_does_not_depend_on_the_order_of_operands(chain: tuple[int, ...], rng: random.Random) -> None:
    assert is_heldout(tuple(rng.sample(chain, len(chain)))) == is_heldout(chain)


@given(st.integers(0, 2**32), st.sampled_from(["train", "heldout"]))
def test_a_drawn_problem_is_sound(seed: int, split: str) -> None:
    problem = draw_problem(random.Random(seed), split)
    assert 3 <= len(problem.chain) <= 6
    assert all(0 <= value <= MAX_VALUE for value in problem.values)
    assert 0 not in problem.chain
    assert len(set(map(abs, problem.chain))) == len(problem.chain)
    assert int(problem.answer) == sum(problem.chain)
    assert [int(n) for n in re.findall(r"\d+", problem.question)] == [abs(n) for n in problem.chain]
    assert belongs(problem.chain, split)


def test_the_splits_share_no_problem_not_even_inside_a_longer_one() -> None:
    heldout = {tuple(sorted(p.chain)) for p in problems("heldout", 0, 500)}
    shown = {tuple(sorted(window)) for p in problems("train", 0, 3000) for window in windows(p.chain)}
    assert len(heldout) == 500
    assert not heldout & shown


def test_a_longer_limit_extends_a_shorter_one() -> None:
    assert list(problems("train", 3, 200))[:50] == list(problems("train", 3, 50))
    assert list(problems("train", 3, 50)) != list(problems("train", 4, 50))


def test_expression_writes_signs_with_spaces() -> None:
    assert expression((5, -3, 9)) == "5 - 3 + 9"
    assert running_values((5, -3, 9)) == (5, 2, 11)


def test_longer_problems_have_more_steps_than_any_training_text_and_are_expressions() -> None:
    for problem in problems("longer", 0, 300):
        assert MAX_STEPS < len(problem.steps) <= MAX_STEPS + 3
        assert problem.expression in problem.question and int(problem.answer) == sum(problem.chain)
        assert all(0 <= value <= MAX_VALUE for value in problem.values)
