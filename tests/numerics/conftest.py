"""Checkpoints for the numerics tests, built once per session, and the instruction sets of the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from instruction_sets import EMULATIONS, use
from random_models import CONFIGS, Checkpoint, build

from distill.engine.kernels import cpu_library


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`checkpoint("v3")`: the random model of that name in CONFIGS, written once per session."""
    built: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in built:
            built[name] = build(tmp_path_factory.mktemp(name), CONFIGS[name])
        return built[name]

    return get


@pytest.fixture(params=[*cpu_library.SETS, *EMULATIONS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, and the emulations of AMX, in use while the test runs."""
    yield from use(request.param)
