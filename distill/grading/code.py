"""Does this program pass the tests? Runs an answer's program in the sandbox.

The gold of a prompt is its tests (`distill.prompts.code_tests`). An answer is `correct` when it passes all of them and
`wrong` at the first that it does not, with the reason: `wrong output`, `test failed`, `time limit`, `error: KeyError`.
It is `unverifiable` when the tests are not Python, when they never use the answer or fail whatever it is (a module that
is missing), and when the only difference are decimals within an error of 1e-6, which a checker of the problem's own
might accept.

What is compared where: the output of a program and the value that a function returned are compared here, in the worker,
and the program never sees what is expected. Asserts run in a process of their own that calls the answer's functions in
another one (`distill.grading.sandbox.peer`).

The program is the last Python block that defines what the tests call, with the blocks that define what it lacks
(`distill.grading.blocks`). Where the tests name nothing, as those of input and output, it is the last Python block that
reads its input and writes, else the last that reads or defines something other than tests, else the last that is marked
as Python, else the last block. Where the line before it says that it is another version (`ASIDE`: "The original code
was:"), the program without such blocks is run too, and `wrong` counts only if it is the verdict on both. Without blocks
it is a response that is Python as a whole, or the lines of Python in it. Only what follows the reasoning is searched.
"""

import ast
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from distill.errors import WorkError
from distill.grading.blocks import binds, joined_program, used_names
from distill.grading.grade import Answer, Detailed, Outcome, Ruling, TaskGrader
from distill.grading.sandbox import levels
from distill.grading.sandbox.peer import Remote
from distill.grading.sandbox.program import OWN_FAULT, Test
from distill.grading.sandbox.runner import Sandbox
from distill.prompts import code_tests
from distill.prompts.code_tests import STDIN, Case, CodeTests
from distill.prompts.prompt import outside_blocks

BLOCK = re.compile(  # a fence that is four columns deeper than the first is text, as in a docstring
    r"^([ \t]*)(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^(?!\1(?: {4}|\t))[ \t]*\2[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
MARKDOWN = ("md", "markdown")  # blocks with blocks in them
PROMPT = re.compile(r"^(?:>>>|\.\.\.)(?: (.*))?$", re.MULTILINE)  # of an interactive session
ASIDE = re.compile(  # the end of the line before a block that may be no answer
    r"\b(?:original|initial|previous|old|na(?:i|\u00ef)ve|brute[- ]?force|slow(?:er)?|inefficient|buggy|broken|"
    r"incorrect|wrong|your|given)\b[^.!?\n]{0,80}[:.)*`]*\s*\Z",
    re.IGNORECASE,
)
PYTHON = ("", "python", "py", "python3", "python2", "pycon")
INPUT = re.compile(r"\binput\(|\bstdin\b|\bopen\(0\b|\bos\.read\(")
OUTPUT = re.compile(r"\bprint\b|\bstdout\b|\bopen\(1\b|\bos\.write\(")
PRINTED = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][+-]?\d{1,4})?")  # a number, as programs print it
SUBSTANCE = re.compile(rf"^(?:async )?(?:def|class) |{INPUT.pattern}", re.MULTILINE)
OTHER_THAN_TESTS = re.compile(rf"^(?:async )?def (?!test)|^class (?!Test)|{INPUT.pattern}", re.MULTILINE)
TESTS_ONLY = re.compile(r"^assert ", re.MULTILINE)
LATE_FENCE = re.compile(r"(?<=[^\s`])[ \t]*(```+[\w+#.-]*\n)")  # "The program: ```python"
DEFINITION = re.compile(r"(?:import|from|class|def|async def) \w|@\w")
STATEMENT = re.compile(  # a line of a program without fences: indented, closing, a keyword, a call, an assignment
    r"\s|$|[)\]}#@]|(?:import|from|class|def|async|if|elif|else|for|while|try|except|finally|with|print)\b"
    r"|[\w.\[\]]+\s*[,=(+*/-]"
)
CLOSE = 1e-6  # relative or absolute error that a checker usually accepts
LARGE = 1e300  # from which an integer may be too large for a float
# What LiveCodeBench executes before a program (`import_string` of its testing_util.py), and LeetCode before a solution,
# whose starter code says `List[int]`. The built-in functions stay; `copy` and `datetime` are the modules.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
GIVEN = "".join(f"from {name} import *\n" for name in f"typing {MODULES} builtins".split())
GIVEN += f"import {MODULES.replace(' ', ', ')}\nsys.setrecursionlimit(50_000)\n"
LINE = 300  # characters of the line before a block that are looked at
SHOWN = 200  # characters of an output or a message in the evidence
TESTED = ("python", "python3", "py")


