"""Checkpoints for the numerics tests, built once per session, and the instruction sets of the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from random_models import CONFIGS, Checkpoint, build

from distill.engine.kernels import cpu, cpu_library


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`checkpoint("v3")`: the random model of that name in CONFIGS, written once per session."""
    built: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in built:
            built[name] = build(tmp_path_factory.mktemp(name), CONFIGS[name])
        return built[name]

    return get


# With the same bits as the emulation on AVX-512, at a tenth of its speed.
PORTABLE_EMULATION = pytest.param("amx_emulated_portable", marks=pytest.mark.slow)


@pytest.fixture(params=[*cpu_library.SETS, "amx_emulated", PORTABLE_EMULATION])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, and the emulations of AMX, in use while the test runs."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    before = cpu.instruction_set()
    try:
        cpu.instruction_set(request.param)
    except ValueError as error:
        pytest.skip(f"{error}: {cpu.amx_missing()}" if request.param == "amx" else str(error))
    yield request.param
    cpu.instruction_set(before)
