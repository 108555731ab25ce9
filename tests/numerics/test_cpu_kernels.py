"""The compiled CPU kernels against the reference ops, on every instruction set that this machine has, and the promise
that no result depends on what else is in the batch, on chunks, or on the number of threads."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from random_models import quantise
from torch import Tensor

from distill.engine.kernels import cpu, reference
from distill.engine.kernels.cpu_packing import Packed
from distill.engine.kernels.stored import Damaged, Fp8, Plain, Stored

# The numerics of a float32 product of this length, relative to the largest result.
CLOSE = 3e-6
HALF = 2e-2  # where keys, values or probabilities are rounded to bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(n: int, c: int, kind: str) -> Stored:
    weight = random(n, c, seed=n + c)
    if kind == "fp8":
        return Fp8(*quantise(weight))
    return Plain(weight.bfloat16() if kind == "bfloat16" else weight)


def columns_of(weight: Stored, count: int) -> Stored:
    """The first columns of a matrix, which end in its last block of 128."""
    values = weight.values[:, :count].contiguous()
    return Plain(values) if weight.scale is None else Fp8(values, weight.scale)


def error(ours: Tensor, exact: Tensor) -> float:
    difference = (ours - exact).abs()
    print(f"max {difference.max():.3g}, mean {difference.mean():.3g}, largest {exact.abs().max():.3g}")
    return float(difference.max() / exact.abs().max())


def reference_dense(weight: Stored) -> Tensor:
    return weight.dense(torch.float32)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(64, 128), (200, 300), (288, 1024), (37, 5)])
def test_linear(isa: str, kind: str, shape: tuple[int, int]) -> None:
    weight, bias = stored(*shape, kind), random(shape[0])
    for dtype in (torch.float32, torch.bfloat16):
        if kind == "float32" and dtype == torch.bfloat16:
            continue  # the weight itself would be rounded
        packed = cpu.pack(weight, dtype)
        for rows in (1, 5, 7, 130):
            x = random(rows, shape[1], seed=1)
            seen = x if dtype == torch.float32 else x.to(dtype)
            exact = seen.double() @ reference_dense(weight).double().T + bias
            ours = cpu.linear(x, packed, bias)
            assert error(ours, exact) < CLOSE
            onto = random(rows, shape[0], seed=2)
            assert error(cpu.linear(x, packed, bias, onto.clone()), onto + exact) < CLOSE
            alone = torch.cat([cpu.linear(x[i : i + 1], packed, bias) for i in range(rows)])
            assert torch.equal(ours, alone), "a row's result depends on the rows beside it"


@pytest.mark.parametrize(
    "scales",
    [
        [1e-3, 2e-3, 5e-4, 1e-3],
        [1e-9, 1e8, 1e-9, 1e-9],  # as far apart as sums may be carried from one block to the next
        [1e-3, 0.0, 1e-3, 0.0],  # blocks of zeros
        [1e-30, 1e-38, 1e-30, 1e-36],
        [1e30, 1e-3, 1e20, 1.0],
    ],
)
def test_scales_of_any_size(isa: str, scales: list[float]) -> None:
    codes = quantise(random(64, 512, seed=3))[0].float().unflatten(1, (4, 128))
    codes = (codes * (torch.tensor(scales) > 0)[:, None]).flatten(1).to(torch.float8_e4m3fn)  # no scale, no numbers
    weight = Fp8(codes, torch.tensor([scales]))
    packed = cpu.pack(weight, torch.float32)
    x = random(40, 512, seed=4)
    ours = cpu.linear(x, packed)
    blocks = (x[:, None].double() * codes.double()).unflatten(-1, (4, 128)).sum(-1)
    assert error(ours, blocks @ torch.tensor(scales).double()) < CLOSE
    assert torch.equal(ours, torch.cat([cpu.linear(x[i : i + 1], packed) for i in range(40)]))


@pytest.mark.parametrize("activation", [1.0, 1e-2, 1e-4])
def test_all_finite_fp8_codes_through_the_dot_product(isa: str, activation: float) -> None:
    """Expected values worked out from the definition of e4m3, code by code."""
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    weight = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    x = torch.tensor([[activation]])
    for dtype in (torch.float32, torch.bfloat16):
        out = cpu.linear(x, cpu.pack(Fp8(weight, torch.tensor([[0.25], [0.5]])), dtype))[0]
        seen = x.to(dtype).item()
        for row, code in enumerate(codes):
            exponent, mantissa = (code >> 3) & 15, code & 7
            value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            expected = (-value if code & 0x80 else value) * (0.25 if row < 128 else 0.5) * seen
            assert math.isclose(out[row].item(), expected, rel_tol=1e-6, abs_tol=0.0), hex(code)


def test_nan_codes_are_found() -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    codes = torch.arange(256, dtype=torch.uint8).repeat(9000)
    healthy = codes[(codes & 0x7F) != 0x7F]
    assert not cpu.has_nan_codes(healthy.view(torch.float8_e4m3fn))
    for nan in (0x7F, 0xFF):
        healthy[-1] = nan
        assert cpu.has_nan_codes(healthy.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float32"])
def test_swiglu_linear(isa: str, kind: str) -> None:
    gate, up = stored(200, 96, kind), stored(200, 97, kind)
    up = columns_of(up, 96)
    x = random(9, 96, seed=2)
    ours = cpu.swiglu_linear(x, cpu.pack(gate, torch.float32), cpu.pack(up, torch.float32))
    expected = reference.swiglu_linear(x, reference_dense(gate), reference_dense(up))
    assert error(ours, expected) < CLOSE


def test_matrices_of_two_forms_read_the_same_rows(isa: str) -> None:
    """A float32 matrix reads rows as they are, another one reads their bfloat16 parts."""
    wide, narrow, x = stored(70, 96, "float32"), stored(70, 96, "bfloat16"), random(9, 96, seed=2)
    for gate, up in ((wide, narrow), (narrow, wide)):
        ours = cpu.swiglu_linear(x, cpu.pack(gate, torch.float32), cpu.pack(up, torch.float32))
        expected = reference.swiglu_linear(x, reference_dense(gate), reference_dense(up))
        assert error(ours, expected) < CLOSE


def bank_of(
    column: Any, matrices: list[tuple[Stored, ...]], resident: int | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    bank = column.expert_bank(len(matrices), dtype)
    for expert in matrices:
        bank.lend(expert)
    bank.settle(resident)
    return bank


@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts(isa: str, kind: str, tokens: int) -> None:
    """Uneven routing: expert 0 takes every token, some take none."""
    count, per_token, f, c = 7, 3, 136, 160
    matrices = [(stored(f, c, kind), stored(f, c + 1, kind), stored(c, f, kind)) for _ in range(count)]
    matrices = [(gate, columns_of(up, c), down) for gate, up, down in matrices]
    matrices[3] = (matrices[3][1], matrices[3][0], matrices[3][2])  # not all the same
    x, weights = random(tokens, c, seed=3), random(tokens, per_token, seed=4).abs()
    chosen = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] + 1 for t in range(tokens)])
    chosen = torch.cat((torch.zeros(tokens, 1, dtype=torch.int64), chosen), dim=1)
    packed, plain = bank_of(cpu, matrices), bank_of(reference, matrices)
    onto = random(tokens, c, seed=5)
    ours = cpu.experts(x, chosen, weights, packed, None, onto.clone())
    expected = reference.experts(x, chosen, weights, plain, None, onto.clone())
    assert error(ours, expected) < CLOSE
    alone = [
        cpu.experts(x[t : t + 1], chosen[t : t + 1], weights[t : t + 1], packed, None, onto[t : t + 1].clone())
        for t in range(tokens)
    ]
    assert torch.equal(ours, torch.cat(alone))


@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("shared_kinds", [("fp8", "fp8"), ("float32", "float32"), ("bfloat16", "float32")])
def test_experts_with_a_shared_one(isa: str, kind: str, shared_kinds: tuple[str, str]) -> None:
    """Wider than the routed ones; in a form that can be computed beside them or not. The bits are those of apart."""
    f, c, tokens = 136, 160, 9
    matrices = [(stored(f, c, kind), stored(f, c, kind), stored(c, f, kind)) for _ in range(5)]
    shared = (*(stored(2 * f, c, shared_kinds[0]) for _ in range(2)), stored(c, 2 * f, shared_kinds[1]))
    x, weights = random(tokens, c, seed=3), random(tokens, 2, seed=4).abs()
    chosen = torch.arange(2 * tokens).view(tokens, 2) % 5
    packed, ours_shared = bank_of(cpu, matrices), tuple(cpu.pack(w, torch.float32) for w in shared)
    onto = random(tokens, c, seed=5)
    ours = cpu.experts(x, chosen, weights, packed, ours_shared, onto.clone())
    plain, plain_shared = bank_of(reference, matrices), tuple(map(reference_dense, shared))
    assert error(ours, reference.experts(x, chosen, weights, plain, plain_shared, onto.clone())) < CLOSE
    alone = cpu.experts(x[3:4], chosen[3:4], weights[3:4], packed, ours_shared, onto[3:4].clone())
    assert torch.equal(ours[3:4], alone)


def test_per_head(isa: str) -> None:
    x, weight = random(5, 3, 20), random(3, 70, 20, seed=1)
    ours = cpu.per_head(x, cpu.pack_heads([Plain(head) for head in weight], torch.float32))
    assert error(ours, reference.per_head(x, weight)) < CLOSE
    wide, packed = random(5, 3, 30)[:, :, :20], cpu.pack_heads([Plain(head) for head in weight], torch.float32)
    assert torch.equal(cpu.per_head(wide, packed), cpu.per_head(wide.contiguous(), packed)), "strides are not followed"


def pool_of(pages: int, heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random(pages, heads, 16, width, seed=seed).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, d, e, longest", [(4, 64, 32, 37), (16, 288, 256, 200), (20, 96, 80, 4500)])
def test_decode_mla(isa: str, dtype: torch.dtype, heads: int, d: int, e: int, longest: int) -> None:
    """More heads than lanes, one token, and a context long enough to be cut into parts."""
    pages = longest // 16 + 2
    pool = pool_of(3 * pages, 1, d, dtype)
    table = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(0)).view(3, pages)
    length, q = torch.tensor([longest, longest // 2, 1]), random(3, heads, d).to(dtype).float()
    ours = cpu.decode_mla(q, pool, table, length, 0.1, e)
    expected = reference.decode_mla(q, pool.float(), table, length, 0.1, e)
    assert error(ours, expected) < (CLOSE if dtype == torch.float32 else HALF)
    alone = [cpu.decode_mla(q[i : i + 1], pool, table[i : i + 1], length[i : i + 1], 0.1, e) for i in range(3)]
    assert torch.equal(ours, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, d, length", [(8, 2, 32, 70), (6, 6, 64, 33), (40, 2, 24, 130)])
def test_gqa(isa: str, dtype: torch.dtype, heads: int, kv_heads: int, d: int, length: int) -> None:
    pages = length // 16 + 1
    k, v = pool_of(pages, kv_heads, d, dtype), pool_of(pages, kv_heads, d, dtype, seed=1)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    q = random(length, heads, d).to(dtype).float()
    close = CLOSE if dtype == torch.float32 else HALF
    whole = cpu.prefill_gqa(q, k, v, table, length, 0.2)
    assert error(whole, reference.prefill_gqa(q, k.float(), v.float(), table, length, 0.2)) < close
    half = length // 2
    assert torch.equal(whole[:half], cpu.prefill_gqa(q[:half], k, v, table, half, 0.2)), "a chunk differs"
    assert torch.equal(whole[-3:], cpu.prefill_gqa(q[-3:], k, v, table, length, 0.2)), "a chunk differs"
    row = table[None], torch.tensor([length]), 0.2
    one = cpu.decode_gqa(q[-1:], k, v, *row)
    assert error(one, reference.decode_gqa(q[-1:], k.float(), v.float(), *row)) < close


@pytest.mark.one_in(7)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 9])  # of query heads to a key: above 8 they are the lanes
@pytest.mark.parametrize("d, e", [(64, 64), (96, 96), (128, 128), (24, 40), (5, 3)])
def test_decode_gqa(isa: str, dtype: torch.dtype, group: int, d: int, e: int) -> None:
    """Lengths on both sides of a page, of a block of keys and of a part. The bits do not depend on the number of heads
    that share a key, on the rows beside, on the pages or on the threads."""
    length = torch.tensor([1, 15, 17, 64, 65, 129, 300])
    rows, width, kv_heads = len(length), 20, 2
    k, v = pool_of(2 * rows * width, kv_heads, d, dtype), pool_of(2 * rows * width, kv_heads, e, dtype, seed=1)
    order = torch.randperm(2 * rows * width, generator=torch.Generator().manual_seed(0))
    table, elsewhere = order.view(2, rows, width)
    q = random(rows, kv_heads, 16, d).to(dtype).float()
    own = q[:, :, :group].flatten(1, 2)
    ours = cpu.decode_gqa(own, k, v, table, length, 0.2)
    expected = reference.decode_gqa(own, k.float(), v.float(), table, length, 0.2)
    assert error(ours, expected) < (CLOSE if dtype == torch.float32 else HALF)
    whole = cpu.decode_gqa(q.flatten(1, 2), k, v, table, length, 0.2)
    assert torch.equal(ours, whole.view(rows, kv_heads, 16, e)[:, :, :group].flatten(1, 2)), "depends on other heads"
    alone = [cpu.decode_gqa(own[i : i + 1], k, v, table[i : i + 1], length[i : i + 1], 0.2) for i in range(rows)]
    assert torch.equal(ours, torch.cat(alone)), "a row's result depends on the rows beside it"
    for pool in (k, v):
        pool[elsewhere] = pool[table]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ours, cpu.decode_gqa(own, k, v, elsewhere, length, 0.2)), "depends on pages or threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_with_their_head(isa: str, dtype: torch.dtype, special: float) -> None:
    """A query that is not finite: its own result is as with many heads, and the others keep their bits."""
    k, v = pool_of(10, 1, 32, dtype), pool_of(10, 1, 32, dtype, seed=1)
    row = torch.arange(10)[None], torch.tensor([100]), 0.2
    q = random(1, 16, 32)
    healthy = cpu.decode_gqa(q[:, :3], k, v, *row)
    q[0, 1, 7] = special
    ours, whole = cpu.decode_gqa(q[:, :3], k, v, *row), cpu.decode_gqa(q, k, v, *row)
    assert torch.equal(ours[:, ::2], healthy[:, ::2])
    assert torch.equal(ours.isnan(), whole[:, :3].isnan()) and ours[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_mla(isa: str, dtype: torch.dtype) -> None:
    heads, nope, rope, e, rank, length = 3, 32, 16, 24, 48, 150
    pages = length // 16 + 1
    pool = pool_of(pages, 1, rank + rope, dtype)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    uk, uv = (random(heads, nope, rank) * 0.2).to(dtype), (random(heads, e, rank, seed=1) * 0.2).to(dtype)
    q = random(length, heads, nope + rope).to(dtype).float()
    packed = [cpu.pack_heads([Plain(head) for head in heads_], dtype) for heads_ in (uk, uv)]
    whole = cpu.prefill_mla(q, pool, table, length, *packed, 0.2)
    expected = reference.prefill_mla(q, pool.float(), table, length, uk.float(), uv.float(), 0.2)
    assert error(whole, expected) < (CLOSE if dtype == torch.float32 else HALF)
    assert torch.equal(whole[-20:], cpu.prefill_mla(q[-20:], pool, table, length, *packed, 0.2)), "a chunk differs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, d", [(64, 128), (5, 24), (72, 32)])
def test_index_scores(isa: str, dtype: torch.dtype, heads: int, d: int) -> None:
    length = 1100
    pages = length // 16 + 1
    pool, table = pool_of(pages, 1, d, dtype), torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    q, weight = random(7, heads, d).to(dtype).float(), random(7, heads, seed=1)
    ours = cpu.index_scores(q, weight, pool, table, length)
    expected = reference.index_scores(q, weight, pool.float(), table, length)
    seen = expected > float("-inf")
    assert torch.equal(ours > float("-inf"), seen)
    assert error(ours[seen], expected[seen]) < CLOSE
    for row in range(7):
        alone = cpu.index_scores(q[row : row + 1], weight[row : row + 1], pool, table, length - 6 + row)
        assert torch.equal(alone[0], ours[row, : length - 6 + row])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(isa: str, interleaved: bool) -> None:
    whole, angle = random(5, 3, 40), random(5, 16, seed=1)
    ours, expected = whole.clone(), whole.clone()
    cpu.rope(ours[:, :, 8:], angle.cos(), angle.sin(), interleaved)
    reference.rope(expected[:, :, 8:], angle.cos(), angle.sin(), interleaved)
    assert error(ours, expected) < CLOSE
    assert torch.equal(ours[:, :, :8], whole[:, :, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_write(isa: str, dtype: torch.dtype) -> None:
    x, page, offset = random(4, 2, 20)[:, :, 3:], torch.tensor([2, 0, 2, 1]), torch.tensor([0, 15, 1, 7])
    ours, expected = pool_of(3, 2, 17, dtype), pool_of(3, 2, 17, dtype)
    cpu.paged_write(ours, page, offset, x)
    reference.paged_write(expected, page, offset, x)
    assert torch.equal(ours, expected)


def test_rms_norm(isa: str) -> None:
    x, weight = random(5, 100)[:, :90], random(90, seed=1)
    assert error(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < CLOSE


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    weight, x = stored(300, 256, "fp8"), random(200, 256)
    packed = cpu.pack(weight, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- packing


@pytest.mark.parametrize(("n", "k"), [(64, 32), (64, 65), (200, 33), (1, 1), (130, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_panels_hold_the_numbers_where_the_layout_says(n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    """common.h: panels of 64 outputs; words of 4 bytes along k, those of the 64 outputs side by side."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)
    per_word = 4 // dtype.itemsize
    padded = torch.zeros(-(-n // 64) * 64, -(-k // per_word) * per_word, dtype=dtype)
    padded[:n, :k] = weight
    expected = padded.view(-1, 64, padded.shape[1] // per_word, per_word).transpose(1, 2).contiguous()
    assert packed_bytes(cpu.pack(Plain(weight), dtype)) == expected.view(torch.uint8).numpy().tobytes()
    strided = torch.zeros(n, k + 3, dtype=dtype)
    strided[:, :k] = weight
    assert packed_bytes(cpu.pack(Plain(strided[:, :k]), dtype)) == expected.view(torch.uint8).numpy().tobytes()


def test_float32_is_rounded_as_torch_rounds(isa: str) -> None:
    """Ties to even, subnormal numbers, zeros of both signs, the largest that stays finite."""
    bits = torch.randint(0, 1 << 32, (300, 77), generator=torch.Generator().manual_seed(1))
    bits[::7] = bits[::7] & ~0xFFFF | 0x8000  # ties
    bits[::11] &= 0x807FFFFF  # subnormal
    weight = bits.to(torch.int32).view(torch.float32)
    weight[~weight.isfinite() | ~weight.bfloat16().isfinite()] = -0.0
    weight[0, 0] = 3.3895313892515355e38
    assert packed_bytes(cpu.pack(Plain(weight), torch.bfloat16)) == packed_bytes(
        cpu.pack(Plain(weight.bfloat16()), torch.bfloat16)
    )
    for bad in (torch.finfo(torch.float32).max, math.inf, -math.inf, math.nan):
        weight[299, 76] = bad
        with pytest.raises(Damaged):
            cpu.pack(Plain(weight), torch.bfloat16)


def packed_bytes(packed: Packed) -> bytes:
    return ctypes.string_at(packed.struct.data, packed.nbytes)
