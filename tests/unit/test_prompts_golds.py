"""Conversations that are asked, answers that are taken out of solutions, and tests of programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_support import file_refused, jsonl, read
from pydantic import ValidationError

from distill.prompts import PromptCounts, code_tests, load_prompts
from distill.prompts.golds import gold_of, with_choices
from distill.recipe.sources import FilePrompts

# Conversations


def roles_and_texts(path: Path, **fields: Any) -> list[tuple[str, str]]:
    (prompt,) = read(path, answer=None, task="chat", **fields)
    return [(message["role"], message["content"]) for message in prompt.messages]


def test_messages_and_sharegpt_are_the_same_conversation(tmp_path: Path) -> None:
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "What is 2 + 3?")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = [{"role": role, "content": content} for role, content in expected]
    shared = [{"from": names[role], "value": content} for role, content in expected]
    parts = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in expected]
    for number, turns in enumerate((messages, shared, parts, json.dumps(messages), json.dumps(shared))):
        path = jsonl(tmp_path / f"{number}.jsonl", {"turns": turns})
        assert roles_and_texts(path, question="turns") == expected
    ids = {read(tmp_path / f"{n}.jsonl", question="turns", answer=None)[0].id for n in range(5)}
    assert len(ids) == 1


def test_an_answer_at_the_end_of_a_conversation_is_not_asked(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "SECRET"), ("assistant", "SECRET")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = jsonl(tmp_path / "a.jsonl", row, {"messages": row["messages"][:3]})
    counts = PromptCounts()
    source = FilePrompts(kind="file", path=str(path), question="messages", answer=None, task="chat")
    (prompt,) = load_prompts([source], counts)
    assert [message["content"] for message in prompt.messages] == ["a", "b", "c"]
    assert counts.notes() == [
        f"{tmp_path.name}/a.jsonl: 1 of 2 conversations go on after the last question; those turns are not asked",
        "1 of 2 prompts repeat an earlier one and are read once",
    ]


def test_text_that_only_looks_like_a_list_is_text(tmp_path: Path) -> None:
    for text in ("[1, 2, 3]", "[", '[{"a": 1}]', "[]", '{"role": "user", "content": "x"}'):
        assert roles_and_texts(jsonl(tmp_path / "a.jsonl", {"question": text})) == [("user", text)]


# Extraction


@pytest.mark.parametrize(
    ("extract", "text", "gold"),
    [
        ("hash", "2 * 3 = 6\n#### 6", "6"),
        ("hash", "#### 1\nor\n#### 1,000", "1,000"),
        ("hash", "no mark", None),
        ("hash", "a #### 6", None),
        ("hash", None, None),
        ("boxed", r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1}. No: \boxed{\sqrt{\frac{a}{\{b\}}}}.", r"\sqrt{\frac{a}{\{b\}}}"),
        ("boxed", r"\boxed{cut off", None),
        ("boxed", r"\boxed{}", None),
        ("boxed", "6", None),
        ("none", "#### 6", "#### 6"),
    ],
)
def test_answers_are_extracted(extract: Any, text: str | None, gold: str | None) -> None:
    assert gold_of(text, "math", extract, {}) == gold


def test_rows_from_which_nothing_is_extracted_are_counted_with_the_first(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": a} for n, a in enumerate(("#### 1", "two words", "three", None))]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    counts = PromptCounts()
    source = FilePrompts(kind="file", path=str(path), extract="hash")
    assert [p.answer for p in load_prompts([source], counts)] == ["1", None, None, None]
    assert counts.notes() == [f"{tmp_path.name}/a.jsonl: 3 of 4 problems have no gold answer (first: {path}, line 2)"]
    file_refused(path, "no row has a \\boxed{…} in column answer", "set another `extract`", extract="boxed")
    file_refused(path, "line 1: column answer is not tests: '#### 1' asserts nothing", extract="tests", task="code")
    bare = jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": []}, {"question": "r", "answer": None})
    file_refused(bare, "no row has tests in column answer", extract="tests", task="code")


def test_gsm8k_and_math500_answers(real_data: Callable[[str], Path]) -> None:
    gsm8k = read(real_data("gsm8k/test.jsonl"), extract="hash")
    assert len(gsm8k) == 1319 and gsm8k[0].answer == "18"
    assert all(p.answer and p.answer.replace(",", "").lstrip("-").isdigit() for p in gsm8k)
    math = read(real_data("math500/test.jsonl"), question="problem", answer="solution", extract="boxed")
    given = [json.loads(line)["answer"] for line in real_data("math500/test.jsonl").read_text().splitlines()]
    differing = [(p.answer, answer) for p, answer in zip(math, given, strict=True) if p.answer != answer]
    assert len(math) == 500 and len(differing) <= 12, differing


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"extract": "hash", "answer": None}, "needs a column to read; set `answer`"),
        ({"extract": "tests"}, "is for task code, and the task is math"),
        ({"extract": "boxed", "task": "code"}, "is for task math, choice, judge or chat, and the task is code"),
        ({"extract": "regex"}, "'none', 'hash', 'boxed', 'tests' or 'instructions'"),
        ({"weight": 0}, "greater than 0"),
        ({"since": "2024-12-01"}, "since needs `date`"),
        ({"until": "2024-12-01"}, "until needs `date`"),
        ({"date": "day", "since": "2024-12-02", "until": "2024-12-01"}, "since is 2024-12-02, after until, 2024-12-01"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        FilePrompts(kind="file", path="a.jsonl", **fields)
    assert said in str(refusal.value)


# Tests of programs

STDIN = {"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}
CALL = {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3}


@pytest.mark.parametrize(
    ("value", "beside", "expected"),
    [
        ({"language": "python", "test_cases": [STDIN | {"fn_name": None}]}, {}, {"test_cases": [STDIN]}),
        ({"language": "cpp", "test_cases": [STDIN]}, {}, {"language": "cpp", "test_cases": [STDIN]}),
        ({"language": None, "test_cases": json.dumps([CALL])}, {}, {"test_cases": [CALL]}),
        ({"inputs": ["1 2\n"], "outputs": ["3\n"]}, {}, {"test_cases": [STDIN]}),
        ({"inputs": [["1 2", ""]], "outputs": [["3", ""]]}, {}, {"test_cases": [STDIN]}),
        ({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}, {}, {"test_cases": [CALL]}),
        ([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}], {}, {"test_cases": [STDIN]}),
        (
            ["assert add(1, 2) == 3", " "],
            {"test_setup_code": "import math", "test_imports": ["import re"]},
            {"test_cases": [{"type": "assert", "code": "assert add(1, 2) == 3"}], "setup": "import re\nimport math"},
        ),
        (
            "def check(candidate):\n    assert candidate(1, 2) == 3",
            {"entry_point": "add", "test_setup_code": ""},
            {
                "test_cases": [{"type": "program", "code": "def check(candidate):\n    assert candidate(1, 2) == 3"}],
                "entry_point": "add",
            },
        ),
    ],
)
def test_tests_in_every_form_become_one(value: object, beside: dict[str, object], expected: dict[str, object]) -> None:
    for published in (value, json.dumps(value)) if not isinstance(value, str) else (value,):
        stored = code_tests.tests_of(published, beside)
        assert stored is not None and json.loads(stored) == {"language": "python"} | expected


@pytest.mark.parametrize(
    ("text", "asserted"),
    [
        ("add(1, 2) == 3", "assert add(1, 2) == 3"),
        ("add(1, 2) == 3  # sum", "assert add(1, 2) == 3  # sum"),
        ("not empty([1])", "assert not empty([1])"),
        ("f(1) and f(2) == 3", "assert f(1) and f(2) == 3"),
        ("é = 'é'; (add(é) ==\n 3)\nadd(1) < 2", "é = 'é'; assert (add(é) ==\n 3)\nassert add(1) < 2"),
        ("x = add(1)\nassert x == 2", "x = add(1)\nassert x == 2"),
    ],
)
def test_a_comparison_that_stands_alone_is_asserted(text: str, asserted: str) -> None:
    for value, kind in (([text], "assert"), (text, "program")):
        stored = json.loads(code_tests.tests_of(value, {}) or "")
        assert stored["test_cases"] == [{"type": kind, "code": asserted}]


@pytest.mark.parametrize(
    "value",
    [
        *("yes", "null", "0", "f(1)", "x = f(1) == 3", ["print(f(1))  # 3", "f(2)"]),
        "def test_f():\n    return f(1) == 3",
        {"test_cases": [{"type": "assert", "code": "f(1)"}]},
    ],
)
def test_tests_that_assert_nothing_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is not tests: .* asserts nothing"):
        code_tests.tests_of(value, {"entry_point": "f"})


@pytest.mark.parametrize(
    "text",
    [
        *("raise SystemExit(f(1) != 3)", "import sys\nsys.exit(f(1) != 3)", "if f(1) != 3: exit(1)"),
        *("np.testing.assert_allclose(f(1), 3)", "class T(TestCase):\n def test(self): self.assertEqual(f(1), 3)"),
        "with pytest.raises(ValueError):\n    f(-1)",
    ],
)
def test_programs_that_fail_without_an_assert(text: str) -> None:
    assert code_tests.tests_of(text, {}) is not None


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stub_is_read_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    row = {"question": "Add.", "answer": "assert add(1, 2) == 3", "entry_point": "add", "stub": "def add(a, b):\n"}
    path = tmp_path / f"a.{suffix}"
    path.write_text(json.dumps(row)) if suffix == "jsonl" else pq.write_table(pa.Table.from_pylist([row]), path)
    source = FilePrompts(kind="file", path=str(path), task="code", extract="tests")
    (prompt,) = load_prompts([source])
    assert prompt.answer is not None and json.loads(prompt.answer)["stub"] == row["stub"]


def test_stored_tests_are_read_as_they_are() -> None:
    stub = "import math\n\ndef add(a, b):\n"
    row = {"entry_point": "add", "prompt": stub, "test_setup_code": "import re"}
    published = (
        "def check(candidate):\n    assert candidate(1, 2) == 3",
        ["assert add(1, 2) == 3"],
        {"test_cases": [STDIN, CALL]},
        {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
        {"language": "cpp", "test_cases": [STDIN]},
    )
    for value in published:
        stored = code_tests.tests_of(value, row)
        assert stored is not None and code_tests.tests_of(stored, {}) == stored


@pytest.mark.parametrize("value", [None, "", " ", [], {}, {"test_cases": []}, {"inputs": [], "outputs": []}, [""]])
def test_no_tests_are_no_gold(value: object) -> None:
    assert code_tests.tests_of(value, {}) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"inputs": ["1"], "outputs": []}, "has 1 inputs and 0 outputs"),
        ({"inputs": [None], "outputs": ["1"]}, "has a test (0) whose input or output is a NoneType"),
        ({"inputs": "1", "outputs": "1"}, "has tests that are a str, not a list"),
        ({"test_cases": [STDIN, {"input": "1"}]}, "has a test (1) with keys input; expected input and output"),
        ({"test_cases": [STDIN | {"type": "magic"}]}, "has a test (0) of type 'magic'; expected one of stdin_stdout"),
        ({"a": 1}, "is an object with a, not tests"),
        (7, "is a int, not tests"),
        ([["1", "2"]], "has a test (0) with a list"),
        ("def check(candidate): pass", "no column entry_point"),
        ({"test_cases": [1]}, "has a test (0) with a int"),
        ({"test_cases": [{"type": "assert", "code": 5}]}, "has a test (0) with keys type, code"),
        ({"test_cases": [STDIN], "setup": 3}, "has tests whose setup is a int, not text"),
        ({"test_cases": [STDIN], "setup": "import"}, "is no Python program (SyntaxError)"),
        ("Add the numbers.", "'Add the numbers.' is no Python program (SyntaxError)"),
        (["assert f(1) == 2", "f(1"], "'f(1' is no Python program (SyntaxError)"),
        ("(" * 5000, "is no Python program ("),
        ([STDIN | {"input": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_with_their_row(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        code_tests.tests_of(value, {})
    assert said in str(refusal.value)
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": value})
    file_refused(path, "line 1: column answer", said, extract="tests", task="code")


def test_humaneval_and_mbpp_carry_what_a_sandbox_needs(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_data("humaneval/HumanEval.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = read(path, question="prompt", answer="test", task="code", extract="tests")
    for row, prompt in zip(rows, prompts, strict=True):
        tests = json.loads(prompt.answer or "")
        program = tests["test_cases"][0]["code"]
        names: dict[str, Any] = {}
        if row["task_id"] in ("HumanEval/0", "HumanEval/163"):  # our own reference solutions, run as a sandbox would
            exec(row["prompt"] + row["canonical_solution"] + "\n" + program, names)
            names["check"](names[tests["entry_point"]])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    packed = read(tmp_path / "a.parquet", question="prompt", answer="test", task="code", extract="tests")
    assert [p.id for p in packed] == [p.id for p in prompts], "the columns beside the tests are read of Parquet too"
    mbpp = read(real_data("mbpp_dev/mbpp.jsonl"), question="text", answer="test_list", task="code", extract="tests")
    cases = [json.loads(p.answer or "")["test_cases"] for p in mbpp]
    assert len(mbpp) == 510 and all(case["type"] == "assert" for of_one in cases for case in of_one)
    assert any("setup" in json.loads(p.answer or "") for p in mbpp)


def test_questions_that_do_not_name_the_function_of_their_tests_are_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "Add one.", "answer": ["assert add1(1) == len([1, 2])"]},
        {"question": "Write add1, which adds one.", "answer": ["assert add1(1) == 2"]},
        {"question": "Add 1.", "answer": {"fn_name": "add1", "inputs": [[1]], "outputs": [2]}},
        {"question": "Read a number, add one.", "answer": {"inputs": ["1"], "outputs": ["2"]}},
        {"question": "Continue: def f(x):", "answer": "def check(g): assert g(1) == 2", "entry_point": "f"},
    ]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    counts = PromptCounts()
    list(load_prompts([FilePrompts(kind="file", path=str(path), extract="tests", task="code")], counts))
    assert counts.notes() == [
        f"{tmp_path.name}/a.jsonl: 2 of 5 questions do not name the function that their tests call (first: add1, "
        f"{path}, line 1), and an answer can only guess it; show the tests, or a column that has the name, with "
        f"`template`"
    ]


def test_a_nested_answer_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "gold": {"value": "1" if n else None}} for n in range(2)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    file_refused(path, "no row has a value at gold.valeu, inside column gold", "`answer: null`", answer="gold.valeu")
    source = FilePrompts(kind="file", path=str(path), answer="gold.value")
    assert [p.answer for p in load_prompts([source])] == [None, "1"]


def test_more_choices_than_letters_are_refused():
    """Ten choices with the right one have the letters A to J; an eleventh would be left out."""
    columns = [f"wrong {n}" for n in range(10)]
    settings = {"kind": "file", "path": "x.jsonl", "task": "choice"}
    assert FilePrompts.model_validate(settings | {"choices": columns[:9]}).choices == tuple(columns[:9])
    with pytest.raises(ValidationError, match="choices\\n.*at most 9 items"):
        FilePrompts.model_validate(settings | {"choices": columns})
    letters = {with_choices("q", right, columns[:9])[1] for right in ("a", "m", "z", "right")}
    assert letters <= set("ABCDEFGHIJ")
