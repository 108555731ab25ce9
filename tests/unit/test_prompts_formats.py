"""The same rows in every kind of file are the same prompts with the same ids, as prompts and as traces."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_support import jsonl, read

from distill.prompts import load_prompts
from distill.recipe.sources import FilePrompts, FileTraces, ProceduralPrompts
from distill.traces.published import read_published

Rows = list[dict[str, Any]]

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
FORMS = [*TEXTS, *(text + packed for text in TEXTS for packed in (".gz", ".zst")), ".parquet", "saved", "splits"]

text = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n\r\t,;"[{\\'), min_size=1)
question = text.filter(str.strip)


def write(folder: Path, form: str, rows: Rows) -> tuple[Path, dict[str, Any]]:
    """Write rows in a form; returns the path and the fields of its source. In CSV, None is an empty value."""
    path = folder / f"rows{form}"
    if form in ("saved", "splits"):
        import datasets

        table = datasets.Dataset.from_list(rows)
        (table if form == "saved" else datasets.DatasetDict(train=table, test=table)).save_to_disk(path)
        return path, {"split": "test"} if form == "splits" else {}
    if form == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path, {}
    path.write_bytes(packed(form, plain(form, rows)))
    return path, {}


def plain(form: str, rows: Rows) -> bytes:
    kind = form.removesuffix(".gz").removesuffix(".zst")
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def packed(form: str, data: bytes) -> bytes:
    if form.endswith(".gz"):
        return gzip.compress(data)
    return bytes(pa.compress(data, "zstd", asbytes=True)) if form.endswith(".zst") else data


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.one_in(2)
@settings(max_examples=20)
@given(rows=st.lists(st.tuples(question, st.none() | text, st.none() | question), min_size=1, max_size=5))
def test_every_form_gives_the_same_prompts(
    tmp_path_factory: pytest.TempPathFactory, form: str, rows: list[tuple[str, str | None, str | None]]
) -> None:
    folder = tmp_path_factory.mktemp("form")
    columns = [{"question": q, "answer": a, "system": s} for q, a, s in rows]
    expected = read(jsonl(folder / "expected.jsonl", *columns))
    path, fields = write(folder, form, columns)
    prompts = read(path, **fields)
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in expected]
    assert [(p.messages, p.answer) for p in prompts] == [(p.messages, p.answer) for p in expected]


def test_every_form_gives_the_same_traces(tmp_path: Path, form: str) -> None:
    rows = [
        {
            "question": f"What is {n} + 1?",
            "thoughts": f"Add\none to {n}.",
            "solution": f"It is \\boxed{{{n + 1}}}.",
            "gold": str(n + 1),
        }
        for n in range(3)
    ]
    path, fields = write(tmp_path, form, rows)
    columns = {"question": "question", "reasoning": "thoughts", "response": "solution", "answer": "gold"}
    traces = list(read_published(FileTraces(kind="file", path=str(path), **columns, **fields)))
    assert [(t.prompt.answer, t.reasoning, t.response) for t in traces] == [
        (row["gold"], row["thoughts"], row["solution"]) for row in rows
    ]


def test_nested_columns_in_every_form(tmp_path: Path, form: str) -> None:
    """verl's layout; a form without nested values holds them as JSON text."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]
    gold = {"ground_truth": "5", "style": "rule"}
    flat = form.partition(".gz")[0].partition(".zst")[0] in (".csv", ".tsv")
    row = {"prompt": json.dumps(turns) if flat else turns, "reward_model": json.dumps(gold) if flat else gold}
    path, fields = write(tmp_path, form, [row])
    (prompt,) = read(path, question="prompt", answer="reward_model.ground_truth", **fields)
    assert (prompt.messages, prompt.answer) == (tuple(turns), "5")


# Ids that must never change: a ledger is keyed by them


def first_ids(path: Path, **fields: Any) -> list[str]:
    return [prompt.id for prompt in read(path, **fields)]


def test_ids_are_those_of_earlier_versions(tmp_path: Path) -> None:
    chains = ProceduralPrompts(kind="procedural", name="arithmetic", limit=3)
    assert [p.id for p in load_prompts([chains])] == ["6c1304b529e8a78c", "494ab60ea5ea4496", "529367895c23f8f4"]
    heldout = ProceduralPrompts(kind="procedural", name="arithmetic", split="heldout", seed=3, limit=2)
    assert [p.id for p in load_prompts([heldout])] == ["cc29e28293f084e9", "cfd0d0d058054ca3"]
    plain = jsonl(
        tmp_path / "a.jsonl",
        {"question": "What is 2 + 3?", "answer": "5"},
        {"question": "q", "answer": 70, "system": "Be brief."},
        {"question": "é", "answer": None},
    )
    assert first_ids(plain) == ["7e31790a1e0e21e5", "0a6d109fa21f7abb", "fc134c99b2665d3b"]
    code = jsonl(
        tmp_path / "b.jsonl",
        {"question": "f", "answer": ["assert f(1) == 2", "é"]},
        {"question": "g", "answer": {"a": [1]}},
    )
    assert first_ids(code, task="code") == ["953f5cf044c4d8c9", "8cd08a192b3b883c"]
    roles = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    turns = [{"role": role, "content": content} for role, content in roles]
    assert first_ids(jsonl(tmp_path / "c.jsonl", {"question": turns, "answer": "5"})) == ["84a7edae87963abf"]
    choice = jsonl(tmp_path / "d.jsonl", {"question": "a?", "answer": "x", "w1": "y", "w2": "z"})
    assert first_ids(choice, choices=("w1", "w2"), task="choice") == ["ab4ecb12e17bf73e"]


@pytest.mark.parametrize(
    ("name", "fields", "digest"),
    [
        ("gsm8k/test.jsonl", {}, "ee7c7627d2e94f9d"),
        ("math500/test.jsonl", {"question": "problem"}, "179527c3d23e1b75"),
        ("amc23/test.jsonl", {"question": "problem"}, "4791832fca75840d"),
        ("aime24_25_prompts/aime24.jsonl", {"question": "prompt"}, "2ada5d24bb0a4877"),
        (
            "humaneval/HumanEval.jsonl",
            {"question": "prompt", "answer": "test", "task": "code"},
            "24cae3cd596d1aab",
        ),
        ("mbpp_dev/mbpp.jsonl", {"question": "text", "answer": "test_list", "task": "code"}, "796ac6f968a389b7"),
    ],
)
def test_ids_of_real_problem_sets_are_those_of_earlier_versions(
    real_data: Callable[[str], Path], name: str, fields: dict[str, Any], digest: str
) -> None:
    ids = " ".join(first_ids(real_data(name), **fields))
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == digest


def test_keys_that_came_later_do_not_change_the_settings_of_a_source() -> None:
    """A finished run compares them with those that it stored."""
    file = FilePrompts(kind="file", path="a.jsonl").settings()
    assert not file.keys() & {"weight", "split", "extract", "shuffle_seed", "limit"}
    changed = FilePrompts(kind="file", path="a", weight=2, split="x", extract="hash", shuffle_seed=1)
    assert changed.settings().keys() - file.keys() == {"weight", "split", "extract", "shuffle_seed"}
    assert "weight" not in ProceduralPrompts(kind="procedural", name="arithmetic").settings()
