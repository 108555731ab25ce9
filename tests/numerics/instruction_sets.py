"""The instruction sets of the CPU kernels, as parameters of fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distill.engine.kernels import cpu, cpu_library


def runs(name: str) -> bool:
    """Whether this machine can use an instruction set."""
    if cpu.why_missing():
        return False
    before = cpu.instruction_set()
    try:
        cpu.instruction_set(name)
    except ValueError:
        return False
    cpu.instruction_set(before)
    return True


def use(name: str) -> Iterator[str]:
    """Have an instruction set in use until the generator goes on; skip the test where this machine does not have it."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    before = cpu.instruction_set()
    try:
        cpu.instruction_set(name)
    except ValueError as error:
        pytest.skip(f"{error}: {cpu.amx_missing()}" if name == "amx" else str(error))
    yield name
    cpu_library.tile_vectors(True)
    cpu.instruction_set(before)


# Both emulations of AMX give the same bits. The portable one takes ten times as long: it is proved by hand where the
# other one runs.
EMULATIONS = (
    "amx_emulated",
    pytest.param("amx_emulated_portable", marks=pytest.mark.slow) if runs("amx_emulated") else "amx_emulated_portable",
)