class CodeGrader(TaskGrader):
    """Runs programs against their tests, each of which has `seconds` of processor time."""

    version = 4  # fences in docstrings, signatures, sessions, blocks within blocks, other versions
    lazy = True  # few runs have code, and a zygote takes half a second
    votes = False
    doubted = ("wrong",)
    packages = ("python",)  # which runs the programs

    def __init__(self) -> None:
        self.sandbox: Sandbox | None = None

    def conditions(self) -> Mapping[str, str]:
        """The level at which this machine isolates programs, where it is not `full`. Errors: WorkError where no program
        runs at all."""
        level, _, _ = levels.this_machine()
        return {} if level == "full" else {"level": level}

    def prepare(self) -> None:
        """Start a zygote behind the strongest walls of this machine. Errors: WorkError when they are below `level`."""
        self.sandbox = Sandbox(levels.open_zygote(self.level))

    def limits(self, gold: str) -> int:
        """Every test has the time limit to itself, and a moment to start."""
        tests = read_tests(gold)
        return 1 if tests is None else 1 + len(tests["test_cases"])

    def gold(self, text: str) -> str:
        """The tests, as they are stored."""
        return text if text.strip() else ""

    def gold_shown(self, gold: str) -> str:
        """How many tests of which type: tests may be megabytes."""
        tests = read_tests(gold)
        kinds = [case["type"] for case in tests["test_cases"]] if tests else []
        return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))

    def find(self, response: str) -> Answer | None:
        """The program, see the module."""
        return find_program(response)

    def find_for(self, gold: str, response: str) -> Answer | None:
        """The program that has the functions which the tests call, see the module."""
        return find_program(response, names_in_tests(gold))

    def rule(self, gold: str, answer: Answer) -> Ruling | None:
        """Only running tells."""
        if (tests := read_tests(gold)) is None:
            return "unverifiable", "tests in no known form"
        if tests["language"] not in TESTED:
            return "unverifiable", f"tests in {tests['language']}"
        return None

    def compare(self, gold: str, answer: str, marked: bool) -> Ruling | Detailed:
        """Run the tests until one fails; details: the number of that test, and what it said."""
        tests = read_tests(gold)
        assert tests is not None and self.sandbox is not None, "`rule` let it through, and `prepare` was called"
        try:
            return run_tests(self.sandbox, answer, tests, self.seconds)
        except WorkError:  # a zygote may be killed by others than its program
            self.sandbox.zygote.close()
        try:
            self.prepare()
            return run_tests(self.sandbox, answer, tests, self.seconds)
        except WorkError as error:
            return "unverifiable", "sandbox failed", {"detail": str(error)}

    def reads_plainly(self, gold: str) -> bool:
        """Whether the gold are tests in Python."""
        tests = read_tests(gold)
        return tests is not None and tests["language"] in TESTED


@lru_cache(maxsize=2)  # the samples of a prompt follow one another, and its tests may be megabytes
def read_tests(text: str) -> CodeTests | None:
    """The tests of a gold, in any published form; None where it has none that can be run. Not to be changed."""
    try:
        return code_tests.read_tests(text, {})
    except ValueError:
        return None


