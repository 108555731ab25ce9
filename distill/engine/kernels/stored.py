"""Weights as a checkpoint stores them, before the kernels of a column pack them.

A stored matrix is a `Stored`: `Plain`, numbers in one of torch's floating dtypes, `Fp8`, e4m3 codes with a scale for
each 128×128 block (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), or `FourBit` (four_bit.py). Whatever depends on the
form is a method here, so that another form is one more class and no change in the code that packs. `isinstance` at each
use was rejected: six files asked the same question.

Legend: n output features, c input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FP8_BLOCK = 128

Damage = Literal["codes", "scale", "values"]


class Damaged(Exception):
    """A stored matrix that no healthy checkpoint holds.

    what: "codes" (FP8 NaN codes), "scale" (a scale that is not finite and positive), "values" (a number that is not
    finite). In a bank of experts: the number of the expert, and of its part (0 gate, 1 up, 2 down).
    """

    def __init__(self, what: Damage, expert: int = 0, part: int = 0) -> None:
        super().__init__(what, expert, part)
        self.what, self.expert, self.part = what, expert, part


@dataclass(frozen=True)
class Place:
    """Where the numbers of a matrix (the codes of an FP8 one) are in a file, row-major: `size` bytes. `file` is held so
    that the descriptor stays open."""

    descriptor: int
    offset: int
    size: int
    file: object


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite: by the extremes, which NaN survives; `isfinite` writes three temporaries,
    and takes 15 times as long on a CPU."""
    return not numbers.numel() or bool(torch.stack(numbers.aminmax()).isfinite().all())


def has_nan_codes(codes: Tensor) -> bool:
    """Whether float8_e4m3fn codes hold a NaN, which a healthy checkpoint never does."""
    return bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any())


