"""The code grader: which program is run, how outputs are compared, and the references of HumanEval and MBPP."""

import ast
import base64
import json
import pickle
import random
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.grading import Grader
from distill.grading.code import (
    CodeGrader,
    compare_output,
    compare_values,
    find_program,
    names_in_tests,
    run_tests,
)
from distill.grading.grade import Answer
from distill.grading.sandbox.levels import open_zygote
from distill.grading.sandbox.runner import Sandbox, Zygote
from distill.prompts import code_tests
from distill.prompts.prompt import Prompt

FENCE = "```"
SLOW = f"{FENCE}python\nn = int(input())\nprint(sum(range(n + 1)) + 1)\n{FENCE}\n"
FINAL = [  # programs that write without `print`, or read without `input`
    "import sys\ndef main():\n    n = int(sys.stdin.readline())\n    sys.stdout.write(str(n))\nmain()\n",
    "from sys import stdin, stdout\nstdout.write(stdin.read())\n",
    "import os\nos.write(1, os.read(0, 99))\n",
    "open(1, 'w').write(open(0).read())\n",
    "print(open('/dev/stdin').read())\n",
]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with open_zygote() as made:
        yield made


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
        (f"{FENCE}python\nprint(1)\n{FENCE}\n\n{FENCE}\n$ python x.py\n1\n{FENCE}", "print(1)\n"),
        (f"{FENCE}\n1 2\n{FENCE}\n{FENCE}\nprint(1)\n{FENCE}\n{FENCE}\n3\n{FENCE}", "print(1)\n"),
        (f"{FENCE}py\ndef f(): pass\n{FENCE}\n{FENCE}py\ndef test_f():\n    f()\n{FENCE}", "def f(): pass\n"),
        (
            f"{FENCE}py\ndef f(): pass\n{FENCE}\n{FENCE}py\nimport unittest\nclass TestF: pass\n{FENCE}",
            "def f(): pass\n",
        ),
        (f"{FENCE}py\ndef test(x): pass\n{FENCE}\n{FENCE}py\nprint(test(1))\n{FENCE}", "def test(x): pass\n"),
        (f"{FENCE}python\r\nprint(1)\r\n{FENCE}\r\nDone.\r\n", "print(1)\n"),
        (f"The program: {FENCE}python\nprint(1)\n{FENCE}\n", "print(1)\n"),
        ("~~~python\nprint(1)\n~~~\n", "print(1)\n"),
        (f"`{FENCE}python\nx = '''\n{FENCE}\n'''\n`{FENCE}\n", f"x = '''\n{FENCE}\n'''\n"),
        (f"1. So:\n   {FENCE}Python3\n   def f():\n       pass\n   {FENCE}\n", "def f():\n    pass\n"),
        ("So:\n\nclass Solution:\n    def f(self): pass\n\nIt is fast.", "class Solution:\n    def f(self): pass"),
        ("def is a keyword of Python (and f = 1 is not).", None),
        (f"{FENCE}python\nprint(s.split('</think>'), '<think>')\n{FENCE}", "print(s.split('</think>'), '<think>')\n"),
        (f"{FENCE}python\nf = 1\n{FENCE}\n<think>{FENCE}\n2\n{FENCE}</think>", "f = 1\n"),
        *((f"{SLOW}wrong and too slow. Final solution:\n{FENCE}python\n{final}{FENCE}", final) for final in FINAL),
    ],
)
def test_the_program_of_a_response(response: str, program: str | None) -> None:
    answer = find_program(response)
    assert (answer and answer.text) == program


