"""`kill -9` in the middle of grading, at random moments, until one run comes through: nothing is judged twice.

The answers all need the parser, so that grading takes a while; the ledger is flushed after every trace, so that "finished"
can be told exactly. Moments are random in the ledger's length, not in time: a busy machine kills at the same places.
"""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_filters import add, make_recipe, make_trace

from distill.filters import filter_traces, pipeline
from distill.run import Run
from distill.traces.ledger import Ledger
from distill.traces.store import read_traces

TRACES = 120
SETTINGS = {"per_prompt": 2, "grade_timeout": 60.0}


def traces():
    for i in range(TRACES):
        right, question = i % 3 > 0, f"question {i // 4}"
        answer = rf"\frac{{{84 if right else 83}}}{{2}}"
        yield make_trace(f"<think>{i}</think> \\boxed{{{answer}}}", question=question, sample=i % 4)


def main(directory: Path) -> None:
    pipeline.FLUSH_SECONDS = 0.0
    with Run(directory, make_recipe(**SETTINGS)) as run:
        filter_traces(run)


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, str(directory)], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_in_the_middle_of_grading(tmp_path: Path, seed: int) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    ledger = run / "filtered" / "verdicts.jsonl"
    add(run, traces())
    (run / "run.json").write_text('{"format": 1, "recipe": "r", "created": ""}')
    random_state = random.Random(seed)
    done = 0
    for _ in range(3):
        stop_at = done + random_state.randint(1, TRACES // 5)
        with start(run) as process:
            while process.poll() is None and lines(ledger) < stop_at:
                pass
            process.kill()
        before, done = done, lines(ledger)
        assert before < done, "each run gets further"
    assert done < TRACES, "the kills came in the middle"
    assert start(run).wait() == 0

    rows = list(Ledger(ledger).rows())
    assert Counter(tuple(row["key"]) for row in rows) == Counter(trace.key for trace in traces())
    assert all([v["filter"] for v in row["verdicts"]] == ["format", "finish", "correct"] for row in rows)

    with Run(undisturbed, make_recipe(**SETTINGS)) as other:
        add(undisturbed, traces())
        filter_traces(other)
    for which in ("kept", "dropped"):
        assert list(read_traces(run / "filtered" / which)) == list(read_traces(undisturbed / "filtered" / which))


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
