"""The code grader: which program is run, how outputs are compared, and the references of HumanEval and MBPP."""

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.grading import Grader
from distill.grading.code import compare_output, compare_values, find_program, run_tests
from distill.grading.sandbox.levels import open_zygote
from distill.grading.sandbox.runner import Sandbox
from distill.prompts.code_tests import tests_of
from distill.prompts.prompt import Prompt

FENCE = "```"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (f"<think>{FENCE}python\nno\n{FENCE}</think>So:\n{FENCE}python\nprint(1)\n{FENCE}\n", "print(1)\n"),
        (f"{FENCE}python\ndef f(): pass\n{FENCE}\nUse it:\n{FENCE}python\nf()\n{FENCE}", "def f(): pass\n"),
        (f"{FENCE}py\nprint(1)\n{FENCE}\n{FENCE}text\noutput 1\n{FENCE}", "print(1)\n"),
        (f"{FENCE}python\nprint(1)", "print(1)"),
        ("x = 1\nprint(x)", "x = 1\nprint(x)"),
        ("    return x + 1\n", "    return x + 1"),
        ("I do not know.", None),
    ],
)
def test_the_program_of_a_response(response: str, program: str | None) -> None:
    answer = find_program(response)
    assert (answer and answer.text) == program


@pytest.mark.parametrize(
    ("given", "wanted", "outcome"),
    [
        ("3\n", "3", "correct"),
        ("1 2 \n3\n\n", "1 2\n3", "correct"),
        ("1.0", "1", "correct"),
        ("0.3333333", "0.3333334", "unverifiable"),
        ("4", "3", "wrong"),
        ("1\n2", "1 2", "wrong"),
        ("1000000001", "1000000000", "wrong"),
        ("yes", "YES", "wrong"),
        ("", "", "correct"),
    ],
)
def test_outputs_are_compared(given: str, wanted: str, outcome: str) -> None:
    assert compare_output(given, wanted)[0] == outcome


@pytest.mark.parametrize(
    ("value", "wanted", "outcome"),
    [
        ((1, [2, 3]), [1, [2, 3]], "correct"),
        ({1: "a"}, {"1": "a"}, "correct"),
        (0.1 + 0.2, 0.3, "unverifiable"),
        (True, 1, "wrong"),
        ("1", 1, "wrong"),
        (None, None, "correct"),
    ],
)
def test_results_are_compared(value: object, wanted: object, outcome: str) -> None:
    assert compare_values(value, wanted)[0] == outcome


def test_programs_are_graded_in_workers() -> None:
    calls = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}
    stdin = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
    reads = "print(sum(map(int, input().split())))"
    items = [
        ("stdin", stdin, reads, ("correct", "all tests passed")),
        ("printed", stdin, "print(4)", ("wrong", "wrong output")),
        ("raised", stdin, "print(int('x'))", ("wrong", "error: ValueError")),
        ("call", calls, "def add(a, b):\n    return a + b", ("correct", "all tests passed")),
        ("method", calls, "class Solution:\n def add(self, a, b): return a + b", ("correct", "all tests passed")),
        ("wrong call", calls, "def add(a, b):\n    return a - b", ("wrong", "wrong result")),
        (
            "cpp",
            {"language": "cpp", "test_cases": [{"input": "", "output": ""}]},
            reads,
            ("unverifiable", "tests in cpp"),
        ),
    ]
    with Grader(workers=1) as grader:
        prompts = (
            (name, Prompt.from_question("q", tests_of(tests, {}), "code"), code) for name, tests, code, _ in items
        )
        grades = dict(grader.grade((name, prompt, f"{FENCE}python\n{code}\n{FENCE}") for name, prompt, code in prompts))
    assert {name: (grade.verdict, grade.reason) for name, grade in grades.items()} == {
        name: expected for name, _, _, expected in items
    }
    assert grades["printed"].evidence["detail"] == "printed '4\\n'"
    assert grades["call"].evidence["gold"] == "1 × function_call"


def test_compressed_tests_are_read_without_unpickling() -> None:
    cases = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]

    def packed(value: object) -> str:
        return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

    row = {"metadata": '{"func_name": "add"}', "public_test_cases": "[]"}
    read = json.loads(tests_of(packed(json.dumps(cases)), row) or "")
    assert read["test_cases"] == [
        {"type": "function_call", "fn_name": "add", "input": [[1, 2], 3], "output": [1, 2, 3]}
    ]
    for value in (print, [1], {"a": "b"}):
        with pytest.raises(ValueError, match="is compressed, and holds"):
            tests_of(packed(value), row)


def problems(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verdicts(rows: list[dict[str, str]], tests: str) -> list[tuple[object, object]]:
    with open_zygote() as zygote:
        sandbox = Sandbox(zygote)
        found = []
        for row in rows:
            code = row["code"] if "code" in row else row["prompt"] + row["canonical_solution"]
            ruling = run_tests(sandbox, code, json.loads(tests_of(row[tests], row) or ""), 10.0)
            found.append((row["task_id"], ruling))
    return [(name, ruling) for name, ruling in found if ruling[0] != "correct"]


def test_a_sample_of_reference_solutions_passes(real_data: Callable[[str], Path]) -> None:
    assert verdicts(problems(real_data("humaneval/HumanEval.jsonl"))[::8], "test") == []
    assert verdicts(problems(real_data("mbpp_dev/mbpp.jsonl"))[::25], "test_list") == []


@pytest.mark.slow
def test_every_reference_solution_passes(real_data: Callable[[str], Path]) -> None:
    assert verdicts(problems(real_data("humaneval/HumanEval.jsonl")), "test") == []
    assert verdicts(problems(real_data("mbpp_dev/mbpp.jsonl")), "test_list") == []
