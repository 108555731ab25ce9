"""The GPU kernel that draws tokens against the plain op that defines it,
in Triton's interpreter (or on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, UNUSED_SLOTS, error, random

from distill.engine.kernels import gpu_draw, reference

pytestmark = UNUSED_SLOTS


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [50, pytest.param(5000, marks=pytest.mark.slow)])
def test_draw(vocab: int) -> None:
    logits, b = random(4, vocab) * 3, 60
    generator = torch.Generator().manual_seed(1)
    row = torch.arange(b, device=DEVICE) % 4
    uniform = torch.rand(b, generator=generator, dtype=torch.float64).to(DEVICE)
    temperature = torch.tensor([0.0, 0.6, 1.0, 1.7], device=DEVICE)[torch.arange(b, device=DEVICE) // 4 % 4]
    top_k = torch.tensor([0, 1, 5, 40, vocab + 1], device=DEVICE)[torch.arange(b, device=DEVICE) % 5]
    top_p = torch.tensor([1.0, 0.95, 0.3], device=DEVICE, dtype=torch.float64)[torch.arange(b, device=DEVICE) % 3]
    ours = gpu_draw.draw(logits, row, uniform, temperature, top_k, top_p)
    theirs = reference.draw(logits, row, uniform, temperature, top_k, top_p)
    assert torch.equal(ours[0], theirs[0])
    assert error(ours[1], theirs[1]) < 1e-5


def test_draws_keep_ties_and_their_edges() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.1, 0.4, 1e-30]], device=DEVICE))
    uniform = torch.tensor([0.0, 0.49, 0.51, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    zeros = torch.zeros(4, dtype=torch.int64, device=DEVICE)

    def tokens(top_k: int, top_p: float) -> list[int]:
        each = torch.full_like(uniform, top_p)
        drawn, _ = gpu_draw.draw(logits, zeros, uniform, torch.ones(4, device=DEVICE), zeros + top_k, each)
        return drawn.tolist()

    assert tokens(1, 1.0) == [1, 1, 3, 3]  # tied with the first: both are kept
    assert tokens(0, 0.5) == [1, 1, 3, 3]
    assert tokens(0, 1.0) == [0, 1, 2, 3]  # the last token's mass is lost in the sum
