"""SIGINT and SIGTERM at any moment of the start: one line and exit code 130, never a traceback.

The clock starts at our first line of Python. Before it the signal's own action or the interpreter's start-up decides.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import interrupts

START = """
import sys
from distill import command
print("first line", flush=True)
sys.argv = ["distill", *sys.argv[1:]]
command.main()
"""
WITHIN = 0.3  # seconds from the first line


def interrupted(arguments: list[str], number: signal.Signals, seconds: float) -> tuple[int, list[str]]:
    """Start the command, send the signal after some seconds; (exit code, lines of stderr)."""
    command = [sys.executable, "-c", START, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "first line\n"
        time.sleep(seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors.splitlines()


def storm(run: Path, times: int) -> None:
    rng = random.Random(0)
    for i in range(times):
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        seconds = rng.uniform(0, WITHIN)
        code, lines = interrupted(["run", "tiny", "--run-dir", str(run)], number, seconds)
        said = ["error: interrupted"], ["error: interrupted; rerun the same command to resume"]
        assert code == 130 and lines in said, f"{number.name} after {seconds:.3f} s: {code} {lines}"


def test_signals_at_the_start_end_with_one_line(tmp_path: Path) -> None:
    storm(tmp_path / "run", 8)


@pytest.mark.slow
def test_a_hundred_signals_at_the_start_end_with_one_line(tmp_path: Path) -> None:
    storm(tmp_path / "run", 100)


@pytest.mark.parametrize("what", ["replacing(Path('out.bin'))", "replacing_directories(Path('out'))"])
def test_what_is_being_written_vanishes(tmp_path: Path, what: str) -> None:
    program = f"""
import signal
from pathlib import Path
from distill import interrupts
from distill.durable import replacing, replacing_directories
interrupts.install()
with {what}:
    assert list(Path().iterdir())
    signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_signal_raises_only_where_something_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("os.write", lambda descriptor, data: len(data))
    with interrupts.held():
        with interrupts.held(), pytest.raises(KeyboardInterrupt):
            interrupts.handle(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            interrupts.handle(signal.SIGTERM, None)
    assert ended == []
    interrupts.handle(signal.SIGINT, None)
    assert ended == [130]
