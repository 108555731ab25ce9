"""Trainings in phases: what is where, what is skipped, resumed and refused, and the same student after a kill."""

import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import train_support as support
from transformers import AutoModelForCausalLM

from distill import api, catalog, generate, pipeline
from distill.artefacts import RunPaths, TrainSummary
from distill.errors import UserError
from distill.filters import pipeline as filters
from distill.models import Models
from distill.pipeline import run_recipe
from distill.plan import plan_recipe
from distill.recipe import Recipe
from distill.report import write_report
from distill.run import Run
from distill.train import PhasesStage
from distill.train.learn.loop import Loop
from distill.train.phases import combined, phase_recipe

STAGE = PhasesStage((generate.STAGE, filters.STAGE))
SMALL = {"per_device_train_batch_size": 4, "max_length": 256, "dtype": "float32", "learning_rate": 3e-3}
PHASES = [
    {"name": "cold-start", "max_steps": 3, "save_steps": 1, "logging_steps": 1},
    {"name": "own", "max_steps": 2, "save_steps": 1, "data": [{"kind": "own", "samples": 2}, {"kind": "kept"}]},
    {"name": "last", "max_steps": 2, "save_steps": 1, "seed": 1},
]


def recipe(student: Path, phases: list[dict[str, Any]] = PHASES, **train: Any) -> Recipe:
    """Filters are off: they would keep no answer of a random student."""
    written = support.make_recipe(student, {}).model_dump(mode="json")
    off = dict.fromkeys(("format", "finish", "correct", "dedup"), False)
    sampling = {"temperature": 1.0, "max_new_tokens": 16}
    changes = {
        "prompts": [{"kind": "procedural", "name": "arithmetic", "limit": 6}],
        "engine": {"dtype": "float32", "device": "cpu"},
        "generate": {"sampling": sampling},
        "filter": off,
        "train": SMALL | train | {"phases": phases},
    }
    return Recipe.model_validate(written | changes)


def start(directory: Path, student: Path) -> Path:
    """A run directory in which the filter stage has left its traces."""
    with Run(directory, recipe(student)) as run:
        support.Filtered(support.sums(12)).perform(run)
    return directory


def train(directory: Path, student: Path, phases: list[dict[str, Any]] = PHASES, **more: Any) -> TrainSummary:
    with Run(directory, recipe(student, phases, **more)) as run:
        return STAGE.perform(run)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def trained(student, tmp_path_factory):
    directory = start(tmp_path_factory.mktemp("runs") / "run", student)
    return directory, train(directory, student)


def weights(directory: Path) -> bytes:
    return (directory / "student" / "model.safetensors").read_bytes()


def test_each_phase_is_a_run_and_the_last_student_is_the_run_s(trained):
    directory, summary = trained
    names = ["1-cold-start", "2-own", "3-last"]
    assert sorted(path.name for path in (directory / "phases").iterdir()) == names
    students = [weights(directory / "phases" / name) for name in names]
    assert len(set(students)) == 3 and weights(directory) == students[-1]
    assert AutoModelForCausalLM.from_pretrained(directory / "student").dtype == torch.float32
    assert [phase.steps for phase in summary.phases.values()] == [3, 2, 2]
    assert list(summary.phases) == ["cold-start", "own", "last"]
    assert (summary.steps, summary.rows) == (7, 12 + (12 + 12) + 12)
    assert summary.last_loss == summary.phases["last"].last_loss
    assert not (directory / "checkpoints").exists()


def test_a_phase_starts_from_the_student_of_the_one_before(trained, student):
    directory, _ = trained
    first, second, third = (phase_recipe(recipe(student), directory, number) for number in range(3))
    assert (first.name, second.name) == ("test.cold-start", "test.own")
    assert first.student == recipe(student).student
    assert third.student == str(directory / "phases" / "2-own" / "student")
    # The base answers in the teacher's place, and the run's kept traces are those of another run.
    assert second.teacher == second.student == str(directory / "phases" / "1-cold-start" / "student")
    assert [source.kind for source in second.train.data] == ["kept", "run"]
    assert (second.generate.samples, second.train.data[1].path) == (2, str(directory))


