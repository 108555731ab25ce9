"""Published traces as the first stage of a recipe."""

import json

import pytest

from distill.errors import UserError
from distill.generate import STAGE
from distill.recipe import Recipe
from distill.run import Run
from distill.traces.store import TraceStore


def recipe_of(path, **traces):
    return Recipe.model_validate(
        {
            "name": "published",
            "teacher": "deepseek-r1",
            "student": "tiny-qwen",
            "traces": [{"kind": "file", "path": str(path)} | traces],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "published.jsonl"
    rows = [
        {"prompt": f"{i}+1?", "completion": f"<think>\nx\n</think>\n\n{i + 1}", "answer": i + 1} for i in range(600)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_first_stage_takes_published_traces_and_is_finished(file, tmp_path):
    with Run(tmp_path / "run", recipe_of(file)) as run:
        summary = STAGE.perform(run)
        assert (summary.traces, summary.prompts, summary.made) == (600, 600, 600)
        assert STAGE.is_finished(run) and STAGE.perform(run) == summary
    assert len(TraceStore(tmp_path / "run" / "traces")) == 600


def test_a_larger_limit_takes_the_rest_and_other_columns_are_refused(file, tmp_path):
    with Run(tmp_path / "run", recipe_of(file, limit=100)) as run:
        assert STAGE.perform(run).made == 100
    with Run(tmp_path / "run", recipe_of(file)) as run:
        assert STAGE.perform(run).made == 500
    with (
        Run(tmp_path / "run", recipe_of(file, answer="gold")) as run,
        pytest.raises(UserError, match=r"traces\.0\.answer"),
    ):
        STAGE.perform(run)


def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path):
    with (
        Run(tmp_path / "run", recipe_of(tmp_path / "nowhere.jsonl")) as run,
        pytest.raises(UserError, match="no such file"),
    ):
        STAGE.perform(run)
    assert not (tmp_path / "run" / "traces").exists()


def test_prompts_and_traces_are_one_or_the_other(file):
    fields = recipe_of(file).model_dump()
    with pytest.raises(ValueError, match="one of `prompts` .* and `traces`"):
        Recipe.model_validate(fields | {"prompts": [{"kind": "procedural", "name": "arithmetic"}]})
    with pytest.raises(ValueError, match="one of `prompts` .* and `traces`"):
        Recipe.model_validate(fields | {"traces": []})
