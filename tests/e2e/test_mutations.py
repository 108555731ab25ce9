"""A finished run whose files are damaged: exit 2 with one line, redone, or no effect. Never a silent difference, a
traceback, a signal or a hang."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TINIEST = {
    "prompts": [{"kind": "procedural", "name": "arithmetic", "split": "train", "limit": 10}],
    "train": {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_length": 512,
        "dtype": "float32",
        "save_steps": 2,
        "logging_steps": 1,
    },
    "eval": {"benchmarks": ["tiny-arithmetic"], "limit": 3, "samples": 2, "max_batch": 16},
}


def mutated(recipe: Path, root: Path, first: int, last: int) -> list[dict[str, object]]:
    """The outcomes that are not allowed, of mutations `first` … `last` - 1."""
    from distill.catalog import load_recipe
    from distill.pipeline import run_recipe

    finished, scratch = root / "finished", root / "scratch"
    scratch.mkdir(parents=True)
    run_recipe(load_recipe(str(recipe)), finished)
    arguments = [str(path) for path in (recipe, finished, scratch)] + [str(first), str(last)]
    done = subprocess.run([sys.executable, str(TESTS / "mutations.py"), *arguments], capture_output=True, text=True)
    *failures, last_line = done.stdout.splitlines() or [done.stderr]
    assert last_line.startswith('{"failures"'), done.stdout + done.stderr
    return [json.loads(line) for line in failures]


def assert_allowed(failures: list[dict[str, object]]) -> None:
    assert not failures, "\n\n".join(json.dumps(failure, indent=1) for failure in failures)


@pytest.mark.slow
def test_mutations_of_a_finished_run(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    assert_allowed(mutated(recipe_file(**TINIEST), tmp_path, 0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 250))
def test_a_thousand_mutations_of_a_finished_run(first: int, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    assert_allowed(mutated(recipe_file(**TINIEST), tmp_path, first, first + 250))