# ---- the program in a response


@lru_cache(maxsize=2)  # the samples of a prompt follow one another, and its tests may be megabytes
def names_in_tests(gold: str) -> frozenset[str]:
    """The functions and classes that an answer may have to define; empty for tests of input and output."""
    if (tests := read_tests(gold)) is None:
        return frozenset()
    names = {name for case in tests["test_cases"] if (name := case.get("fn_name"))}
    if "entry_point" in tests:
        return frozenset(names | {tests["entry_point"]})
    if programs := [case["code"] for case in tests["test_cases"] if "code" in case]:
        names |= used_names("\n".join([tests.get("setup", ""), *programs]))
    return frozenset(names)


def find_program(response: str, names: frozenset[str] = frozenset()) -> Answer | None:
    """The program of a response; None where there is none. Linear time. names: that the tests use."""
    scope = outside_blocks(response.replace("\r\n", "\n"))
    first, late = BLOCK.search(scope), LATE_FENCE.search(scope)
    if late and not (first and first.start() < late.start()):
        scope = LATE_FENCE.sub(_own_line, scope)
    if blocks := _blocks(scope):
        last, answers = _program(blocks, names), [block for block in blocks if not block.aside]
        other = _program(answers, names) if answers and len(answers) < len(blocks) else last
        return Answer(last, "code block", other if other != last else "")
    if scope.strip() and _parses(scope.strip()) and re.search(r"[=(]", scope):
        return Answer(scope.strip(), "whole response")
    if scope.strip() and scope[:1] in " \t" and _parses(f"def f():\n{scope.rstrip()}\n"):
        return Answer(scope.rstrip(), "body")
    if program := _unfenced(scope):
        return Answer(program, "lines of code")
    return None


class _Fenced(NamedTuple):
    """A code block: its language, in lower case, its text, and whether the line before says that it is another
    version."""

    tag: str
    text: str
    aside: bool


def _program(blocks: Sequence[_Fenced], names: frozenset[str]) -> str:
    """The program in blocks, see the module."""
    if names and (program := joined_program([block.text for block in blocks if block.tag in PYTHON], names)):
        return program
    ranks = [(_rank(block.tag, block.text, not names), number) for number, block in enumerate(blocks)]
    return blocks[max(ranks)[1]].text


def _blocks(scope: str) -> list[_Fenced]:
    """The code blocks that are not empty, those of a Markdown block instead of it."""
    blocks = []
    for match in BLOCK.finditer(scope):
        _, fence, tag, text = match.groups()
        if (tag.lower() in MARKDOWN or (not tag and len(fence) > 3)) and (inner := _blocks(text)):
            blocks += inner
        elif text.strip():
            before = scope[max(0, match.start() - LINE) : match.start()].rstrip().rpartition("\n")[2]
            blocks.append(_Fenced(tag.lower(), _typed(textwrap.dedent(text)), ASIDE.search(before) is not None))
    return blocks


def _typed(text: str) -> str:
    """What was typed in an interactive session that defines something; any other text as it is."""
    if not text.lstrip().startswith(">>>"):
        return text
    typed = "\n".join(match[1] or "" for match in PROMPT.finditer(text)) + "\n"
    return typed if SUBSTANCE.search(typed) else text


def _own_line(match: re.Match[str]) -> str:
    """A fence on a line of its own, at its column."""
    line = match.string.rfind("\n", 0, match.start()) + 1
    return "\n" + " " * (match.start(1) - line) + match[1]


def _rank(tag: str, text: str, reads: bool) -> int:
    """How likely a block is the program; of equal blocks the last counts. reads: it is to read input and write."""
    if tag not in PYTHON:
        return 0
    if reads and INPUT.search(text) and OUTPUT.search(text):
        return 6
    if SUBSTANCE.search(text):
        return 5 if OTHER_THAN_TESTS.search(text) else 4
    if tag:
        return 3 if not TESTS_ONLY.search(text) else 2
    return 2 if re.search(r"[=(]", text) and _parses(text) else 1


