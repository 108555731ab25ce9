"""What the kernels become on a Hopper GPU, which need not be there: the compiler says what they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

SHARED_MEMORY = 227 << 10  # bytes that a program may take on Hopper


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("gpu_compiler.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    expected = {"quantise", "rms_norm", "swiglu", "rope", "linear", "add_parts", "grouped", "route", "count", "place"}
    expected |= {"combine", "mla", "gqa", "join", "index", "write_fp8", "write_latents", "draw", "four_bit"}
    assert {row["kernel"] for row in compiled} == expected


def test_none_takes_more_than_there_is(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared"] <= SHARED_MEMORY, row


SPILLED = {  # bytes a thread, where that was measured to be faster than a tile that spills nothing (perf/README.md)
    ("linear", "8192 rows"): 96,
    ("mla", "16 heads"): 96,
    ("mla", "128 heads"): 448,
    ("draw", "draws"): 48,
}


def test_registers_suffice(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["spilled"] <= SPILLED.get((row["kernel"], row["what"]), 0), row


def test_products_take_the_fast_paths(compiled: list[dict[str, Any]]) -> None:
    """Tensor memory copies bring weights; warp-group products from 64 rows on."""
    products = [row for row in compiled if row["kernel"] in ("linear", "grouped")]
    assert all(row["tma"] for row in products)
    assert {row["what"] for row in products if row["wgmma"]} >= {"64 rows", "256 rows", "8192 rows"}
    assert all(row["wgmma"] or row["mma"] for row in products)
    assert any(row["kernel"] == "mla" and row["wgmma"] and row["tma"] for row in compiled)
