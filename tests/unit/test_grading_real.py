"""The grader against people's labels and another grader's scores, on real answers.

"Agrees" means: our `correct` is their "equivalent", our `wrong` or `unverifiable` is their "not". Every disagreement is
listed by hand with its reason, so that a change of the grader shows up here as a changed list.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.grading import Grade, Grader
from distill.prompts.prompt import Prompt

RealData = Callable[[str], Path]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


Graded = Callable[[Iterable[tuple[str, str]]], list[Grade]]


@pytest.fixture(scope="module")
def graded() -> Iterator[Graded]:
    """One grade for every (gold answer, response)."""

    def grade(pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        items = [(i, Prompt.from_question("q", gold), response) for i, (gold, response) in enumerate(pairs)]
        grades = dict(grader.grade(items))
        return [grades[i] for i in range(len(items))]

    # None of these comparisons is endless, and a busy machine must not change a verdict: hence the long time-out.
    with Grader(workers=2, timeout=60.0) as grader:
        yield grade


def disagreements(grades: list[Grade], expected: list[bool]) -> list[int]:
    assert len(grades) == len(expected)
    return [i for i, (g, yes) in enumerate(zip(grades, expected, strict=True)) if (g.verdict == "correct") != yes]


def test_pairs_labelled_by_hand_or_by_two_graders(real_data: RealData, graded: Graded) -> None:
    pairs = [row for row in rows(real_data("grader_pairs_real_dev/pairs.jsonl")) if row["equivalent"] is not None]
    grades = graded((row["gold"], rf"\boxed{{{row['pred']}}}") for row in pairs)
    assert len(pairs) == 194
    assert disagreements(grades, [row["equivalent"] for row in pairs]) == []
    assert sum(g.verdict == "unverifiable" for g in grades) == 2  # both are garbled, and labelled "not equivalent"


MATH_VERIFY_DISAGREEMENTS = {
    "test_strict.py:250": "f(y) for f(x): equal with its option `strict: false` only; 249 is the same pair",
    "test_all.py:133": "0.33 for 1/3: that case asks for two decimals (its options say so); rounding is undecided here",
}


def test_math_verify_own_cases(real_data: RealData, graded: Graded) -> None:
    """These are whole responses and gold texts as its authors wrote them, for its own extraction."""
    pairs = rows(real_data("grader_pairs_mathverify_dev/pairs.jsonl"))
    assert len(pairs) == 117
    grades = graded((row["gold"], row["pred"]) for row in pairs)
    differ = disagreements(grades, [row["equivalent"] for row in pairs])
    assert {pairs[i]["id"] for i in differ} == MATH_VERIFY_DISAGREEMENTS.keys()
    assert len(differ) == len(MATH_VERIFY_DISAGREEMENTS)


QWEN_DISAGREEMENTS = {
    ("6", "6th"): "a place in a race: we take the ordinal for its number",
    ("10{,}000", "10000"): "one number with and without its separator: the other grader is wrong",
}


def test_samples_scored_by_another_grader(real_data: RealData, graded: Graded) -> None:
    """1,270 sampled solutions of two models with the score of Qwen2.5-Math's evaluation."""
    samples: list[tuple[str, str, bool]] = []
    for name in ("aime24", "amc23", "gsm8k"):
        for row in rows(real_data(f"boxed_outputs_qwen25_3b/{name}.jsonl")):
            samples.append((row["gt"], row["response"], row["score"]))
    for row in rows(real_data("qwen25math_cot100x8/math_cot_100.slim.jsonl")):
        samples += [(row["gt"], text, score) for text, score in zip(row["code"], row["score"], strict=True)]
    grades = graded((gold, text) for gold, text, _ in samples)
    assert len(samples) == 1270
    differ = [grades[i].evidence for i in disagreements(grades, [score for _, _, score in samples])]
    assert {(evidence["gold"], evidence["extracted"]) for evidence in differ} == QWEN_DISAGREEMENTS.keys()
    assert len(differ) == len(QWEN_DISAGREEMENTS)


def test_reference_answers_are_correct_whatever_they_look_like(real_data: RealData, graded: Graded) -> None:
    """Identical strings are correct before any parser: no gold answer of these sets depends on being parseable."""
    golds = [str(row["answer"]) for row in rows(real_data("math500/test.jsonl"))]
    golds += [row["answer"] for row in rows(real_data("gsm8k/test.jsonl"))]  # whole solutions that end in `#### 42`
    grades = graded((gold, rf"Therefore \boxed{{{gold.rpartition('#### ')[2]}}}.") for gold in golds)
    assert len(grades) == 500 + 1319
    assert {(g.verdict, g.reason) for g in grades} == {("correct", "identical")}
