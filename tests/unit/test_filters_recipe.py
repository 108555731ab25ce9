"""`filter:` in a recipe: its spellings, its old keys."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from distill.catalog import load_recipe
from distill.errors import UserError
from distill.filters.correct import Correct
from distill.recipe.filter import Filter


def parsed(text: str) -> Filter:
    return Filter.model_validate_json(text, strict=True)


def test_a_filter_is_on_or_off_in_several_spellings() -> None:
    assert parsed("{}") == parsed('{"format": true, "dedup": {}, "length": null, "select": false}') == Filter()
    off = parsed('{"format": false, "finish": null}')
    assert off.format is None and off.finish is None
    assert parsed('{"correct": {"workers": 3}}').correct == Correct(workers=3)
    assert [name for name, value in Filter().settings().items() if value is False] == ["length", "select"]
    assert off.settings()["format"] is False and Filter().settings()["correct.timeout"] == 5.0
    assert "correct.workers" not in Filter().settings(), "how many processes decides nothing"
    assert parsed(json.dumps(off.model_dump(mode="json"))) == off
    assert off.model_dump(mode="json")["dedup"] is True
    for wrong in ('{"select": true}', '{"length": {}}', '{"format": 3}', '{"length": {"min": 3}}'):
        with pytest.raises(ValidationError):
            parsed(wrong)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min_tokens: 30", "filter.length: {min_tokens"),
        ("max_tokens: 30", "filter.length: {max_tokens"),
        ("per_prompt: 1", "filter.select: {per_prompt"),
        ("workers: 1", "filter.correct: {workers"),
        ("grade_timeout: 3.0", "filter.correct: {timeout"),
    ],
)
def test_an_old_key_names_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "mine.yaml"
    base = "name: r\nteacher: t\nstudent: s\nprompts: [{kind: procedural, name: arithmetic}]\neval: {benchmarks: [b]}\n"
    path.write_text(f"{base}filter: {{{old}}}\n")
    with pytest.raises(UserError, match=f"unknown key; write {re.escape(new)}"):
        load_recipe(str(path))
