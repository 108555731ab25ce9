"""Test cases of a programming problem, from the forms in which data sets publish them → one.

    {"language": "python",
     "test_cases": [{"type": "stdin_stdout", "input": "1 2\\n", "output": "3\\n"},
                    {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3},
                    {"type": "assert", "code": "assert add(1, 2) == 3"},
                    {"type": "program", "code": "def check(candidate): …"}],
     "setup": "import math",          where there is one: code before every test
     "entry_point": "add"}            where there is one: the function that `check` is called with

The gold of a prompt is this object as JSON text, so a sandbox reads one form, and the prompt's id is the same whether
the tests were published as objects or as JSON text. The forms: `verification_info` of open-r1 (an object with
`test_cases`), `input_output` of APPS and TACO (`inputs`, `outputs`, `fn_name`), lists of `input` and `output` of
LiveCodeBench, `test_list` of MBPP (asserts, with `test_setup_code`), `test` of HumanEval (a program, with
`entry_point`). Columns beside the tests are read by these names (`BESIDE`).
"""

import ast
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import NotRequired, TypedDict

from distill.prompts.columns import parsed

BESIDE = ("entry_point", "test_setup_code", "test_imports")  # columns that are read beside the tests
STDIN, CALL = "stdin_stdout", "function_call"
TYPES = {STDIN: STDIN, "stdin": STDIN, CALL: CALL, "functional": CALL}


class Case(TypedDict):
    """One test. type: `stdin_stdout`, `function_call`, `assert` or `program`; the other keys depend on it."""

    type: str
    fn_name: NotRequired[str | None]
    input: NotRequired[object]
    output: NotRequired[object]
    code: NotRequired[str]


class CodeTests(TypedDict):
    """The tests of one problem."""

    language: str
    test_cases: list[Case]
    setup: NotRequired[str]
    entry_point: NotRequired[str]


def tests_of(value: object, row: Mapping[str, object]) -> str | None:
    """The tests as JSON text; None where there are none. row: for the columns beside the tests.

    Errors: ValueError, the end of a sentence about the column, when the tests are in no known form.
    """
    value, language = parsed(value), "python"
    setup, entry = _setup(row), row.get("entry_point")
    if isinstance(value, dict) and "test_cases" in value:
        language = str(value.get("language") or language)
        cases = [_case(case, number) for number, case in enumerate(_listed(value["test_cases"]))]
    elif isinstance(value, dict) and "inputs" in value and "outputs" in value:
        cases = list(_paired(value))
    elif isinstance(value, list) and all(isinstance(case, str) for case in value):
        cases = [{"type": "assert", "code": _program(str(case))} for case in value if str(case).strip()]
    elif isinstance(value, list):
        cases = [_case(case, number) for number, case in enumerate(value)]
    elif isinstance(value, str) and value.strip():
        if "def check(" in value and not (isinstance(entry, str) and entry.strip()):
            raise ValueError("defines check(candidate), and there is no column entry_point with the function's name")
        cases = [{"type": "program", "code": _program(value)}]
    elif value is None or value in ("", {}) or isinstance(value, str):
        return None
    else:
        keys = f"an object with {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise ValueError(f"is {keys}, not tests: expected test_cases, inputs and outputs, a list, or a program")
    if not cases:
        return None
    tests: CodeTests = {"language": language, "test_cases": cases}
    if setup:
        tests["setup"] = setup
    if isinstance(entry, str) and entry.strip():
        tests["entry_point"] = entry.strip()
    text = json.dumps(tests, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair") from None
    return text


def _program(text: str) -> str:
    """The text, which is Python: prose in its place would fail every answer. Errors: ValueError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # MemoryError: nested too deep
        raise ValueError(f"is not tests: {text[:40]!r} is no Python program ({type(error).__name__})") from error
    return text


def _listed(value: object) -> list[object]:
    value = parsed(value)
    if not isinstance(value, list):
        raise ValueError(f"has tests that are a {type(value).__name__}, not a list")
    return value


def _case(case: object, number: int) -> Case:
    """A test of input and output. Errors: ValueError."""
    if not isinstance(case, dict) or "input" not in case or "output" not in case:
        what = f"keys {', '.join(case)}" if isinstance(case, dict) else f"a {type(case).__name__}"
        raise ValueError(f"has a test ({number}) with {what}; expected input and output")
    name = case.get("fn_name") or None
    kind = case.get("type") or case.get("testtype") or (CALL if name else STDIN)
    if kind not in TYPES:
        raise ValueError(f"has a test ({number}) of type {kind!r}; expected one of {', '.join(TYPES)}")
    return _made(TYPES[str(kind)], name, case["input"], case["output"], number)


def _paired(value: Mapping[str, object]) -> Iterator[Case]:
    """The tests of `inputs` and `outputs`. Errors: ValueError."""
    inputs, outputs, name = _listed(value["inputs"]), _listed(value["outputs"]), value.get("fn_name") or None
    if len(inputs) != len(outputs):
        raise ValueError(f"has {len(inputs)} inputs and {len(outputs)} outputs")
    for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True)):
        yield _made(CALL if name else STDIN, name, given, wanted, number)


def _made(kind: str, name: object, given: object, wanted: object, number: int) -> Case:
    if kind == STDIN:
        return {"type": kind, "input": _stream(given, number), "output": _stream(wanted, number)}
    return {"type": kind, "fn_name": None if name is None else str(name), "input": given, "output": wanted}


def _stream(value: object, number: int) -> str:
    """What a program reads or writes: text, or a list of its lines. Errors: ValueError."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"has a test ({number}) whose input or output is a {type(value).__name__}, not text")
    return str(value)


def _setup(row: Mapping[str, object]) -> str:
    """The code before every test: imports, then the setup."""
    parts = list[str]()
    for column in ("test_imports", "test_setup_code"):
        value = parsed(row.get(column))
        parts += [str(line) for line in value] if isinstance(value, list) else [value] if isinstance(value, str) else []
    return "\n".join(part for part in parts if part.strip())
