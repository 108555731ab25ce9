"""Checkpoints for the numerics tests, built once per session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from random_models import CONFIGS, Checkpoint, build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`checkpoint("v3")`: the random model of that name in CONFIGS, written once per session."""
    built: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in built:
            built[name] = build(tmp_path_factory.mktemp(name), CONFIGS[name])
        return built[name]

    return get
