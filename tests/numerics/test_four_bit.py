"""Weights in four bits: every code with every scale against values worked out apart, the packers, and the products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from four_bit_models import e2m1, e4m3, e8m0, int4, pack, pack_words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.engine.kernels import cpu, reference
from distill.engine.kernels.four_bit import E2M1_VALUES, INT4_VALUES, FourBit
from distill.engine.kernels.stored import Damaged, Plain

CODES = list(range(16))


def rounded(exact: np.ndarray) -> Tensor:
    """float64 numbers as bfloat16, to nearest, ties to even, by their own arithmetic; what is below its range in
    steps of 2**-133."""
    exponent = np.maximum(np.floor(np.log2(np.abs(exact), where=exact != 0, out=np.full_like(exact, -200.0))), -126)
    step = np.exp2(exponent - 7)
    return torch.from_numpy(np.rint(exact / step) * step)


def by_scale(scales: Tensor, table: tuple[float, ...], group: int, **values: float) -> FourBit:
    """One row a scale, all codes in it."""
    row = [CODES * (group // 16)] * len(scales)
    return FourBit(pack(row), scales[:, None], table, **values)


def test_the_tables_are_those_of_the_formats() -> None:
    assert [int4(code) for code in CODES] == list(INT4_VALUES) == list(range(-8, 8))
    assert [e2m1(code) for code in CODES] == list(E2M1_VALUES)
    assert str(E2M1_VALUES[8]) == "-0.0"


def test_every_int4_code_with_every_scale() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        scales = bits.view(dtype)
        scales = scales[scales.isfinite() & ((scales * 8).isfinite())]
        matrix = by_scale(scales, INT4_VALUES, 16)
        exact = scales.double().numpy()[:, None] * np.array([int4(code) for code in CODES])
        assert matrix.name == "int4 group 16" and matrix.shape == (len(scales), 16)
        assert torch.equal(matrix.dense(torch.float32).double(), torch.from_numpy(exact)), "not exact in float32"
        assert torch.equal(matrix.dense(torch.bfloat16).double(), rounded(exact)), "not rounded once"


def test_every_mxfp4_code_with_every_scale() -> None:
    bytes_ = torch.arange(255, dtype=torch.uint8)
    matrix = by_scale(bytes_.view(torch.float8_e8m0fnu), E2M1_VALUES, 32)
    exact = torch.tensor([[e8m0(byte) * e2m1(code) for code in CODES * 2] for byte in range(255)], dtype=torch.float64)
    finite = exact.abs() < 2.0**128
    assert matrix.name == "mxfp4 group 32"
    for dtype in (torch.float32, torch.bfloat16):
        ours = matrix.dense(dtype).double()
        assert torch.equal(ours[finite], exact[finite]), f"not exact in {dtype}"
        assert ours[~finite].isinf().all()
    assert matrix.kept_dtype(torch.float32) == torch.bfloat16, "bfloat16 holds every number"


@pytest.mark.parametrize("of_all", [1.0, 0.5, 3.1e-5, 7.77])
def test_every_nvfp4_code_with_every_scale(of_all: float) -> None:
    """Twice rounded, to float32: the scale, and the number."""
    bytes_ = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    number = np.float32(of_all)
    scale = np.array([e4m3(byte) for byte in bytes_.tolist()], dtype=np.float32)
    for values, by_group in (({"factor": float(number)}, scale * number), ({"divisor": float(number)}, scale / number)):
        matrix = by_scale(bytes_.view(torch.float8_e4m3fn), E2M1_VALUES, 16, **values)
        expected = by_group[:, None] * np.array([e2m1(code) for code in CODES], dtype=np.float32)
        assert expected.dtype == np.float32 and matrix.name == "nvfp4 group 16"
        assert torch.equal(matrix.dense(torch.float32), torch.from_numpy(expected))
        assert torch.equal(matrix.dense(torch.bfloat16).double(), rounded(expected.astype(np.float64)))


def some(n: int, c: int, kind: str, seed: int = 0) -> FourBit:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (n, c // 2), generator=generator).to(torch.uint8)
    if kind == "int4":
        scales = (torch.rand(n, c // 32, generator=generator) + 0.1).bfloat16()
        return FourBit(codes, scales, INT4_VALUES)
    if kind == "mxfp4":
        exponents = torch.randint(120, 130, (n, c // 32), generator=generator).to(torch.uint8)
        return FourBit(codes, exponents.view(torch.float8_e8m0fnu), E2M1_VALUES)
    scales = (torch.rand(n, c // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    return FourBit(codes, scales, E2M1_VALUES, factor=float(np.float32(0.0123)))


def test_other_libraries_decode_to_the_same_numbers() -> None:
    """transformers for gpt-oss's blocks and for DeepSeek-V4's FP4, torchao for NVFP4."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    matrix = some(6, 96, "mxfp4")
    blocks, exponents = matrix.codes.view(1, 6, 3, 16), matrix.scales.view(torch.uint8).view(1, 6, 3)
    theirs = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)[0]
    theirs = theirs if theirs.shape == (6, 96) else theirs.T  # some versions return it transposed
    assert torch.equal(matrix.dense(torch.float32), theirs)
    dequantise = Fp8Dequantize(None)._dequantize_one
    theirs = dequantise(matrix.codes.view(torch.int8), matrix.scales, output_dtype=torch.bfloat16)
    assert torch.equal(matrix.dense(torch.bfloat16), theirs)

    matrix = some(32, 96, "nvfp4")
    factor = torch.tensor(matrix.factor)
    theirs = NVFP4Tensor(matrix.codes, matrix.scales, 16, torch.float32, factor).dequantize()
    assert torch.equal(matrix.dense(torch.float32), theirs)


