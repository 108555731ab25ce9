"""Two engines side by side: the traces of one, whatever dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore

DISTILL = Path(sys.executable).with_name("distill")


def generate(recipe: Path, directory: Path, *more: str) -> subprocess.Popen[str]:
    command = [DISTILL, "generate", recipe, "--run-dir", directory, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def texts(directory: Path) -> dict[tuple[str, int], tuple[int, ...]]:
    return {trace.key: trace.completion_token_ids for trace in TraceStore(directory / "traces")}


def finished(process: subprocess.Popen[str]) -> bool:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return True


def rows(directory: Path) -> int:
    return sum(1 for path in directory.rglob("ledger.jsonl") for _ in Ledger(path).rows())


def engines_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if b"distill.engine.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_two_engines_and_a_death(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """An engine killed in the middle is named, exit code 1; the same command goes on, and the texts are those of
    one."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 160}
    many: dict[str, Any] = {"samples": 12, "sampling": sampling, "max_batch": 4}
    recipe, one, two = recipe_file(generate=many), tmp_path / "one", tmp_path / "two"
    assert finished(generate(recipe, one))

    pair = "engine.data_parallel_size=2"
    running = generate(recipe, two, "--set", pair)
    deadline = time.monotonic() + 120
    while rows(two) < 20:
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.02)
    engines = engines_of(running.pid)
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    said, _ = running.communicate()
    assert running.returncode == 1
    assert "the engine on cpu died (exit code -9)" in " ".join(said.split())
    assert "run the same command to continue" in " ".join(said.split())
    assert "Traceback" not in said

    assert 20 <= rows(two) < 480
    assert finished(generate(recipe, two, "--set", pair))
    assert texts(two) == texts(one) and len(texts(one)) == 480
