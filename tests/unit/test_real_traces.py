"""The 790 real `<think>` traces of a 3B model through the whole filter, with another grader's scores to compare with.

The responses stop at `\\boxed{…}`, so `<answer>` is usually not closed; a few are cut off inside their reasoning. The
multiple-choice ones (aqua) carry a letter as gold answer, which is compared like any other short answer.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.chat import split_reasoning
from distill.filters.pipeline import STAGE
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.run import Run
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace


def as_trace(row: dict[str, Any]) -> Trace:
    prompt = Prompt.from_question(row["question"], row["gt"], source=row["dataset"])
    reasoning, response = split_reasoning(row["response"])
    return Trace(prompt, 0, 0, row["response"], reasoning, response, "stop", "qwen2.5-3b-rlft")


def test_790_real_traces(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    lines = [
        line
        for name in ("gsm8k", "mixed")
        for line in real_data(f"think_traces_rg3b_dev/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [json.loads(line) for line in lines]
    score = {as_trace(row).key: row["score"] for row in rows}
    assert len(score) == 790
    recipe = Recipe.model_validate(
        {
            "name": "real",
            "teacher": "qwen2.5-3b-rlft",
            "student": "none",
            "prompts": [{"kind": "file", "path": "think_traces_rg3b_dev"}],
            "filter": {"correct": {"timeout": 60.0}},  # none is endless: a busy machine must not change a verdict
            "eval": {"benchmarks": ["none"]},
        }
    )
    with Run(tmp_path / "run", recipe) as run:
        (run.directory / "traces").mkdir()
        with TraceStore(run.directory / "traces") as store:
            store.append(map(as_trace, rows))
        summary = STAGE.perform(run)

    kept = list(read_traces(tmp_path / "run/filtered/kept"))
    dropped = list(read_traces(tmp_path / "run/filtered/dropped"))
    assert {trace.key for trace, _ in kept} | {trace.key for trace, _ in dropped} == score.keys()
    verdicts = {trace.key: {v.filter: v for v in found} for trace, found in kept + dropped}

    # Every verdict on correctness agrees with the stored score; had one not, it would be listed here with its reason.
    assert [key for key, found in verdicts.items() if found["correct"].keep != score[key]] == []

    reasons = {"not_closed": 7, "several_blocks": 2, "no_think": 1, "no_response": 1}
    assert [step.model_dump() for step in summary.funnel] == [
        {"filter": "format", "entered": 790, "dropped": 11, "kept": 779, "reasons": reasons},
        {"filter": "finish", "entered": 779, "dropped": 0, "kept": 779, "reasons": {}},
        {
            "filter": "correct",
            "entered": 779,
            "dropped": 141,
            "kept": 638,
            "reasons": {"wrong": 140, "unverifiable: words, not mathematics": 1},
        },
        {"filter": "dedup", "entered": 638, "dropped": 0, "kept": 638, "reasons": {}},
    ]
    # Over all traces: two correct ones have a broken format, and eight have nothing behind their reasoning.
    assert summary.verdicts["correct"] == {
        "correct": 640,
        "wrong": 141,
        "unverifiable: no answer found": 8,
        "unverifiable: words, not mathematics": 1,
    }
    assert len(kept) == summary.kept == 638
    assert all(trace.reasoning and trace.response for trace, _ in kept)
    assert summary.unit == "words"  # these traces came without token ids
