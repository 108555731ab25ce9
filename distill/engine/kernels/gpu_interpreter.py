"""Triton's interpreter, corrected: it runs GPU kernels on a CPU, and what it rounds must be what a GPU rounds.

Of the interpreter's own (up to 3.9), conversion to e4m3 rounds halves up and loses the carry of a mantissa that
overflows, conversion to bfloat16 cuts off, and products of bfloat16 multiply its bits as integers. Here conversions are
torch's, to nearest even as the hardware's are, and products are of float32.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
_Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
_convert_other = interpreter._convert_float


class _Handle(Protocol):
    """The interpreter's TensorHandle: an array (of bits, for floats that numpy does not know) and its Triton dtype."""

    data: _Array
    dtype: tl.dtype


def _convert(data: _Array, given: tl.dtype, wanted: tl.dtype, rounding_mode: object) -> _Array:
    """Floats of dtype `given` as floats of dtype `wanted`, in unsigned integers that hold their bits."""
    if given not in _TORCH or wanted not in _TORCH:
        return cast(_Array, _convert_other(data, given, wanted, rounding_mode))
    values = torch.from_numpy(np.ascontiguousarray(data).view(f"u{data.itemsize}")).view(_TORCH[given])
    out = values.to(_TORCH[wanted])
    return cast(_Array, out.view(_BITS[out.itemsize]).numpy().reshape(data.shape))


def _float32(handle: _Handle) -> _Array:
    if handle.dtype == tl.float32:
        return handle.data
    return _convert(handle.data, handle.dtype, tl.float32, None).view(np.float32)


def _dot(self: object, a: _Handle, b: _Handle, d: _Handle, precision: object, imprecise: object) -> _Handle:
    product = np.matmul(_float32(a), _float32(b)) + d.data
    return cast(_Handle, interpreter.TensorHandle(product, d.dtype.scalar))


def correct() -> None:
    """Correct the interpreter of this process."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
