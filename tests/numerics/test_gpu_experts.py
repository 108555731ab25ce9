"""The GPU kernels for routing and experts against the plain ops that define them,
in Triton's interpreter (or on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import CLOSE, CLOSE_BFLOAT16, DEVICE, ROWS, UNUSED_SLOTS, error, fp8, gpu, random, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.engine.kernels import gpu_four_bit, gpu_gemm, gpu_moe, gpu_rows, reference, w8a8
from distill.engine.kernels.four_bit import E2M1_VALUES, INT4_VALUES, FourBit
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


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([16, 32]))
def test_slots_of_any_routing(pairs: list[int], rows: int) -> None:
    made = gpu_moe.slots(torch.tensor(pairs, dtype=torch.int32, device=DEVICE)[:, None], 6, rows)
    assert [made.expert_b.tolist()[slot // rows] for slot in made.slot_p.tolist()] == pairs
    assert sorted(pair for pair in made.pair_s.tolist() if pair >= 0)[: len(pairs)] == list(range(len(pairs)))


@pytest.mark.one_in(3)
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


@pytest.mark.slow
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


def four_bit(n: int, c: int, kind: str, seed: int) -> FourBit:
    draw = torch.Generator().manual_seed(seed)
    group = {"int4": 32, "row": c, "mxfp4": 32, "nvfp4": 16, "wide": 128}[kind]
    codes = torch.randint(256, (n, c // 2), generator=draw).to(torch.uint8)
    if kind == "mxfp4":
        exponents = torch.randint(118, 124, (n, c // group), generator=draw).to(torch.uint8)
        return FourBit(codes, exponents.view(torch.float8_e8m0fnu), E2M1_VALUES)
    scales = torch.rand(n, c // group, generator=draw) / 16 + 0.01
    if kind == "nvfp4":
        return FourBit(codes, (scales * 448).to(torch.float8_e4m3fn), E2M1_VALUES, 0.0123 * seed, 3.7)
    return FourBit(codes, scales.to(torch.float16 if kind == "wide" else torch.bfloat16), INT4_VALUES)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("resident", [4, slow(1)])
@pytest.mark.parametrize(
    ("kind", "dtype", "c"),
    [(kind, torch.bfloat16, 192) for kind in ("int4", "row", "mxfp4", "nvfp4")]
    + [("nvfp4", torch.float32, 192), ("wide", torch.bfloat16, 256)],
)
def test_experts_in_four_bits_stay_so(kind: str, dtype: torch.dtype, c: int, resident: int) -> None:
    """The products are those with the decoded matrices, wherever an expert is."""
    f = 128 if kind == "wide" else 96
    experts = [
        tuple(four_bit(*shape, kind, 3 * i + j) for j, shape in enumerate(((f, c), (f, c), (c, f)))) for i in range(4)
    ]
    decoded = [tuple(Plain(matrix.dense(dtype)) for matrix in expert) for expert in experts]
    x = random(5, c, seed=5, dtype=dtype)
    chosen, weights = routing("even", 5, 3, 4).int(), random(5, 3, seed=7).abs()
    outs = []
    for each in (experts, decoded):
        bank = gpu.expert_bank(4, dtype, each[0])
        for expert in each:
            bank.lend(expert)
        bank.settle(resident)
        if resident < 4:
            memory = gpu.arena(bank.bytes_each * (4 - resident))
            bank.fill(memory)
            bank.install(memory)
        outs.append(gpu.experts(x, chosen, weights, bank, None, torch.zeros_like(x)))
    assert error(*outs) < 1e-6  # the order of the sums is that of the tile
    assert gpu_four_bit.takes(experts[0])


@pytest.mark.parametrize("numbers", [INT4_VALUES, E2M1_VALUES])
def test_every_code_in_four_bits_times_every_scale(numbers: tuple[float, ...]) -> None:
    """A row for each scale, a column for each code: the decoded matrix comes back when it is multiplied by one."""
    scales = torch.arange(253, dtype=torch.uint8).repeat(2)  # with the last of E8M0, codes are infinite
    scales = scales.view(torch.float8_e8m0fnu) if numbers is E2M1_VALUES else scales.float() / 7
    codes = torch.arange(16, dtype=torch.uint8).view(8, 2)
    row = (codes[:, 0] | codes[:, 1] << 4).repeat(8)  # 128 columns
    gate = FourBit(row.repeat(len(scales), 1), scales[:, None].expand(-1, 4).contiguous(), numbers)
    down = FourBit(torch.zeros(128, len(gate.codes) // 2, dtype=torch.uint8), torch.ones(128, 1), INT4_VALUES)
    bank = gpu_four_bit.FourBitBank(1, torch.float32, DEVICE)
    bank.lend((gate, gate, down))
    bank.settle()
    one, expert_b = torch.eye(128, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    out = gpu_four_bit.grouped(one, None, 1, bank.gate_up, expert_b, Tile(64, 128, 1, 4, 3))
    assert torch.equal(out[:, : len(gate.codes)].T.cpu(), gate.dense(torch.float32))


@pytest.mark.parametrize("resident", [0, 2])
def test_experts_in_groups_that_are_not_those_of_a_step_are_decoded_when_they_are_loaded(resident: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(72).view(192, 96)
    matrix = FourBit(codes, torch.full((192, 2), 0.3).bfloat16(), INT4_VALUES)  # 96 columns
    forms = (matrix, Plain(matrix.dense(torch.bfloat16)))
    banks = [gpu.expert_bank(2, torch.bfloat16, (form,) * 3) for form in forms]
    for bank, form in zip(banks, forms, strict=True):
        for _ in range(2):
            bank.lend((form, form, form))
        bank.settle(resident)
    assert torch.equal(banks[0]._here, banks[1]._here) and torch.equal(banks[0]._there, banks[1]._there)


@pytest.mark.one_in(11)
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
