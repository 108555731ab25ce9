"""The GPU kernels over paged caches against the plain ops that define them,
in Triton's interpreter (or on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import CLOSE, CLOSE_BFLOAT16, DEVICE, UNUSED_SLOTS, error, gpu, random, slow
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill.engine.kernels import gpu_attention, reference, w8a8

pytestmark = UNUSED_SLOTS


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_written_as_norm_rope_and_write_would(interleaved: bool, dtype: torch.dtype) -> None:
    """Of columns of a wider tensor; every bit is that of the three ops."""
    wide, weight, angle = random(5, 100, dtype=dtype), random(40, seed=1, dtype=dtype), random(5, 8, seed=2)
    page, offset = (torch.tensor(numbers, device=DEVICE) for numbers in ([2, 0, 1, 2, 0], [0, 3, 1, 2, 0]))
    pools = [torch.zeros(3, 1, 4, 56, dtype=dtype, device=DEVICE) for _ in range(2)]
    for write, pool in zip((gpu_attention.write_latents, gpu._composed), pools, strict=True):
        x = wide.clone()[:, 20:76]
        write(pool, page, offset, x, weight, 1e-6, angle.cos(), angle.sin(), interleaved)
    assert torch.equal(*pools) and pools[0].count_nonzero() == 5 * 56


def paged(b: int, longest: int, page: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Tables of shuffled pages and lengths, one of them 1; and how many pages there are."""
    per = -(-longest // page)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(b * per, generator=generator).view(b, per)
    lengths = torch.randint(1, longest + 1, (b,), generator=generator)
    lengths[0], lengths[-1] = longest, 1
    return table.to(DEVICE), lengths.to(DEVICE), b * per


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 16, slow(72)])
@pytest.mark.parametrize("page", [1, 16])
def test_decode_mla(page: int, heads: int, dtype: torch.dtype) -> None:
    latent, rope = 96, 16
    table, lengths, pages = paged(3, 300, page)
    pool = random(pages, 1, page, latent + rope, dtype=dtype)
    q = random(3, heads, latent + rope, seed=1, dtype=dtype)
    theirs = reference.decode_mla(q.float(), pool.float(), table, lengths, 0.1, latent)
    ours = gpu.decode_mla(q, pool, table, lengths, 0.1, latent)
    assert error(ours, theirs) < (CLOSE if dtype == torch.float32 else CLOSE_BFLOAT16)
    assert torch.equal(ours, gpu.decode_mla(q, pool, table, lengths, 0.1, latent))


