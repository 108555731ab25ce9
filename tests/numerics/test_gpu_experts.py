"""The GPU kernels for routing and experts against the plain ops that define them,
in Triton's interpreter (or on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import CLOSE, CLOSE_BFLOAT16, DEVICE, ROWS, UNUSED_SLOTS, error, fp8, gpu, random, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.engine.kernels import gpu_gemm, gpu_moe, gpu_rows, reference, w8a8
from distill.engine.kernels.four_bit import INT4_VALUES, FourBit
from distill.engine.kernels.gpu_tiles import Tile
from distill.engine.kernels.stored import Damaged, Plain

pytestmark = UNUSED_SLOTS


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


@pytest.mark.parametrize(
    ("t", "kind", "ue8m0"),
    [(1, "even", False), (7, "one", False), (7, "even", True)]
    + [slow(129, "empty", True)]
    + [slow(t, kind, ue8m0) for t in ROWS for kind, ue8m0 in (("even", False), ("even", True), ("one", False))],
)
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


@pytest.mark.parametrize("resident", [0, 2])
def test_experts_in_four_bits_are_decoded_when_they_are_loaded(resident: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64).view(256, 64)  # [256, 128]
    matrix = FourBit(codes, torch.full((256, 4), 0.3).bfloat16(), INT4_VALUES)
    banks = [gpu.expert_bank(2, torch.bfloat16, form) for form in (matrix, Plain(matrix.dense(torch.bfloat16)))]
    for bank, form in zip(banks, (matrix, Plain(matrix.dense(torch.bfloat16))), strict=True):
        for _ in range(2):
            bank.lend((form.rows(0, 128), form.rows(128, 256), form.rows(5, 133)))
        bank.settle(resident)
    assert torch.equal(banks[0]._here, banks[1]._here) and torch.equal(banks[0]._there, banks[1]._there)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "options",
    [
        ("sigmoid", "best two", 4, 2, 3, True, 2.5),
        ("sigmoid", "best two", 1, 1, 3, True, 2.5),
        ("softmax", "best", 4, 2, 3, False, 16.0),
        ("softmax", "best", 1, 1, 6, False, 1.0),
    ],
)
@pytest.mark.parametrize(("experts", "bias"), [(16, True), (20, False), slow(16, False), slow(20, True)])
def test_route(options: tuple, experts: int, bias: bool) -> None:
    logits, bias_x = random(129, experts), random(experts, seed=1) if bias else None
    ours, theirs = gpu_moe.route(logits, bias_x, *options), reference.route(logits, bias_x, *options)
    assert torch.equal(ours[0].long(), theirs[0])
    assert error(ours[1], theirs[1]) < 1e-6