def _unfenced(scope: str) -> str | None:
    """The lines of Python from the first import, class or function on, in a response without code blocks."""
    lines = scope.splitlines()
    start = next((number for number, line in enumerate(lines) if DEFINITION.match(line)), len(lines))
    end = next((number for number in range(start, len(lines)) if not STATEMENT.match(lines[number])), len(lines))
    program = "\n".join(lines[start:end]).strip()
    return program if SUBSTANCE.search(program) and _parses(program) else None


def _parses(code: str, flags: int = ast.PyCF_ONLY_AST) -> bool:
    """Whether code is Python. flags: of `compile`; with 0 a `return` outside a function is an error."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(code, "main.py", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def completed(program: str, tests: CodeTests) -> str:
    """The program with what the problem gave: imports and helpers, or the head of the function that it continues."""
    stub, entry = tests.get("stub", ""), tests.get("entry_point", "")
    if not stub:
        return program
    body = program if program[:1] in " \t" else textwrap.indent(program, _indentation(stub))
    if not binds(program, entry) or (not _parses(program, 0) and _parses(stub + body, 0)):
        return stub + body
    head = re.split(rf"^(?:async )?def {re.escape(entry)}\b", stub, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{head}\n{program}" if _parses(head) and "from __future__" not in program else program


def _indentation(stub: str) -> str:
    """The indentation of a function's body, of which a stub may have a docstring."""
    last = stub.rstrip().rpartition("\n")[2]
    return last[: len(last) - len(last.lstrip())] or "    "


# ---- running


def run_tests(sandbox: Sandbox, program: str, tests: CodeTests, seconds: float) -> Ruling | Detailed:
    """Run all tests; the ruling on the first that does not pass. seconds: of processor time for each; asserts share
    theirs.

    Errors: WorkError when the sandbox fails.
    """
    code, setup = completed(program, tests), tests.get("setup", "")
    asserts = [Test(type=case["type"], code=case["code"]) for case in tests["test_cases"] if "code" in case]
    doubt: Ruling | Detailed | None = None
    for number, case in enumerate(case for case in tests["test_cases"] if "code" not in case):
        if case["type"] == STDIN:
            outcome, reason, detail = _run_script(sandbox, code, case, seconds)
        else:
            outcome, reason, detail = _run_call(sandbox, code, case, tests, seconds)
        if outcome == "wrong":
            return outcome, reason, {"test": number, "detail": detail}
        if outcome == "unverifiable" and doubt is None:
            doubt = outcome, reason, {"test": number, "detail": detail}
    if asserts:
        tested = sandbox.tests(code, setup, asserts, tests.get("entry_point"), seconds)
        if tested["reason"] == "never called":
            return "unverifiable", "tests never call the answer"
        if tested["reason"] == OWN_FAULT:
            return "unverifiable", OWN_FAULT, {"test": tested["number"], "detail": _last(tested["detail"])}
        if not tested["passed"]:
            outcome, reason, detail = _failed(tested["reason"], tested["detail"])
            return outcome, reason, {"test": tested["number"], "detail": detail}
    return doubt or ("correct", "all tests passed")


_Result = tuple[Outcome, str, str]  # the outcome of one test, its reason, and a line on what came


def _failed(reason: str, detail: str) -> _Result:
    """The result of a program that did not end well."""
    return "wrong", reason, _last(detail)


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2][:SHOWN]


def _run_script(sandbox: Sandbox, code: str, case: Case, seconds: float) -> _Result:
    ended = sandbox.script(code, str(case["input"]).encode(errors="surrogateescape"), seconds, GIVEN)
    if ended.reason:
        return _failed(ended.reason, ended.errors)
    output = ended.output.decode(errors="replace")
    return *compare_output(output, str(case["output"])), f"printed {output[:SHOWN]!r}"


