"""The run directory: the lock against real processes, refusals that change nothing, states that survive `kill -9`."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill import run as run_module
from distill.errors import UserError
from distill.recipe import Recipe
from distill.run import Run

OUTPUTS = {"generate": ["traces"], "filter": ["filtered"], "train": ["checkpoints", "student"], "eval": ["eval"]}


def recipe(name: str = "small", **changes: Any) -> Recipe:
    base = {
        "name": name,
        "teacher": "t",
        "student": "s",
        "prompts": [{"kind": "procedural", "name": "arithmetic"}],
        "eval": {"benchmarks": ["b"]},
    }
    return Recipe.model_validate(base | changes)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory but the lock."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def work(run: Run, *names: str, settings: dict[str, Any] | None = None) -> None:
    """Do the named stages: one file per output."""
    for name in names:
        stage = run.stage(name, settings or {"seed": 0}, {"samples": 1}, OUTPUTS[name])
        for output in OUTPUTS[name]:
            (run.directory / output).mkdir(exist_ok=True)
            (run.directory / output / "file").write_text(name)
        stage.finish({"did": name})


# What is written


def test_recipe_is_written_with_every_default_and_reads_back(tmp_path: Path) -> None:
    with Run(tmp_path / "deep" / "run", recipe(train={"learning_rate": 2e-5})) as run:
        run.stage("generate", {}, {}, [])
    written = yaml.safe_load((run.directory / "recipe.yaml").read_text())
    assert written["train"]["learning_rate"] == 2e-5
    assert written["generate"]["sampling"]["top_p"] == 0.95
    assert Recipe.model_validate(written) == run.recipe
    assert json.loads((run.directory / "run.json").read_text())["recipe"] == "small"


def test_run_without_an_accepted_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights"), Run(tmp_path / "a" / "b", recipe()):
        raise UserError("no weights")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with Run(tmp_path / "mine", recipe()):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


# Stages


def test_stage_resumes_until_it_is_finished_as_asked(tmp_path: Path) -> None:
    settings, extent = {"a": (1, 2), "b.c": 0.1}, {"samples": 1}
    for _ in range(2):
        with Run(tmp_path, recipe()) as run:
            stage = run.stage("generate", settings, extent, ["traces"])
            assert not stage.finished and stage.summary is None
    with Run(tmp_path, recipe()) as run:
        stage = run.stage("generate", settings, extent, ["traces"])
        stage.finish({"traces": 3})
        assert stage.finished
    with Run(tmp_path, recipe()) as run:
        stage = run.stage("generate", settings, extent, ["traces"])
        assert stage.finished and stage.summary == {"traces": 3}
        assert run.finished("generate", settings, extent) == {"traces": 3} and run.worked == set()
        assert run.finished("generate", settings, {"samples": 2}) is None
        more = run.stage("generate", settings, {"samples": 2}, ["traces"])
        assert not more.finished and more.summary is None and run.worked == {"generate"}


def test_other_settings_are_refused_by_name_and_nothing_changes(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        work(run, "generate", settings={"temperature": 0.6, "gone": True, "same": 1})
    before = content(tmp_path)
    with Run(tmp_path, recipe(train={"learning_rate": 1e-3})) as run, pytest.raises(UserError) as refusal:
        run.stage("generate", {"temperature": 0.7, "new": None, "same": 1}, {"samples": 1}, ["traces"])
    with Run(tmp_path, recipe()) as run, pytest.raises(UserError, match="temperature: 0.6 → 0.7"):
        run.finished("generate", {"temperature": 0.7}, {"samples": 1})
    assert content(tmp_path) == before
    message = str(refusal.value)
    assert "temperature: 0.6 → 0.7, new: not set → null, gone: true → not set" in message
    assert "same" not in message and "\n" not in message
    assert "--fresh generate" in message and "--run-dir" in message and str(tmp_path) in message


def test_finished_stage_changes_nothing(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        work(run, "generate")
    before = content(tmp_path)
    with Run(tmp_path, recipe(generate={"max_batch": 7})) as run:
        assert run.stage("generate", {"seed": 0}, {"samples": 1}, ["traces"]).finished
    assert content(tmp_path) == before


def test_seconds_count_sessions_and_not_the_pauses_between_them(tmp_path: Path) -> None:
    def begin() -> Any:
        return run.stage("generate", {}, {"samples": 1}, ["traces"])

    state = tmp_path / "stages" / "generate.json"
    with Run(tmp_path, recipe()) as run:
        begin()
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "ledger.jsonl").write_text("a trace")
    told = json.loads(state.read_text())
    begun = datetime.fromisoformat(told["resumed"])
    hours_ago = (begun - timedelta(hours=5)).isoformat()
    state.write_text(json.dumps(told | {"begun": hours_ago, "resumed": hours_ago}))
    for path in (tmp_path / "traces", tmp_path / "traces" / "ledger.jsonl"):  # 90 s later it wrote for the last time
        os.utime(path, times=(begun.timestamp() - 5 * 3600 + 90,) * 2)
    with Run(tmp_path, recipe()) as run:
        assert json.loads(state.read_text())["begun"] == hours_ago
        begin().finish({})
    told = json.loads(state.read_text())
    assert 90 <= told["seconds"] < 90 + 60 and told["begun"] == hours_ago
    with Run(tmp_path, recipe()) as run:
        run.stage("generate", {}, {"samples": 2}, ["traces"])
    assert json.loads(state.read_text())["seconds"] == told["seconds"], "extending goes on from what was worked"


# Fresh


def test_fresh_moves_the_stage_and_all_later_ones_aside(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        work(run, *OUTPUTS)
    before = content(tmp_path)
    with Run(tmp_path, recipe(train={"learning_rate": 1e-3})) as run:
        run.fresh("train")
        old = content(tmp_path / "old" / "train-1")
        assert set(old) == {
            "recipe.yaml", "stages/train.json", "stages/eval.json", "checkpoints/file", "student/file", "eval/file",
        }  # fmt: skip
        assert old["recipe.yaml"] == before["recipe.yaml"]
        assert {name for name in content(tmp_path) if not name.startswith("old/")} == set(before) - set(old) | {
            "recipe.yaml"
        }
        assert run.stage("filter", {"seed": 0}, {"samples": 1}, ["filtered"]).finished
        work(run, "train", settings={"seed": 5})  # the new settings are accepted now
        run.fresh("train")
        run.fresh("train")  # nothing there any more
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["train-1", "train-2"]


def test_fresh_of_an_unknown_stage_lists_the_stages(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run, pytest.raises(UserError, match="generate, filter, train, eval"):
        run.fresh("trian")


def test_fresh_cut_short_leaves_no_stage_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(tmp_path, recipe()) as run:
        work(run, *OUTPUTS)

    def out_of_order(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "gone", str(source))

    with Run(tmp_path, recipe()) as run:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
            patch.setattr(Path, "rename", out_of_order)
            run.fresh("filter")
        assert run.stage("generate", {"seed": 0}, {"samples": 1}, ["traces"]).finished
        for name in ("filter", "train", "eval"):
            assert not run.stage(name, {"seed": 0}, {"samples": 1}, OUTPUTS[name]).finished


# Refusals of whole directories


def refused(directory: Path, *expected: str) -> None:
    before = content(directory) if directory.is_dir() else None
    with pytest.raises(UserError) as refusal, Run(directory, recipe()):
        pass
    message = str(refusal.value)
    assert "\n" not in message and "--run-dir" in message
    for text in expected:
        assert text in message
    if before is not None:
        assert content(directory) == before


def test_directory_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, recipe("other")) as run:
        work(run, "generate")
    refused(tmp_path, str(tmp_path), "other", "small")


def test_foreign_directory_is_refused_and_gets_no_lock_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    refused(tmp_path, "not a run directory")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a directory")
    refused(tmp_path / "file" / "run", "not a directory")


def test_damaged_or_newer_run_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        work(run, "generate")
    (tmp_path / "run.json").write_text('{"format": 99, "recipe": "small"}')
    refused(tmp_path, "format 99")
    (tmp_path / "run.json").write_text("{")
    refused(tmp_path, "run.json", "damaged")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere: be nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_directory_without_write_permission_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: nobody may not even look into that
        directory = Path(name)
        directory.chmod(0o555)
        with unprivileged():
            refused(directory, "no permission")
            refused(directory / "new", "no permission")
        assert list(directory.iterdir()) == []
        directory.chmod(0o755)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_write_errors_of_the_place_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(directory: Path) -> int:
        raise OSError(code, os.strerror(code), str(directory / ".lock"))

    monkeypatch.setattr(run_module, "_take_lock", fail)
    refused(tmp_path, str(tmp_path))


def test_full_disk_is_not_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with Run(tmp_path / "run", recipe()) as run, monkeypatch.context() as patch:
        patch.setattr(run_module, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            run.stage("generate", {}, {}, [])
    assert not (tmp_path / "run").exists()


# Real processes

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

HOLDER = """
import os, sys, time
from pathlib import Path
from distill.recipe import Recipe
from distill.run import Run
recipe = Recipe.model_validate_json(sys.argv[2])
with Run(Path(sys.argv[1]), recipe) as run:
    run.stage("generate", {}, {}, [])
    if os.fork() == 0:  # as a worker process that outlives its parent
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), recipe().model_dump_json()]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        refused(tmp_path, f"process {holder.pid}", str(tmp_path))
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives on, and does not hold the lock
        with Run(tmp_path, recipe()) as run:
            assert not run.stage("generate", {}, {}, []).finished
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_same_process_cannot_hold_a_run_twice(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        run.stage("generate", {}, {}, [])
        refused(tmp_path, f"process {os.getpid()}")
    with Run(tmp_path, recipe()):
        pass


WRITER = """
import sys
from pathlib import Path
from distill.durable import write_whole
print("ready", flush=True)
for number in range(10**9):
    write_whole(Path(sys.argv[1]), f"{number} " * 20_000)
"""


def test_file_is_whole_however_its_writer_dies(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old " * 20_000)
    rng = random.Random(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        words = path.read_text().split()
        assert len(words) == 20_000 and len(set(words)) == 1
