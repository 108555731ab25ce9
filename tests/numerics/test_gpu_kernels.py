"""The GPU kernels for activations and products against the plain ops that define them,
in Triton's interpreter (or on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import CLOSE, CLOSE_BFLOAT16, DEVICE, ROWS, UNUSED_SLOTS, error, fp8, gpu, random, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill.engine.kernels import gpu_gemm, gpu_rows, reference, w8a8
from distill.engine.kernels.gpu_tiles import Tile, grouped_tile, linear_tile
from distill.engine.kernels.stored import dequantize_fp8_block

pytestmark = UNUSED_SLOTS


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


@pytest.mark.one_in(11)
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [64, 576, 1408])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise(rows: int, columns: int, dtype: torch.dtype, ue8m0: bool) -> None:
    x = random(rows, columns, dtype=dtype) * random(rows, 1, seed=1).exp().to(dtype)
    same(gpu_rows.quantise(x, ue8m0), w8a8.quantise(x, ue8m0))


@pytest.mark.one_in(5)
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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(7)
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


@pytest.mark.one_in(7)
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


# ---- tiles


@given(st.integers(1, 16384), st.integers(1, 20000), st.integers(1, 150))
def test_tiles_are_possible(rows: int, columns: int, groups: int) -> None:
    tile = linear_tile(rows, columns, groups)
    assert 128 % tile.columns == 0 and tile.rows in (16, 32, 64, 128)
    assert tile.parts == 1 or tile.parts * 4 <= groups
    assert tile.stages * (tile.rows + tile.columns) * 128 < 227 << 10
    assert 128 % grouped_tile(rows, columns).columns == 0
