"""Phases under torchrun: two ranks train as one process does, also after a kill in any phase."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import train_support as support
from safetensors.torch import load_file

from distill import catalog
from distill.artefacts import TrainSummary
from distill.children import free_port
from distill.pipeline import STAGES
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.run import Run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
SHORT = {"save_steps": 1, "logging_steps": 1}
ROLLOUTS = {"prompts_per_step": 2, "samples": 4, "sampling": {"temperature": 1.6, "max_new_tokens": 12}}
GRPO = {"kind": "grpo", "rewards": {"correct": 1.0, "length": 1.0}, "rollouts": ROLLOUTS}
STEPS = {"cold-start": 3, "own": 2, "rl": 2}
PHASES = [
    SHORT | {"name": "cold-start", "max_steps": 3, "train_batch_size": 8},
    SHORT | {"name": "own", "max_steps": 2, "train_batch_size": 8, "data": [{"kind": "own", "samples": 2}]},
    SHORT | {"name": "rl", "max_steps": 2, "objective": GRPO},
]
# One rank kills itself after its n-th step; 0: none does.
SCRIPT = """
    import os, signal, sys
    from distill.train.learn.loop import Loop

    rank, left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    step = Loop.step

    def dying(*arguments):
        global left
        result = step(*arguments)
        left -= os.environ["RANK"] == str(rank)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    if left:
        Loop.step = dying
    from distill.command import main
    main()
"""


def make_recipe(parallel: str) -> Recipe:
    student = catalog.resolve_weights("student", "tiny-qwen")  # ends its answers
    written = support.make_recipe(student).model_dump(mode="json")
    off = dict.fromkeys(("format", "finish", "correct", "dedup"), False)
    small = {"per_device_train_batch_size": 4, "max_length": 128, "dtype": "float32", "learning_rate": 1e-3}
    changes = {
        "student": "tiny-qwen",
        "prompts": [{"kind": "procedural", "name": "arithmetic", "split": "train", "limit": 8}],
        "engine": {"dtype": "float32", "device": "cpu"},
        "generate": {"sampling": {"temperature": 1.6, "max_new_tokens": 12}},
        "filter": off,
        "train": small | {"parallel": parallel, "phases": PHASES},
    }
    return Recipe.model_validate(written | changes)


def start(directory: Path, parallel: str) -> Path:
    """A run directory as the filter stage leaves it, with the recipe beside it."""
    recipe = make_recipe(parallel)
    directory.with_suffix(".yaml").write_text(recipe.to_yaml())
    with Run(directory, recipe) as run:
        support.Filtered(support.sums(16)).perform(run)
    return directory


def torchrun(directory: Path, rank: int = 0, step: int = 0) -> "subprocess.CompletedProcess[str]":
    script = directory.with_suffix(".py")
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [str(rank), str(step), "train", str(directory.with_suffix(".yaml")), "--run-dir", str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(free_port()), str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def log(phase: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (phase / "checkpoints" / "log.jsonl").read_text().splitlines()]


def assert_alike(ours: Path, theirs: Path) -> None:
    phases = [path.relative_to(theirs) for path in sorted((theirs / "phases").iterdir())]
    assert len(phases) == 3
    for phase in phases:
        for a, b in zip(log(ours / phase), log(theirs / phase), strict=True):
            for key in ("step", "tokens", "loss", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (phase, a["step"], key)
    base, one, two = (
        load_file(student / "model.safetensors")
        for student in (catalog.resolve_weights("student", "tiny-qwen"), theirs / "student", ours / "student")
    )
    assert one.keys() == two.keys()
    moved = sum(float((one[name] - base[name].float()).norm() ** 2) for name in one)
    apart = sum(float((one[name] - two[name]).norm() ** 2) for name in one)
    assert apart < 1e-4 * moved, "Adam scales rounding up where a gradient is nearly zero; a step is 0.1 of `moved`"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The phases in this process."""
    directory = start(tmp_path_factory.mktemp("one") / "run", "auto")
    with Run(directory, make_recipe("auto")) as run:
        STAGES["train"].perform(run)
    return directory


@pytest.mark.slow
def test_two_ranks_train_phases_as_one_process_does(one, tmp_path):
    directory = start(tmp_path / "run", "ddp")
    done = torchrun(directory)
    assert done.returncode == 0, done.stderr[-2000:]
    record = StageRecord.read(directory / "stages" / "train.json", "")
    summary = TrainSummary.model_validate(record.summary)
    assert {name: (phase.steps, phase.processes) for name, phase in summary.phases.items()} == {
        name: (steps, 2) for name, steps in STEPS.items()
    }
    assert done.stdout.count("phase 2 of 3, own") == 1, "only the first rank speaks"
    assert_alike(directory, one)
    again = torchrun(directory)
    assert again.returncode == 0 and "nothing to do: train" in again.stdout, again.stderr[-2000:]


@pytest.mark.slow
def test_killed_in_every_phase_sharded_ranks_go_on(one, tmp_path):
    """Sharded weights, and each phase loses a rank in its second step or, the last one, in its first."""
    directory = start(tmp_path / "run", "fsdp")
    for rank, step in ((1, 2), (0, 3), (1, 2)):  # the first start redoes nothing; the others redo one step at most
        killed = torchrun(directory, rank, step)
        assert killed.returncode == 1 and "SIGKILL" in killed.stderr, killed.stderr[-2000:]
    done = torchrun(directory)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "phase 1 of 3, cold-start: finished before" in done.stdout
    assert_alike(directory, one)


@pytest.mark.slow
def test_a_refused_phase_releases_the_other_ranks(tmp_path):
    directory = start(tmp_path / "run", "ddp")
    path = directory.with_suffix(".yaml")
    path.write_text(path.read_text().replace("max_length: 128", "max_length: 24"))  # no row of the second phase fits
    done = torchrun(directory)
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("error: ") == 1 and "Traceback (most recent call last)" not in done.stdout
