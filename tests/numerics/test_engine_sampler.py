"""Draws: keyed and uniform, distributed as worked out by hand, raw in their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.engine import SamplingParams
from distill.engine.kernels import cpu, ops_for, reference
from distill.engine.sampler import Draw, Drawn, _splitmix64, stream_key, uniforms
from distill.engine.sampler import sample as sample_with

HALVES = torch.tensor([[1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16]]).log()
POSITIONS = 20_000
Sample = Callable[[Tensor, Sequence[Draw]], list[Drawn]]


@pytest.fixture(params=["reference", "cpu"])
def sample(request: pytest.FixtureRequest) -> Sample:
    if request.param == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    return partial(sample_with, ops_for(request.param))


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


@pytest.mark.one_in(5)
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
def test_distribution(sample: Sample, params: SamplingParams, expected: list[float]) -> None:
    key = stream_key(0, 0, 0)
    drawn = sample(HALVES, [Draw(0, key, position, params) for position in range(POSITIONS)])
    counts = np.bincount([d.token for d in drawn], minlength=5)
    wanted = np.array(expected) * POSITIONS
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 0
    chi_square = ((counts - wanted)[kept] ** 2 / wanted[kept]).sum()
    assert chi_square < 23.5, f"{counts} drawn, {wanted} expected"  # 4 degrees of freedom, one in ten thousand


def test_top_p_looks_as_far_as_it_must(sample: Sample) -> None:
    """A flat distribution over 5,000 tokens: top p keeps half of them, far beyond the first look."""
    logits = torch.linspace(0, 0.01, 5000)[None]
    draws = [Draw(0, 1, position, SamplingParams(top_p=0.5)) for position in range(2000)]
    tokens = [d.token for d in sample(logits, draws)]
    assert 2500 <= min(tokens) < 2530
    assert max(tokens) > 4970


def test_rows_do_not_see_each_other(sample: Sample) -> None:
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


def test_blocks_change_nothing(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(i % 4, i, i, SamplingParams(top_p=0.9, logprobs=3)) for i in range(11)]
    whole = sample(logits, draws)
    monkeypatch.setattr("distill.engine.sampler._BLOCK_ELEMENTS", 120)
    assert sample(logits, draws) == whole


def test_logprobs_are_raw(sample: Sample) -> None:
    params = SamplingParams(temperature=0.1, top_k=1, logprobs=3)
    (drawn,) = sample(HALVES + 5.0, [Draw(0, 0, 0, params)])
    assert drawn.token == 0
    assert drawn.logprob == pytest.approx(np.log(1 / 2), abs=1e-6)
    assert drawn.top is not None
    (top,) = drawn.top.pairs
    assert [i for i, _ in top] == [0, 2, 3]
    assert [p for _, p in top] == pytest.approx(np.log([1 / 2, 1 / 4, 1 / 8]), abs=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 15, 300, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_the_compiled_draw_is_the_reference(vocabulary: int, spread: float) -> None:
    """Every sampler setting at once, flat and peaked logits, some of them -inf; uniforms at both ends."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    generator = torch.Generator().manual_seed(vocabulary)
    draws = 400
    logits = spread * torch.randn(7, vocabulary, generator=generator)
    logits[:, 1::3] = float("-inf")
    row = torch.randint(7, (draws,), generator=generator)
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-52])
    temperature = torch.tensor([0.0, 0.3, 1.0, 4.0]).repeat(draws // 4)
    top_k = torch.tensor([0, 1, 5, 100, 2000]).repeat(draws // 5)
    top_p = torch.tensor([1.0, 0.95, 0.5, 1e-9, 1.0, 0.999, 0.8, 1.0], dtype=torch.float64).repeat(draws // 8)
    arguments = logits, row, uniform, temperature, top_k, top_p
    (ours, ours_logprob), (theirs, theirs_logprob) = cpu.draw(*arguments), reference.draw(*arguments)
    assert (ours == theirs).float().mean() >= 0.99, "rounding may move a token, rarely"
    assert ours_logprob.isfinite().all()
    same = ours == theirs
    torch.testing.assert_close(ours_logprob[same], theirs_logprob[same], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 2**31},
        {"max_new_tokens": 0},
        {"logprobs": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_likeliest_tokens_of_the_kernels_are_those_of_the_reference(isa: str) -> None:
    """Rows shorter and longer than a vector; given ids that are listed already, twice among themselves, and none."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((1, 5, 5, 3), (7, 37, 4, 6), (9, 1000, 32, 32), (3, 64, 0, 5), (4, 40, 8, 0))
    for rows, vocabulary, top_k, given in shapes:
        logits_rv = torch.randn(rows, vocabulary, generator=draw)
        ids_rm = torch.randint(-1, vocabulary, (rows, given), generator=draw) if given else None
        if ids_rm is not None:
            ids_rm[:, -1] = ids_rm[:, 0]
        logits_rv[0, 2] = -torch.inf
        normaliser_r1 = logits_rv.logsumexp(-1, keepdim=True)
        expected = reference.likeliest(logits_rv, normaliser_r1, top_k, ids_rm)
        for ours, theirs in zip(cpu.likeliest(logits_rv, normaliser_r1, top_k, ids_rm), expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.equal(theirs)


def test_of_equal_logits_the_lower_id_comes_first(isa: str) -> None:
    logits_rv = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0] + [2.0] * 40])
    ids, logprobs = cpu.likeliest(logits_rv, torch.ones(1, 1), 4, torch.tensor([[44, 3, 4]]))
    assert ids.tolist() == [[1, 3, 2, 4, 44, 0, 0]]
    assert logprobs.tolist() == [[2.0, 2.0, 1.0, 1.0, 1.0, -torch.inf, -torch.inf]]


def test_given_ids_outside_the_vocabulary_are_refused() -> None:
    for id_ in (-2, 5):
        with pytest.raises(IndexError, match="a token is outside the vocabulary"):
            cpu.likeliest(torch.zeros(1, 5), torch.zeros(1, 1), 1, torch.tensor([[id_]]))
