"""Rows with a column `distill`, which anyone can write: what it may decide, and what the source decides."""

import json

import pytest
from pydantic import TypeAdapter

from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.recipe.sources import TraceSource
from distill.traces.published import read_published


def read(tmp_path, rows, **fields):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TypeAdapter(TraceSource).validate_python({"kind": "file", "path": str(path)} | fields)
    return list(read_published(source, [].append))


def exported(question: str = "2+2?", answer: str = "4", **mark: object) -> dict[str, object]:
    row = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Four."}],
        "answer": answer,
    }
    given = {"id": "0" * 16, "task": "math", "source": "s", "finish_reason": "stop", "teacher": "t"}
    rest = {"reasoning": None, "response": None, "split": True, "seed": 0, "completion_tokens": None}
    return row | {"distill": given | rest | mark}


def test_the_id_of_an_exported_row_is_that_of_its_prompt(tmp_path):
    first, second = read(tmp_path, [exported(), exported("3+3?", "6")])
    assert first.prompt == Prompt.from_question("2+2?", "4", source="s")
    assert first.prompt.id != second.prompt.id and first.sample == second.sample == 0


@pytest.mark.parametrize(
    ("task", "source", "message"),
    [
        ("code", None, "task code, whose grader runs what the file contains; if you trust the file, set `task: code`"),
        ("code", "math", "task code, whose grader runs"),
        ("gym", "code", "task gym, whose grader runs"),
        ("choice", "math", "task choice, and the source says math; set `task: choice`"),
        ("nonsense", None, "unknown task 'nonsense' in column distill; expected one of math, code"),
        (["math"], None, "unknown task"),
    ],
)
def test_an_exported_row_does_not_choose_a_task_that_the_source_excludes(tmp_path, task, source, message):
    with pytest.raises(UserError, match=rf"^\S*traces.jsonl, line 2: {message}"):
        read(tmp_path, [exported(), exported(task=task)], task=source)


@pytest.mark.parametrize(("task", "source"), [("choice", None), ("judge", None), ("code", "code"), ("gym", "gym")])
def test_an_exported_row_keeps_its_task(tmp_path, task, source):
    rows = [exported(task=task), exported("3+3?")] if source else [exported(task=task)]
    assert [trace.prompt.task for trace in read(tmp_path, rows, task=source)] == [task, "math"][: len(rows)]


@pytest.mark.parametrize("change", [{"source": 5}, {"finish_reason": 5}])
def test_an_exported_row_of_other_types_is_refused(tmp_path, change):
    with pytest.raises(UserError, match="the column distill does not fit the others"):
        read(tmp_path, [exported(**change)])
    row = exported()
    row["messages"][0]["role"] = "tool"
    with pytest.raises(UserError, match="the column distill does not fit the others"):
        read(tmp_path, [row])