RIGHT = "def add1(x):\n    return x + 1\n"
TESTED = {
    "asserts": (["assert add1(1) == 2"], {}),
    "check": ("def check(candidate):\n    assert candidate(1) == 2", {"entry_point": "add1"}),
    "calls": ({"fn_name": "add1", "inputs": [[1]], "outputs": [2]}, {}),
}
BESIDE = {
    "tests": ([RIGHT, "from solution import add1\n\ndef test_add1():\n    assert add1(1) == 2"], RIGHT),
    "example": ([RIGHT, "def main():\n    print(add1(2))\n\nmain()"], RIGHT),
    "alternative": ([RIGHT, "def add1_slow(x):\n    return sum([x, 1])"], RIGHT),
    "reads its input": ([RIGHT, "x = int(input())\nprint(add1(x))"], RIGHT),
    "helper": (["def plus(x):\n    return x + 1", "def add1(x):\n    return plus(x)"], None),
    "helper after": (["def add1(x):\n    return plus(x)", "def plus(x):\n    return x + 1"], None),
    "import": (["import operator", "print(0)", "def add1(x):\n    return operator.add(x, 1)"], None),
    "star import": (["from operator import *", "def add1(x):\n    return add(x, 1)"], None),
    "constant of a helper": (["ONE = 1", "def one():\n    return ONE", "def add1(x):\n    return x + one()"], None),
    "corrected": (["def add1(x):\n    return x - 1", RIGHT], RIGHT),
    "lambda": (["add1 = lambda x: x + 1", "print(add1(1))"], "add1 = lambda x: x + 1\n"),
    "broken repetition": ([RIGHT, "def add1(x):\n    ...and so on"], RIGHT),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", BESIDE)
def test_the_block_with_the_tested_function_is_run(name: str) -> None:
    blocks, program = BESIDE[name]
    response = "\n\nAnd:\n\n".join(f"{FENCE}python\n{block}\n{FENCE}" for block in blocks)
    golds = {kind: code_tests.tests_of(tests, row) for kind, (tests, row) in TESTED.items()}
    if program is not None:
        chosen = {kind: CodeGrader().find_for(gold or "", response) for kind, gold in golds.items()}
        assert {answer and answer.text for answer in chosen.values()} == {program}
    with Grader(workers=1) as grader:
        items = [(kind, Prompt.from_question("q", gold, "code"), response) for kind, gold in golds.items()]
        assert {kind: grade.verdict for kind, grade in grader.grade(items)} == dict.fromkeys(TESTED, "correct")


def test_a_method_of_the_class_solution_is_a_function() -> None:
    gold = code_tests.tests_of({"fn_name": "add1", "inputs": [[1]], "outputs": [2]}, {}) or ""
    method = "class Solution:\n    def add1(self, x):\n        return x + 1\n"
    use = "class Runner:\n    def main(self):\n        print(Solution().add1(1))"
    answer = CodeGrader().find_for(gold, f"{FENCE}python\n{method}{FENCE}\n\n{FENCE}python\n{use}\n{FENCE}")
    assert answer is not None and answer.text == method


def test_tests_that_name_nothing_choose_as_without_tests() -> None:
    gold = code_tests.tests_of({"inputs": ["1\n"], "outputs": ["2\n"]}, {}) or ""
    response = f"{FENCE}python\nprint(int(input()) + 1)\n{FENCE}\n\n{FENCE}python\nprint(2)\n{FENCE}"
    assert names_in_tests(gold) == frozenset() and CodeGrader().find_for(gold, response) == find_program(response)


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
        (True, 1, "correct"),
        (0, False, "correct"),
        (0, None, "wrong"),
        (10**400, 0.5, "wrong"),
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
            (name, Prompt.from_question("q", code_tests.tests_of(tests, {}), "code"), code)
            for name, tests, code, _ in items
        )
        grades = dict(grader.grade((name, prompt, f"{FENCE}python\n{code}\n{FENCE}") for name, prompt, code in prompts))
    assert {name: (grade.verdict, grade.reason) for name, grade in grades.items()} == {
        name: expected for name, _, _, expected in items
    }
    assert grades["printed"].evidence["detail"] == "printed '4\\n'"
    assert grades["call"].evidence["gold"] == "1 × function_call"


