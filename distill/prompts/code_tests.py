"""Test cases of a programming problem, from the forms in which data sets publish them → one.

    {"language": "python",
     "test_cases": [{"type": "stdin_stdout", "input": "1 2\\n", "output": "3\\n"},
                    {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3},
                    {"type": "assert", "code": "assert add(1, 2) == 3"},
                    {"type": "program", "code": "def check(candidate): …"}],
     "setup": "import math",          optional: code before every test
     "entry_point": "add",            optional: the function that `check` is called with
     "stub": "def add(a, b):\n",       optional: the beginning of the function, with its imports and helpers
     "exact": true}                    optional: no output of a function call is wrapped (`may_be_wrapped`)

The gold of a prompt is this object as JSON text, so a sandbox reads one form, and the prompt's id is the same whether
the tests were published as objects or as JSON text. The published forms:

    open-r1           `verification_info`, an object with `test_cases`
    APPS, TACO        `input_output`, an object with `inputs`, `outputs` and, for a function, `fn_name`
    LiveCodeBench     `private_test_cases`: base64 of zlib of a pickle of the JSON of a list of `input`, `output` and
                      `testtype`; for a function, `metadata` has `func_name`, and each line of an input is an argument
    MBPP, MBPP+       `test_list`, a list of asserts, with `test_setup_code` and `test_imports`; `test`, a program
    HumanEval(+)      `test`, a program that defines `check`, with `entry_point` and `prompt`

Columns beside the tests are read by these names (`BESIDE`). LiveCodeBench's pickle is not unpickled, which could run
code: its instructions are read, and any but that of one string is refused.

Tests that can fail no answer, and tests of which no part could, are refused where they are read (`assertions`).
"""

import base64
import binascii
import json
import pickletools
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import NotRequired, TypedDict

from distill.prompts.assertions import called_functions, can_fail, parsed_program, with_asserts
from distill.prompts.columns import parsed

# columns that are read beside the tests
BESIDE = ("entry_point", "stub", "test_setup_code", "test_imports", "prompt", "metadata", "public_test_cases")
STDIN, CALL = "stdin_stdout", "function_call"
TYPES = {STDIN: STDIN, "stdin": STDIN, CALL: CALL, "functional": CALL}
PROGRAMS = ("assert", "program")
UNPACKED = 1 << 30  # bytes that compressed tests may hold
BASE64 = re.compile(r"eJ[A-Za-z0-9+/]{10,}={0,2}|eN[A-Za-z0-9+/]{10,}={0,2}")  # of a zlib stream's first bytes
STRING = {"PROTO", "FRAME", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}


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
    stub: NotRequired[str]
    exact: NotRequired[bool]


def tests_of(value: object, row: Mapping[str, object]) -> str | None:
    """The tests as JSON text; None where there are none. row: for the columns beside the tests.

    Errors: ValueError, the end of a sentence about the column, when the tests are in no known form, or assert nothing.
    """
    if (tests := read_tests(value, row)) is None:
        return None
    text = json.dumps(tests, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair") from None
    return text


def read_tests(value: object, row: Mapping[str, object]) -> CodeTests | None:
    """The tests in a published form, or in that of `tests_of`. Errors: as `tests_of`."""
    value, language, exact = parsed(_unpacked(value)), "python", False
    beside = {name: row.get(name) for name in ("entry_point", "stub")} | {"setup": _setup(row)}
    if isinstance(value, dict) and "test_cases" in value:
        language = str(value.get("language") or language)
        beside |= {name: value[name] for name in beside if value.get(name)}
        exact = value.get("exact") is True
        cases = [_case(case, number) for number, case in enumerate(_listed(value["test_cases"]))]
    elif isinstance(value, dict) and "inputs" in value and "outputs" in value:
        cases = list(_paired(value))
    elif isinstance(value, list) and all(isinstance(case, str) for case in value):
        cases = [{"type": "assert", "code": with_asserts(str(case))} for case in value if str(case).strip()]
    elif isinstance(value, list):
        function = _function(row)
        published = [*_public(row), *value]
        cases = [_case(case, number, function) for number, case in enumerate(published)]
        exact = any(isinstance(case, dict) and case.get("testtype") == "functional" for case in published)
    elif isinstance(value, str) and value.strip():
        cases = [{"type": "program", "code": with_asserts(value)}]
    elif value is None or value in ("", {}) or isinstance(value, str):
        return None
    else:
        keys = f"an object with {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise ValueError(f"is {keys}, not tests: expected test_cases, inputs and outputs, a list, or a program")
    if not cases:
        return None
    tests: CodeTests = {"language": language, "test_cases": cases}
    if setup := _text_beside("setup", beside):
        parsed_program(setup)
        tests["setup"] = setup
    if entry := _text_beside("entry_point", beside).strip():
        tests["entry_point"] = entry
        stub = _text_beside("stub", beside) or row.get("prompt")
        if isinstance(stub, str) and re.search(rf"^(?:async )?def {re.escape(entry)}\b", stub, re.MULTILINE):
            tests["stub"] = stub
    if exact and may_be_wrapped(tests):
        tests["exact"] = True
    _check_programs(tests)
    return tests


def may_be_wrapped(tests: CodeTests) -> bool:
    """Whether the expected results of a problem's function calls may each be in a list of its own.

    APPS, TACO and open-r1 wrap the results of whole problems (Codewars) and not of others (LeetCode), and do not say
    which. LiveCodeBench never does: there `exact` says so where all results are lists of one value.
    """
    outputs = [case.get("output") for case in tests["test_cases"] if case["type"] == CALL]
    return not tests.get("exact") and all(isinstance(output, list) and len(output) == 1 for output in outputs)


def _text_beside(name: str, beside: Mapping[str, object]) -> str:
    """A text that goes with the tests, empty where there is none. Errors: ValueError."""
    value = beside[name]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"has tests whose {name} is a {type(value).__name__}, not text")
    return value or ""


