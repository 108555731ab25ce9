"""Questions with options: which letter a response names, in which of its statements, and what a gold answer may be."""

import re

import pytest

from distill.grading import GRADERS
from distill.grading.choice import ChoiceGrader, letter

B = "correct"
A = "wrong"
NEITHER = "unverifiable"


def verdict(response: str, gold: str = "B") -> str:
    grader = ChoiceGrader()
    answer = grader.find(response)
    assert answer is not None
    return grader.rule(grader.gold(gold), answer)[0]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The correct answer is B because the cell divides.", B),
        ("The answer is B, photosynthesis.", B),
        ("The answer is B, not A.", B),
        ("The answer is B since A and C are too low.", B),
        ("So the answer is option B - photosynthesis", B),
        ("Answer: B (A is wrong)", B),
        ("Answer: A (B is wrong)", A),
        ("\\boxed{B, because}", B),
        ("\\boxed{选项B}", B),
        ("\\boxed{答案是B}", B),
        ("因此\uff0c答案是B。", B),
        ("综上\uff0c故选\uff1aA", A),
        ("Answer: (b)", B),
        ("B) 4 mol", B),
        ("**Answer:** B", B),
        ("The answer is I think B.", B),
        ("Answer: I think it is B.", B),
        ("The answer is A or B.", NEITHER),
        ("The answer is B, or maybe A.", NEITHER),
        ("The answer is B (or A).", NEITHER),
        ("The answer is (B) or (A).", NEITHER),
        ("\\boxed{B}, \\boxed{A}", NEITHER),
        ("\\boxed{\\text{A stable carbocation}}", NEITHER),
        ("The answer is A stable carbocation.", NEITHER),
        ("The answer is I cannot tell.", NEITHER),
        ("The answer is B? No, it is A.", NEITHER),
        ("It seems that the answer is B, but actually it is A", NEITHER),
        ("At first glance the answer is B, but it is really A.", NEITHER),
        ("The answer is (B) (A)", NEITHER),
        ("Answer: B - or C", NEITHER),
        ("A: incorrect. B: correct.", NEITHER),
        ("\u6545\u9009\uff1aB\uff0e", B),
        ("Answer: B, wait, no: A", NEITHER),
        ("\\boxed{\\text{E. coli}}", NEITHER),
        ("\\boxed{\\text{B. subtilis}}", NEITHER),
        ("The answer is B. subtilis", NEITHER),
        ("Answer: D, L-isomers", NEITHER),
        ("Answer: I, II and III", NEITHER),
        ("Answer: C, N and O", NEITHER),
        ("Answer: B, X-ray diffraction", B),
        ("\\boxed{B: not this one}", NEITHER),
        ("Answer: B) Not enough information", B),
        ("Answer: B) No, because the cell divides", B),
        ("\\boxed{B. photosynthesis}", B),
        ('```json\n{"reasoning": "x", "answer": "B"}\n```', B),
        ("\u6b63\u786e\u9009\u9879\u4e3aB", B),
    ],
)
def test_a_statement_names_a_letter(response: str, expected: str) -> None:
    assert verdict(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Answer: B) 4 mol\n\nIncorrect answers: A) is too low.", B),
        ("The correct answer is B. The incorrect option is A.", B),
        ("The answer is B.\n\nThe other answers are A) too low and C) too high.", B),
        ("The answer is B.\nA tempting but wrong answer is A.", B),
        ("The answer is B. This is not the correct answer: A.", B),
        ("\\boxed{B}\n\nNote: the answer is A) only if x.", B),
        ("\\boxed{B}\n\nIf the answer were asked at noon, then if the answer is A, stop.", B),
        ("**Answer: B**\n\nThe first option is A) 2 mol, too low.", B),
        ("The correct option is A. Wait: the correct option is B.", B),
        ("Energy is \\boxed{A = 2}.\n\nThe answer is (B).", B),
        ("The option is B.", B),
        ("The answer is A only if x is even.", NEITHER),
        ("Incorrect answers: A) and C).", NEITHER),
        ("The answer is not A.", NEITHER),
        ("The answer is A.\n\nFinal answer: B", B),
        ("The answer is B. It seems at first that the answer is A.", B),
        ("Is the answer A? The answer is B.", B),
        ("Answer: B. Actually, A.", NEITHER),
        ("Answer: B\n\nWait, that's wrong. It should be A.", NEITHER),
        ("Answer: A\n\nWait, that's wrong. The answer is B.", B),
        ("\\boxed{B}\n\nWait, actually A is correct.", NEITHER),
        ("Answer: B. Correction: D", NEITHER),
        ("Answer: B\n\nActually, option A is wrong because it is low.", B),
        ("Answer: B\n\nWait, let me double-check: yes, B is correct.", B),
        ("Answer: B\n\nNo other option fits.", B),
        ("Option B is correct.", B),
        ("Option B is correct. Option C is correct.", NEITHER),
        ("Suppose option B is correct.", NEITHER),
        ("Is it true that option B is correct?", NEITHER),
        ("Therefore, I choose B.", B),
        ("I'll go with option (A).", A),
    ],
)
def test_the_statement_that_counts(response: str, expected: str) -> None:
    assert verdict(response) == expected


@pytest.mark.parametrize("gold", ["photosynthesis", "1", "A or B", "K", "both"])
def test_no_answer_is_wrong_where_the_gold_is_no_letter(gold: str) -> None:
    assert verdict("\\boxed{B}", gold) == verdict("The answer is A.", gold) == "unverifiable"
    assert not ChoiceGrader().reads_plainly(ChoiceGrader().gold(gold))
    assert verdict(f"\\boxed{{{gold}}}", gold) == "correct", "the same spelling"


@pytest.mark.parametrize(
    ("response", "expected"),
    [("\\boxed{C, A}", B), ("Answer: A and C", B), ("\\boxed{A}", NEITHER), ("\\boxed{A, B}", NEITHER)],
)
def test_the_same_letters_are_right_where_the_gold_lists_some(response: str, expected: str) -> None:
    assert verdict(response, "A,C") == expected


@pytest.mark.parametrize("gold", ["B", "b", "(B)", "\\boxed{B}", "The answer is B", "B) 4 mol", "Answer: B"])
def test_gold_letters(gold: str) -> None:
    assert ChoiceGrader().gold(gold) == "B"
    assert verdict("\\boxed{B}", gold) == "correct"


@pytest.mark.parametrize(
    "unit", [" ", "\n", "\t \n", "answer is ", "answer: (", "\\boxed{", "(", "A, ", "*", "\\text{"]
)
def test_a_long_run_does_not_hold_the_caller_up(unit: str) -> None:
    """Grading happens in the caller's process, without a time limit: with a pattern of cubic time this never ends."""
    grader = GRADERS["choice"]
    answer = grader.find(f"answer {unit * 20_000}x")
    assert answer is not None
    assert grader.rule("B", answer) is not None


def test_a_letter_is_read_from_a_short_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    class Watched:
        def __init__(self, pattern: re.Pattern[str]) -> None:
            self.pattern = pattern

        def fullmatch(self, text: str) -> object:
            lengths.append(len(text))
            return self.pattern.fullmatch(text)

    for name in ("WHOLE", "HEAD"):
        pattern = getattr(__import__("distill.grading.choice", fromlist=[name]), name)
        monkeypatch.setattr(f"distill.grading.choice.{name}", Watched(pattern))
    assert letter("answer " + " " * 100_000 + "x") is None
    assert lengths and max(lengths) <= 400
