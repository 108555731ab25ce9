"""Real reasoning traces of a 3B model, fifty steps: the loss falls, and it is said on how many tokens."""

import json
from pathlib import Path

import pytest
import train_support as support

from distill.artefacts import RunPaths
from distill.chat import split_reasoning
from distill.models import Models
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace
from distill.train.learn.fit import Task, fit
from distill.train.ranks.world import World

TINY = Path(__file__).resolve().parents[2] / "students" / "tiny-qwen"


def real_traces(paths):
    """The rows with a closed block and an answer, as the filter keeps them."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        reasoning, response = split_reasoning(row["response"])
        if reasoning and response:
            prompt = Prompt.from_question(row["question"], row["gt"])
            yield Trace(prompt, i, 0, row["response"], reasoning, response, "stop", "real")


@pytest.fixture
def student(tmp_path):
    """The embedded student; a random one of its kind where its weights have not been built."""
    if (TINY / "model.safetensors").exists():
        return TINY
    return support.make_student(tmp_path / "student", hidden=128, layers=4, context=4096)


@pytest.mark.slow
def test_fifty_steps_on_real_traces(real_data, student, tmp_path, capsys):
    traces = list(real_traces(real_data(f"think_traces_rg3b_dev/{name}.jsonl") for name in ("gsm8k", "mixed")))
    assert len(traces) > 700
    directory = support.prepare(tmp_path / "run", traces)
    recipe = support.make_recipe(
        student, {"max_steps": 50, "max_length": 1536, "per_device_train_batch_size": 1, "logging_steps": 5}
    )

    rows = support.rows_of(recipe, directory)
    summary = fit(Task(recipe, Models(recipe, directory), RunPaths(directory)), rows, World())

    lines = [json.loads(line) for line in (directory / "checkpoints" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(5, 51, 5))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    said = capsys.readouterr().out
    assert f"dropped {summary.dropped_rows:,} of {len(traces):,} traces" in said
    assert f"supervised tokens: {rows.counts.supervised:,} of {rows.counts.tokens:,}" in said
    assert summary.rows + summary.dropped_rows == len(traces) and summary.dropped_rows > 0
    assert summary.supervised_tokens == lines[-1]["supervised_tokens"] > 20_000