@pytest.mark.slow
def test_decode_mla_of_an_fp8_cache() -> None:
    latent, rope, page = 256, 16, 16
    table, lengths, pages = paged(3, 200, page)
    width = w8a8.fp8_row_bytes(latent, rope)
    ours_pool, pool = (torch.zeros(pages, 1, page, width, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    t = pages * page
    x = random(t, 1, latent + rope, dtype=torch.bfloat16)
    where = torch.arange(t, device=DEVICE)
    gpu.paged_write(ours_pool, where // page, where % page, x)
    w8a8.paged_write(pool, where // page, where % page, x)
    assert torch.equal(ours_pool, pool)
    back = w8a8.dense_rows(pool, latent, rope, torch.float32).flatten(0, 2)
    assert torch.equal(back[:, latent:], x[:, 0, latent:].float())
    assert error(back, x[:, 0]) < 0.05
    q = random(3, 16, latent + rope, seed=1, dtype=torch.bfloat16)
    theirs = w8a8.decode_mla(q.float(), pool, table, lengths, 0.1, latent)
    assert error(gpu.decode_mla(q, pool, table, lengths, 0.1, latent), theirs) < CLOSE_BFLOAT16
    expand_k, expand_v = (
        random(4, 32, latent, seed=2, dtype=torch.bfloat16),
        random(4, 24, latent, seed=3, dtype=torch.bfloat16),
    )
    q = random(5, 4, 32 + rope, seed=4, dtype=torch.bfloat16)
    theirs = w8a8.prefill_mla(q.float(), pool, table[0], 150, expand_k.float(), expand_v.float(), 0.1)
    assert error(gpu.prefill_mla(q, pool, table[0], 150, expand_k, expand_v, 0.1), theirs) < CLOSE_BFLOAT16


@given(st.integers(1, 8), st.integers(0, 200))
def test_a_row_of_bytes_says_how_wide_its_latent_is(groups: int, rope: int) -> None:
    width = w8a8.fp8_row_bytes(128 * groups, rope)
    assert width % 16 == 0 and w8a8.latent_width(128 * groups + rope, width) == 128 * groups


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (40, 2)])
def test_decode_gqa(heads: tuple[int, int], dtype: torch.dtype) -> None:
    table, lengths, pages = paged(3, 300, 16)
    k_pool, v_pool = (random(pages, heads[1], 16, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    q = random(3, heads[0], 24, dtype=dtype)
    theirs = reference.decode_gqa(q.float(), k_pool.float(), v_pool.float(), table, lengths, 0.2)
    ours = gpu_attention.decode_gqa(q, k_pool, v_pool, table, lengths, 0.2)
    assert error(ours, theirs) < (CLOSE if dtype == torch.float32 else CLOSE_BFLOAT16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 256, 512])
def test_decode_gqa_of_wide_heads(width: int, dtype: torch.dtype) -> None:
    """As Qwen3.5 and Gemma 4 have them: a multiprocessor's memory holds fewer keys at once."""
    table, lengths, pages = paged(2, 150, 16)
    k_pool, v_pool = (random(pages, 1, 16, width, seed=seed, dtype=dtype) for seed in (1, 2))
    q = random(2, 8, width, dtype=dtype)
    theirs = reference.decode_gqa(q.float(), k_pool.float(), v_pool.float(), table, lengths, width**-0.5)
    ours = gpu_attention.decode_gqa(q, k_pool, v_pool, table, lengths, width**-0.5)
    assert error(ours, theirs) < (CLOSE if dtype == torch.float32 else CLOSE_BFLOAT16)


@pytest.mark.parametrize("t", [1, 9, 60])
def test_prefill_gqa_of_wide_heads(t: int) -> None:
    """Wider than FlashAttention takes, with grouped heads."""
    table, _, pages = paged(1, 60, 16)
    k_pool, v_pool = (random(pages, 2, 16, 512, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    q = random(t, 8, 512, dtype=torch.bfloat16)
    theirs = reference.prefill_gqa(q.float(), k_pool.float(), v_pool.float(), table[0], 60, 0.04)
    assert error(gpu.prefill_gqa(q, k_pool, v_pool, table[0], 60, 0.04), theirs) < CLOSE_BFLOAT16


@pytest.mark.parametrize("t", [1, 9, 100])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_prefill_gqa(t: int, heads: tuple[int, int]) -> None:
    table, _, pages = paged(1, 100, 16)
    k_pool, v_pool = (random(pages, heads[1], 16, 24, seed=seed) for seed in (1, 2))
    q = random(t, heads[0], 24)
    theirs = reference.prefill_gqa(q, k_pool, v_pool, table[0], 100, 0.2)
    assert error(gpu.prefill_gqa(q, k_pool, v_pool, table[0], 100, 0.2), theirs) < CLOSE


@pytest.mark.parametrize("t", [1, 9, 100])
def test_prefill_mla(t: int) -> None:
    table, _, pages = paged(1, 100, 16)
    pool = random(pages, 1, 16, 48 + 16)
    expand_k, expand_v = random(4, 32, 48, seed=2), random(4, 24, 48, seed=3)
    q = random(t, 4, 32 + 16)
    theirs = reference.prefill_mla(q, pool, table[0], 100, expand_k, expand_v, 0.1)
    assert error(gpu.prefill_mla(q, pool, table[0], 100, expand_k, expand_v, 0.1), theirs) < CLOSE


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 20])
@pytest.mark.parametrize("heads", [16, 72])
def test_index_scores(t: int, heads: int, dtype: torch.dtype) -> None:
    table, _, pages = paged(1, 150, 16)
    pool, q, weight = (
        random(pages, 1, 16, 40, dtype=dtype),
        random(t, heads, 40, seed=1, dtype=dtype),
        random(t, heads, seed=2),
    )
    theirs = reference.index_scores(q.float(), weight, pool.float(), table[0], 150)
    ours = gpu_attention.index_scores(q, weight, pool, table[0], 150)
    assert torch.equal(ours.isinf(), theirs.isinf())
    seen = ~theirs.isinf()
    assert error(ours[seen], theirs[seen]) < (CLOSE if dtype == torch.float32 else CLOSE_BFLOAT16)
