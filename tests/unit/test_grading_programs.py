"""Which program an answer with several code blocks has, and which verdict where two of them may be meant."""

import pytest

from distill.grading import Grader
from distill.grading.code import find_program
from distill.prompts.prompt import Prompt

FENCE = "```"
GOOD, BAD = "def f(x):\n    return x + 1\n", "def f(x):\n    return x - 1\n"
RAISES = 'def f(x):\n    raise ValueError("NotImplementedError")\n'
READS, READS_BADLY = "n = int(input())\nprint(n + 1)\n", "n = int(input())\nprint(n - 1)\n"


def block(text: str, tag: str = "python", fence: str = FENCE) -> str:
    return f"{fence}{tag}\n{text}{fence}\n"


DOCUMENTED = f'def f(x):\n    """Add one.\n\n    {FENCE}\n    >>> f(1)\n    {FENCE}\n    """\n    return x + 1\n'
IN_A_LIST = "   def f(x):\n       return x + 1\n"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (block(DOCUMENTED), DOCUMENTED),
        (f"1. Code:\n\n   {FENCE}python\n{IN_A_LIST}   {FENCE}\n\nIt adds.", GOOD),
        (f"1. {FENCE}python\n{IN_A_LIST}   {FENCE}\n\nIt adds.", GOOD),
        (f"10. {FENCE}python\n    def f(x):\n        return x + 1\n    {FENCE}\n\nIt adds.", GOOD),
        (block(GOOD) + "The signature is\n" + block("def f(x): ...\n"), GOOD),
        (block(GOOD) + "The signature is\n" + block('def f(x):\n    """Add."""\n    pass\n'), GOOD),
        (block(GOOD) + block("def f(x):\n    raise NotImplementedError\n"), GOOD),
        (block(GOOD) + block('def f(x):\n    raise NotImplementedError("later")\n'), GOOD),
        (block(GOOD) + block(RAISES), RAISES),
        (block("def f(x): ...\n"), "def f(x): ...\n"),
        (block(">>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2\n", "pycon"), GOOD + "\nf(1)\n"),
        (block(GOOD) + "So:\n" + block(">>> f(1)\n2\n"), GOOD),
        (block(f"# f\n{block(GOOD)}Done.\n", "md", FENCE + "`"), GOOD),
        (block(f"# f\n{block(GOOD)}Done.\n", "", FENCE + "`"), GOOD),
    ],
)
def test_the_program_among_blocks(response: str, program: str) -> None:
    answer = find_program(response, frozenset({"f"}))
    assert answer is not None and (answer.text, answer.other) == (program, "")


@pytest.mark.parametrize(
    ("line", "aside"),
    [
        ("The original code was:", True),
        ("**Naive version (TLE):**", True),
        ("A brute force for comparison:", True),
        ("Your code, which is wrong:", True),
        ("This is the final version:", False),
        ("The naive version is slow. So we use:", False),
        ("", False),
    ],
)
def test_a_program_of_another_version_stands_beside_the_one_before(line: str, aside: bool) -> None:
    for names, good, bad in ((frozenset({"f"}), GOOD, BAD), (frozenset[str](), READS, READS_BADLY)):
        answer = find_program(f"{block(good)}\n{line}\n\n{block(bad)}", names)
        assert answer is not None and (answer.text, answer.other) == (bad, good if aside else "")


def test_wrong_counts_only_where_no_other_version_passes() -> None:
    prompt = Prompt.from_question("Add one.", '{"inputs": ["1\\n"], "outputs": ["2\\n"]}', "code")
    label = "The original code was:\n"
    responses = {
        "undecided": block(READS) + label + block(READS_BADLY),
        "wrong": block(READS_BADLY) + label + block(READS_BADLY + "\n"),
        "right": block(READS_BADLY) + label + block(READS),
        "last": block(READS) + block(READS_BADLY),
    }
    with Grader(workers=1) as grader:
        grades = dict(grader.grade((name, prompt, response) for name, response in responses.items()))
    assert {name: (grade.verdict, grade.reason) for name, grade in grades.items()} == {
        "undecided": ("unverifiable", "two answers"),
        "wrong": ("wrong", "wrong output"),
        "right": ("correct", "all tests passed"),
        "last": ("wrong", "wrong output"),
    }
