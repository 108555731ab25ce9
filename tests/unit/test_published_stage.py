"""Published traces as the first stage of a recipe."""

import json
import shutil

import pytest

from distill.errors import UserError
from distill.generate import STAGE
from distill.recipe import Recipe
from distill.run import Run
from distill.traces import imports
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
        assert STAGE.perform(run).made == 600
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


def write(path, *rows):
    path.write_text("".join(json.dumps({"prompt": "P?", "completion": text, "answer": "1"}) + "\n" for text in rows))
    return path


def test_a_source_that_changed_is_refused_and_a_run_without_its_hash_goes_on(tmp_path):
    path = write(tmp_path / "a.jsonl", "1")
    with Run(tmp_path / "run", recipe_of(path)) as run:
        STAGE.perform(run)
        write(path, "2", "3")
        with pytest.raises(UserError, match=r"traces\.0\.content.*--fresh generate"):
            STAGE.perform(run)
        path.unlink()
        assert STAGE.is_finished(run), "what was copied is there"
        write(path, "2", "3")
        record = run.record("generate")
        settings = {key: value for key, value in record.settings.items() if key != "traces.0.content"}
        record.model_copy(update={"settings": settings}).write(run.paths.record("generate"))
        assert STAGE.is_finished(run)


def test_another_run_that_was_filtered_again_is_refused(tmp_path):
    source = tmp_path / "source"
    imports.import_traces(imports.sources_of([str(write(tmp_path / "a.jsonl", "1"))], {}), source)
    with Run(tmp_path / "run", recipe_of(source, kind="run")) as run:
        STAGE.perform(run)
        shutil.rmtree(source)
        imports.import_traces(imports.sources_of([str(write(tmp_path / "a.jsonl", "2"))], {}), source)
        with pytest.raises(UserError, match=r"traces\.0\.content"):
            STAGE.perform(run)


def test_a_bad_row_in_the_middle_may_be_corrected(tmp_path):
    path = write(tmp_path / "a.jsonl", "1", "2")
    path.write_text(path.read_text() + '{"other": 1}\n')
    with Run(tmp_path / "run", recipe_of(path)) as run:
        with pytest.raises(UserError, match="line 3"):
            STAGE.perform(run)
        write(path, "1", "2")
        assert STAGE.perform(run).traces == 2


def test_limits_of_two_sources_that_share_a_prompt(tmp_path):
    first, second = write(tmp_path / "a.jsonl", "1", "2"), write(tmp_path / "b.jsonl", "3")
    for limit, expected in ((1, ["1", "3"]), (2, ["1", "2", "3"]), (1, ["1", "3"])):
        fields = recipe_of(first, limit=limit).model_dump()
        other = {"kind": "file", "path": str(second)}
        recipe = Recipe.model_validate(fields | {"traces": [*fields["traces"], other]})
        with Run(tmp_path / "run", recipe) as run:
            assert STAGE.perform(run).traces == len(expected)
        stored = list(TraceStore(tmp_path / "run" / "traces"))
        assert [trace.text for trace in stored] == expected and [t.sample for t in stored] == list(range(len(stored)))