def dequantize_fp8_block(weight_nc: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float8_e4m3fn [n, c] times its block's scale: one per 128×128 block, [⌈n/128⌉, ⌈c/128⌉], edge blocks partial.

    The product is taken in float32 and rounded to `dtype` once.
    """
    n, c = weight_nc.shape
    scale_nc = scale.to(torch.float32).repeat_interleave(FP8_BLOCK, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :c]
    return (weight_nc.to(torch.float32) * scale_nc).to(dtype)


class Stored(ABC):
    """A matrix [n, c]."""

    damage: Damage  # what `values` are when they are damaged
    quantised = False  # whether `values` are codes

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The tensor that takes the memory: numbers or codes, [n, c] if each has an element of its own."""

    @property
    @abstractmethod
    def scale(self) -> Tensor | None:
        """What products multiply codes by, float32 [⌈n/128⌉, ⌈c/128⌉]; None where they read numbers."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, c)."""
        n, c = self.values.shape
        return n, c

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers, [n, c] in `dtype`."""

    @abstractmethod
    def kept_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype of `kept`."""

    def form(self, compute: torch.dtype) -> tuple[object, ...]:
        """What it is kept as: equal for matrices of one shape that take the same memory and are read alike."""
        return type(self), self.kept_dtype(compute)

    def kept(self, compute: torch.dtype) -> Tensor:
        """`values`, converted where that saves memory and the compute dtype could not show the difference."""
        return self.values.to(self.kept_dtype(compute))

    @abstractmethod
    def for_fp8_products(self, compute: torch.dtype) -> Fp8 | None:
        """Itself, where products with it in this compute dtype read FP8 codes; None where they read numbers."""

    @abstractmethod
    def rows(self, begin: int, end: int) -> Stored:
        """Rows `begin … end-1`, in the same form where their blocks are those of a matrix of its own, else float32."""

    @abstractmethod
    def transposed(self) -> Stored:
        """[c, n]."""

    @abstractmethod
    def on(self, device: torch.device, copy: bool = False) -> Stored:
        """The same on a device. copy: also if it is there already."""

    @abstractmethod
    def check_scale(self, expert: int = 0, part: int = 0) -> None:
        """Raises Damaged for a scale that is not finite and positive. Zero is accepted where all codes of the block are
        zeros: some quantisers divide the largest of them by 448."""

    @abstractmethod
    def check(self, expert: int = 0, part: int = 0, has_nan: Callable[[Tensor], bool] = has_nan_codes) -> None:
        """Raises Damaged for numbers that no healthy checkpoint holds. has_nan: how codes are searched for NaN."""


@dataclass(frozen=True, eq=False)
class Plain(Stored):
    """Numbers: bfloat16, float16 or float32."""

    numbers: Tensor
    damage = "values"

    @property
    def values(self) -> Tensor:
        """See Stored."""
        return self.numbers

    @property
    def scale(self) -> None:
        """See Stored."""
        return None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See Stored."""
        return self.numbers.to(dtype)

    def kept_dtype(self, compute: torch.dtype) -> torch.dtype:
        """bfloat16 where it is stored or computed in, else float32."""
        return torch.bfloat16 if torch.bfloat16 in (compute, self.numbers.dtype) else torch.float32

    def for_fp8_products(self, compute: torch.dtype) -> None:
        """See Stored."""
        return None

    def rows(self, begin: int, end: int) -> Plain:
        """See Stored."""
        return Plain(self.numbers[begin:end])

    def transposed(self) -> Plain:
        """See Stored."""
        return Plain(self.numbers.T)

    def on(self, device: torch.device, copy: bool = False) -> Plain:
        """See Stored."""
        return Plain(self.numbers.to(device, copy=copy))

    def check_scale(self, expert: int = 0, part: int = 0) -> None:
        """Nothing: there is no scale."""

    def check(self, expert: int = 0, part: int = 0, has_nan: Callable[[Tensor], bool] = has_nan_codes) -> None:
        """See Stored."""
        if not all_finite(self.numbers):
            raise Damaged("values", expert, part)


@dataclass(frozen=True, eq=False)
class Fp8(Stored):
    """float8_e4m3fn codes [n, c] and float32 scales [⌈n/128⌉, ⌈c/128⌉], edge blocks partial.

    ue8m0: scales are powers of two, and the scales of quantised activations must be, too.
    """

    codes: Tensor
    scales: Tensor
    ue8m0: bool = False
    damage = "codes"
    quantised = True

    @property
    def values(self) -> Tensor:
        """See Stored."""
        return self.codes

    @property
    def scale(self) -> Tensor:
        """See Stored."""
        return self.scales

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See Stored."""
        return dequantize_fp8_block(self.codes, self.scales, dtype)

    def kept_dtype(self, compute: torch.dtype) -> torch.dtype:
        """That of the codes."""
        return self.codes.dtype

    def for_fp8_products(self, compute: torch.dtype) -> Fp8 | None:
        """See Stored."""
        return self if compute == torch.bfloat16 else None

    def rows(self, begin: int, end: int) -> Stored:
        """See Stored."""
        blocks = slice(begin // FP8_BLOCK, -(-end // FP8_BLOCK))
        if begin % FP8_BLOCK == 0 or blocks.stop - blocks.start == 1:
            return Fp8(self.codes[begin:end], self.scales[blocks], self.ue8m0)
        return Plain(self.dense(torch.float32)[begin:end])

    def transposed(self) -> Fp8:
        """See Stored."""
        return Fp8(self.codes.T.contiguous(), self.scales.T.contiguous(), self.ue8m0)

    def on(self, device: torch.device, copy: bool = False) -> Fp8:
        """See Stored; scales are copied only if they are elsewhere."""
        return Fp8(self.codes.to(device, copy=copy), self.scales.to(device), self.ue8m0)

    def check_scale(self, expert: int = 0, part: int = 0) -> None:
        """See Stored."""
        if not (self.scales.isfinite() & (self.scales >= 0)).all():
            raise Damaged("scale", expert, part)
        for row, column in (self.scales == 0).nonzero().tolist():
            rows = slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK)
            block = self.codes[rows, column * FP8_BLOCK : (column + 1) * FP8_BLOCK]
            if (block.contiguous().view(torch.uint8) & 0x7F).any():
                raise Damaged("scale", expert, part)

    def check(self, expert: int = 0, part: int = 0, has_nan: Callable[[Tensor], bool] = has_nan_codes) -> None:
        """See Stored."""
        if has_nan(self.codes):
            raise Damaged("codes", expert, part)
        self.check_scale(expert, part)
