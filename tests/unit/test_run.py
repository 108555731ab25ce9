"""The run directory: the lock against real processes, refusals that change nothing, records that survive `kill -9`."""

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

import pytest
import yaml
from run_support import (
    EVAL,
    FILTER,
    GENERATE,
    STAGES,
    TRAIN,
    Words,
    Writing,
    begin,
    content,
    finished,
    finished_run,
    generate,
    recipe,
    rewritten,
)

from distill import lock
from distill import record as record_module
from distill.artefacts import Artefact
from distill.errors import UserError
from distill.recipe import Recipe
from distill.record import StageRecord, read_recipe
from distill.run import Run


@pytest.fixture
def done(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


# What is written


def test_recipe_is_written_with_every_default_and_reads_back(tmp_path: Path) -> None:
    with Run(tmp_path / "deep" / "run", recipe(train={"learning_rate": 2e-5})) as run:
        begin(run, generate())
    written = yaml.safe_load((run.directory / "recipe.yaml").read_text())
    assert written["train"]["learning_rate"] == 2e-5
    assert written["generate"]["sampling"]["top_p"] == 0.95
    assert Recipe.model_validate(written) == run.recipe
    assert json.loads((run.directory / "run.json").read_text())["recipe"] == "small"
    assert read_recipe(run.directory) == (run.directory / "recipe.yaml").read_text()


def test_an_edited_recipe_is_refused_by_those_who_only_read(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        begin(run, generate())
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("top_p: 0.95", "top_p: 0.9"))
    with pytest.raises(UserError, match="recipe.yaml is damaged or was edited; run the recipe again"):
        read_recipe(tmp_path)
    with Run(tmp_path, recipe()) as run:
        begin(run, generate())
    assert "top_p: 0.95" in read_recipe(tmp_path)


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
    stage = generate({"a": [1, 2], "b.c": 0.1})
    for _ in range(2):
        with Run(tmp_path, recipe()) as run:
            begin(run, stage)
            assert finished(run, stage) is None and not run.is_finished("generate")
    with Run(tmp_path, recipe()) as run:
        assert stage.perform(run) == Words(words="generate")
        assert run.worked == {"generate"}
    with Run(tmp_path, recipe()) as run:
        assert finished(run, stage) == stage.perform(run) == Words(words="generate")
        assert run.stored_summary("generate", Words) == Words(words="generate") and run.worked == set()
        more = generate({"a": [1, 2], "b.c": 0.1}, samples=2)
        assert finished(run, more) is None and not more.is_finished(run)
        more.perform(run)
        assert run.worked == {"generate"} and finished(run, more) is not None


def test_other_settings_are_refused_by_name_and_nothing_changes(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        generate({"temperature": 0.6, "gone": True, "same": 1}).perform(run)
    before = content(tmp_path)
    with Run(tmp_path, recipe(train={"learning_rate": 1e-3})) as run, pytest.raises(UserError) as refusal:
        begin(run, generate({"temperature": 0.7, "new": None, "same": 1}))
    with Run(tmp_path, recipe()) as run, pytest.raises(UserError, match="temperature: 0.6 → 0.7"):
        finished(run, generate({"temperature": 0.7}))
    assert content(tmp_path) == before
    message = str(refusal.value)
    assert "temperature: 0.6 → 0.7, new: not set → null, gone: true → not set" in message
    assert "same" not in message and "\n" not in message
    assert "--fresh generate" in message and "--run-dir" in message and str(tmp_path) in message


def test_finished_stage_changes_nothing(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        GENERATE.perform(run)
    before = content(tmp_path)
    with Run(tmp_path, recipe(generate={"max_batch": 7})) as run:
        GENERATE.perform(run)
    assert content(tmp_path) == before


def test_seconds_count_sessions_and_not_the_pauses_between_them(tmp_path: Path) -> None:
    path = tmp_path / "stages" / "generate.json"
    with Run(tmp_path, recipe()) as run:
        begin(run, GENERATE)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "ledger.jsonl").write_text("a trace")
    begun = datetime.fromisoformat(json.loads(path.read_text())["resumed"])
    hours_ago = (begun - timedelta(hours=5)).isoformat()
    rewritten(path, StageRecord, begun=hours_ago, resumed=hours_ago)
    for file in (tmp_path / "traces", tmp_path / "traces" / "ledger.jsonl"):  # 90 s later it wrote for the last time
        os.utime(file, times=(begun.timestamp() - 5 * 3600 + 90,) * 2)
    with Run(tmp_path, recipe()) as run:
        GENERATE.perform(run)
    record = json.loads(path.read_text())
    assert 90 <= record["seconds"] < 90 + 60 and record["begun"] == hours_ago
    with Run(tmp_path, recipe()) as run:
        begin(run, generate(samples=2))
    assert json.loads(path.read_text())["seconds"] == record["seconds"], "extending goes on from what was worked"


# Fresh


def test_each_machine_that_worked_on_a_stage_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("first", "first", "second"):
        monkeypatch.setattr("distill.run.description", lambda machine=machine: machine)
        with Run(tmp_path, recipe()) as run:
            begin(run, GENERATE)
    assert json.loads((tmp_path / "stages" / "generate.json").read_text())["machines"] == ["first", "second"]


def test_fresh_moves_the_stages_aside(done: Path) -> None:
    before = content(done)
    with Run(done, recipe(train={"learning_rate": 1e-3})) as run:
        run.fresh([TRAIN, EVAL])
        old = content(done / "old" / "train-1")
        assert set(old) == {
            "recipe.yaml", "stages/train.json", "stages/eval.json", "checkpoints/file", "student/file", "eval/file",
        }  # fmt: skip
        assert old["recipe.yaml"] == before["recipe.yaml"]
        assert {name for name in content(done) if not name.startswith("old/")} == set(before) - set(old) | {
            "recipe.yaml"
        }
        assert finished(run, FILTER) is not None
        Writing("train", "checkpoints", "student", settings={"seed": 5}).perform(run)  # new settings are accepted now
        run.fresh([TRAIN, EVAL])
        run.fresh([TRAIN, EVAL])  # nothing there any more
    assert sorted(path.name for path in (done / "old").iterdir()) == ["train-1", "train-2"]


def test_fresh_moves_outputs_without_a_record(tmp_path: Path) -> None:
    """A training of phases whose later one was refused: its record was taken back, and the first phase is there."""
    with Run(tmp_path / "run", recipe()) as run:
        run.fresh([])
        run.fresh([TRAIN, EVAL])
        assert not (tmp_path / "run" / "old").exists(), "there is nothing to move"
        Writing("train", "checkpoints", "student").perform(run)
        run.forget(TRAIN)
        run.fresh([TRAIN, EVAL])
    assert set(content(tmp_path / "run" / "old" / "train-1")) == {"recipe.yaml", "checkpoints/file", "student/file"}
    assert not (tmp_path / "run" / "student").exists()


def test_fresh_cut_short_leaves_no_stage_that_looks_finished(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_order(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "gone", str(source))

    with Run(done, recipe()) as run:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
            patch.setattr(Path, "rename", out_of_order)
            run.fresh(STAGES[1:])
        assert finished(run, GENERATE) is not None
        assert not any(run.is_finished(stage.name) for stage in STAGES[1:])


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
        GENERATE.perform(run)
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
        GENERATE.perform(run)
    for found in (1, 99):
        (tmp_path / "run.json").write_text(json.dumps({"format": found, "recipe": "small"}))
        refused(tmp_path, f"run format {found}, this version writes {record_module.FORMAT}")
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
            refused(directory, "permission")
            refused(directory / "new", "permission")
        assert list(directory.iterdir()) == []
        directory.chmod(0o755)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_write_errors_of_the_place_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(directory: Path, option: str) -> int:
        raise OSError(code, os.strerror(code), str(directory / ".lock"))

    monkeypatch.setattr(lock, "take", fail)
    refused(tmp_path, str(tmp_path))


def test_full_disk_is_not_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(artefact: Artefact, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with Run(tmp_path / "run", recipe()) as run, monkeypatch.context() as patch:
        patch.setattr(Artefact, "write", full)
        with pytest.raises(OSError, match="No space left"):
            begin(run, GENERATE)
    assert not (tmp_path / "run").exists()


# Real processes

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

HOLDER = """
import os, sys, time
from pathlib import Path
from distill.recipe import Recipe
from distill.run import Run
recipe = Recipe.model_validate_json(sys.argv[2])
sys.path.insert(0, sys.argv[3])
from run_support import GENERATE, begin
with Run(Path(sys.argv[1]), recipe) as run:
    begin(run, GENERATE)
    if os.fork() == 0:  # as a worker process that outlives its parent
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), recipe().model_dump_json(), str(Path(__file__).parents[1])]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        refused(tmp_path, f"process {holder.pid}", str(tmp_path))
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives on, and does not hold the lock
        with Run(tmp_path, recipe()) as run:
            assert finished(run, GENERATE) is None
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_same_process_cannot_hold_a_run_twice(tmp_path: Path) -> None:
    with Run(tmp_path, recipe()) as run:
        begin(run, GENERATE)
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
