"""Gold answers of published traces: tests of programs, instructions, and answers inside solutions."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from distill.grading import Grader
from distill.recipe.sources import FileTraces, TraceSource
from distill.traces.published import read_published

PROGRAM = "<think>\nI add.\n</think>\n\n```python\ndef add1(x):\n    return x + 1\n```"
READING = "<think>\nI add.\n</think>\n\n```python\nprint(int(input()) + 1)\n```"


def golds(tmp_path: Path, rows: list[dict[str, Any]], notes: list[str], **fields: Any) -> list[str | None]:
    """The gold answers, which are the same of a .jsonl and a .parquet file."""
    text, table = tmp_path / "traces.jsonl", tmp_path / "traces.parquet"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table)
    found = []
    for path in (text, table):
        notes.clear()
        source: TraceSource = TypeAdapter(TraceSource).validate_python({"kind": "file", "path": str(path)} | fields)
        found.append([trace.prompt.answer for trace in read_published(source, notes.append)])
    assert found[0] == found[1]
    return found[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("columns", "fields", "answer"),
    [
        ({"test_list": ["assert add1(1) == 2"], "test_setup_code": "import math"}, {}, PROGRAM),
        ({"verification_info": json.dumps({"test_cases": [{"input": "1", "output": "2"}]})}, {}, READING),
        ({"input_output": json.dumps({"inputs": ["1"], "outputs": ["2"]})}, {}, READING),
        ({"answer": ["add1(1) == 2"]}, {}, PROGRAM),
        ({"test": "def check(f):\n    assert f(1) == 2", "entry_point": "add1"}, {}, PROGRAM),
        ({"unit": ["assert add1(1) == 2"]}, {"answer": "unit"}, PROGRAM),
        ({"answer": "The successor.", "tests": ["assert add1(1) == 2"]}, {}, PROGRAM),
    ],
)
def test_published_programs_are_graded(
    columns: dict[str, Any], fields: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    row = {"problem": "Add one: add1.", "response": answer, **columns}
    notes: list[str] = []
    (gold,) = golds(tmp_path, [row], notes, task="code", **fields)
    assert gold is not None and notes == []
    path = tmp_path / "traces.jsonl"
    source = FileTraces.model_validate({"kind": "file", "path": str(path), "task": "code", **fields})
    with Grader(workers=1) as grader:
        grades = dict(
            grader.grade((n, trace.prompt, trace.text) for n, trace in enumerate(read_published(source, notes.append)))
        )
    assert [grade.verdict for grade in grades.values()] == ["correct"]


def test_tests_that_cannot_be_read_are_counted_with_the_first(tmp_path: Path) -> None:
    rows = [
        {"problem": f"Add {n}.", "response": PROGRAM, "answer": answer}
        for n, answer in enumerate(["assert add1(1) == 2", "print(add1(1))", "Add one to it."])
    ]
    notes: list[str] = []
    assert [gold is None for gold in golds(tmp_path, rows, notes, task="code")] == [False, True, True]
    assert len(notes) == 1
    assert "2 of 3 answers have no gold answer (first: " in notes[0]
    assert notes[0].endswith("column answer is not tests: 'print(add1(1))' asserts nothing)")


def test_instructions(tmp_path: Path) -> None:
    ids = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
    stored = '[{"id": "punctuation:no_comma"}]'
    for columns in (ids, {"answer": stored}):
        row = {"problem": "Write.", "response": "Fine.", **columns}
        assert golds(tmp_path, [row], [], task="instructions") == [stored]


def test_answers_inside_solutions(tmp_path: Path) -> None:
    row = {"problem": "3 + 4?", "response": "7", "solution": "So \\boxed{7}\n#### 8"}
    assert golds(tmp_path, [row], [], answer="solution", extract="boxed") == ["7"]
    assert golds(tmp_path, [row], [], answer="solution", extract="hash") == ["8"]
    assert golds(tmp_path, [row], [], answer="solution") == [row["solution"]]
    for fields in ({"extract": "boxed"}, {"extract": "boxed", "answer": "solution", "task": "code"}):
        with pytest.raises(ValidationError, match="extract: boxed needs `answer`, and task math"):
            FileTraces.model_validate({"kind": "file", "path": "a.jsonl", **fields})
