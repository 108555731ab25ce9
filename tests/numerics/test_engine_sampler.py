"""Draws: keyed and uniform, distributed as worked out by hand, raw in their log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.engine import SamplingParams
from distill.engine.sampler import Draw, _splitmix64, sample, stream_key, uniforms

HALVES = torch.tensor([[1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16]]).log()
POSITIONS = 20_000


def test_splitmix64_is_the_published_one() -> None:
    assert _splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the reference implementation seeded with 0
    for key, position in ((0, 0), (2**64 - 1, 5), (12345, 2**40)):
        assert uniforms([key], [position])[0] == (_splitmix64(key ^ position) >> 12) * 2.0**-52


def test_uniforms_are_uniform_and_unrelated() -> None:
    """Along positions, samples, prompts and seeds: mean, variance, and no correlation between neighbours."""
    n = 20_000
    streams = {
        "position": uniforms([stream_key(1, 2, 3)] * n, range(n)),
        "sample": uniforms([stream_key(1, 2, s) for s in range(n)], [7] * n),
        "prompt": uniforms([stream_key(1, p, 3) for p in range(n)], [7] * n),
        "seed": uniforms([stream_key(s, 2, 3) for s in range(n)], [7] * n),
    }
    for name, u in streams.items():
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 4 / (12 * n) ** 0.5, name
        assert abs(u.var() - 1 / 12) < 0.003, name
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / n**0.5, name


def test_any_64_bit_key_is_accepted() -> None:
    assert stream_key(-1, 0, 0) == stream_key(2**64 - 1, 0, 0)
    assert len({stream_key(s, p, k) for s in range(5) for p in range(5) for k in range(5)}) == 125


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16]),
        (SamplingParams(temperature=0.5), [64 / 86, 1 / 86, 16 / 86, 4 / 86, 1 / 86]),
        (SamplingParams(top_k=2), [2 / 3, 0, 1 / 3, 0, 0]),
        (SamplingParams(top_p=0.7), [2 / 3, 0, 1 / 3, 0, 0]),
        (SamplingParams(top_p=0.8), [4 / 7, 0, 2 / 7, 1 / 7, 0]),
        (SamplingParams(top_p=0.45), [1, 0, 0, 0, 0]),
        # The two sixteenths tie at the edge: both are kept.
        (SamplingParams(top_k=4), [1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16]),
        # Top p counts what top k left: 4/7 + 2/7 reaches 0.8.
        (SamplingParams(top_k=3, top_p=0.8), [2 / 3, 0, 1 / 3, 0, 0]),
        # And what the temperature made: 64/86 + 16/86 reaches 0.9.
        (SamplingParams(temperature=0.5, top_p=0.9), [4 / 5, 0, 1 / 5, 0, 0]),
        (SamplingParams(temperature=0), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=1e-4), [1, 0, 0, 0, 0]),
        (SamplingParams(top_k=1000), [1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16]),
    ],
)
def test_distribution(params: SamplingParams, expected: list[float]) -> None:
    key = stream_key(0, 0, 0)
    drawn = sample(HALVES, [Draw(0, key, position, params) for position in range(POSITIONS)])
    counts = np.bincount([d.token for d in drawn], minlength=5)
    wanted = np.array(expected) * POSITIONS
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 0
    chi_square = ((counts - wanted)[kept] ** 2 / wanted[kept]).sum()
    assert chi_square < 23.5, f"{counts} drawn, {wanted} expected"  # 4 degrees of freedom, one in ten thousand


def test_top_p_looks_as_far_as_it_must() -> None:
    """A flat distribution over 5,000 tokens: top p keeps half of them, far beyond the first look."""
    logits = torch.linspace(0, 0.01, 5000)[None]
    draws = [Draw(0, 1, position, SamplingParams(top_p=0.5)) for position in range(2000)]
    tokens = [d.token for d in sample(logits, draws)]
    assert 2500 <= min(tokens) < 2530
    assert max(tokens) > 4970


def test_rows_do_not_see_each_other() -> None:
    """A mixed batch draws for each entry what it draws alone."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 400, generator=generator)
    mixed = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.3, logprobs=2),
        SamplingParams(top_k=7),
        SamplingParams(temperature=2.0, top_p=0.99, top_k=300),
        SamplingParams(temperature=0.6, top_p=0.95, logprobs=5),
    ]
    draws = [Draw(row, stream_key(3, row, 0), 17, params) for row, params in enumerate(mixed)]
    together = sample(logits, draws)
    assert [sample(logits, [draw])[0] for draw in draws] == together
    assert sample(logits, draws[::-1]) == together[::-1]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(i % 4, i, i, SamplingParams(top_p=0.9, logprobs=3)) for i in range(11)]
    whole = sample(logits, draws)
    monkeypatch.setattr("distill.engine.sampler._BLOCK_ELEMENTS", 120)
    assert sample(logits, draws) == whole


def test_logprobs_are_raw() -> None:
    params = SamplingParams(temperature=0.1, top_k=1, logprobs=3)
    (drawn,) = sample(HALVES + 5.0, [Draw(0, 0, 0, params)])
    assert drawn.token == 0
    assert drawn.logprob == pytest.approx(np.log(1 / 2), abs=1e-6)
    assert [i for i, _ in drawn.top_logprobs] == [0, 2, 3]
    assert [p for _, p in drawn.top_logprobs] == pytest.approx(np.log([1 / 2, 1 / 4, 1 / 8]), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"logprobs": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