def test_the_answers_are_those_of_the_base(trained):
    summary = RunPaths(trained[0] / "phases" / "2-own")
    assert len(list(summary.traces.glob("*.parquet"))) == 1 and summary.funnel.is_file()


def test_large_files_are_stored_once(trained):
    directory, _ = trained
    last = directory / "phases" / "3-last" / "student"
    assert (last / "model.safetensors").samefile(directory / "student" / "model.safetensors")


def test_the_card_names_every_phase(trained):
    text = (trained[0] / "student" / "README.md").read_text()
    assert "trained in 3 phases" in text and "base_model: tiny-test" in text
    assert "| phase 2, own | sft; its own answers; supervised tokens" in text


def test_a_finished_training_is_not_done_again(trained, student, monkeypatch):
    directory, summary = trained
    monkeypatch.setattr(Loop, "run", None)  # calling it would raise
    assert train(directory, student) == summary


def test_a_missing_student_is_taken_from_the_last_phase(trained, student, monkeypatch):
    directory, summary = trained
    before = weights(directory)
    (directory / "student" / "config.json").unlink()
    monkeypatch.setattr(Loop, "run", None)
    assert train(directory, student) == summary
    assert (directory / "student" / "config.json").is_file() and weights(directory) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([PHASES[0], PHASES[1] | {"learning_rate": 1e-4}, PHASES[2]], r"phases\.1\.learning_rate: 0\.003 → 0\.0001"),
        (PHASES[:2], r'phases: \["cold-start", "own", "last"\] → \["cold-start", "own"\]'),
        ([PHASES[0], PHASES[1] | {"data": [{"kind": "own"}]}, PHASES[2]], r"phases\.1\.data\.0\.samples: 2 → 4"),
    ],
)
def test_other_settings_are_refused_with_phase_and_key(trained, student, changed, message):
    with pytest.raises(UserError, match=rf"stage train was run with other settings \(.*{message}.*--fresh train"):
        train(trained[0], student, changed)


def test_what_decides_own_answers_decides_the_student(trained, student):
    directory, _ = trained
    other = recipe(student).model_copy(update={"seed": 5})
    with Run(directory, other) as run, pytest.raises(UserError, match=r"phases\.1\.generate\.seed: 0 → 5"):
        STAGE.perform(run)


def test_counts_and_means_may_change(trained, student):
    directory, summary = trained
    assert train(directory, student, [phase | {"save_steps": 9} for phase in PHASES]) == summary


def test_fresh_moves_all_phases_aside(student, tmp_path):
    directory = start(tmp_path / "run", student)
    train(directory, student, PHASES[:1])
    with Run(directory, recipe(student)) as run:
        run.fresh([STAGE])
    assert not (directory / "phases").exists() and (directory / "old" / "train-1" / "phases" / "1-cold-start").is_dir()


def test_a_model_that_teaches_itself_has_the_training_template_in_every_phase(student, tmp_path):
    logits = {"kind": "logits", "top_k": 2}
    phases = [phase | {"data": [{"kind": "kept"}], "objective": logits} for phase in PHASES[:2]]
    written = recipe(student, phases).model_dump(mode="json")
    written["train"]["phases"] = [phase | {"chat_template": "chatml"} for phase in written["train"]["phases"]]
    asked = Recipe.model_validate(written | {"teacher": str(student), "student": str(student)})
    before = tmp_path / "phases" / "1-cold-start" / "student"
    shutil.copytree(student, before)
    first, second = (Models(phase_recipe(asked, tmp_path, number), tmp_path) for number in (0, 1))
    assert first.teacher.template == second.teacher.template == "chatml"
    assert (first.base.directory, second.base.directory) == (student, before) and second.teacher.directory == student
    other = asked.model_copy(update={"teacher": str(before)})
    assert phase_recipe(other, tmp_path, 1).teacher_template is None, "another model answers with its own"


