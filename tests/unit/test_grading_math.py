"""Final answers are found as documented, and only what is certain is called correct or wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.grading import Grade, Grader, require_grader
from distill.grading.math import Answer, final_answer, gold_answer, has_words, judge, normalise, quick_judge
from distill.prompts.boxes import boxed
from distill.prompts.prompt import Prompt


@pytest.mark.parametrize(
    ("response", "text", "method"),
    [
        (r"So it is \boxed{42}.", "42", "boxed"),
        (r"\boxed{1} is a step, \boxed{\frac{1}{2}} the end", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"$\boxed{\left\{ x \right.}$", r"\left\{ x \right.", "boxed"),
        (r"\boxed{x = \boxed{3}}", r"x = \boxed{3}", "boxed"),
        (r"\boxed 7.", "7", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"\boxed{5} and then the text was cut off in \boxed{12", "5", "boxed"),
        (r"the roots are $\boxed{-2}$ and $\boxed{1}$.", "-2, 1", "boxed"),
        (r"\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}", "k = 45, n = 2", "boxed"),
        ("\\boxed{840}\n\n\\boxed{840}", "840", "boxed"),
        (r"\boxed{3}. Check: $3 + 4 =$ \boxed{7}", "7", "boxed"),
        ("<answer> 5 </answer>", "5", "tag"),
        ("<answer> B", "B", "tag"),
        (r"\boxed{1} <answer> it is \boxed{2} </answer> so \boxed{3}", "2", "boxed"),
        ("16 - 3 = 13\n#### 1,300\n", "1,300", "hashes"),
        ("The final answer is $42$. I hope it is correct.", "42", "stated"),
        ("**Answer:** 3.5 metres. Done", "3.5 metres", "stated"),
        ("The answer: 1. No, the answer is 2.", "2", "stated"),
        ("Answer:\n**12**", "12", "stated"),
        ("$x = 42$", "x = 42", "bare"),
        ("-7", "-7", "bare"),
        ("First 3 * 4 = 12.\nTogether they have 12 apples", "Together they have 12 apples", "last line"),
        ("<think> \\boxed{1} </think> \\boxed{2}", "2", "boxed"),
        ("<think>a</think> b </think> \\boxed{2}", "2", "boxed"),
        ("So it is \\boxed{2}, after the tag </think> of course.", "2", "boxed"),
        ("</think>\n\\boxed{2} <think> or \\boxed{3}", "2", "boxed"),
    ],
)
def test_final_answer(response: str, text: str, method: str) -> None:
    assert final_answer(response) == Answer(text, method)


@pytest.mark.parametrize("response", ["", " \n", "<think> \\boxed{1}", "<think> \\boxed{1} </think>", "</think>\n"])
def test_no_answer_outside_the_reasoning(response: str) -> None:
    assert final_answer(response) is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("18", "18"), ("She makes 9 * 2 = 18\n#### 18", "18"), (r"long \boxed{3} text \boxed{4}.", "4"), ("$x^2$", "x^2")],
)
def test_gold_answer(gold: str, answer: str) -> None:
    assert gold_answer(gold) == answer


balanced = st.recursive(
    st.text(alphabet="a1+ ,", min_size=1, max_size=4).filter(str.strip),
    lambda inner: st.tuples(inner, inner).map(lambda two: f"{two[0]}{{{two[1]}}}\\}}"),
    max_leaves=6,
)


@given(content=balanced, before=st.text(alphabet="ab }{\n"), after=st.text(alphabet="ab }{\n"))
def test_a_box_is_cut_at_its_own_brace(content: str, before: str, after: str) -> None:
    assert boxed(f"{before}\\boxed{{{content}}}{after}") == content.strip()


@given(st.text(alphabet="\\boxed{} $,answer:is<>/think#\n12"))
def test_finding_never_fails_and_finds_something_to_compare(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or answer.text == answer.text.strip()


@pytest.mark.parametrize("text", ["\\boxed{" * 50_000, "answer is " * 50_000, "<answer>" * 50_000, "{" * 200_000])
def test_finding_is_linear_in_hostile_text(text: str) -> None:
    final_answer(text)  # quadratic scanning would take minutes here


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"12\,000", "12000"),
        ("\N{MINUS SIGN}5", "-5"),
        (r"\$5", "5"),
    ],
)
def test_spellings_of_one_answer(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1 1/2", "11/2"), (r"\leftarrow", "arrow"), ("m", "M"), ("1 2", "12"), (r"3\;4", "34"), ("3  4", "34")],
)
def test_different_answers_stay_different(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize("text", [r"so the answer is \boxed{12", "Thus\n\\boxed{", r"$x = \fbox{\frac{1}{2}$"])
def test_a_box_that_was_cut_off_is_no_answer(text: str) -> None:
    assert final_answer(text) is None


def test_words_are_told_from_products() -> None:
    assert has_words("no solution") and has_words("3 hours")
    assert not has_words(r"\frac{abc}{\sqrt{2}} \text{ hours}") and not has_words("xyz + sqrt(2)")
    assert not has_words(r"\begin{pmatrix}1\end{pmatrix}")


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("42", Answer("042", "boxed"), ("correct", "equal")),
        ("42", Answer("43", "boxed"), ("wrong", "not equal")),
        ("42", Answer("43", "last line"), None),
        ("Evelyn", Answer(r"\text{Evelyn}", "boxed"), ("correct", "identical")),
        ("Evelyn", Answer("Carla", "boxed"), None),
        ("silent", Answer("listen", "boxed"), None),
        ("no one", Answer("nobody at all", "boxed"), None),
        ("1/2", Answer("0.5", "boxed"), None),
    ],
)
def test_what_needs_no_parser(gold: str, answer: Answer, verdict: tuple[str, str] | None) -> None:
    assert quick_judge(gold, answer) == verdict


@pytest.mark.parametrize(
    ("gold", "answer", "marked", "verdict"),
    [
        ("1/2", "0.5", True, ("correct", "equal")),
        ("1/2", "0.6", True, ("wrong", "not equal")),
        ("18", "18 eggs", True, ("correct", "equal")),
        ("18", "17 eggs", True, ("wrong", "not equal")),
        ("18", r"\$18", True, ("correct", "equal")),
        ("5000000", "5 million", True, ("correct", "equal")),
        ("5", "five", True, ("correct", "equal")),
        ("Evelyn", r"\text{evelyn}", True, ("correct", "equal")),
        ("Evelyn", "Carla", True, ("wrong", "not equal")),
        ("Evelyn", "Evelyn and Carla", True, ("unverifiable", "words, not mathematics")),
        ("no solution", "5", True, ("wrong", "not equal")),
        ("no solution", "0", True, ("unverifiable", "equality not decided")),
        ("42", "42 dollars for 3 people", False, ("unverifiable", "no marked answer")),
        ("42", "Together they have 42 apples", False, ("correct", "equal")),
        ("1,22", "1.22", True, ("correct", "equal")),
        ("1000", "1 000", True, ("correct", "equal")),
        (r"\frac{", "5", True, ("unverifiable", "gold not read: not parseable")),
        ("5", r"\frac{", True, ("unverifiable", "answer not read: not parseable")),
    ],
)
def test_judge(gold: str, answer: str, marked: bool, verdict: tuple[str, str]) -> None:
    assert judge(gold, answer, marked) == verdict


def test_grades_say_what_was_compared_and_how() -> None:
    prompt = Prompt.from_question("Half of one?", "$0.5$")
    items = [
        ("half", prompt, r"\boxed{\frac12}"),
        ("same", prompt, r"\boxed{0.5}"),
        ("none", prompt, "<think>0.5"),
        ("gold", Prompt.from_question("Why?", None), r"\boxed{1}"),
    ]
    with Grader(workers=1) as grader:
        grades = dict(grader.grade(items))
    assert grades == {
        "half": Grade("correct", "equal", {"extracted": r"\frac12", "gold": "0.5", "method": "boxed"}),
        "same": Grade("correct", "identical", {"extracted": "0.5", "gold": "0.5", "method": "boxed"}),
        "none": Grade("unverifiable", "no answer found", {"extracted": None, "gold": "0.5", "method": None}),
        "gold": Grade("unverifiable", "no gold answer", {"extracted": "1", "gold": None, "method": "boxed"}),
    }


def test_a_later_answer_and_one_that_is_taken_back_are_in_the_grade() -> None:
    prompt = Prompt.from_question("2 + 2?", "4")
    items = [
        ("later", prompt, "\\boxed{4}\n\nAfter rechecking, the answer is 5."),
        ("same", prompt, "\\boxed{4}\n\nAfter rechecking, the answer is $2+2$."),
        ("back", prompt, "\\boxed{4}. Wait, that's wrong."),
    ]
    with Grader(workers=1) as grader:
        grades = dict(grader.grade(items))
    evidence = {"extracted": "4", "gold": "4", "method": "boxed"}
    assert grades == {
        "later": Grade("unverifiable", "two answers", evidence | {"other": "5"}),
        "same": Grade("correct", "equal", evidence | {"other": "2+2"}),
        "back": Grade("unverifiable", "taken back", evidence | {"method": "taken back"}),
    }


def test_a_task_without_a_grader_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as refusal:
        require_grader("chat", "filter.correct", "set it to false")
    assert str(refusal.value) == (
        "filter.correct: task 'chat' has no grader yet (only math, choice, code, gym, instructions, judge have); "
        "set it to false"
    )
    with Grader() as grader, pytest.raises(UserError, match="'chat' has no grader"):
        list(grader.grade([(0, Prompt.from_question("How are you?", None, "chat"), "Fine.")]))


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("<think>\nA? B?\n</think>\nSo \\boxed{B}.", "correct"),
        ("\\boxed{\\text{(B)}}", "correct"),
        ("The answer is (B) 4 mol.", "correct"),
        ("Answer: **B**", "correct"),
        ("\\boxed{A}", "wrong"),
        ("\\boxed{4 mol}", "unverifiable"),
        ("It could be A or\nC, I think", "unverifiable"),
        ("", "unverifiable"),
    ],
)
def test_choices_are_letters(response: str, verdict: str) -> None:
    with Grader() as grader:
        ((_, grade),) = grader.grade([(0, Prompt.from_question("A) 3 mol B) 4 mol", "B", "choice"), response)])
    assert grade.verdict == verdict, grade


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        (r"x \in [1\text{ cm}, 2]", "not parseable"),
        (r"\{1\text{ cm}, 2\} \cup \{3\}", "not parseable"),
        (r"x \in (i, 2)", "not an interval"),
        (r"x \in 5", "not a set"),
    ],
)
def test_a_set_that_is_not_read_has_the_reason_of_its_end(gold: str, reason: str) -> None:
    """An end with a unit is not an expression; sympy refuses an end that is not a real number."""
    assert judge(gold, "5", True) == ("unverifiable", f"gold not read: {reason}")