@pytest.mark.parametrize(
    ("tests", "beside", "verdicts"),  # of a right program, a wrong one, and one with another name
    [
        (["add1(1) == 2"], {}, ("correct", "wrong", "wrong")),
        (["assert add1(1) == 2", "print(add1(1))"], {}, ("correct", "wrong", "wrong")),
        (["assert list(map(add1, [1])) == [2]"], {}, ("correct", "wrong", "wrong")),
        (["import math", "assert math.isclose(add1(1), 2)"], {}, ("correct", "wrong", "wrong")),
        (["assert nowhere(x=1) == add1(1)", "assert add1(1) == 2"], {}, ("wrong", "wrong", "wrong")),
        (["assert add1(x) == 2"], {}, ("unverifiable", "unverifiable", "wrong")),
        (["import no_such_library\nassert add1(1) == 2"], {}, ("unverifiable",) * 3),
        (["assert add1(1) == 2"], {"test_setup_code": "import no_such_library"}, ("unverifiable",) * 3),
        (["assert add1(1) == 2"], {"test_setup_code": "x = no_such_name"}, ("unverifiable",) * 3),
        (["from solution import add1\nassert add1(1) == 2"], {}, ("correct", "wrong", "wrong")),
    ],
)
def test_an_error_of_the_tests_is_no_fault_of_the_answer(
    zygote: Zygote, tests: list[str], beside: dict[str, object], verdicts: tuple[str, ...]
) -> None:
    read = json.loads(code_tests.tests_of(tests, beside) or "")
    programs = [f"def {name}(x):\n    return x + {by}" for name, by in (("add1", 1), ("add1", 2), ("plus", 1))]
    rulings = [run_tests(Sandbox(zygote), program, read, 5.0) for program in programs]
    assert tuple(ruling[0] for ruling in rulings) == verdicts
    assert all(ruling[1] == "tests fail by themselves" for ruling in rulings if ruling[0] == "unverifiable")


ADD_STUB = 'import math\n\ndef add(x, y):\n  """Add.\n\n  >>> add(1, 2)\n  3\n  """\n'


@pytest.mark.parametrize(
    "response",
    [
        f"{FENCE}python\n  z = x + y\n  return z\n{FENCE}",
        f"So:\n  {FENCE}\n  return x + y\n  {FENCE}",
        f"{FENCE}\n  return h(x, y)\n\ndef h(x, y): return math.fsum((x, y))\n{FENCE}",
        f"{FENCE}\n  add = x + y\n  return add\n{FENCE}",
        f"{FENCE}\nadd = lambda x, y: x + y\n{FENCE}",
        "  z = x + y\n  return z",
    ],
)
def test_the_body_of_a_function_continues_its_stub(zygote: Zygote, response: str) -> None:
    check = "def check(candidate):\n    assert candidate(1, 2) == 3"
    gold = code_tests.tests_of(check, {"entry_point": "add", "prompt": ADD_STUB}) or ""
    answer = CodeGrader().find_for(gold, response)
    assert answer is not None
    assert run_tests(Sandbox(zygote), answer.text, json.loads(gold), 5.0)[0] == "correct"


@pytest.mark.parametrize(
    ("tests", "outcomes"),  # of a program that returns 1, and one that returns [1]
    [
        ({"fn_name": "f", "inputs": [[0]], "outputs": [[1]]}, ("correct", "correct")),
        ({"fn_name": "f", "inputs": [[0], [0]], "outputs": [[1], 1]}, ("wrong", "wrong")),
        ({"test_cases": [{"fn_name": "f", "input": [0], "output": [1]}]}, ("correct", "correct")),
        ({"exact": True, "test_cases": [{"fn_name": "f", "input": [0], "output": [1]}]}, ("wrong", "correct")),
        ([{"input": "0", "output": "[1]", "testtype": "functional"}], ("wrong", "correct")),
    ],
)
def test_a_result_may_be_wrapped_where_all_of_a_problem_are(
    zygote: Zygote, tests: object, outcomes: tuple[str, str]
) -> None:
    stored = code_tests.tests_of(tests, {"metadata": '{"func_name": "f"}'}) or ""
    assert code_tests.tests_of(stored, {}) == stored
    programs = [f"def f(x): return {result}" for result in ("1", "[1]")]
    assert tuple(run_tests(Sandbox(zygote), each, json.loads(stored), 5.0)[0] for each in programs) == outcomes


