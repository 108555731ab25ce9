"""What a plan counts of files on this machine: problems of a benchmark, rows of a training, copied traces, disk."""

import json
from pathlib import Path

import pytest
from eval_support import distill

from distill import catalog
from distill.plan import stages
from distill.plan.problems import problems_of
from distill.plan.training import configuration, disk_of
from distill.recipe import BenchmarkCard


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def card(name: str, **more: object) -> BenchmarkCard:
    return BenchmarkCard.model_validate(
        {"name": name, "samples": 4, "sampling": {"max_new_tokens": 64, "temperature": 0.6, "top_p": 0.95}} | more
    )


@pytest.mark.parametrize(
    "source, limit, given, expected",
    [
        ({"kind": "file", "path": "sums.jsonl"}, None, None, 50),
        ({"kind": "file", "path": "sums.jsonl", "limit": 7}, None, None, 7),
        ({"kind": "file", "path": "sums.jsonl"}, 20, None, 20),
        ({"kind": "procedural", "name": "arithmetic", "limit": 30}, None, None, 30),
        ({"kind": "hub", "dataset": "a/b"}, None, None, None),
        ({"kind": "hub", "dataset": "a/b"}, 20, None, 20),
        ({"kind": "hub", "dataset": "a/b"}, None, "sums.jsonl", 50),
    ],
)
def test_problems_of_a_benchmark(source, limit, given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sums.jsonl", [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(50)])
    settings = catalog.load_recipe("tiny").eval.model_copy(update={"limit": limit, "sources": {}})
    if given:
        settings = settings.model_copy(update={"sources": {"own": given}})
    assert problems_of(card("own", prompts=source), settings) == expected


@pytest.mark.slow
def test_a_benchmark_of_unknown_size_has_no_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = card("own", prompts={"kind": "hub", "dataset": "a/b"}).model_dump(mode="json")
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    recipe = catalog.load_recipe("tiny", ["eval.benchmarks=[./own.yaml]", "eval.limit=null"])
    *_, plan = stages.plan_recipe(recipe, tmp_path / "run", traces=10, mean=100).stages
    assert plan.stage == "eval" and plan.tokens is None and plan.disk is None
    assert "how many problems own has is not known; its card may say `problems`" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_files_are_counted_and_those_elsewhere_named(tmp_path, monkeypatch, capsys):
    """Ten traces of the teacher, and twice seven of eight rows of a file."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "more.jsonl", [{"question": "q", "response": str(n)} for n in range(8)])
    data = [
        {"kind": "kept"},
        {"kind": "file", "path": str(file), "limit": 7, "weight": 2},
        {"kind": "run", "path": "runs/other"},
    ]
    recipe = catalog.load_recipe("tiny", [f"train.data={json.dumps(data)}", "train.max_length=512"])
    stages.plan_recipe(recipe, tmp_path / "run", traces=10, mean=100)
    out = " ".join(capsys.readouterr().out.split())
    assert "24 rows" in out and "without runs/other" in out


@pytest.mark.slow
def test_copied_traces_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"{n} + 1?", "r": "thought", "a": str(n + 1), "g": str(n + 1)} for n in range(3)]
    write(tmp_path / "t.jsonl", rows)
    source = {"kind": "file", "path": "t.jsonl", "question": "q", "reasoning": "r", "response": "a", "answer": "g"}
    content = {"name": "copied", "teacher": "tiny-r1", "student": "tiny-qwen", "traces": [source]}
    content |= {"eval": {"benchmarks": ["tiny-arithmetic"]}}
    (tmp_path / "copied.yaml").write_text(json.dumps(content))
    assert distill(monkeypatch, "plan", "copied.yaml") == 0 and "3 traces" not in capsys.readouterr().out
    assert distill(monkeypatch, "generate", "copied.yaml") == 0
    capsys.readouterr()
    assert distill(monkeypatch, "plan", "copied.yaml", "--hardware", "1xH100") == 0
    out = capsys.readouterr().out
    assert "\n3 traces, " in out and "hours of generate" not in out


def test_disk_of_a_training_by_hand(tmp_path):
    """Three checkpoints of 12 bytes a parameter, and the student in bfloat16; adapters are far smaller."""
    recipe = catalog.load_recipe("tiny", ["train.dtype=bfloat16"])
    config = configuration(recipe, catalog.load_student(recipe.student))
    checkpoints, student = disk_of(recipe.train, config)
    kept = recipe.train.save_total_limit + 1
    assert checkpoints == kept * 12 * (student / 2)
    adapted = catalog.load_recipe("tiny", ["train.dtype=bfloat16", "train.adapter={kind: lora}"])
    smaller, merged = disk_of(adapted.train, config)
    assert merged == student and 0 < smaller < checkpoints / 4
