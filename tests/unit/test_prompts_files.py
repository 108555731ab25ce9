"""Prompts from files and data sets: what goes in comes out, and whatever is wrong is named with its line."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.prompts import Prompt, load_prompts
from distill.recipe.sources import FilePrompts, HubPrompts, ProceduralPrompts


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **fields: Any) -> list[Prompt]:
    return list(load_prompts([FilePrompts(kind="file", path=str(path), **fields)]))


def refused(sources: Any, *expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        list(load_prompts(sources))
    message = str(refusal.value)
    assert "\n" not in message
    for text in expected:
        assert text in message


def file_refused(path: Path, *expected: str, **fields: Any) -> None:
    refused([FilePrompts(kind="file", path=str(path), **fields)], str(path), *expected)


# Files


@given(
    rows=st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.none() | st.text()), min_size=1, unique=True),
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
    answers = [70, 27.0, True, ["assert f(1) == 2", "é"], None, " 5 "]
    path = jsonl(tmp_path / "a.jsonl", *({"question": f"q{n}", "answer": a} for n, a in enumerate(answers)))
    assert [p.answer for p in read(path)] == ["70", "27.0", "true", '["assert f(1) == 2", "é"]', None, " 5 "]


def test_windows_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"question": "a", "answer": "1"}\r\n\r\n{"question": "b", "answer": "2"}'.encode())
    assert [p.answer for p in read(path)] == ["1", "2"]


def test_duplicates_are_read_once_and_counted(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", *({"question": q, "answer": "1"} for q in "abaca"))
    second = jsonl(tmp_path / "b.jsonl", {"question": "b", "answer": "1"}, {"question": "a", "answer": "2"})
    seen: Counter[str] = Counter()
    prompts = list(load_prompts([FilePrompts(kind="file", path=str(path)) for path in (first, second)], seen))
    assert [(p.messages[0]["content"], p.answer) for p in prompts] == [("a", "1"), ("b", "1"), ("c", "1"), ("a", "2")]
    assert seen[prompts[0].id] == 3 and seen.total() - len(seen) == 3


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
    file_refused(path, "no column answer", question="problem")
    pq.write_table(pa.table({"problem": ["a"], "solution": ["1"]}), tmp_path / "a.parquet")
    file_refused(tmp_path / "a.parquet", "no column question", "problem, solution")


@pytest.mark.parametrize(
    ("question", "said"), [("", "empty"), (None, "empty"), (" \n", "blank"), (5, "int"), ("\ud800", "surrogate")]
)
def test_question_that_cannot_be_asked(tmp_path: Path, question: Any, said: str) -> None:
    good = {"question": "a", "answer": "1"}
    file_refused(jsonl(tmp_path / "a.jsonl", good, good | {"question": question}), "line 2", "question", said)


def test_files_that_are_not_there_or_not_prompts(tmp_path: Path) -> None:
    file_refused(tmp_path / "none.jsonl", "no such file")
    (tmp_path / "dir.jsonl").mkdir()
    file_refused(tmp_path / "dir.jsonl", "no such file")
    (tmp_path / "a.csv").write_text("question,answer\n")
    file_refused(tmp_path / "a.csv", ".jsonl or .parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    file_refused(tmp_path / "empty.jsonl", "no rows")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    file_refused(tmp_path / "a.parquet", "not a readable Parquet file")


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
    refused([HubPrompts(kind="hub", dataset="nobody/nothing")], "nobody/nothing", "check its name", "network")
    refused([HubPrompts(kind="hub", dataset=str(tmp_path))], str(tmp_path), "check its name")
    jsonl(tmp_path / "train.jsonl", {"problem": "a"}).open("a").write('{"problem": ')
    refused([HubPrompts(kind="hub", dataset=str(tmp_path))], str(tmp_path), "JSON")


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
