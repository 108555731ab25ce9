"""Prompts from files and data sets: what goes in comes out, and whatever is wrong is named with its line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_support import file_refused, jsonl, read, refused

from distill.prompts import PromptCounts, load_prompts
from distill.recipe.sources import FilePrompts, HubPrompts, ProceduralPrompts

# Files

text = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\t"), min_size=1).filter(str.strip)


@given(
    rows=st.lists(st.tuples(text, st.none() | text), min_size=1, unique=True),
    suffix=st.sampled_from(["jsonl", "parquet"]),
)
def test_questions_and_answers_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str | None]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("prompts") / f"file.{suffix}"
    columns = [{"question": question, "answer": answer} for question, answer in rows]
    if suffix == "jsonl":
        jsonl(path, *columns)
    else:
        pq.write_table(pa.Table.from_pylist(columns), path)
    prompts = read(path)
    assert [(p.messages[0]["content"], p.answer) for p in prompts] == rows
    assert prompts[0].messages == ({"role": "user", "content": rows[0][0]},)


def test_columns_task_limit_and_source(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = jsonl(tmp_path / "set" / "a.jsonl", *({"q": f"question {n}", "other": n} for n in range(5)))
    prompts = read(path, question="q", answer=None, task="chat", limit=2)
    assert [p.messages[0]["content"] for p in prompts] == ["question 0", "question 1"]
    assert all((p.answer, p.task, p.source) == (None, "chat", "set/a.jsonl") for p in prompts)


def test_answers_that_are_not_text_become_text(tmp_path: Path) -> None:
    answers = [70, 27.0, True, None, " 5 ", ["5"], [], " ", [7]]
    path = jsonl(tmp_path / "a.jsonl", *({"question": f"q{n}", "answer": a} for n, a in enumerate(answers)))
    assert [p.answer for p in read(path)] == ["70", "27.0", "true", None, " 5 ", "5", None, None, "7"]
    tests = jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": ["assert f(1) == 2", "é"]})
    assert [p.answer for p in read(tests, task="code")] == ['["assert f(1) == 2", "é"]']


def test_windows_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"question": "a", "answer": "1"}\r\n\r\n{"question": "b", "answer": "2"}'.encode())
    assert [p.answer for p in read(path)] == ["1", "2"]


def test_duplicates_are_read_once_and_counted(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", *({"question": q, "answer": "1"} for q in "abaca"))
    second = jsonl(tmp_path / "b.jsonl", {"question": "b", "answer": "1"}, {"question": "a", "answer": "2"})
    counts = PromptCounts()
    prompts = list(load_prompts([FilePrompts(kind="file", path=str(path)) for path in (first, second)], counts))
    assert [(p.messages[0]["content"], p.answer) for p in prompts] == [("a", "1"), ("b", "1"), ("c", "1"), ("a", "2")]
    assert counts.seen[prompts[0].id] == 3
    assert counts.notes() == [
        "3 of 7 prompts repeat an earlier one and are read once",
        "1 of 4 prompts ask the question of an earlier one with another gold answer, such as 'a'; all are kept",
    ]


# What is wrong with a file


@pytest.mark.parametrize(
    "line", [b'{"question": "b", ', b"{'question': 'b'}", b'{"question": "\xff", "answer": ""}', b"nonsense"]
)
def test_broken_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"question": "a", "answer": "1"}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    file_refused(path, "line 3", "not JSON")


def test_line_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('["a", "1"]\n')
    file_refused(path, "line 1", "not a JSON object")


def test_missing_column_names_the_columns_there_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"problem": "a", "solution": "1"})
    file_refused(path, "line 1", "no column question", "problem, solution")
    file_refused(path, "no column answer", "problem, solution", "or set `answer: null`", question="problem")
    pq.write_table(pa.table({"problem": ["a"], "solution": ["1"]}), tmp_path / "a.parquet")
    file_refused(tmp_path / "a.parquet", "no column question", "problem, solution")
    file_refused(tmp_path / "a.parquet", "no column answer", "`answer: null`", question="problem")


def test_rows_without_the_answer_column_are_counted_unless_none_has_it(tmp_path: Path) -> None:
    rows = [{"question": "a"}, {"question": "b", "answer": "2"}, {"question": "c", "answer": None}]
    counts = PromptCounts()
    source = FilePrompts(kind="file", path=str(jsonl(tmp_path / "a.jsonl", *rows)))
    assert [p.answer for p in load_prompts([source], counts)] == [None, "2", None]
    first = f"(first: {tmp_path}/a.jsonl, line 1)"
    assert counts.notes() == [f"{tmp_path.name}/a.jsonl: 2 of 3 problems have no gold answer {first}"]
    file_refused(
        jsonl(tmp_path / "b.jsonl", rows[0], {"question": "d", "gold": 1}), "no column answer", "question, gold"
    )
    counts = PromptCounts()
    list(load_prompts([source.model_copy(update={"answer": None})], counts))
    assert counts.notes() == []


def test_answers_of_a_key_inside_a_column(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "5", "style": "rule"}}
    path = jsonl(tmp_path / "a.jsonl", row)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in (path, tmp_path / "a.parquet"):
        (prompt,) = read(file, question="prompt", answer="reward_model.ground_truth")
        assert (prompt.messages, prompt.answer) == (({"role": "user", "content": "q"},), "5")
    dotted = jsonl(tmp_path / "b.jsonl", {"question": "q", "a.b": "1", "a": {"b": "2"}})
    assert read(dotted, answer="a.b")[0].answer == "1", "a column of that name comes first"
    file_refused(path, "no column gold.x", question="prompt", answer="gold.x")


# Columns beside question and answer


def test_a_system_column_is_a_system_message(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"question": "q", "answer": 1, "system": "Be brief."}, {"question": "r", "answer": 1}
    )
    first, second = read(path)
    assert first.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"})
    assert second.messages == ({"role": "user", "content": "r"},)
    assert read(path, system=None)[0].messages == ({"role": "user", "content": "q"},)
    own = jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": 1, "instruction": "Think."})
    assert [m["role"] for m in read(own, system="instruction")[0].messages] == ["system", "user"]
    file_refused(jsonl(tmp_path / "c.jsonl", {"question": "q", "answer": 1, "system": ["x"]}), "system is not text")


def test_turns_may_have_the_keys_of_both_spellings(tmp_path: Path) -> None:
    """As Arrow stores a column in which some turns have a role and others `from`."""
    turns = [{"role": None, "content": None, "from": "human", "value": "q"}]
    turns = [*turns, {"role": "user", "content": "r", "from": None, "value": None}]
    path = jsonl(tmp_path / "a.jsonl", {"question": turns, "answer": 1})
    assert [m["content"] for m in read(path)[0].messages] == ["q", "r"]


@pytest.mark.parametrize("column", ["image", "images", "audio", "video"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_problems_that_are_not_text_alone_are_refused(tmp_path: Path, column: str, suffix: str) -> None:
    rows = [{"question": "q", "answer": "1", column: None}, {"question": "r", "answer": "1", column: ["a.png"]}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        jsonl(path, *rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    file_refused(path, f"{'line' if suffix == 'jsonl' else 'row'} 2", f"column {column} is not empty", "remove")
    assert len(read(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "has no message of the user"),
        ([{"role": "assistant", "content": "a"}], "has no message of the user"),
        (["q"], "not of messages: it holds a str"),
        ([{"role": "tool", "content": "q"}], "not of messages: it holds a turn of role 'tool'"),
        ([{"from": "tool", "value": "q"}], "not of messages: it holds a turn of role 'tool'"),
        ([{"content": "q"}], "not of messages: it holds a turn of role None"),
        ([{"from": "human", "value": None}], "question.value is empty"),
        ([{"role": "user", "content": ["a", {"type": "image"}]}], "question.content is not text but list"),
        ([{"role": "user", "content": [{"type": "image"}]}], "question.content is not text but list"),
        ([{"role": "user"}], "question.content is empty"),
    ],
)
def test_a_question_that_is_a_list_is_one_of_messages(tmp_path: Path, turns: list[Any], said: str) -> None:
    file_refused(jsonl(tmp_path / "a.jsonl", {"question": turns, "answer": "1"}), "line 1", said)


def test_a_gold_answer_is_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": ["1", "2"]})
    file_refused(path, "line 1", "column answer is a list of 2")


@pytest.mark.parametrize("text", ["\frac{1}{2}", "\boxed{}", "a\0b", "\x1b[31m", "\x7f"])
def test_control_characters_are_refused_in_question_and_answer(tmp_path: Path, text: str) -> None:
    """LaTeX with one backslash in JSON is a form feed and "rac"."""
    code = next(f"U+{ord(c):04X}" for c in text if c < " " or c == "\x7f")
    file_refused(jsonl(tmp_path / "a.jsonl", {"question": text, "answer": "1"}), "column question", code)
    file_refused(jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": text}), "column answer", code)


def test_dates_of_a_window(tmp_path: Path) -> None:
    rows = [{"question": f"q{d}", "answer": "1", "day": f"2024-08-{d:02}T00:00:00"} for d in (1, 2, 3)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert [p.messages[0]["content"] for p in read(path, date="day", since="2024-08-02")] == ["q2", "q3"]
    for wrong in (None, "August 1", 5):
        file = jsonl(tmp_path / "b.jsonl", *rows, rows[0] | {"day": wrong})
        file_refused(file, "line 4", "not a date", date="day", since="2024-08-02")
    file_refused(path, "no column date", date="date", until="2024-08-02")


@pytest.mark.parametrize(
    ("question", "said"),
    [("", "empty"), (None, "empty"), (" \n", "blank"), (5, "int"), ("\ud800", "surrogate"), (float("nan"), "empty")],
)
def test_question_that_cannot_be_asked(tmp_path: Path, question: Any, said: str) -> None:
    good = {"question": "a", "answer": "1"}
    file_refused(jsonl(tmp_path / "a.jsonl", good, good | {"question": question}), "line 2", "question", said)


# The cases that once failed


CASES = {  # file → fields of the source, what is read or what is said
    "verl.jsonl": ({"question": "prompt", "answer": "reward_model.ground_truth"}, [("What is 2 + 3?", "5")]),
    "imend.jsonl": ({}, 2),
    "nan.jsonl": ({}, [("What is 2 + 3?", None), ("What is 4 + 3?", "7")]),
    "listanswer.jsonl": ({}, [("What is 2 + 3?", "5")]),
    "crlf_bom.jsonl": ({}, [("What is 2 + 3?", "5")]),
    "dupkeys.jsonl": ({}, "line 1: not JSON (duplicate key 'question')"),
    "control.jsonl": ({}, "line 1: column question holds the control character U+000C (LaTeX in JSON needs two"),
    "nanq.jsonl": ({}, "line 1: column question is empty"),
    "array.json": ({}, [("What is 2 + 3?", "5")]),
    "array.jsonl": ({}, "line 1: a JSON array; name the file array.json, or write one object per line"),
    "lfs.jsonl": ({}, "a Git LFS pointer, not the file: run `git lfs pull`"),
    "inf.jsonl": ({}, "line 1: not JSON (Infinity is not a JSON value)"),
    "utf16.jsonl": ({}, "UTF-16 text: convert it"),
    "nul.jsonl": ({}, "line 1: column question holds the control character U+0000;"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cases(cases: Callable[[str], Path], name: str) -> None:
    fields, expected = CASES[name]
    path = cases(f"prompts/{name}")
    if isinstance(expected, str):
        file_refused(path, expected, **fields)
    else:
        prompts = read(path, **fields)
        assert len(prompts) == expected or [(p.messages[0]["content"], p.answer) for p in prompts] == expected


def test_every_case_is_tried(cases: Callable[[str], Path]) -> None:
    assert {path.name for path in cases("prompts").iterdir()} == CASES.keys()


# Data sets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_local_dataset_directories(tmp_path: Path, cache: Path) -> None:
    import datasets

    rows = {"problem": ["a", "b", "a"], "answer": [1, 2, 1], "other": [None, None, None]}
    plain, saved, splits = tmp_path / "plain", tmp_path / "saved", tmp_path / "splits"
    plain.mkdir()
    pq.write_table(pa.table(rows), plain / "train.parquet")
    datasets.Dataset.from_dict(rows).save_to_disk(saved)
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(splits)
    for path in (plain, saved, splits):
        prompts = list(load_prompts([HubPrompts(kind="hub", dataset=str(path))]))
        assert [(p.messages[0]["content"], p.answer, p.source) for p in prompts] == [
            ("a", "1", path.name),
            ("b", "2", path.name),
        ]
        refused([HubPrompts(kind="hub", dataset=str(path), question="q")], str(path), "no column q", "problem, answer")
    for path in (plain, splits):
        refused([HubPrompts(kind="hub", dataset=str(path), split="test")], str(path), "test", "train")


def test_dataset_that_cannot_be_had(tmp_path: Path, cache: Path) -> None:
    refused([HubPrompts(kind="hub", dataset="nobody/nothing")], "nobody/nothing", "HF_HUB_OFFLINE", "`kind: file`")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text("")
    refused([HubPrompts(kind="hub", dataset=str(tmp_path / "empty" / "a.jsonl"))], "a file; read it with `kind: file`")
    refused([HubPrompts(kind="hub", dataset=str(tmp_path / "empty"))], "it has no rows")
    (tmp_path / "none").mkdir()
    refused([HubPrompts(kind="hub", dataset=str(tmp_path / "none"))], "check its name")
    (tmp_path / "broken").mkdir()
    jsonl(tmp_path / "broken" / "train.jsonl", {"problem": "a"}).open("a").write('{"problem": ')
    refused([HubPrompts(kind="hub", dataset=str(tmp_path / "broken"))], str(tmp_path), "JSON")


# Generators, real data, imports


def test_procedural_prompts() -> None:
    source = ProceduralPrompts(kind="procedural", name="arithmetic", split="heldout", seed=3, limit=20)
    prompts = list(load_prompts([source]))
    assert len(prompts) == 20 and prompts == list(load_prompts([source]))
    assert all(p.task == "math" and p.source == "arithmetic/heldout" and p.answer for p in prompts)


def test_real_problem_sets(real_data: Callable[[str], Path]) -> None:
    gsm8k = read(real_data("gsm8k/test.jsonl"))
    assert len(gsm8k) == 1319 and all(p.answer and "####" in p.answer for p in gsm8k)
    aime = read(real_data("aime24_25_prompts/aime25.jsonl"), question="prompt")
    assert len(aime) == 30 and aime[0].answer == "70"
    assert all(p.answer and p.answer.isdigit() for p in aime)
    amc = read(real_data("amc23/test.jsonl"), question="problem")
    assert len(amc) == 40 and amc[0].answer == "27.0"


def test_prompts_import_with_the_standard_library_alone() -> None:
    code = "import sys, distill.prompts, distill.prompts.arithmetic; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
    modules = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "distill.prompts.arithmetic" in modules
    assert not modules & {"pydantic", "yaml", "pyarrow", "numpy", "datasets", "torch", "rich"}