def _run_call(sandbox: Sandbox, code: str, case: Case, tests: CodeTests, seconds: float) -> _Result:
    name, given = case.get("fn_name") or tests.get("entry_point"), case["input"]
    if not name:
        return "unverifiable", "tests without a function's name", ""
    arguments = given if isinstance(given, list) else [given]
    returned = sandbox.call(code, tests.get("setup", ""), name, arguments, seconds, GIVEN)
    if returned.reason:
        return _failed(returned.reason, returned.detail)
    if isinstance(returned.value, Remote):
        return "wrong", "returned no plain data", ""
    wanted = case["output"]
    rulings = [compare_values(returned.value, wanted)]
    if isinstance(wanted, list) and code_tests.may_be_wrapped(tests):
        rulings.append(compare_values(returned.value, wanted[0]))
    best = min(rulings, key=lambda ruling: ("correct", "unverifiable", "wrong").index(ruling[0]))
    return *best, f"returned {repr(returned.value)[:SHOWN]}"


def compare_output(output: str, wanted: str) -> Ruling:
    """Compare what was printed with what was to be: line by line without the space around them, numbers by value."""
    given, expected = (
        [line.split() for line in text.strip().splitlines() if line.strip()] for text in (output, wanted)
    )
    if given == expected:
        return "correct", "same output"
    if list(map(len, given)) != list(map(len, expected)):
        return "wrong", "wrong output"
    pairs = [
        (a, b) for line, other in zip(given, expected, strict=True) for a, b in zip(line, other, strict=True) if a != b
    ]
    return _closest([_compare_numbers(_number(a), _number(b)) for a, b in pairs], "output")


def _number(text: str) -> Decimal | None:
    if not PRINTED.fullmatch(text):  # 007 and 1_000 are texts
        return None
    number = Decimal(text)
    return number if number.is_finite() and -400 < number.adjusted() < 400 else None


def _compare_numbers(given: Decimal | None, wanted: Decimal | None) -> str:
    """`equal`, `close` or `different`. Integers are never close."""
    if given is None or wanted is None:
        return "different"
    if given == wanted:
        return "equal"
    if given == given.to_integral_value() and wanted == wanted.to_integral_value():
        return "different"
    return "close" if abs(given - wanted) <= Decimal(CLOSE) * max(Decimal(1), abs(wanted)) else "different"


def _closest(differences: Sequence[str], what: str) -> Ruling:
    if "different" in differences:
        return "wrong", f"wrong {what}"
    return ("unverifiable", "close numbers") if "close" in differences else ("correct", f"same {what}")


def compare_values(value: object, wanted: object) -> Ruling:
    """Compare what a function returned with the JSON value that it should: tuples are lists, keys are texts, and True
    is 1."""
    return _closest(list(_differences(value, wanted, 0)), "result")


def _differences(value: object, wanted: object, depth: int) -> list[str]:
    if depth > 100:
        return ["different"]
    if isinstance(value, list | tuple) and isinstance(wanted, list):
        if len(value) != len(wanted):
            return ["different"]
        return [d for one, other in zip(value, wanted, strict=True) for d in _differences(one, other, depth + 1)]
    if isinstance(value, dict) and isinstance(wanted, dict):
        texts = {str(key): inner for key, inner in value.items()}
        if texts.keys() != wanted.keys():
            return ["different"]
        return [d for key, inner in texts.items() for d in _differences(inner, wanted[key], depth + 1)]
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        if value == wanted:
            return ["equal"]
        inexact = not (isinstance(value, int) and isinstance(wanted, int)) and max(abs(value), abs(wanted)) < LARGE
        return ["close" if inexact and math.isclose(value, wanted, rel_tol=CLOSE, abs_tol=CLOSE) else "different"]
    return ["equal" if type(value) is type(wanted) and value == wanted else "different"]
