"""A recipe of the tiny pair that runs in seconds: every stage is real, only the counts are small."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.recipe import Recipe

SMALL: dict[str, Any] = {
    "name": "small",
    "teacher": "tiny-r1",
    "student": "tiny-qwen",
    "prompts": [{"kind": "procedural", "name": "arithmetic", "split": "train", "limit": 40}],
    "generate": {"samples": 2, "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 160}, "max_batch": 16},
    "train": {
        "learning_rate": 1e-3,
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "max_length": 512,
        "dtype": "float32",
        "save_steps": 4,
        "logging_steps": 4,
    },
    "eval": {"benchmarks": ["tiny-arithmetic"], "limit": 12, "max_batch": 16},
}


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    return Recipe.model_validate_json(json.dumps(SMALL))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """`recipe_file(seed=1, …)` writes the small recipe with those top-level keys replaced, and returns its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **changes}), encoding="utf-8")
        return path

    return write