def test_a_refused_phase_leaves_nothing(student, tmp_path):
    directory = start(tmp_path / "run", student)
    before = sorted(directory.rglob("*"))
    with pytest.raises(UserError, match=r"train\.report_to: unknown tracker"):
        train(directory, student, [PHASES[0] | {"report_to": ["nobody"]}])
    assert sorted(directory.rglob("*")) == before


def test_a_run_may_be_moved_between_phases(trained, student, tmp_path, monkeypatch):
    directory = start(tmp_path / "run", student)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loop, "run", _until(3, Loop.run))
        train(directory, student)
    moved = directory.rename(tmp_path / "moved")
    train(moved, student)
    assert weights(moved) == weights(trained[0])


def _until(last: int, function: Any) -> Any:
    """The function, interrupted at its last call."""
    calls = count(1)

    def counted(*arguments: Any) -> Any:
        if next(calls) == last:
            raise KeyboardInterrupt
        return function(*arguments)

    return counted


@pytest.mark.slow
def test_several_processes_train_each_phase(student, tmp_path):
    directory = start(tmp_path / "run", student)
    summary = train(directory, student, [PHASES[0], PHASES[2]], num_processes=2)
    assert [phase.processes for phase in summary.phases.values()] == [2, 2]


def test_what_reads_no_traces_skips_generate_and_filter(student, tmp_path, monkeypatch, capsys):
    performed = []
    monkeypatch.setattr(pipeline, "_perform", lambda run, names: performed.extend(names))
    alone = recipe(student, [{"name": "rl", "objective": {"kind": "grpo"}}])
    with pytest.raises(UserError, match=r"--fresh filter moves the output of filter aside, and this command"):
        run_recipe(alone, tmp_path / "run", fresh=["filter"])
    run_recipe(alone, tmp_path / "run")
    assert performed == ["train", "eval", "report"]
    assert "generate and filter: skipped" in capsys.readouterr().out
    run_recipe(alone, tmp_path / "run", ["generate"])
    assert performed[3:] == ["generate"]


def test_rollouts_in_a_phase(tmp_path):
    student = catalog.resolve_weights("student", "tiny-qwen")  # ends its answers
    rollouts = {"prompts_per_step": 2, "samples": 2, "sampling": {"max_new_tokens": 32}}
    rl = {"name": "rl", "max_steps": 1, "objective": {"kind": "grpo", "rewards": {"format": 1.0}, "rollouts": rollouts}}
    summary = train(start(tmp_path / "run", student), student, [rl, PHASES[2]])
    assert (summary.steps, summary.rollouts) == (3, summary.phases["rl"].rollouts)
    assert list((tmp_path / "run" / "phases" / "1-rl" / "rollouts").glob("*"))


def test_the_report_has_a_section_for_each_phase(trained):
    page = write_report(trained[0]).read_text()
    for number, name in enumerate(("cold-start", "own", "last"), 1):
        assert f'<h3 id="phase-{number}">Phase {number}: {name}</h3>' in page
        assert (trained[0] / "report" / f"loss-{number}.svg").is_file()
    assert "Its base wrote 12 answers to 6 prompts; the filters kept 12." in page


def test_the_report_refuses_a_damaged_phase(trained, tmp_path):
    copy = shutil.copytree(trained[0], tmp_path / "run")
    log = copy / "phases" / "1-cold-start" / "checkpoints" / "log.jsonl"
    log.write_text(log.read_text().replace("1", "2"))
    with pytest.raises(UserError, match=r"1-cold-start/checkpoints/log\.jsonl .*--fresh train` repeats all phases"):
        write_report(copy)


