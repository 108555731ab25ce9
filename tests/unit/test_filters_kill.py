"""`kill -9` in the middle of grading, at random moments, until one run comes through: nothing is judged twice.

All answers need the parser, so that grading takes a while; the ledger is flushed after every trace, so that "finished"
can be told exactly. Moments are random in the ledger's length, not in time: a busy machine kills at the same places.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filter_support import add, make_recipe, make_trace

from distill.filters.pipeline import STAGE
from distill.run import Run
from distill.traces import ledger as ledger_module
from distill.traces.ledger import Ledger
from distill.traces.store import read_traces
from distill.traces.trace import Trace

TRACES = 90
SETTINGS: dict[str, Any] = {"select": {"per_prompt": 2}, "correct": {"timeout": 60.0, "workers": 1}}


def traces() -> Iterator[Trace]:
    for i in range(TRACES):
        right, question = i % 3 > 0, f"question {i // 4}"
        answer = rf"\frac{{{84 if right else 83}}}{{2}}"
        yield make_trace(f"<think>{i}</think> \\boxed{{{answer}}}", question=question, sample=i % 4)


def main(directory: Path) -> None:
    ledger_module.FLUSH_SECONDS = 0.0
    with Run(directory, make_recipe(**SETTINGS)) as run:
        STAGE.perform(run)


def start(directory: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # where filter_support is
    return subprocess.Popen([sys.executable, __file__, str(directory)], stdout=subprocess.DEVNULL, env=environment)


def test_kill_in_the_middle_of_grading(tmp_path: Path) -> None:
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for directory in (killed, undisturbed):
        with Run(directory, make_recipe(**SETTINGS)) as run:
            run.begin(STAGE, STAGE.settings(run), {})
            add(directory, traces())
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

    main(undisturbed)
    for which in ("kept", "dropped"):
        one, other = (list(read_traces(directory / "filtered" / which)) for directory in (killed, undisturbed))
        assert one == other and one


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
