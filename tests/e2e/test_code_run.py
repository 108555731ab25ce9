"""A code run from end to end: problems with tests, a teacher that answers with programs, a student, HumanEval's form.

The teacher is a scripted server, because the embedded one writes no programs; every third of its answers is wrong and
must not be trained on.
"""

import json
from pathlib import Path

import pytest
import yaml
from eval_support import distill, scores, server, url

from distill.traces.browse import verdict_of
from distill.traces.store import TraceStore, read_traces

FENCE = "```"
PROBLEMS = 12


def answer(question: str, seed: int) -> tuple[tuple[str, str], str]:
    """The program for `Write a function add_N(x) …`; wrong for every third N."""
    number = int(question.partition("add_")[2].partition("(")[0])
    added = number + 1 if number % 3 == 0 else number
    program = f"def add_{number}(x):\n    return x + {added}"
    return (f"I add {number}.", f"{FENCE}python\n{program}\n{FENCE}"), "stop"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "task_id": f"Own/{n}",
            "question": f"Write a function add_{n}(x) that returns x + {n}.",
            "test_list": [f"assert add_{n}(1) == {n + 1}", f"assert add_{n}(-5) == {n - 5}"],
            "prompt": f'def add_{n}(x):\n    """Return x + {n}."""\n',
            "entry_point": f"add_{n}",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        }
        for n in range(PROBLEMS)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "file", "path": "problems.jsonl", "extract": "tests", "task": "code"}
    card = {
        "name": "own-humaneval",
        "prompts": source | {"question": "prompt", "answer": "test"},
        "problems": PROBLEMS,
        "sampling": {"max_new_tokens": 32},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(card))
    return tmp_path


def recipe(files: Path, address: str) -> str:
    source = {"kind": "file", "path": "problems.jsonl", "extract": "tests", "task": "code"}
    content = {
        "name": "code",
        "teacher": "deepseek-r1",
        "student": "tiny-qwen",
        "server": {"url": address, "model": "scripted"},
        "engine": {"dtype": "float32"},
        "prompts": [source | {"question": "question", "answer": "test_list"}],
        "generate": {"samples": 1, "sampling": {"max_new_tokens": 64}},
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": 512, "dtype": "float32"},
        "eval": {"benchmarks": ["./own.yaml"], "models": ["student", "teacher"]},
    }
    (files / "code.yaml").write_text(yaml.safe_dump(content))
    return "code.yaml"


def test_problems_with_tests_become_a_student_that_is_scored(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(answer) as script:
        assert distill(monkeypatch, "run", recipe(files, url(script)), "--run-dir", "run") == 0
    run = files / "run"
    kept = [trace.prompt.messages[-1]["content"] for trace in TraceStore(run / "filtered" / "kept")]
    assert len(kept) == PROBLEMS - PROBLEMS // 3
    assert all(int(question.partition("add_")[2].partition("(")[0]) % 3 for question in kept)
    verdicts = [verdict_of(verdicts) for _, verdicts in read_traces(run / "filtered" / "dropped", ids=False)]
    assert verdicts == ["correct: wrong"] * (PROBLEMS // 3)
    teacher = scores(run / "eval", "own-humaneval", "teacher")
    assert (teacher.problems, teacher.correct) == (PROBLEMS, PROBLEMS - PROBLEMS // 3)
    assert scores(run / "eval", "own-humaneval", "student").problems == PROBLEMS


def test_a_machine_that_isolates_less_is_refused_before_any_work(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.grading.sandbox import levels

    powers = {"walls": "process", "uid": 1, "namespaces": False, "landlock": 0, "seccomp": False}
    monkeypatch.setattr(levels, "this_machine", lambda: ("process", powers, ()))
    assert distill(monkeypatch, "run", recipe(files, "http://127.0.0.1:9/v1"), "--run-dir", "run") == 2
    assert "filter.correct.sandbox: programs are run at level 'full'" in " ".join(capsys.readouterr().err.split())
    assert not (files / "run" / "traces").exists()
