"""Four-bit weights as they are published: codes in pairs, and a scale for each group of a row.

One class holds all forms, because they differ in three facts only: the sixteen values of a code, the dtype of a scale,
and how many columns share one.

    INT4    −8 … 7         bfloat16 (or float16, float32) for any group; compressed-tensors' `pack-quantized`
    MXFP4   E2M1           E8M0, a power of two, for 32 columns (OCP Microscaling Formats 1.0, section 5.3.3)
    NVFP4   E2M1           E4M3 for 16 columns, and one float32 number for the matrix

A number is its value times its scale, in float32, rounded to the compute dtype once. In float32, MXFP4 is exact, and so
is INT4 with a scale of 16 bits (11 bits of significand with bfloat16, 14 with float16). NVFP4 is rounded twice: its
scale is E4M3 times the number of the matrix (ModelOpt) or divided by it (compressed-tensors), rounded to float32, and
so is value times scale. In bfloat16, MXFP4 stays exact; the others are rounded, as those who publish them do.

Products are those with the decoded matrix. Where codes stay codes in memory, an expert is decoded when it is used
(cpu_four_bit.py).

Legend: n output features, c input features, g groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from distill.engine.kernels.stored import Damaged, Fp8, Plain, Stored, has_nan_codes

MXFP4_GROUP, NVFP4_GROUP = 32, 16
INT4_VALUES = tuple(float(code - 8) for code in range(16))  # stored with 8 added
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


@cache
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2] float32: that of the low half first."""
    return torch.tensor([(values[byte & 15], values[byte >> 4]) for byte in range(256)], device=device)


@dataclass(frozen=True, eq=False)
class FourBit(Stored):
    """codes: uint8 [n, c/2], of two columns each, the first in the low half. scales: [n, g], of a floating dtype.

    numbers: the values of the sixteen codes. factor, divisor: what all scales are multiplied or divided by, float32.
    """

    codes: Tensor
    scales: Tensor
    numbers: tuple[float, ...]
    factor: float = 1.0
    divisor: float = 1.0
    damage = "scale"
    quantised = True

    @property
    def values(self) -> Tensor:
        """The codes, [n, c/2]: two numbers in each."""
        return self.codes

    @property
    def scale(self) -> None:
        """None: products read the decoded numbers."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """See Stored."""
        n, half = self.codes.shape
        return n, 2 * half

    @property
    def name(self) -> str:
        """The form in words, for `ModelWeights.stored`."""
        group = f"group {self.shape[1] // self.scales.shape[1]}"
        if self.numbers == INT4_VALUES:
            return f"int4 {group}"
        return f"mxfp4 {group}" if self.scales.dtype == torch.float8_e8m0fnu else f"nvfp4 {group}"

    def _group_scales(self) -> Tensor:
        """[n, g], float32."""
        return self.scales.float() * self.factor / self.divisor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See Stored, and the module's docstring on rounding."""
        (n, c), g = self.shape, self.scales.shape[1]
        numbers = _pairs(self.numbers, self.codes.device)[self.codes.int()].view(n, g, c // g)
        return numbers.mul_(self._group_scales()[:, :, None]).view(n, c).to(dtype)

    def kept_dtype(self, compute: torch.dtype) -> torch.dtype:
        """bfloat16 where it is computed in, or holds every number exactly (MXFP4); else float32."""
        exact = self.scales.dtype == torch.float8_e8m0fnu
        return torch.bfloat16 if exact or compute == torch.bfloat16 else torch.float32

    def form(self, compute: torch.dtype) -> tuple[object, ...]:
        """See Stored."""
        return self.name, self.scales.dtype

    def kept(self, compute: torch.dtype) -> Tensor:
        """The decoded numbers, [n, c] in `kept_dtype`."""
        return self.dense(self.kept_dtype(compute))

    def for_fp8_products(self, compute: torch.dtype) -> Fp8 | None:
        """None: products read numbers."""
        return None

    def rows(self, begin: int, end: int) -> FourBit:
        """See Stored."""
        return replace(self, codes=self.codes[begin:end], scales=self.scales[begin:end])

    def transposed(self) -> Plain:
        """[c, n], decoded: groups run along rows."""
        return Plain(self.dense(torch.float32).T)

    def on(self, device: torch.device, copy: bool = False) -> FourBit:
        """See Stored."""
        return self.of(self.codes.to(device, copy=copy), self.scales.to(device, copy=copy))

    def of(self, codes: Tensor, scales: Tensor) -> FourBit:
        """The same form with these codes and scales."""
        return replace(self, codes=codes, scales=scales)

    def check_scale(self, expert: int = 0, part: int = 0) -> None:
        """Raises Damaged for a scale with which the largest code is not finite. All codes are numbers, and a scale of
        zero or below is one that some quantisers write."""
        largest = max(map(abs, self.numbers))
        if not (self._group_scales() * largest).isfinite().all():
            raise Damaged("scale", expert, part)

    def check(self, expert: int = 0, part: int = 0, has_nan: Callable[[Tensor], bool] = has_nan_codes) -> None:
        """See Stored."""
        self.check_scale(expert, part)
