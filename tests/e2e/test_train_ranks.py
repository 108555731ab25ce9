"""Several processes on a CPU: the losses of one, sharding that is real, and what happens when one of them dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import train_support as support
from safetensors.torch import load_file

from distill.children import free_port
from distill.errors import WorkError

REPO = Path(__file__).resolve().parents[2]
SETTINGS = {"max_steps": 8, "logging_steps": 1, "save_steps": 3}
ROWS = 22  # in batches of four: a step of two ranks, and one in which a rank has nothing left


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


def begin(directory, student, count=ROWS):
    return support.begin(directory, support.sums(count), student)


def log(directory):
    return [json.loads(line) for line in (directory / "checkpoints" / "log.jsonl").read_text().splitlines()]


def figures(directory):
    return [value for row in log(directory) for value in (row["loss"], row["grad_norm"])]


@pytest.fixture(scope="module")
def one(student, tmp_path_factory):
    """One process that takes the batches of two."""
    directory = begin(tmp_path_factory.mktemp("one") / "run", student)
    support.train_here(directory, student, SETTINGS | {"gradient_accumulation_steps": 2})
    return directory


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one_does(one, student, tmp_path, parallel):
    directory = begin(tmp_path / "run", student)
    summary = support.train_here(directory, student, SETTINGS | {"num_processes": 2, "parallel": parallel})
    assert summary.processes == 2
    assert figures(directory) == pytest.approx(figures(one), rel=1e-5)
    for name, ours in load_file(directory / "student" / "model.safetensors").items():
        theirs = load_file(one / "student" / "model.safetensors")[name]
        assert (ours - theirs).abs().max() < 1e-5, name
    assert not (directory / "checkpoints" / "step-000003").exists(), "two checkpoints are kept"


@pytest.mark.slow
def test_shards_resume_at_a_checkpoint_that_follows_an_evaluation(student, tmp_path):
    directory = begin(tmp_path / "run", student)
    settings = SETTINGS | {"num_processes": 2, "parallel": "fsdp", "dtype": "bfloat16"}
    settings |= {"val_size": 0.2, "eval_steps": 4, "save_steps": 4}
    support.train_here(directory, student, settings)
    whole, weights = figures(directory), (directory / "student" / "model.safetensors").read_bytes()
    shutil.rmtree(directory / "checkpoints" / "step-000008")
    (directory / "student" / "model.safetensors").unlink()
    support.train_here(directory, student, settings)
    assert "eval_loss" in log(directory)[-1] and figures(directory) == whole
    assert (directory / "student" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_two_ranks_keep_what_a_family_does_not_train(tmp_path):
    """By DDP: FSDP refuses families whose experts transformers converts on loading."""
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    student = support.make_other(tmp_path / "base", "ernie4_5_moe", **experts)
    directory = begin(tmp_path / "run", student)
    support.train_here(directory, student, {"max_steps": 2, "num_processes": 2, "parallel": "ddp"})
    ours, base = (load_file(path / "model.safetensors") for path in (directory / "student", student))
    biases = [name for name in base if name.endswith("e_score_correction_bias")]
    assert ours.keys() == base.keys() and biases
    assert all((ours[name] == base[name]).all() for name in biases)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_in_float8_as_one_does(student, tmp_path, parallel):
    """Scales are per token, so batches may be split. FSDP gathers in bfloat16, so weights are rounded twice."""
    settings = SETTINGS | {"dtype": "float8", "gradient_checkpointing": parallel == "fsdp"}
    one, two = (begin(tmp_path / name, student) for name in ("one", "two"))
    support.train_here(one, student, settings | {"gradient_accumulation_steps": 2})
    support.train_here(two, student, settings | {"num_processes": 2, "parallel": parallel})
    tolerance = 1e-5 if parallel == "ddp" else 1e-2
    assert figures(two) == pytest.approx(figures(one), rel=tolerance)
    ours, theirs = (load_file(directory / "student" / "model.safetensors") for directory in (two, one))
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_on_two_ranks_train_as_on_one(student, tmp_path, parallel):
    """Adapters of a sharded model are initialised shard by shard, and so begin elsewhere; what they begin with is the
    base all the same, and they learn."""
    settings = SETTINGS | {"adapter": {"kind": "lora"}, "learning_rate": 1e-2}
    alone, several = (begin(tmp_path / name, student) for name in ("alone", "several"))
    support.train_here(alone, student, settings | {"gradient_accumulation_steps": 2})
    support.train_here(several, student, settings | {"num_processes": 2, "parallel": parallel})
    if parallel == "ddp":
        assert figures(several) == pytest.approx(figures(alone), rel=1e-5)
    losses = [row["loss"] for row in log(several)]
    assert losses[0] == pytest.approx(log(alone)[0]["loss"], rel=1e-5) and losses[-1] < 0.97 * losses[0]
    assert (several / "checkpoints" / "adapter" / "adapter_config.json").exists()


SHARDED = """
    import sys, torch
    from pathlib import Path
    from torch.distributed.tensor import DTensor
    from distill.recipe import Recipe
    from distill.train.student import methods
    from distill.train.learn.fit import Task, build
    from distill.artefacts import RunPaths
    from distill.models import Models
    from distill.train.ranks.world import World

    sys.path.insert(0, "{tests}")
    import train_support as support

    recipe = support.make_recipe(Path("{student}"), {{"parallel": "fsdp"}})
    world = World()
    world.layout = "fsdp"
    built = build(Task(recipe, Models(recipe, Path(".")), RunPaths(Path("."))), world)
    parameters = dict(built.learner.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values()), "a parameter is whole on every rank"
    mine = sum(p.to_local().nbytes for p in parameters.values())
    whole = sum(p.nbytes for p in parameters.values())
    optimizer = methods.optimizer(built.learner, recipe.train)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [s for p in parameters.values() for s in optimizer.state[p].values() if s.ndim]
    assert all(isinstance(s, DTensor) for s in states)
    kept = sum(s.to_local().nbytes for s in states)
    print(f"share {{mine / whole:.3f}} {{kept / (2 * whole):.3f}}", flush=True)
    world.close()
