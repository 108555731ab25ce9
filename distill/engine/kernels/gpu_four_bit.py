"""Experts in four bits on the GPU: codes stay codes in memory, and a tile of them is decoded on its way to the product.

Memory, and what is copied when experts are streamed, are those of the published checkpoint, a quarter of bfloat16. A
number is decoded in registers as four_bit.py says, value times scale in float32, rounded to the compute dtype, and the
products are those of the decoded matrix (gpu_gemm.py). Many rows pay for it: each tile of rows decodes the weights
again.

A record of an expert has codes of gate over up, [2f, c/2], and of down, [c, f/2]; their scales, as they are stored; and
for each block of 128 rows the two numbers by which scales are multiplied and divided. Padding has scales of zero.

Rejected: scales in float32 with those numbers applied, which take four bytes for 16 or 32 codes; and even and odd
columns as two products, which need no interleaving but have another order of sums than the decoded matrix.

Legend: as in gpu_gemm.py; f and c are padded to blocks of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.engine.kernels.four_bit import INT4_VALUES, FourBit
from distill.engine.kernels.gpu_experts import ExpertBank, padded, put
from distill.engine.kernels.gpu_gemm import Matrices, rows_of
from distill.engine.kernels.gpu_tiles import Tile
from distill.engine.kernels.stored import FP8_BLOCK, Stored
from distill.engine.kernels.w8a8 import Activations

_E8M0 = torch.float8_e8m0fnu
_COLUMNS = 64  # of a result, at a time: the decoded tile is in registers, and 128 columns of it spill


@triton.jit(do_not_specialize=["BLOCKS", "FIRST", "EXPERTS"])
def _four_bit(
    a_ptr, row_ptr, code_ptr, scale_ptr, number_ptr, expert_ptr, out_ptr,
    N, STEPS, GROUPS, BLOCKS, FIRST, EXPERTS, code_stride, scale_stride, number_stride,
    PER_ROW: tl.constexpr, GATHER: tl.constexpr, INT4: tl.constexpr, EXPONENTS: tl.constexpr, GROUP: tl.constexpr,
    SPANS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As gpu_gemm's. GROUP: columns of a scale. SPANS: scales of 128 columns, at least one."""
    block, first_n = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS * BLOCK_N
    expert = tl.load(expert_ptr + block) - FIRST
    if (expert < 0) | (expert >= EXPERTS):
        return
    slot, n, k = block * BLOCK_M + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, 128)
    row, real = rows_of(row_ptr, slot, PER_ROW, GATHER)
    a_ptrs = a_ptr + row[:, None].to(tl.int64) * (STEPS * 128) + k[None, :]
    code_ptrs = code_ptr + expert.to(tl.int64) * code_stride + n[:, None] * (STEPS * 64) + tl.arange(0, 64)[None, :]
    scale_ptrs = scale_ptr + expert.to(tl.int64) * scale_stride + n[:, None] * GROUPS + tl.arange(0, SPANS)[None, :]
    number_ptr += expert.to(tl.int64) * number_stride + first_n // 128 * 2
    factor, divisor = tl.load(number_ptr), tl.load(number_ptr + 1)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        a = tl.load(a_ptrs + step * 128, mask=real[:, None], other=0.0)
        pairs = tl.load(code_ptrs + step * 64, mask=(n < N)[:, None], other=0).to(tl.int32)
        code = tl.reshape(tl.join(pairs & 15, pairs >> 4), (BLOCK_N, 128))
        at = step * 128 // GROUP if SPANS == 1 else step * SPANS
        scale = _scale(tl.load(scale_ptrs + at, mask=(n < N)[:, None], other=0.0), EXPONENTS)
        scale = tl.div_rn(scale * factor, divisor)
        value = tl.reshape(_value(code, INT4), (BLOCK_N, SPANS, 128 // SPANS)) * scale[:, :, None]
        w = tl.reshape(value, (BLOCK_N, 128)).to(a_ptr.dtype.element_ty)
        total = tl.dot(a, w.T, total, input_precision="ieee")
    at = slot[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(n < N)[None, :] & real[:, None])


@triton.jit
def _value(code, INT4: tl.constexpr):
    """The float32 of a code. Of E2M1, exponent and mantissa are those of the bits, but for 0 and ½."""
    if INT4:
        value = (code - 8).to(tl.float32)
    else:
        size = code & 7
        bits = ((size + 252) << 22).to(tl.float32, bitcast=True)
        value = tl.where(size < 2, size.to(tl.float32) * 0.5, bits)
        value = tl.where(code < 8, value, -value)
    return value


@triton.jit
def _scale(stored, EXPONENTS: tl.constexpr):
    """The float32 of a scale. Of E8M0, the byte is the exponent's; that of 2⁻¹²⁷ is not normal."""
    if EXPONENTS:
        exponent = stored.to(tl.int32)
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    else:
        scale = stored.to(tl.float32)
    return scale


@dataclass(frozen=True)
class FourBitMatrices(Matrices):
    """values: codes [experts, n, k/2]. scale: [experts, n, g], of the stored dtype, E8M0 as bytes. numbers: float32
    [experts, ⌈n/128⌉, 2], factor and divisor."""

    numbers: Tensor
    int4: bool
    group: int


def takes(expert: Sequence[Stored]) -> bool:
    """Whether experts like this one (gate, up, down) are multiplied here: in four bits, a scale's columns within steps
    of 128 or whole steps in them."""
    if not expert or not all(isinstance(matrix, FourBit) for matrix in expert):
        return False
    gate, up, down = (cast(FourBit, matrix) for matrix in expert)
    same = (gate.name, gate.scales.dtype) == (up.name, up.scales.dtype)
    return same and all(_group(m) % FP8_BLOCK == 0 or FP8_BLOCK % _group(m) == 0 for m in (gate, down))


def _group(matrix: FourBit) -> int:
    """Columns of a scale, in whole steps where it is the whole row's."""
    c, groups = matrix.shape[1], matrix.scales.shape[1]
    return padded(c) if groups == 1 else c // groups


def grouped(
    x: Activations, row_s: Tensor | None, per_row: int, places: Sequence[Matrices], expert_b: Tensor, tile: Tile
) -> Tensor:
    """As gpu_gemm.grouped, with the matrices of this module."""
    assert isinstance(x, Tensor) and x.is_contiguous() and x.shape[1] % FP8_BLOCK == 0
    blocks, n, columns = len(expert_b), places[0].values.shape[1], min(tile.columns, _COLUMNS)
    assert row_s is not None or len(x) == blocks * tile.rows
    out_sn = torch.empty(blocks * tile.rows, n, dtype=x.dtype, device=x.device)
    for some in places:
        assert isinstance(some, FourBitMatrices)
        exponents = some.scale.dtype == _E8M0
        scale = some.scale.view(torch.uint8) if exponents else some.scale
        _four_bit[blocks * triton.cdiv(n, columns),](
            x, expert_b if row_s is None else row_s, some.values, scale, some.numbers, expert_b, out_sn,
            n, x.shape[1] // FP8_BLOCK, scale.shape[2], blocks, some.first, len(some.values),
            some.values.stride(0), scale.stride(0), some.numbers.stride(0), per_row, row_s is not None,
            some.int4, exponents, some.group, max(1, FP8_BLOCK // some.group), tile.rows, columns,
            num_warps=tile.warps, num_stages=2,
        )  # fmt: skip
    return out_sn


class FourBitBank(ExpertBank):
    """As ExpertBank, of experts that this module `takes`."""

    product = staticmethod(grouped)

    def _sizes(self, expert: Sequence[Stored]) -> list[int]:
        """Codes of gate over up and of down, their scales, and the numbers of their blocks of rows."""
        gate, _, down = (cast(FourBit, matrix) for matrix in expert)
        self._like = gate, down
        # Rows and columns of gate over up and of down, and tensors like their scales, without memory.
        self._layout = [
            (rows, columns, torch.empty(rows, columns // _group(like), dtype=like.scales.dtype, device="meta"))
            for rows, columns, like in ((2 * self.f, self.c, gate), (self.width, self.f, down))
        ]
        codes = [rows * columns // 2 for rows, columns, _ in self._layout]
        scales = [like.nbytes for _, _, like in self._layout]
        return codes + scales + [8 * -(-rows // FP8_BLOCK) for rows, _, _ in self._layout]

    def _fill_record(self, record: Tensor, expert: Sequence[Stored]) -> None:
        gate, up, down = (cast(FourBit, matrix) for matrix in expert)
        for part, (matrices, rows) in enumerate((((gate, up), self.f), ((down,), self.width))):
            _, columns, like = self._layout[part]
            codes = torch.zeros(len(matrices) * rows, columns // 2, dtype=torch.uint8, device=record.device)
            scales = torch.zeros(
                like.shape, dtype=torch.uint8 if like.itemsize == 1 else like.dtype, device=codes.device
            )
            numbers = torch.ones(-(-len(codes) // FP8_BLOCK), 2, device=record.device)
            for number, matrix in enumerate(matrices):
                n, half = matrix.codes.shape
                at, each = number * rows, -(-rows // FP8_BLOCK)
                codes[at : at + n, :half] = matrix.codes
                stored = matrix.scales.view(scales.dtype)
                scales[at : at + n, : stored.shape[1]] = stored
                numbers[number * each : (number + 1) * each] = torch.tensor([matrix.factor, matrix.divisor])
            for place, tensor in ((part, codes), (2 + part, scales), (4 + part, numbers)):
                put(record, self._offsets[place], tensor)

    def _matrices(self, memory: Tensor, first: int, count: int, part: int) -> FourBitMatrices:
        rows, columns, like = self._layout[part]
        shapes = [
            (part, torch.uint8, (rows, columns // 2)),
            (2 + part, like.dtype, tuple(like.shape)),
            (4 + part, torch.float32, (-(-rows // FP8_BLOCK), 2)),
        ]
        codes, scales, numbers = (self._view(memory, count, *place) for place in shapes)
        form = self._like[part]
        return FourBitMatrices(codes, scales, first, numbers, form.numbers == INT4_VALUES, _group(form))
