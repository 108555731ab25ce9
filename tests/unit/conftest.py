"""A finished run of the tiny pair, every stage at counts that take seconds, for tests that read one; a sandbox."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distill.grading.sandbox.runner import Sandbox

TINY_RUN = """
name: tiny
teacher: tiny-r1
student: tiny-qwen
prompts: [{kind: procedural, name: arithmetic, limit: 12}]
engine: {dtype: float32}
generate: {samples: 2, sampling: {max_new_tokens: 160}, max_batch: 16}
train:
  learning_rate: 1e-3
  max_steps: 4
  per_device_train_batch_size: 8
  max_length: 512
  dtype: float32
  logging_steps: 1
eval: {benchmarks: [tiny-arithmetic], limit: 4, samples: 2, max_batch: 16}
"""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`…/runs/tiny`. Read-only: a test that changes files copies it first."""
    from distill.catalog import load_recipe
    from distill.pipeline import run_recipe

    directory = tmp_path_factory.mktemp("finished")
    (directory / "tiny.yaml").write_text(TINY_RUN)
    run_recipe(load_recipe(str(directory / "tiny.yaml")), directory / "runs" / "tiny")
    return directory / "runs" / "tiny"


@pytest.fixture(scope="module")
def sandbox() -> "Iterator[Sandbox]":
    """Runs programs behind the strongest walls; skips the test where this machine has weaker ones."""
    from distill.grading.sandbox.levels import level_of, open_zygote, this_machine
    from distill.grading.sandbox.runner import Sandbox

    with open_zygote() as zygote:
        if level_of(zygote.powers) != "full":
            pytest.skip(f"this machine does not isolate fully: {this_machine()}")
        yield Sandbox(zygote)
