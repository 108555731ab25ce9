"""kill -9 during training, again and again: the losses and the student are those of a run that nobody touched."""

import json
import multiprocessing
import random
import time

import pytest
import train_support as support

STEPS = 60
SETTINGS = {"max_steps": STEPS, "logging_steps": 3, "save_steps": 4, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def spawn():
    """Start a training in a process of its own; torch is imported once, in the server that forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.train.learn.fit", "train_support"])

    def start(directory, student):
        process = context.Process(target=support.train_here, args=(directory, student, SETTINGS))
        process.start()
        return process

    return start


def log(directory):
    """The whole lines of the log, without what depends on the clock."""
    path = directory / "checkpoints" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_second", "crc32")} for row in rows]


def last_step(directory):
    rows = log(directory)
    return rows[-1]["step"] if rows else 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(tmp_path, spawn, kills):
    student = support.make_student(tmp_path / "student")
    names = ("undisturbed", "killed")
    undisturbed, killed = (support.begin(tmp_path / name, support.sums(40), student) for name in names)
    process = spawn(undisturbed, student)
    process.join()
    assert process.exitcode == 0

    draw = random.Random(0)
    for target in sorted(draw.sample(range(3, STEPS - 6), kills)):
        process = spawn(killed, student)
        while last_step(killed) < target and process.is_alive():
            time.sleep(0.003)
        time.sleep(draw.uniform(0, 0.05))  # anywhere in a step, a log line or a checkpoint
        process.kill()
        process.join()
        assert len(list((killed / "checkpoints").glob("step-*"))) <= 3  # save_total_limit, and one about to go
    assert list((killed / "checkpoints").glob("step-*")), "nothing was there to resume from"
    process = spawn(killed, student)
    process.join()
    assert process.exitcode == 0

    assert [row["step"] for row in log(killed)] == list(range(3, STEPS + 1, 3))
    assert log(killed) == log(undisturbed)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json", "chat_template.jinja"):
        assert (killed / "student" / name).read_bytes() == (undisturbed / "student" / name).read_bytes(), name