"""


@pytest.mark.slow
def test_sharded_means_that_a_rank_holds_half(student, tmp_path):
    """Of parameters and of the optimiser's state, as DTensors: on a CPU a library may quietly copy instead."""
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED.format(tests=REPO / "tests", student=student)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    done = subprocess.run(
        [*command, str(free_port()), str(script)], capture_output=True, text=True, cwd=REPO, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shares = [float(share) for share in re.findall(r"share ([\d.]+) ", done.stdout)]
    states = [float(share) for share in re.findall(r"share [\d.]+ ([\d.]+)", done.stdout)]
    assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=0.01)
    assert all(0.45 < share < 0.55 for share in (*shares, *states))


@pytest.mark.slow  # six processes that import torch
def test_torchrun_may_start_the_processes(one, student, tmp_path):
    directory = begin(tmp_path / "run", student)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(support.make_recipe(student, SETTINGS).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    arguments = [str(free_port()), str(REPO / "cli.py"), "train", str(recipe), "--run-dir", str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=REPO, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert figures(directory) == pytest.approx(figures(one), rel=1e-5)
    assert done.stdout.count("integrity gate") == 1, "only the first rank speaks"
    again = subprocess.run(
        [*command, str(free_port()), *arguments[1:]], capture_output=True, text=True, cwd=REPO, timeout=180
    )
    assert again.returncode == 0 and "nothing to do: train" in again.stdout


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_a_rerun_goes_on(one, student, tmp_path):
    directory = begin(tmp_path / "run", student)
    settings = SETTINGS | {"num_processes": 2}
    killer = threading.Thread(target=kill_a_rank, args=(directory, 4))
    killer.start()
    with pytest.raises(WorkError, match=r"training process \d of 2 ended with exit code -?\d+: rerun the same command"):
        support.train_here(directory, student, settings | {"max_steps": 4000, "lr_scheduler_type": "constant"})
    killer.join()
    assert not worker_pids(directory), "a rank was left behind"


def worker_pids(directory):
    command = ["pgrep", "-f", f"distill.train.ranks.worker {directory} "]
    return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def kill_a_rank(directory, step):
    path = directory / "checkpoints" / "log.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        time.sleep(0.02)
    os.kill(worker_pids(directory)[-1], signal.SIGKILL)


@pytest.mark.slow
def test_an_interrupt_saves_on_all_ranks_and_a_rerun_goes_on(one, student, tmp_path):
    directory = begin(tmp_path / "run", student)
    recipe = tmp_path / "recipe.yaml"
    settings = SETTINGS | {"num_processes": 2, "parallel": "fsdp"}
    recipe.write_text(support.make_recipe(student, settings | {"max_steps": 4000}).to_yaml())
    command = [sys.executable, str(REPO / "cli.py"), "train", str(recipe), "--run-dir", str(directory)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = directory / "checkpoints" / "log.jsonl"
    while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; rerun the same command to resume" in said
    newest = max((directory / "checkpoints").glob("step-*"))
    step = int(newest.name.removeprefix("step-"))
    assert log(directory)[-1]["step"] == step and step % 3 >= 0
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(path.read_text().splitlines()) < step + 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and f"resuming at step {step} of 4000" in out
    assert [row["step"] for row in log(directory)] == list(range(1, len(log(directory)) + 1))
    first = [row["loss"] for row in log(directory)][:3]
    assert len(first) == 3 and all(loss > 4 for loss in first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_is_still_importing_torch_is_interrupted_like_any_other(number, tmp_path):
    command = [sys.executable, "-m", "distill.train.ranks.worker", str(tmp_path), str(tmp_path / "outcome.json")]
    with (
        open(tmp_path / "said", "w") as said,
        subprocess.Popen(
            command, cwd=REPO, stdin=subprocess.PIPE, stderr=said
        ) as process,  # the end of its input ends it
    ):
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():
            time.sleep(0.002)
        process.send_signal(number)
        process.wait(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "outcome.json").exists()
    assert (tmp_path / "said").read_text() == ""
