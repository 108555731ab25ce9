"""Every GPU kernel against the plain op that defines it, in Triton's interpreter (or on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.engine.kernels import reference, w8a8
from distill.engine.kernels.stored import Damaged, Fp8, Plain, dequantize_fp8_block

gpu = pytest.importorskip("distill.engine.kernels.gpu", reason="triton is not installed: pip install triton")
from distill.engine.kernels import (  # noqa: E402
    gpu_attention,
    gpu_draw,
    gpu_gemm,
    gpu_moe,
    gpu_rows,
)
from distill.engine.kernels.gpu_tiles import Tile, grouped_tile, linear_tile  # noqa: E402

DEVICE = gpu.device()
# Slots that nobody fills hold whatever lay there, and the interpreter computes on it as a GPU does.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROWS = [1, 7, 129]
CLOSE, CLOSE_BFLOAT16 = 1e-3, 1e-2


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


# ---- activations


def test_quantising_by_hand() -> None:
    x = torch.tensor([[448.0, 2.0] + [0.0] * 126 + [1.0, -0.5]], device=DEVICE)
    made = w8a8.quantise(x)
    assert made.scale.tolist() == [[1.0, pytest.approx(1 / 448)]]
    assert made.codes.float()[0, :2].tolist() == [448.0, 2.0]
    assert made.codes.float()[0, 128:130].tolist() == [448.0, -224.0]
    assert w8a8.quantise(x, ue8m0=True).scale.tolist() == [[1.0, 2.0**-8]]
    assert w8a8.quantise(torch.zeros(1, 1)).scale.item() == pytest.approx(1e-4 / 448)


@given(st.floats(2.0**-120, 2.0**120, width=32))
def test_powers_of_two(x: float) -> None:
    above = w8a8.power_of_two_above(torch.tensor(x)).item()
    assert x <= above < 2 * x and torch.tensor(above).frexp().mantissa == 0.5


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [64, 576, 1408])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise(rows: int, columns: int, dtype: torch.dtype, ue8m0: bool) -> None:
    x = random(rows, columns, dtype=dtype) * random(rows, 1, seed=1).exp().to(dtype)
    same(gpu_rows.quantise(x, ue8m0), w8a8.quantise(x, ue8m0))


@pytest.mark.parametrize("ue8m0", [None, False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [48, 576])
def test_rms_norm(rows: int, columns: int, ue8m0: bool | None) -> None:
    x, weight = random(rows, columns, dtype=torch.bfloat16), random(columns, seed=1, dtype=torch.bfloat16)
    ours, quantised = gpu_rows.rms_norm(x, weight, 1e-6, ue8m0)
    assert error(ours, reference.rms_norm(x.float(), weight.float(), 1e-6)) < CLOSE_BFLOAT16
    assert (quantised is None) == (ue8m0 is None)
    if quantised is not None:
        same(quantised, w8a8.quantise(ours, bool(ue8m0)))


@pytest.mark.parametrize("ue8m0", [None, False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows: int, ue8m0: bool | None) -> None:
    both = random(rows, 2 * 200, dtype=torch.bfloat16)
    gate, up = both.chunk(2, dim=1)
    plain = gpu_rows.swiglu(gate, up)
    assert error(plain, torch.nn.functional.silu(gate.float()) * up.float()) < CLOSE_BFLOAT16
    if ue8m0 is not None:
        same(gpu_rows.swiglu(gate, up, ue8m0), w8a8.quantise(plain, ue8m0))


@pytest.mark.parametrize("ue8m0", [None, False])
def test_swiglu_of_the_slots_in_use(ue8m0: bool | None) -> None:
    gate, up = random(5, 2 * 200, dtype=torch.bfloat16).chunk(2, dim=1)
    used = torch.tensor([3, -1, 0, -1, 7], dtype=torch.int32, device=gate.device)
    some, every = (gpu_rows.swiglu(gate, up, ue8m0, which) for which in (used, None))
    at = (used >= 0).nonzero()[:, 0]
    if ue8m0 is None:
        assert torch.equal(some[at], every[at])
    else:
        same(w8a8.Quantised(some.codes[at], some.scale[at]), w8a8.Quantised(every.codes[at], every.scale[at]))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope(interleaved: bool, dtype: torch.dtype) -> None:
    x, angle = random(7, 20, 40, dtype=dtype), random(7, 8, seed=1)
    ours, theirs = x.clone(), x.clone()
    for op, x in ((gpu_rows.rope, ours), (reference.rope, theirs)):
        op(x[..., 24:], angle.cos(), angle.sin(), interleaved)
    assert torch.equal(ours[..., :24], theirs[..., :24])
    assert error(ours, theirs) < (1e-6 if dtype == torch.float32 else CLOSE_BFLOAT16)


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


@pytest.mark.parametrize("behind", [False, True])
def test_per_head(behind: bool) -> None:
    wide, weight = random(6, 3 * 24, dtype=torch.bfloat16).view(6, 3, 24), random(3, 20, 16, dtype=torch.bfloat16)
    x, rest = wide[..., :16], wide[..., 16:] if behind else None
    ours, theirs = gpu.per_head(x, weight, rest), reference.per_head(x, weight, rest)
    assert ours.is_contiguous() and error(ours, theirs) < CLOSE_BFLOAT16
    if rest is not None:
        assert torch.equal(ours[..., 20:], rest)


# ---- products


def test_matrices_side_by_side_are_one_product() -> None:
    stored = [fp8(256, 300, seed=1), fp8(70, 300, seed=2)]
    alone = [w8a8.fp8_matrix(one) for one in stored]
    together = gpu.side_by_side(alone)
    assert together[0].whole is together[1].whole is not None
    x = random(9, 300, seed=3, dtype=torch.bfloat16)
    for matrices in (alone, together):
        made = gpu.linears(x, matrices, [None, None])
        for ours, weight in zip(made, alone, strict=True):
            assert error(ours, w8a8.linear(x, weight)) < CLOSE_BFLOAT16
    for one, other in zip(together, alone, strict=True):
        same(w8a8.Quantised(one.codes, one.scale), w8a8.Quantised(other.codes, other.scale))
    assert gpu.side_by_side(alone[::-1])[0].whole is None, "the second's blocks of 128 would not begin with it"
    assert gpu.side_by_side([alone[0], x]) == [alone[0], x], "one is not FP8"


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(576, 1024), (128, 300), (200, 128)])
def test_linear(rows: int, shape: tuple[int, int], ue8m0: bool) -> None:
    weight = w8a8.fp8_matrix(fp8(*shape, ue8m0=ue8m0))
    x = w8a8.quantise(random(rows, shape[1], seed=2), ue8m0)
    ours = gpu_gemm.linear(gpu_rows.quantise(random(rows, shape[1], seed=2), ue8m0), weight)
    assert error(ours, w8a8.product(x, weight)) < CLOSE_BFLOAT16
    exact = x.codes.double().unflatten(1, (-1, 128)) * x.scale.double()[..., None]
    dense = dequantize_fp8_block(weight.codes, weight.scale, torch.float64)
    assert error(w8a8.product(x, weight), exact.flatten(1) @ dense.T) < CLOSE
    assert torch.equal(ours, gpu_gemm.linear(gpu_rows.quantise(random(rows, shape[1], seed=2), ue8m0), weight))


@pytest.mark.parametrize(
    "tile", [Tile(16, 64, 1, 4, 2), Tile(16, 64, 3, 4, 2), Tile(64, 128, 2, 4, 2), Tile(128, 128, 1, 8, 2)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_every_way_through_linear(tile: Tile, bias: bool, onto: bool) -> None:
    weight, x = w8a8.fp8_matrix(fp8(192, 640)), gpu_rows.quantise(random(129, 640, seed=2))
    bias_n = random(192, seed=3, dtype=torch.bfloat16) if bias else None
    onto_mn = random(129, 192, seed=4, dtype=torch.bfloat16)
    theirs = w8a8.linear(x, weight, bias_n, onto_mn.clone() if onto else None)
    ours = gpu_gemm.linear(x, weight, bias_n, onto_mn if onto else None, tile)
    assert error(ours, theirs) < CLOSE_BFLOAT16
    assert not onto or ours is onto_mn


def test_where_the_table_names_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`scaled_mm` needs a GPU, so one that does what its documentation says stands in for it."""

    def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, a_recipe: object, b_scale: Tensor, b_recipe: object,
                  *swizzles: object, output_dtype: torch.dtype) -> Tensor:  # fmt: skip
        kinds = torch.nn.functional.ScalingType
        assert (a_recipe, b_recipe) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
        assert len(a) % 4 == 0 and a.stride(1) == b.stride(0) == a_scale.stride(0) == b_scale.stride(0) == 1
        return w8a8.product(w8a8.Quantised(a, a_scale), w8a8.Fp8Matrix(b.T, b_scale.T, False)).to(output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    weight, x = w8a8.fp8_matrix(fp8(256, 384)), gpu_rows.quantise(random(9, 384, seed=2))
    bias, onto = random(256, seed=3, dtype=torch.bfloat16), random(9, 256, seed=4, dtype=torch.bfloat16)
    theirs = w8a8.linear(x, weight, bias, onto.clone())
    tile = Tile(64, 128, 1, 4, 2, "torch")
    assert error(gpu_gemm.linear(x, weight, bias, onto, tile), theirs) < CLOSE_BFLOAT16


def routing(kind: str, t: int, k: int, experts: int) -> Tensor:
    if kind == "one":
        return torch.full((t, 1), experts - 1, device=DEVICE)
    chosen = torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:k] for i in range(t)])
    return (chosen // 2 * 2 if kind == "empty" else chosen).to(DEVICE)


@pytest.mark.parametrize("kind", ["even", "empty", "one"])
@pytest.mark.parametrize("t", ROWS)
@pytest.mark.parametrize("rows", [16, 64])
def test_slots(kind: str, t: int, rows: int) -> None:
    experts_tk = routing(kind, t, 3, 8).int()
    made = gpu_moe.slots(experts_tk, 8, rows)
    pairs = experts_tk.flatten().tolist()
    block = made.expert_b.tolist()
    at = made.slot_p.tolist()
    assert len(set(at)) == len(pairs)
    assert [block[slot // rows] for slot in at] == pairs
    taken = {slot: pair for pair, slot in enumerate(at)}
    needed = sum(-(-pairs.count(expert) // rows) for expert in range(8))
    assert [e for e in block if e >= 0] == block[:needed] == sorted(block[:needed])
    assert made.pair_s.tolist()[: needed * rows] == [taken.get(slot, -1) for slot in range(needed * rows)]
    for expert in range(8):  # tokens in order
        slots = [slot for slot, pair in zip(at, pairs, strict=True) if pair == expert]
        assert slots == list(range(slots[0], slots[0] + len(slots))) if slots else True


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([16, 32]))
def test_slots_of_any_routing(pairs: list[int], rows: int) -> None:
    made = gpu_moe.slots(torch.tensor(pairs, dtype=torch.int32, device=DEVICE)[:, None], 6, rows)
    assert [made.expert_b.tolist()[slot // rows] for slot in made.slot_p.tolist()] == pairs
    assert sorted(pair for pair in made.pair_s.tolist() if pair >= 0)[: len(pairs)] == list(range(len(pairs)))


@pytest.mark.parametrize("t", ROWS)
@pytest.mark.parametrize(("kind", "ue8m0"), [("even", False), ("even", True), ("empty", True), ("one", False)])
def test_experts(t: int, kind: str, ue8m0: bool) -> None:
    check_experts(t, kind, ue8m0, torch.bfloat16, shared=True)


def test_experts_that_lie_far_apart() -> None:
    """As 256 of DeepSeek-V3's do: a scale's place is beyond what 32 bits count. Nobody fills the room between."""
    apart = 2**30 + 16
    scale = torch.empty(2 * apart + 1, device=DEVICE).as_strided((3, 1), (apart, 1))
    scale[2] = 0.25
    values = torch.stack([fp8(128, 128, seed).codes for seed in range(3)])
    x, expert_b = gpu_rows.quantise(random(16, 128)), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    row_s = torch.arange(16, dtype=torch.int32, device=DEVICE)
    places = [gpu_gemm.Matrices(values, scale, 0)]
    ours = gpu_gemm.grouped(x, row_s, 1, places, expert_b, Tile(16, 128, 1, 4, 3))
    assert error(ours, w8a8.product(x, w8a8.Fp8Matrix(values[2], scale[2:], False))) < CLOSE_BFLOAT16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["fp8", "plain"])
def test_experts_that_are_not_multiplied_in_fp8(dtype: torch.dtype, stored: str) -> None:
    if (dtype, stored) != (torch.bfloat16, "fp8"):
        check_experts(7, "even", False, dtype, shared=False, plain=stored == "plain")


def check_experts(t: int, kind: str, ue8m0: bool, dtype: torch.dtype, shared: bool, plain: bool = False) -> None:
    experts, c, f = 8, 200, 96
    ours_bank, bank = gpu.expert_bank(experts, dtype), w8a8.expert_bank(experts, dtype)
    for i in range(experts):
        shapes = ((f, c), (f, c), (c, f))
        parts = tuple(fp8(*shape, seed=10 * i + j, ue8m0=ue8m0) for j, shape in enumerate(shapes))
        if plain:
            parts = tuple(Plain(part.dense(torch.float32)) for part in parts)
        ours_bank.lend(parts)
        bank.lend(parts)
    ours_bank.settle()
    bank.settle()
    x, onto = random(t, c, seed=5, dtype=dtype), random(t, c, seed=6, dtype=dtype)
    experts_tk = routing(kind, t, 3, experts)
    weights_tk = random(*experts_tk.shape, seed=7).abs()
    packed = None
    if shared:
        packed = tuple(w8a8.fp8_matrix(fp8(*shape, seed=90 + j, ue8m0=ue8m0)) for j, shape in enumerate(shapes))
    theirs = w8a8.experts(x, experts_tk, weights_tk, bank, packed, torch.zeros_like(onto))
    ours = gpu.experts(x, experts_tk.int(), weights_tk, ours_bank, packed, torch.zeros_like(onto))
    assert error(ours, theirs) < (CLOSE_BFLOAT16 if dtype == torch.bfloat16 else CLOSE)
    added = gpu.experts(x, experts_tk.int(), weights_tk, ours_bank, packed, onto)
    assert added is onto and error(added, theirs + random(t, c, seed=6, dtype=dtype)) < CLOSE_BFLOAT16
    assert torch.equal(ours, gpu.experts(x, experts_tk.int(), weights_tk, ours_bank, packed, torch.zeros_like(onto)))


@pytest.mark.parametrize("what", ["codes", "scale"])
@pytest.mark.parametrize("resident", [0, 4])
def test_damaged_experts_are_named(what: str, resident: int) -> None:
    bank = gpu.expert_bank(4, torch.bfloat16)
    for index in range(4):
        parts = [fp8(128, 128), fp8(128, 128), fp8(128, 128)]
        if index == 2 and what == "codes":
            parts[1].codes.view(torch.uint8)[5, 7] = 0xFF
        elif index == 2:
            parts[1].scale[0, 0] = float("inf")
        bank.lend(tuple(parts))
    with pytest.raises(Damaged) as damage:
        bank.settle(resident)
    assert (damage.value.what, damage.value.expert, damage.value.part) == (what, 2, 1)


@pytest.mark.parametrize(
    "options",
    [
        ("sigmoid", "best two", 4, 2, 3, True, 2.5),
        ("sigmoid", "best two", 1, 1, 3, True, 2.5),
        ("softmax", "best", 4, 2, 3, False, 16.0),
        ("softmax", "best", 1, 1, 6, False, 1.0),
    ],
)
@pytest.mark.parametrize("experts", [16, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_route(options: tuple, experts: int, bias: bool) -> None:
    logits, bias_x = random(129, experts), random(experts, seed=1) if bias else None
    ours, theirs = gpu_moe.route(logits, bias_x, *options), reference.route(logits, bias_x, *options)
    assert torch.equal(ours[0].long(), theirs[0])
    assert error(ours[1], theirs[1]) < 1e-6


# ---- attention


def paged(b: int, longest: int, page: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Tables of shuffled pages and lengths, one of them 1; and how many pages there are."""
    per = -(-longest // page)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(b * per, generator=generator).view(b, per)
    lengths = torch.randint(1, longest + 1, (b,), generator=generator)
    lengths[0], lengths[-1] = longest, 1
    return table.to(DEVICE), lengths.to(DEVICE), b * per


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 16, 72])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (40, 2)])
def test_decode_gqa(heads: tuple[int, int], dtype: torch.dtype) -> None:
    table, lengths, pages = paged(3, 300, 16)
    k_pool, v_pool = (random(pages, heads[1], 16, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    q = random(3, heads[0], 24, dtype=dtype)
    theirs = reference.decode_gqa(q.float(), k_pool.float(), v_pool.float(), table, lengths, 0.2)
    ours = gpu_attention.decode_gqa(q, k_pool, v_pool, table, lengths, 0.2)
    assert error(ours, theirs) < (CLOSE if dtype == torch.float32 else CLOSE_BFLOAT16)


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


# ---- sampling


@pytest.mark.parametrize("vocab", [50, 5000])
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


# ---- tiles


@given(st.integers(1, 16384), st.integers(1, 20000), st.integers(1, 150))
def test_tiles_are_possible(rows: int, columns: int, groups: int) -> None:
    tile = linear_tile(rows, columns, groups)
    assert 128 % tile.columns == 0 and tile.rows in (16, 32, 64, 128)
    assert tile.parts == 1 or tile.parts * 4 <= groups
    assert tile.stages * (tile.rows + tile.columns) * 128 < 227 << 10
    assert 128 % grouped_tile(rows, columns).columns == 0