def test_each_assert_adds_to_the_time_limit(zygote: Zygote) -> None:
    busy = "import time\ndef f(x):\n    end = time.process_time() + 0.6\n    while time.process_time() < end: pass"
    tests = json.loads(code_tests.tests_of(["assert f(1) is None", "assert f(2) is None"], {}) or "")
    assert run_tests(Sandbox(zygote), busy, tests, 1.0)[0] == "correct"


@pytest.mark.parametrize(
    ("gold", "shown", "reason"),
    [
        ('["assert add1(1) == 2"]', "1 × assert", None),
        ('{"inputs": ["1"], "outputs": ["2"]}', "1 × stdin_stdout", None),
        ('{"test_cases": [{"input": "1", "output": "2"}]}', "1 × stdin_stdout", None),
        ('{"test_cases": [1]}', "", "tests in no known form"),
        ('{"language": "python", "test_cases": [{"type": "assert", "code": 5}]}', "", "tests in no known form"),
        (
            '{"test_cases": [{"input": "1", "output": "2"}], "setup": 3}',
            "",
            "tests in no known form",
        ),
        ("The sum of both.", "", "tests in no known form"),
    ],
)
def test_a_gold_of_another_hand_is_read_or_named(gold: str, shown: str, reason: str | None) -> None:
    grader = CodeGrader()
    assert grader.gold_shown(grader.gold(gold)) == shown
    assert grader.reads_plainly(grader.gold(gold)) == (reason is None)
    assert grader.rule(grader.gold(gold), Answer("x", "code block")) == (reason and ("unverifiable", reason))


def test_compressed_tests_are_read_without_unpickling() -> None:
    cases = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]

    def packed(value: object) -> str:
        return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

    row = {"metadata": '{"func_name": "add"}', "public_test_cases": "[]"}
    read = json.loads(code_tests.tests_of(packed(json.dumps(cases)), row) or "")
    assert read["test_cases"] == [
        {"type": "function_call", "fn_name": "add", "input": [[1, 2], 3], "output": [1, 2, 3]}
    ]
    (program, bare) = (
        f"class Solution:\n def add(self, a: {kind}, b): return a + [b]" for kind in ("List[int]", "Liste")
    )
    with open_zygote() as zygote:
        assert run_tests(Sandbox(zygote), program, read, 5.0)[0] == "correct", "LeetCode imports `List` for its answers"
        assert run_tests(Sandbox(zygote), bare, read, 5.0)[:2] == ("wrong", "error: NameError")
    for value in (print, [1], {"a": "b"}):
        with pytest.raises(ValueError, match="is compressed, and holds"):
            code_tests.tests_of(packed(value), row)


