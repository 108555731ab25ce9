"""Recipes, overrides and prompt files with seeded mutations: read, or refused in one line; never another exception.

A mutation that is read is no fault: a digit of a learning rate is another learning rate.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import mutations
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.catalog import entries, load_recipe
from distill.errors import UserError
from distill.prompts import load_prompts
from distill.recipe.sources import FilePrompts

ROWS = [
    {"question": f"What is {i} + {i}? \\frac{{1}}{{2}} é", "answer": str(2 * i), "note": {"a": [i], "b": None}}
    for i in range(20)
]


def one_line(read: Callable[[], object], what: str) -> None:
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error), what
        assert len(str(error)) < 2000, what


def mutated(seed: int, data: bytes) -> tuple[str, bytes]:
    rng = random.Random(seed)
    kind = rng.choice([mutation for mutation in mutations.MUTATIONS if mutation is not mutations.delete])
    changed = kind(rng, data)
    assert changed is not None
    return kind.__name__, changed


def recipes(directory: Path, seeds: range) -> None:
    texts = [path.read_bytes() for path in entries("recipe").values()]
    path = directory / "recipe.yaml"
    for seed in seeds:
        kind, changed = mutated(seed, texts[seed % len(texts)])
        path.write_bytes(changed)
        one_line(lambda: load_recipe(str(path)), f"seed {seed}, {kind}")


def prompt_files(directory: Path, seeds: range) -> None:
    jsonl = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    pq.write_table(pa.Table.from_pylist(ROWS), directory / "whole.parquet")
    table = "question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in ROWS)
    wholes = {
        ".parquet": (directory / "whole.parquet").read_bytes(),
        ".jsonl": jsonl,
        ".json": json.dumps(ROWS).encode(),
        ".csv": table.encode(),
        ".jsonl.gz": gzip.compress(jsonl, mtime=0),
        ".json.zst": bytes(pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True)),
        ".csv.zst": bytes(pa.compress(table.encode(), "zstd", asbytes=True)),
    }
    for seed in seeds:
        suffix, data = list(wholes.items())[seed % len(wholes)]
        kind, changed = mutated(seed, data)
        path = directory / f"prompts{suffix}"
        path.write_bytes(changed)
        source = FilePrompts(kind="file", path=str(path))
        one_line(lambda source=source: list(load_prompts([source])), f"seed {seed}, {kind} of {suffix}")  # type: ignore[misc]


VALUES = ["", "null", "[", "{", "1e400", "-1", ".nan", "!!timestamp foo", "2024-13-45", "9" * 5000, "*a", "&a [*a]"]
KEYS = ["train", "train.learning_rate", "prompts.0", "prompts.9.limit", "eval.benchmarks", "seed", "", ".", "a..b"]


def overrides(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        signs = ("=", "", "==")
        values = (*VALUES, "\t", "\0")
        texts = [rng.choice(KEYS) + rng.choice(signs) + rng.choice(values) for _ in range(rng.randint(1, 3))]
        one_line(lambda texts=texts: load_recipe("tiny", texts), f"seed {seed}: {texts}")  # type: ignore[misc]


def test_mutated_recipes_overrides_and_prompt_files(tmp_path: Path) -> None:
    recipes(tmp_path, range(60))
    overrides(range(100))
    prompt_files(tmp_path, range(60))


@pytest.mark.slow
def test_thousands_of_mutated_recipes_overrides_and_prompt_files(tmp_path: Path) -> None:
    recipes(tmp_path, range(1000, 2000))
    overrides(range(1000, 2000))
    prompt_files(tmp_path, range(1000, 3000))
