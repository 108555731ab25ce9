"""`kill -9` at random moments of every stage: the rerun finishes, and leaves what an undisturbed run leaves.

The tokens of the traces, the verdicts, the trained weights and the scores are all compared for equality: sampling draws
depend on (seed, prompt, sample, position) alone, and a resumed training repeats the undisturbed one. Only the stored
log-probabilities may differ in their last bits, because a resumed batch has other neighbours. The victims are forked
from one process that has imported everything, so that forty of them start in the time of one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.recipe import Recipe
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, read_traces

KILLS = 2  # in each stage
MANY = 50
STAGES = ("generate", "filter", "train", "eval", "report")


def victim(recipe: Recipe, directory: Path, stage: str) -> int:
    """Fork a process that runs one stage; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        from distill.pipeline import run_recipe

        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        run_recipe(recipe, directory, stages=[stage])
        status = 0
    finally:
        os._exit(status)


def ledgers(directory: Path) -> list[list[dict[str, Any]]]:
    """The rows of every ledger of samples, as often as they stand there."""
    return [list(Ledger(path).rows()) for path in directory.rglob("ledger.jsonl")]


def run_with_kills(recipe: Recipe, directory: Path, stage: str, seconds: float, kills: int, rng: random.Random) -> int:
    """Run a stage to its end, killing it up to `kills` times on the way; returns how often it was."""
    killed = 0
    while True:
        pid = victim(recipe, directory, stage)
        if killed < kills:
            time.sleep(rng.uniform(0, max(0.05, seconds / kills)))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"{stage} failed after {killed} kills"
            return killed
        killed += 1
        for samples in ledgers(directory):
            keys = [(row["prompt"]["id"], row["sample"]) for row in samples]
            assert len(keys) == len(set(keys)), "a finished sample was drawn again"


def outcome(directory: Path) -> dict[str, Any]:
    def traces(path: Path) -> list[Any]:
        return sorted((replace(trace, logprobs=None) for trace in TraceStore(path)), key=lambda trace: trace.key)

    def judged(name: str) -> dict[Any, Any]:
        return {trace.key: verdicts for trace, verdicts in read_traces(directory / "filtered" / name)}

    scores = {}
    for path in sorted((directory / "eval").rglob("scores.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        scores[path.parent.name] = [row[key] for key in ("problems", "pass@1")]
    return {
        "traces": traces(directory / "traces"),
        "kept": judged("kept"),
        "dropped": judged("dropped"),
        "weights": (directory / "student" / "model.safetensors").read_bytes(),
        "losses": [json.loads(line)["loss"] for line in (directory / "checkpoints" / "log.jsonl").open()],
        "scores": scores,
        "answers": {path.parent.name: traces(path) for path in (directory / "eval").rglob("traces")},
    }


def rehearse(recipe_json: str, root: Path, kills: int) -> None:
    """What the test's own process does: it must not have run torch's threads before it forks."""
    from distill.pipeline import run_recipe

    recipe = Recipe.model_validate_json(recipe_json)
    rng = random.Random(0)
    whole, broken = root / "whole", root / "broken"
    for stage in STAGES:
        begun = time.monotonic()
        os.waitpid(victim(recipe, whole, stage), 0)
        killed = run_with_kills(recipe, broken, stage, time.monotonic() - begun, kills, rng)
        print(stage, "killed", killed, flush=True)
    run_recipe(recipe, broken)  # everything is finished now


if __name__ == "__main__":
    rehearse(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))


def killed_and_whole(recipe: Recipe, root: Path, kills: int) -> int:
    """Kill every stage `kills` times; both runs must end alike, report included, and leave nothing half-written.

    Returns how often a process was killed: a stage may finish before its last kill."""
    script = [sys.executable, __file__, recipe.model_dump_json(), str(root), str(kills)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to do" in done.stdout
    whole, broken = outcome(root / "whole"), outcome(root / "broken")
    for part in whole:
        assert whole[part] == broken[part], part
    assert len(whole["traces"]) == 80
    assert len(whole["losses"]) == 6
    assert all((root / name / "report.html").is_file() for name in ("whole", "broken"))
    left = {p.name for p in (root / "broken").rglob("*")} - {p.name for p in (root / "whole").rglob("*")}
    assert not left
    return sum(int(line.split()[-1]) for line in done.stdout.splitlines() if " killed " in line)


@pytest.mark.slow
def test_killed_and_undisturbed_runs_leave_the_same(small_recipe: Recipe, tmp_path: Path) -> None:
    assert killed_and_whole(small_recipe, tmp_path, KILLS) >= 0.8 * KILLS * len(STAGES)


@pytest.mark.slow
def test_two_hundred_kills_leave_the_same(small_recipe: Recipe, tmp_path: Path) -> None:
    assert killed_and_whole(small_recipe, tmp_path, MANY) >= 200