rows = st.integers(1, 4).flatmap(
    lambda words: st.lists(st.lists(st.integers(0, 15), min_size=8 * words, max_size=8 * words), min_size=1, max_size=5)
)


@settings(max_examples=40)
@given(rows)
def test_codes_in_words_are_codes_in_bytes(codes: list[list[int]]) -> None:
    words = pack_words(codes)
    assert torch.equal(words.view(torch.uint8), pack(codes))
    matrix = FourBit(words.view(torch.uint8), torch.ones(len(codes), 1), INT4_VALUES)
    assert matrix.dense(torch.float32).tolist() == [[int4(code) for code in row] for row in codes]
    assert matrix.transposed().numbers.T.tolist() == matrix.dense(torch.float32).tolist()
    assert torch.equal(matrix.rows(0, 1).dense(torch.float32), matrix.dense(torch.float32)[:1])


def test_scales_that_are_not_finite_are_damage() -> None:
    for kind, bad in (("int4", float("nan")), ("int4", float("inf")), ("nvfp4", float("nan"))):
        matrix = some(4, 64, kind)
        matrix.check()
        matrix.scales[2, 1] = bad
        with pytest.raises(Damaged) as damage:
            matrix.check(3, 1)
        assert (damage.value.what, damage.value.expert, damage.value.part) == ("scale", 3, 1)
    matrix = some(4, 64, "mxfp4")
    for byte in (255, 254):  # NaN, and one with which the largest code is infinite
        matrix.scales.view(torch.uint8)[1, 0] = byte
        with pytest.raises(Damaged):
            matrix.check()


@pytest.fixture(params=["reference", "cpu"])
def column(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    return cpu if request.param == "cpu" else reference


def bank_of(column: Any, experts: list[tuple[Any, ...]], dtype: torch.dtype, resident: int | None = None) -> Any:
    bank = column.expert_bank(len(experts), dtype, experts[0])
    for expert in experts:
        bank.lend(expert)
    bank.settle(resident)
    return bank


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_with_the_decoded_matrix(column: Any, kind: str, dtype: torch.dtype) -> None:
    matrix = some(70, 96, kind)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(column.activation_dtype(dtype))
    kept = matrix.kept_dtype(dtype) if column is cpu else dtype
    decoded = column.pack(Plain(matrix.dense(kept)), dtype)
    assert torch.equal(matrix.dense(kept).float(), matrix.dense(dtype).float()), "a number was rounded"
    assert torch.equal(column.linear(x, column.pack(matrix, dtype)), column.linear(x, decoded))


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(column: Any, kind: str, dtype: torch.dtype) -> None:
    """As the definition on decoded matrices; in each place of memory, alone and in a batch of 64 the same bits."""
    count, f, c, tokens = 6, 64, 96, 64
    experts = [(some(f, c, kind, i), some(f, c, kind, 10 + i), some(c, f, kind, 20 + i)) for i in range(count)]
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(tokens, c, generator=generator) / 50).to(column.activation_dtype(dtype))
    chosen = torch.stack([torch.randperm(count, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator)
    onto = torch.randn(tokens, c, generator=generator).to(x.dtype)

    bank = bank_of(column, experts, dtype)
    ours = column.experts(x, chosen, weights, bank, None, onto.clone())
    plain = bank_of(reference, [tuple(Plain(matrix.dense(dtype)) for matrix in expert) for expert in experts], dtype)
    expected = reference.experts(x.to(dtype), chosen, weights, plain, None, onto.clone().to(dtype))
    error = (ours.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    if column is cpu:
        packed = [tuple(cpu.pack(matrix, dtype) for matrix in expert) for expert in experts]
        by_hand = onto.clone()
        for t in range(tokens):
            total = torch.zeros(c)
            for index, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                gate, up, down = packed[index]
                total += cpu.linear(cpu.swiglu_linear(x[t : t + 1], gate, up), down)[0] * weight
            by_hand[t] += total
        assert torch.equal(ours, by_hand)
        assert bank.bytes_each == sum(matrix.codes.nbytes + matrix.scales.nbytes for matrix in experts[0])
        for t in range(tokens):
            at = slice(t, t + 1)
            assert torch.equal(column.experts(x[at], chosen[at], weights[at], bank, None, onto[at].clone()), ours[at])
        with pytest.raises(IndexError, match="expert 6 is out of range"):
            column.experts(x[:1], torch.tensor([[6, 0, 1]]), weights[:1], bank, None, onto[:1].clone())
    for resident in (0, 4):
        streamed = bank_of(column, experts, dtype, resident)
        arena = column.arena((count - resident) * streamed.bytes_each)
        for wanted in (None, [0, 3, 5]):
            streamed.fill(arena, wanted)
            streamed.install(arena)
            among = torch.tensor([0, 3, 5])[chosen % 3] if wanted else chosen
            whole = column.experts(x[:3], among[:3], weights[:3], bank, None, onto[:3].clone())
            parts = column.experts(x[:3], among[:3], weights[:3], streamed, None, onto[:3].clone())
            assert torch.equal(parts, whole)
