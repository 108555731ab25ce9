"""The tasks of traces that a recipe does not name: of another run, of an exported file. What they need is checked."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from eval_support import server, url
from filter_support import make_trace

from distill import generate
from distill.errors import UserError, WorkError
from distill.filters.pipeline import STAGE, check_gradable
from distill.grading import Grader
from distill.grading.sandbox import levels
from distill.prompts import code_tests
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.run import Run
from distill.traces.store import TraceStore, tasks_in, write_traces
from distill.traces.trace import Trace

TESTS = code_tests.tests_of({"fn_name": "add1", "inputs": [[1]], "outputs": [2]}, {})
PROGRAM = "```python\ndef add1(x):\n    return x + 1\n```"
POWERS = {"walls": "process", "uid": 1, "namespaces": False, "landlock": 0, "seccomp": False}


def trace(task: Any, number: int = 0, answer: str = "<think>a</think>Paris") -> Trace:
    return make_trace(
        answer, prompt=Prompt.from_question(f"Capital {number}?", TESTS if task == "code" else "Paris", task)
    )


def recipe_of(source: Path, **more: Any) -> Recipe:
    kind = {"kind": "run"} if source.is_dir() else {"kind": "file"}
    return Recipe.model_validate(
        {
            "name": "b",
            "teacher": "t",
            "student": "s",
            "traces": [{"path": str(source)} | kind | more.pop("source", {})],
            "filter": {"format": False},
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
        | more
    )


def run_with(directory: Path, *traces: Trace) -> Path:
    write_traces(directory / "filtered" / "kept", traces)
    return directory


def judge(address: str, **more: Any) -> dict[str, Any]:
    return {"server": {"url": address, "model": "scripted"}} | more


def yes(question: str, seed: int | None) -> tuple[str, str]:
    return "Judgement: Yes", "stop"


def test_the_tasks_of_stored_traces(tmp_path: Path) -> None:
    with TraceStore(tmp_path) as store:
        store.append([trace("judge"), trace("math")])
    assert TraceStore(tmp_path).tasks() == {"judge", "math"} and tasks_in(tmp_path) == set()
    TraceStore(tmp_path).compact()
    assert TraceStore(tmp_path).tasks() == tasks_in(tmp_path) == {"judge", "math"}


def test_the_judge_of_a_run_s_traces_is_needed_and_recorded(tmp_path: Path) -> None:
    source = run_with(tmp_path / "a", *(trace("judge", number) for number in range(3)))
    with pytest.raises(UserError, match="filter.correct: task judge needs a model that judges"):
        check_gradable(recipe_of(source))
    with server(yes) as made:
        with Run(tmp_path / "b", recipe_of(source, judge=judge(url(made)))) as run:
            generate.STAGE.perform(run)
            assert STAGE.perform(run).kept == 3
        for change in ({"accepted": ["no"], "rejected": ["yes"]}, {"seed": 5}):
            recipe = recipe_of(source, judge=judge(url(made), **change))
            with Run(tmp_path / "b", recipe) as run, pytest.raises(UserError, match=r"judge_model\.(accepted|seed)"):
                STAGE.perform(run)
        with Run(tmp_path / "b", recipe_of(source)) as run, pytest.raises(UserError, match="judge_model"):
            STAGE.perform(run)


def test_the_judge_of_exported_rows_is_recorded(tmp_path: Path) -> None:
    row = {"messages": trace("judge").messages, "answer": "Paris"}
    mark = {"id": "x", "task": "judge", "source": "s", "finish_reason": "stop", "teacher": "t", "split": True}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row | {"distill": mark | {"seed": 0, "completion_tokens": None}}) + "\n")
    with Run(tmp_path / "b", recipe_of(file)) as run:
        generate.STAGE.perform(run)
        with pytest.raises(UserError, match="task judge needs a model that judges"):
            STAGE.perform(run)
    with server(yes) as made, Run(tmp_path / "b", recipe_of(file, judge=judge(url(made)))) as run:
        assert STAGE.perform(run).kept == 1
        assert "judge_model.seed" in STAGE.settings(run)


def test_a_judge_that_no_trace_needs_is_not_opened(tmp_path: Path) -> None:
    source = run_with(tmp_path / "a", make_trace("<think>a</think>\\boxed{42}"))
    unusable = judge("http://127.0.0.1:9/v1")
    unusable["server"] |= {"api_key_env": "NO_SUCH_KEY"}
    with Run(tmp_path / "b", recipe_of(source, judge=unusable)) as run:
        generate.STAGE.perform(run)
        assert STAGE.perform(run).kept == 1


# ---- isolation


def test_the_level_of_a_run_s_programs_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = run_with(tmp_path / "a", trace("math", 1), trace("code", answer=f"<think>a</think>{PROGRAM}"))
    recipe = recipe_of(source)
    with Run(tmp_path / "b", recipe) as run:
        generate.STAGE.perform(run)
        monkeypatch.setattr(levels, "this_machine", lambda: ("process", POWERS, ()))
        for check in (lambda: check_gradable(recipe), lambda: STAGE.perform(run)):
            with pytest.raises(UserError, match=r"filter\.correct\.sandbox: .* 'full' of isolation"):
                check()
        assert not run.paths.filtered.exists()


def test_an_unknown_task_in_a_run_s_traces_is_refused(tmp_path: Path) -> None:
    source = run_with(tmp_path / "a", trace("nonsense"))
    with pytest.raises(UserError, match="^filter.correct: task 'nonsense' has no grader"):
        check_gradable(recipe_of(source))


def test_a_zygote_below_the_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "_kinds", lambda: iter(["process"]))
    levels.open_zygote().close()
    with pytest.raises(WorkError, match=f"^{os.uname().nodename}: .*'landlock' of isolation, .* gives 'process'"):
        levels.open_zygote("landlock")


def test_a_worker_runs_nothing_below_the_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Ray node with weaker walls than the machine of the command: the worker itself refuses."""
    (tmp_path / "sitecustomize.py").write_text(
        "from distill.grading.sandbox import levels\nlevels._kinds = lambda: iter(['process'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    items = [(0, trace("code").prompt, PROGRAM)]
    with Grader(workers=1) as grader, pytest.raises(WorkError, match="'full' of isolation, .* gives 'process'"):
        list(grader.grade(items))
    with Grader(workers=1, level="process") as grader:
        [(_, grade)] = grader.grade(items)
    assert grade.verdict == "correct"
