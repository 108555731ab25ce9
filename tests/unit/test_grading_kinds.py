"""Every kind of answer with its siblings: equal rewritings are never wrong, unequal ones never correct."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.grading import Grader
from distill.grading.math import judge
from distill.prompts.prompt import Prompt

EQUAL = [
    ("5 cm", r"0.05\text{ m}"), (r"5\text{ m}", "5"), (r"2\mathrm{~kg}", r"2000\text{ g}"),
    (r"5\text{ cm}", "50 mm"), (r"\$5", "500 cents"), ("2 hours", "120 minutes"),
    ("3 km", "3"),
    ("90°", "90"), (r"\frac{\pi}{2}", "90°"), ("€5", "5"), (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"0.1\overline{6}", "1/6"),
    ("1.5e-3", "0.0015"), ("3e8", r"3\times10^8"), ("204_5", "54"), ("11_2", "3"), ("12%", "0.12"),
    ("1, 1, 2", "2, 1, 1"), (r"\{1,2\}", "2, 1"), ("[2, \\infty)", "x \\ge 2"), ("x \\ge 2", "[2, \\infty)"),
    ("1 < x < 3", "(1, 3)"), ("(1, 3)", "3 > x > 1"), (r"x \ne 2", r"\mathbb{R} \setminus \{2\}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"x \equiv 3 \pmod 7", r"x \equiv 10 \pmod 7"), ("2x+4y=6", "x+2y-3=0"), (r"\sin(2x)", r"2\sin x\cos x"),
    (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"\sqrt{4+2\sqrt{3}}", r"1+\sqrt{3}"),
    ("5 million", "5000000"), ("seven", "7"), ("1 1/2", "3/2"), (r"2\frac{1}{2}", "2.5"), ("a:b=2:3", "4:6"),
    (r"\pm 3", "3, -3"), ("x = 2 or x = 3", "3, 2"), ("W(n) = n^2", "W(x) = x^2"), ("mgh", "h g m"), ("x**2", "x^2"),
    (r"\emptyset", "no solution"), (r"\text{Yes}", "yes"), ("12", r"\textbf{(B)}\ 12"), ("x^2+C", "x^2 + c"),
]  # fmt: skip
UNEQUAL = [
    ("5 cm", "5 m"), ("5 kg", "5 g"), (r"5\text{ m}", r"5\text{ s}"), (r"3\text{ m}/\text{s}", r"3\text{ m}"),
    (r"5\text{ cm}^2", r"5\text{ cm}^3"), (r"\$5", "5 cents"), ("mgh", "mg"),
    ("mgh", "m g"),
    (r"x \equiv 3 \pmod 7", r"x \equiv 5 \pmod 7"), (r"x \equiv 3 \pmod 7", r"x \equiv 3 \pmod{11}"),
    ("5*X**2+1", "5*X**2"),
    ("1,1,2", "1,2,2"), ("1, 1, 2", "1, 2"), ("1.60e-19", "6.63e-34"), ("2^{-99}", "2^{-98}"), ("1e-5", "e-5"),
    ("10^{-30}", "0"),
    ("204_5", "204_7"), ("101_2", "101_3"), ("[1,2)", "(1,2]"), ("[1,2]", "x > 1"), ("x \\ge 2", "(2, \\infty)"),
    ("3:2", "2:3"),
    (r"\frac{1}{3}", "0.33"), (r"\pi", "3.14"), ("1, 2, \\ldots, n", "1, 2"), ("3 \\mid n", "3"), ("n!", "n"),
    ("\\pm 2", "2"),
    (r"\lfloor x \rfloor", "x"), ("x=2 or x=3", "x=2"), ("f(2)", "f(3)"), (r"\frac{dM}{dt}", r"\frac{M}{t}"),
    ("x_1", "x_2"),
    (r"\sum_{k=1}^n k", "n"), (r"\sqrt{x^2}", "x"), (r"\log 100", "5"), (r"\text{odd}", r"\text{even}"), ("I(0)", "0"),
    ("5 apples", "6 apples"), ("12:00", "1:00"), ("(1,2)", "(2,1)"), (r"\mathbb{R} \setminus \{0\}", r"\mathbb{R}"),
    ("2x+3y=1", "2x+3y=2"), ("a < b", "b < a"), ("12", "the answer is not 12"), ("25%", "0.5%"), ("4k+1", "4k+3"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers_are_correct_in_both_directions(one: str, other: str) -> None:
    assert [judge(one, other, True), judge(other, one, True)] == [("correct", "equal")] * 2


@pytest.mark.parametrize(("one", "other"), [("5 cm", "0.05 m"), ("1 h", "3600 s"), ("1000 g", "1 kg")])
def test_a_letter_that_may_be_a_unit_is_neither_right_nor_wrong(one: str, other: str) -> None:
    assert judge(one, other, True)[0] == judge(other, one, True)[0] == "unverifiable"
    assert judge(one, f"9{other}", True)[0] == "wrong", "equal under no reading"


@pytest.mark.parametrize(("one", "other"), UNEQUAL)
def test_unequal_answers_are_correct_in_no_direction(one: str, other: str) -> None:
    assert "correct" not in (judge(one, other, True)[0], judge(other, one, True)[0])


fractions = st.fractions(min_value=-50, max_value=50, max_denominator=60)


def spellings(number: Fraction) -> list[str]:
    """Ways to write a rational number."""
    top, bottom = number.numerator, number.denominator
    sign = "-" if top < 0 else ""
    texts = [f"{top}/{bottom}", rf"{sign}\frac{{{abs(top)}}}{{{bottom}}}", rf"x = {top * 3}/{bottom * 3}"]
    whole, rest = divmod(abs(top), bottom)
    if whole and rest:
        texts.append(rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}")
    return texts


@given(one=fractions, other=fractions, data=st.data())
def test_rational_numbers_in_any_spelling(one: Fraction, other: Fraction, data: st.DataObject) -> None:
    gold, answer = data.draw(st.sampled_from(spellings(one))), data.draw(st.sampled_from(spellings(other)))
    assert judge(gold, answer, True)[0] == ("correct" if one == other else "wrong")
    assert judge(gold, data.draw(st.sampled_from(spellings(one))), True)[0] == "correct"


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=5), st.lists(st.integers(-9, 9), min_size=2, max_size=5))
def test_lists_are_multisets(one: list[int], other: list[int]) -> None:
    verdict = judge(", ".join(map(str, one)), ", ".join(map(str, other)), True)[0]
    assert verdict == ("correct" if sorted(one) == sorted(other) else "wrong")


@given(st.text(alphabet="0123456789xyn+-*/^(){}[]\\,.=<>!| ", max_size=25))
def test_reading_a_text_never_fails_otherwise(text: str) -> None:
    assert judge("1", text[:25].replace("^", "+"), True)[0] in ("correct", "wrong", "unverifiable")


CUT_OFF = {
    43: "the box is cut off in the file, so there is no answer; the next line allows the opposite for the same text",
    44: "the box is cut off in the file, so there is no answer",
}


def test_collected_cases(real_data: Callable[[str], Path]) -> None:
    path = real_data(".").parent / "cases/grading.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = [(i, Prompt.from_question("q", case["gold"], case["task"]), case["pred"]) for i, case in enumerate(cases)]
    with Grader(workers=2, timeout=30.0) as grader:
        grades = dict(grader.grade(items))
    missed = {i: grades[i].verdict for i, case in enumerate(cases) if grades[i].verdict not in case["verdicts"]}
    assert missed == dict.fromkeys(CUT_OFF, "unverifiable")
