"""Prompt files to write, to read and to be refused, for the tests of prompts."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.prompts import Prompt, load_prompts
from distill.recipe.sources import FilePrompts


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **fields: Any) -> list[Prompt]:
    return list(load_prompts([FilePrompts(kind="file", path=str(path), **fields)]))


def refused(sources: Any, *expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        list(load_prompts(sources))
    message = str(refusal.value)
    assert "\n" not in message
    for text in expected:
        assert text in message


def file_refused(path: Path, *expected: str, **fields: Any) -> None:
    refused([FilePrompts(kind="file", path=str(path), **fields)], str(path), *expected)