def test_the_log_of_a_phase_is_named(trained):
    with pytest.raises(UserError, match=r"trained in phases, .*Run\('.*/phases/1-cold-start'\)\.log\(\)") as caught:
        api.Run(trained[0]).log()
    assert "\n" not in str(caught.value)
    assert len(api.Run(trained[0] / "phases" / "1-cold-start").log()) == 3


@pytest.mark.slow
def test_phases_are_summed_in_a_plan(student, tmp_path, capsys):
    plan = plan_recipe(recipe(student), tmp_path / "run", ["1x24GB"])
    printed = capsys.readouterr().out
    once = plan_recipe(recipe(student, [PHASES[0] | {"max_steps": 3 + 2 + 2}]), tmp_path / "run", ["1x24GB"])
    trained, whole = (next(stage for stage in p.stages if stage.stage == "train") for p in (plan, once))
    assert trained.tokens.value == pytest.approx(whole.tokens.value)
    assert trained.hours.value == pytest.approx(whole.hours.value)
    assert [f"phase {n}, {name}:" in printed for n, name in ((1, "cold-start"), (2, "own"), (3, "last"))] == [True] * 3


def test_a_later_recipe_takes_the_run_as_teacher_and_base(trained, tmp_path):
    later = support.make_recipe(trained[0]).model_copy(update={"teacher": str(trained[0]), "student": str(trained[0])})
    with Run(tmp_path / "later", later) as run:
        assert run.models.teacher.place == run.models.base.place == trained[0] / "student"
        assert run.models.teacher.weights == run.models.base.weights
        assert list(run.models.teacher.chat.prompts_ids([[{"role": "user", "content": "1+1?"}]]))


def test_the_summary_adds_the_phases_up():
    fields = dict.fromkeys(TrainSummary.model_fields, 2) | {"student": "student", "padded_rows": None, "phases": {}}
    one = TrainSummary.model_construct(**fields)
    both = combined({"a": one, "b": one.model_copy(update={"first_loss": 9.0, "last_loss": 1.0})})
    assert (both.steps, both.tokens, both.first_loss, both.last_loss, both.processes) == (4, 4, 2, 1.0, 2)


# ---- kill -9


STEPS = {  # name → where a function is found, and the number of the call that is the last
    "the second step of the first phase": (Loop, "step", 2),
    "the record of the first phase": (Run, "finish", 1),
    "the answers of the base": (generate.STAGE, "work", 1),
    "the filter of the answers": (filters.STAGE, "work", 1),
    "the first step of the second phase": (Loop, "step", 4),
    "the last step": (Loop, "step", 7),
    "the run's student": (os, "link", 3),
    "the record of the training": (Run, "finish", 6),
}
FAST = ("the second step of the first phase",)


def main(directory: Path, student: Path, step: str) -> None:
    """Train; kill this process in the middle of a step."""
    place, name, last = STEPS[step]
    calls, function = count(1), getattr(place, name)

    def dying(*arguments: Any, **more: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)

    setattr(place, name, dying)
    train(directory, student)


def launched(directory: Path, student: Path, step: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # where train_support is
    command = [sys.executable, __file__, str(directory), str(student), step]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("step", [pytest.param(s, marks=[] if s in FAST else [pytest.mark.slow]) for s in STEPS])
def test_a_killed_training_gives_the_same_student(trained, student, tmp_path, step):
    directory = start(tmp_path / "run", student)
    assert launched(directory, student, step).wait() == -signal.SIGKILL
    train(directory, student)
    assert weights(directory) == weights(trained[0])
    log = (directory / "phases" / "1-cold-start" / "checkpoints" / "log.jsonl").read_text()
    assert log.count('"step"') == 3


@pytest.mark.slow
def test_kills_at_random_moments_give_the_same_student(trained, student, tmp_path):
    directory, chance = start(tmp_path / "run", student), random.Random(20)
    for _ in range(8):
        process = launched(directory, student, "the record of the training")
        try:
            process.wait(chance.uniform(3, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    train(directory, student)
    assert weights(directory) == weights(trained[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
