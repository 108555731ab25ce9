"""Notations, each in the spellings that people use: `grading_pairs.txt` has a line for every pair.

A line is `kind @ gold @ answer @ expectation`. Answers are boxed and tried in both directions; those of the kind
`responses` are whole responses, in one direction. Expectations: a verdict, or the verdict that would be false.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.grading import Grader
from distill.prompts.prompt import Prompt, Task

ALLOWED = {
    "correct": {"correct"},
    "wrong": {"wrong"},
    "unverifiable": {"unverifiable"},
    "never correct": {"wrong", "unverifiable"},
    "never wrong": {"correct", "unverifiable"},
}


def pairs() -> dict[str, list[tuple[str, str, str]]]:
    kinds: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for line in Path(__file__).with_name("grading_pairs.txt").read_text(encoding="utf-8").splitlines():
        kind, gold, answer, expectation = line.split(" @ ")
        if kind == "responses":
            kinds[kind].append((gold, answer.replace(r"\n", "\n"), expectation))
        else:
            kinds[kind] += [(a, rf"\boxed{{{b}}}", expectation) for a, b in ((gold, answer), (answer, gold))]
    return kinds


PAIRS = pairs()


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, timeout=60.0) as grader:
        yield grader


@pytest.mark.parametrize("kind", PAIRS)
def test_every_pair_of_a_kind_gets_its_verdict(kind: str, grader: Grader) -> None:
    items = [(i, Prompt.from_question("q", gold), response) for i, (gold, response, _) in enumerate(PAIRS[kind])]
    grades = dict(grader.grade(items))
    false = [
        (*pair, grades[i].verdict, grades[i].reason)
        for i, pair in enumerate(PAIRS[kind])
        if grades[i].verdict not in ALLOWED[pair[2]]
    ]
    assert false == []


@pytest.mark.parametrize(
    ("gold", "response", "expectation"),
    [
        ("B", r"\boxed{\mathbf{(B)}\ 5}", "correct"),
        ("B. 5 mol", r"\boxed{B}", "correct"),
        ("B", "The answer is A. Wait, no, the answer is B.", "correct"),
        ("B", 'Final answer: "B"', "correct"),
        ("B", "Final answer: `B`", "correct"),
        ("B", "\u7b54\u6848\u662fB", "correct"),
        ("B", "So the answer should be B.", "correct"),
        ("B", r"\boxed{B \text{ only}}", "correct"),
        ("C", "The answer is C, because D is wrong.", "correct"),
        ("C", "The answer is C - 5 mol", "correct"),
        ("C", "The answer is C (5 mol)", "correct"),
        ("B", "The answer is B or C", "never correct"),
        ("B", "The answer is neither A nor B", "never correct"),
        ("B", "The answer isn't B, it's C", "never correct"),
        ("A", "The answer is a (hypothetical) triangle", "unverifiable"),
        ("A", "The answer is a triangle", "unverifiable"),
        ("D", "The answer is D = 5", "unverifiable"),
        ("B", r"\boxed{5}", "unverifiable"),
    ],
)
def test_letters_of_choices(gold: str, response: str, expectation: str, grader: Grader) -> None:
    task: Task = "choice"
    [(_, grade)] = grader.grade([(0, Prompt.from_question("q", gold, task), response)])
    assert grade.verdict in ALLOWED[expectation], grade


HOSTILE = [
    "10^{10^{10}}",
    "9!!!!!",
    "(" * 20_000 + "6" + ")" * 20_000,
    "9" * 100_000,
    "0." + "12" * 40_000 + "...",
    r"{1\over" * 3000,
    "1'000" * 20_000,
    "\u00b2" * 50_000,
    "]1," * 20_000,
    r"\sum_{i=1}^{2000}\sum_{j=1}^{2000}\sum_{k=1}^{2000} \frac{1}{ijk}",
    r"\int_0^1 x^{x^{x^{x}}} dx",
    r"\begin{cases}" * 500,
    "one hundred " * 5000,
    "5, not " * 20_000,
]


@pytest.mark.slow
def test_hostile_sizes_are_never_correct_and_leave_the_pool_alive() -> None:
    responses = [rf"\boxed{{{answer}}}" for answer in HOSTILE] + HOSTILE
    with Grader(workers=2, timeout=1.0) as own:
        grades = dict(own.grade((i, Prompt.from_question("q", "7"), each) for i, each in enumerate(responses)))
        [(_, alive)] = own.grade([(0, Prompt.from_question("q", "0.5"), r"\boxed{\frac12}")])
    assert [i for i, grade in grades.items() if grade.verdict == "correct"] == []
    assert len(grades) == len(responses)
    assert alive.verdict == "correct"
