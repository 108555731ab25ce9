"""`kill -9` of the stage and of its workers: nothing is judged twice, and the output has the same bytes in the end.

All answers need the parser, so that grading takes a while; the ledger is flushed after every trace, so that the number
of finished traces is known exactly. Moments are random in the ledger's length, not in time: a busy machine kills at the
same places. After grading the stage kills itself, in the middle of each step that follows.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from filter_support import add, make_recipe, make_trace

from distill import durable
from distill.artefacts import FilterSummary
from distill.filters import pipeline
from distill.filters.dedup import Dedup
from distill.filters.judge import Judge
from distill.filters.pipeline import STAGE
from distill.filters.table import JudgedTable
from distill.run import Run
from distill.traces import ledger as ledger_module
from distill.traces.ledger import Ledger
from distill.traces.parts import PartWriter
from distill.traces.trace import Trace

TRACES = 90
SETTINGS: dict[str, Any] = {"select": {"per_prompt": 2}, "correct": {"timeout": 60.0, "workers": 1}}


def traces() -> Iterator[Trace]:
    for i in range(TRACES):
        right, question = i % 3 > 0, f"question {i // 4}"
        answer = rf"\frac{{{84 if right else 83}}}{{2}}"
        yield make_trace(f"<think>{i}</think> \\boxed{{{answer}}}", question=question, sample=i % 4)


STEPS = {  # name → where a function is found, and the number of the call that is the last
    "the first verdicts": (Judge, "judge", 1),
    "the ledger is put in order": (pipeline, "line_of", 40),
    "the index": (JudgedTable, "arrange", 1),
    "choosing": (Dedup, "judge_group", 7),
    "writing": (PartWriter, "write", 2),
    "the first directory has its name": (durable, "replace_directory", 2),
    "the funnel": (FilterSummary, "write", 1),
    "the record": (Run, "finish", 1),
}


def main(directory: Path, step: str | None = None) -> None:
    """Filter; step: kill this process in the middle of it."""
    ledger_module.FLUSH_SECONDS = 0.0
    if step is not None:
        place, name, last = STEPS[step]
        calls, function = count(1), getattr(place, name)

        def dying(*arguments: Any, **more: Any) -> Any:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        setattr(place, name, dying)
    with Run(directory, make_recipe(**SETTINGS)) as run:
        STAGE.perform(run)


def start(directory: Path, *step: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # where filter_support is
    command = [sys.executable, __file__, str(directory), *step]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def begun(directory: Path) -> Path:
    with Run(directory, make_recipe(**SETTINGS)) as run:
        run.begin(STAGE, STAGE.settings(run), {})
        add(directory, traces())
    return directory


def output(directory: Path) -> dict[str, bytes]:
    """Every file that the stage wrote, hidden ones too."""
    files = (path for path in (directory / "filtered").rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = begun(tmp_path_factory.mktemp("run") / "undisturbed")
    assert start(directory).wait() == 0
    whole = output(directory)
    assert {Path(name).name for name in whole} == {"verdicts.jsonl", "funnel.json", "part-00000.parquet"}
    return whole


@pytest.mark.slow
def test_kill_in_the_middle_of_grading(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    killed = begun(tmp_path / "killed")
    ledger = killed / "filtered" / "verdicts.jsonl"
    moments = random.Random(0)
    done = 0
    for _ in range(4):
        stop_at = done + moments.randint(1, TRACES // 6)
        with start(killed) as process:
            while process.poll() is None and lines(ledger) < stop_at:
                time.sleep(0.001)
            process.kill()
        before, done = done, lines(ledger)
        assert before < done, "each run gets further"
    assert done < TRACES, "the kills came in the middle"
    assert start(killed).wait() == 0

    rows = list(Ledger(ledger).rows())
    assert Counter(tuple(row["key"]) for row in rows) == Counter(trace.key for trace in traces())
    assert all([v["filter"] for v in row["verdicts"]] == ["format", "finish", "correct"] for row in rows)

    assert output(killed) == undisturbed


@pytest.mark.slow
def test_kill_in_every_later_step(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    killed = begun(tmp_path / "killed")
    for step in STEPS:
        assert start(killed, step).wait() == -signal.SIGKILL, step
    assert start(killed).wait() == 0
    assert output(killed) == undisturbed


def test_kill_of_grading_workers(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """A worker that is killed says nothing about its trace."""
    directory = begun(tmp_path / "killed")
    killed: set[int] = set()
    with start(directory) as process:
        ledger = directory / "filtered" / "verdicts.jsonl"
        while process.poll() is None and len(killed) < 3:
            new = {worker for worker in workers(process.pid) if lines(ledger) > 9 * len(killed)} - killed
            for worker in new:
                os.kill(worker, signal.SIGKILL)
            killed |= new
            time.sleep(0.001)
        assert process.wait() == 0
    assert len(killed) == 3
    assert output(directory) == undisturbed


def workers(pid: int) -> set[int]:
    """The grading processes of a process that have a question: a worker that is starting has used no such limit."""
    children = set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return {child for child in children if "unlimited" not in limit_of_time(child)}


def limit_of_time(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/limits").read_text()
    except OSError:
        return "unlimited"
    return next(line for line in text.splitlines() if line.startswith("Max cpu time")).split("seconds")[0].split()[3]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