def problems(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verdicts(rows: list[dict[str, str]], tests: str) -> list[tuple[object, object]]:
    with open_zygote() as zygote:
        sandbox = Sandbox(zygote)
        found = []
        for row in rows:
            code = row["code"] if "code" in row else row["prompt"] + row["canonical_solution"]
            ruling = run_tests(sandbox, code, json.loads(code_tests.tests_of(row[tests], row) or ""), 10.0)
            found.append((row["task_id"], ruling))
    return [(name, ruling) for name, ruling in found if ruling[0] != "correct"]


def test_a_sample_of_reference_solutions_passes(real_data: Callable[[str], Path]) -> None:
    assert verdicts(problems(real_data("humaneval/HumanEval.jsonl"))[::8], "test") == []
    assert verdicts(problems(real_data("mbpp_dev/mbpp.jsonl"))[::25], "test_list") == []


@pytest.mark.slow
def test_every_reference_solution_passes(real_data: Callable[[str], Path]) -> None:
    assert verdicts(problems(real_data("humaneval/HumanEval.jsonl")), "test") == []
    assert verdicts(problems(real_data("mbpp_dev/mbpp.jsonl")), "test_list") == []


class Mutator(ast.NodeTransformer):
    """Changes the place with a given number: an operator, a comparison, a constant, a condition or a result."""

    def __init__(self, place: int) -> None:
        self.place, self.seen = place, 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        changed = mutated(node)
        if changed is None:
            return node
        self.seen += 1
        return changed if self.seen - 1 == self.place else node


def mutated(node: ast.AST) -> ast.AST | None:
    match node:
        case ast.BinOp(left, operator, right):
            other = ast.Sub() if isinstance(operator, ast.Add) else ast.Add()
            return ast.BinOp(left, other, right)
        case ast.Compare(left, [operator], [right]):
            other = (
                ast.LtE() if isinstance(operator, ast.Lt) else ast.NotEq() if isinstance(operator, ast.Eq) else ast.Lt()
            )
            return ast.Compare(left, [other], [right])
        case ast.Constant(bool(value)):
            return ast.Constant(not value)
        case ast.Constant(int(value)):
            return ast.Constant(value + 1)
        case ast.If(test, body, orelse):
            return ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(value) if value is not None:
            return ast.Return(ast.Constant(None))
    return None


def mutants(code: str, count: int, draw: random.Random) -> list[str]:
    counter = Mutator(-1)
    counter.visit(ast.parse(code))
    places = draw.sample(range(counter.seen), min(count, counter.seen))
    return [ast.unparse(ast.fix_missing_locations(Mutator(place).visit(ast.parse(code)))) for place in places]


PLAIN_SECONDS = 15


def plainly(code: str, row: dict[str, str]) -> bool:
    """The verdict of a process without a sandbox."""
    if "test" in row:
        program = f"{code}\n{row['test']}\ncheck({row['entry_point']})\n"
    else:
        program = "\n".join([code, row["test_setup_code"], *row["test_list"]])

    def limit() -> None:  # processor time: a busy machine must not decide a verdict
        resource.setrlimit(resource.RLIMIT_CPU, (PLAIN_SECONDS, PLAIN_SECONDS))

    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            timeout=20 * PLAIN_SECONDS,
            stdin=subprocess.DEVNULL,
            preexec_fn=limit,
        )
    except subprocess.TimeoutExpired:  # it waits for something
        return False
    return done.returncode == 0


def differing(rows: list[dict[str, str]], each: int, draw: random.Random) -> tuple[int, list[object]]:
    """How many mutants were run, and those that the sandbox judges differently."""
    count, different = 0, list[object]()
    with open_zygote() as zygote:
        sandbox = Sandbox(zygote)
        for row in rows:
            code = row["code"] if "code" in row else row["prompt"] + row["canonical_solution"]
            tests = json.loads(code_tests.tests_of(row["test" if "test" in row else "test_list"], row) or "")
            for mutant in mutants(code, each, draw):
                ruling = run_tests(sandbox, mutant, tests, 3.0)
                count += 1
                if (ruling[0] == "correct") != plainly(mutant, row):
                    different.append((row["task_id"], ruling, mutant))
    return count, different


def test_a_sample_of_mutants_gets_the_verdicts_of_a_plain_process(real_data: Callable[[str], Path]) -> None:
    rows = problems(real_data("humaneval/HumanEval.jsonl"))[::16] + problems(real_data("mbpp_dev/mbpp.jsonl"))[::50]
    count, different = differing(rows, 2, random.Random(19))
    assert count > 30 and different == []


@pytest.mark.slow
def test_two_thousand_mutants_get_the_verdicts_of_a_plain_process(real_data: Callable[[str], Path]) -> None:
    rows = problems(real_data("humaneval/HumanEval.jsonl")) + problems(real_data("mbpp_dev/mbpp.jsonl"))
    count, different = differing(rows, 4, random.Random(2000))
    assert count >= 2000 and different == []