def _check_programs(tests: CodeTests) -> None:
    """Raise ValueError for programs that can fail no answer, and for a `check` of a function without a name."""
    programs = [case["code"] for case in tests["test_cases"] if "code" in case]
    if not programs:
        return
    defined = [case["code"] for case in tests["test_cases"] if case["type"] == "program" and "code" in case]
    if "entry_point" not in tests and any("def check(" in code for code in defined):
        raise ValueError("defines check(candidate), and there is no column entry_point with the function's name")
    if not any(map(can_fail, [*programs, tests.get("setup", "")])):
        raise ValueError(f"is not tests: {programs[0].strip()[:40]!r} asserts nothing")


def function_not_named(tests_text: str, question: str) -> str | None:
    """The function that tests call and the question does not name: an answer can only guess it. None elsewhere.

    tests_text: as `tests_of` returns it.
    """
    if f'"type": "{STDIN}"' in tests_text[:200]:  # tests may be megabytes
        return None
    tests: CodeTests = json.loads(tests_text)
    names = [tests["entry_point"]] if "entry_point" in tests else []
    for case in tests["test_cases"]:
        names += [name] if (name := case.get("fn_name")) else []
        if "code" in case and "entry_point" not in tests:
            names += called_functions(f"{tests.get('setup', '')}\n{case['code']}")
    if not names or any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", question) for name in names):
        return None
    return names[0]


def _listed(value: object) -> list[object]:
    value = parsed(value)
    if not isinstance(value, list):
        raise ValueError(f"has tests that are a {type(value).__name__}, not a list")
    return value


def _case(case: object, number: int, function: str | None = None) -> Case:
    """A test of input and output, or a program. function: its name, where the case has none. Errors: ValueError."""
    if isinstance(case, dict) and case.get("type") in PROGRAMS and isinstance(case.get("code"), str):
        return {"type": case["type"], "code": with_asserts(case["code"])}
    if not isinstance(case, dict) or "input" not in case or "output" not in case:
        what = f"keys {', '.join(case)}" if isinstance(case, dict) else f"a {type(case).__name__}"
        raise ValueError(f"has a test ({number}) with {what}; expected input and output")
    name = case.get("fn_name") or (function if case.get("testtype") == "functional" else None)
    kind = case.get("type") or case.get("testtype") or (CALL if name else STDIN)
    if kind not in TYPES:
        raise ValueError(f"has a test ({number}) of type {kind!r}; expected one of {', '.join(TYPES)}")
    if case.get("testtype") == "functional":
        lines = str(case["input"]).strip().split("\n")
        return _made(CALL, name, [_json(line) for line in lines], _json(str(case["output"])), number)
    return _made(TYPES[str(kind)], name, case["input"], case["output"], number)


def _json(text: str) -> object:
    """A value in JSON; the text itself where it is none, as contests write some texts without quotes."""
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value


def _function(row: Mapping[str, object]) -> str | None:
    """The function that LiveCodeBench's functional tests call."""
    metadata = parsed(row.get("metadata"))
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    return str(name) if name else None


def _public(row: Mapping[str, object]) -> list[object]:
    """LiveCodeBench's public tests, which count beside the private ones."""
    value = parsed(row.get("public_test_cases"))
    return value if isinstance(value, list) else []


def _unpacked(value: object) -> object:
    """The text in LiveCodeBench's compressed form; anything else as it is. Errors: ValueError."""
    if not isinstance(value, str) or not BASE64.fullmatch(value.strip()):
        return value
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(value, validate=True), UNPACKED)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"looks like compressed tests, and cannot be read ({error})") from error
    if stream.unconsumed_tail:
        raise ValueError(f"holds more than {UNPACKED >> 20} MiB when it is decompressed")
    if not stream.eof:
        raise ValueError("looks like compressed tests, and is cut off")
    texts = list[str]()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in STRING:
                raise ValueError(f"its pickle has the instruction {opcode.name}")
            texts += [argument] if isinstance(argument, str) else []
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"is compressed, and holds no JSON text ({error})") from error
    if len(texts) != 1:
        raise ValueError(f"is compressed, and holds {len(texts)} texts in place of one")
    return texts[0]


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
