"""Matrices of four bits in a checkpoint: which tensors they are made of, by the names that each publisher gives them.

    form    codes                    scales                        for all of the matrix
    INT4    weight_packed, I32       weight_scale                  weight_shape              compressed-tensors
    NVFP4   weight_packed, U8        weight_scale, F8_E4M3         weight_global_scale (÷)   compressed-tensors
    NVFP4   weight, U8               weight_scale, F8_E4M3         weight_scale_2 (×)        ModelOpt
    MXFP4   weight_packed, U8        weight_scale, U8 (E8M0)                                 compressed-tensors
    MXFP4   weight, I8 or U8         scale, F8_E8M0 or U8                                    DeepSeek-V4

As for FP8, the tensors decide matrix by matrix, so that lists of what was left unquantised need not be read. Eight
codes in an I32 are four bytes of two on a little-endian machine: the first column is in the lowest bits in all forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.engine.checkpoint import Checkpoint
from distill.engine.kernels.four_bit import E2M1_VALUES, INT4_VALUES, MXFP4_GROUP, NVFP4_GROUP, FourBit

_BYTES = ("U8", "I8")
OF_CACHE = (".k_scale", ".v_scale", ".q_scale")  # endings of the scales of a quantised cache, which is not one here
_NOT_READ = ("input_scale", "input_global_scale")  # of activations, which are not quantised here


def read_four_bit(checkpoint: Checkpoint, name: str, n: int, c: int) -> FourBit | None:
    """The matrix `name` (ending in .weight), [n, c], if it is stored in four bits. Its scales are not checked.

    Errors: ValueError, one line with file and tensor, where its tensors do not fit each other.
    """
    stem = name.removesuffix("weight")
    if name + "_packed" in checkpoint:
        codes = name + "_packed"
    elif name in checkpoint and checkpoint.form(name)[0] in _BYTES:
        codes = name
    else:
        return None
    for ending in _NOT_READ:
        if stem + ending in checkpoint:
            checkpoint.leave(stem + ending)
    if checkpoint.form(codes)[0] == "I32":
        return _int4(checkpoint, name, n, c)
    for number in (name + "_scale_2", name + "_global_scale"):
        if number in checkpoint:
            return _nvfp4(checkpoint, codes, name + "_scale", number, n, c)
    scales = [ending for ending in (name + "_scale", name + "_scale_inv", stem + "scale") if ending in checkpoint]
    if not scales:
        raise ValueError(
            f"{checkpoint.where(codes)} holds codes and has no scales ({name}_scale or {stem}scale); download the "
            "checkpoint again"
        )
    return _mxfp4(checkpoint, codes, scales[0], n, c)


def scale_of(checkpoint: Checkpoint, name: str) -> str:
    """The name of the scales of a matrix that is stored in four bits or in FP8."""
    names = (name + "_scale", name.removesuffix("weight") + "scale")
    return next((scale for scale in names if scale in checkpoint), name + "_scale_inv")


def _int4(checkpoint: Checkpoint, name: str, n: int, c: int) -> FourBit:
    scales = name + "_scale"
    shape = checkpoint.form(scales)[1]
    groups = shape[-1] if shape else 0
    if c % 8 or not groups or c % groups:
        raise ValueError(
            f"{checkpoint.where(scales)} has shape {list(shape)}, which cannot be the groups of {c} columns; download "
            "the checkpoint again"
        )
    codes = checkpoint.tensor(name + "_packed", (n, c // 8), ("I32",))
    stated = checkpoint.tensor(name + "_shape", (2,), ("I32", "I64")).tolist()
    if stated != [n, c]:
        raise ValueError(
            f"{checkpoint.where(name + '_shape')} holds {stated}, config.json makes it {[n, c]}; config.json and "
            "weights do not match"
        )
    dtypes = ("BF16", "F16", "F32")
    return FourBit(codes.view(torch.uint8), checkpoint.tensor(scales, (n, groups), dtypes), INT4_VALUES)


def _nvfp4(checkpoint: Checkpoint, codes: str, scales: str, number: str, n: int, c: int) -> FourBit:
    _refuse_part_of_group(checkpoint, codes, c, NVFP4_GROUP)
    packed = checkpoint.tensor(codes, (n, c // 2), _BYTES)
    shape = checkpoint.form(number)[1]
    of_all = checkpoint.tensor(number, (1,) if shape else (), ("F32",)).item()
    if not 0 < of_all < float("inf"):
        raise ValueError(
            f"{checkpoint.where(number)} is {of_all}; it must be finite and positive, so download the checkpoint again"
        )
    by_group = checkpoint.tensor(scales, (n, c // NVFP4_GROUP), ("F8_E4M3",))
    multiplied = number.endswith("_scale_2")
    factor, divisor = (of_all, 1.0) if multiplied else (1.0, of_all)
    return FourBit(packed.view(torch.uint8), by_group, E2M1_VALUES, factor, divisor)


def _mxfp4(checkpoint: Checkpoint, codes: str, scales: str, n: int, c: int) -> FourBit:
    _refuse_part_of_group(checkpoint, codes, c, MXFP4_GROUP)
    packed = checkpoint.tensor(codes, (n, c // 2), _BYTES)
    exponents: Tensor = checkpoint.tensor(scales, (n, c // MXFP4_GROUP), ("F8_E8M0", "U8"))
    return FourBit(packed.view(torch.uint8), exponents.view(torch.float8_e8m0fnu), E2M1_VALUES)


def _refuse_part_of_group(checkpoint: Checkpoint, codes: str, c: int, group: int) -> None:
    if c % group:
        raise ValueError(f"{checkpoint.where(codes)}: its {c} columns are not whole groups of {group}")
