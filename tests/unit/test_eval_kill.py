"""`kill -9` while samples come in, are graded and vote: the same scores in the end, and nothing is done twice.

The kills are at random lengths of the three ledgers, not at random times: a busy machine kills at the same places. A
server in this process gives the answers, and counts how often it was asked.
"""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the processes that run this file
import pytest
from eval_support import server, url

from distill.errors import UserError
from distill.eval import evaluate_model
from distill.evaluations import read_grades, read_results, read_votes
from distill.recipe import Eval, LocalEngine
from distill.traces import ledger
from distill.traces.ledger import Ledger

PROBLEMS, SAMPLES, CONCURRENCY = 10, 4, 2


def reply(question, seed):
    """Different at every seed, equal in two spellings, and never settled without the parser."""
    n = int(question.split()[2])
    return f"\\boxed{{\\frac{{{4 * n + 2 * (seed % 3)}}}{{{2 if seed % 2 else '2.0'}}}}}", "stop"


def main(address: str, card: str, directory: Path) -> None:
    ledger.FLUSH_SECONDS = 0.0
    evaluate_model(address, None, Eval(benchmarks=(card,), max_batch=CONCURRENCY), LocalEngine(), directory)


def progress(directory: Path) -> int:
    """Lines of all ledgers; the samples' goes into Parquet when all are there."""
    place = directory / "sums" / "scripted"
    ledgers = [place / name for name in ("traces/ledger.jsonl", "grades.jsonl", "votes.jsonl")]
    found = sum(path.read_bytes().count(b"\n") for path in ledgers if path.exists())
    return found + (PROBLEMS * SAMPLES if any(place.glob("traces/part-*.parquet")) and not ledgers[0].exists() else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path, kills):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(PROBLEMS)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = tmp_path / "sums.yaml"
    card.write_text(
        f"name: sums\nprompts: {{kind: file, path: {tmp_path}/sums.jsonl}}\nproblems: {PROBLEMS}\nsamples: {SAMPLES}\n"
    )
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    total = 2 * PROBLEMS * SAMPLES + PROBLEMS
    moments = sorted(random.Random(1).sample(range(1, total - 2), kills))
    with server(reply) as made:
        command = [sys.executable, __file__, url(made), str(card)]
        killings = 0
        for moment in moments:
            with subprocess.Popen(
                [*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as process:
                while process.poll() is None and progress(killed) < moment:
                    time.sleep(0.001)
                killings += process.poll() is None
                process.kill()
        assert killings >= kills - 2, "a run came through before its kill"
        subprocess.run([*command, str(killed)], check=True, capture_output=True)
        asked = len(made.asked)
        assert asked <= PROBLEMS * SAMPLES + killings * CONCURRENCY, "only what was under way is asked again"
        main(url(made), str(card), undisturbed)
        assert len(made.asked) == asked + PROBLEMS * SAMPLES

    first, second = (directory / "sums" / "scripted" for directory in (killed, undisturbed))
    for directory in (first, second):
        rows = list(Ledger(directory / "votes.jsonl").rows())
        assert set(Counter(row["prompt"] for row in rows).values()) == {1}, "nothing is done twice"
        assert len(read_votes(directory / "votes.jsonl")) == len(rows) == PROBLEMS
        assert len(read_grades(directory / "grades.jsonl")) == PROBLEMS * SAMPLES
    scores = read_results(first).scores
    assert scores == read_results(second).scores
    assert 0 < scores.pass_at_1.value < 1 and scores.consensus_at_k[4].value > 0


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except UserError as error:
        sys.exit(f"error: {error}")
