"""Helpers of the GPU kernels' tests: random inputs on the device, and errors. Importing it skips a module where triton
is missing."""

from __future__ import annotations

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from distill.engine.kernels import w8a8
from distill.engine.kernels.stored import Fp8

gpu = pytest.importorskip("distill.engine.kernels.gpu", reason="triton is not installed: pip install triton")

DEVICE = gpu.device()
# Slots without a pair hold whatever was in memory, and the interpreter computes on it as a GPU does.
UNUSED_SLOTS = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROWS = [1, 7, 129]
CLOSE, CLOSE_BFLOAT16 = 1e-3, 1e-2


def slow(*values: object) -> ParameterSet:
    """A case for `make test-slow`: Triton's interpreter takes ten seconds and more for it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative, by norm."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.double(), theirs.double()
    assert ours.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


def fp8(n: int, c: int, seed: int = 0, ue8m0: bool = False) -> Fp8:
    codes = (random(n, c, seed=seed) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = random(-(-n // 128), -(-c // 128), seed=seed + 1).abs() * c**-0.5 / 100 + 1e-5
    return Fp8(codes, w8a8.power_of_two_above(scale) if ue8m0 else scale, ue8m0)


def same(ours: w8a8.Quantised, theirs: w8a8.Quantised) -> None:
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
