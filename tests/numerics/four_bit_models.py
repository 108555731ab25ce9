"""Matrices in four bits, packed and unpacked one code at a time, as each publisher's documents say.

Nothing here is shared with the package: codes are written by shifts of Python integers, values by arithmetic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from random_models import Checkpoint, _load_published, build, write
from torch import Tensor

INT4 = "int4"
MXFP4 = "mxfp4"
NVFP4 = "nvfp4"
FORMS = (INT4, MXFP4, "mxfp4-packed", NVFP4, "nvfp4-packed")
GROUPS = {INT4: 32, MXFP4: 32, NVFP4: 16}
COMPRESSED: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def e2m1(code: int) -> float:
    """A sign, two bits of exponent (bias 1), one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(value, -1.0 if code & 8 else 1.0)


def int4(code: int) -> float:
    """Two's complement with its sign bit turned over, which adds 8."""
    flipped = code ^ 8
    return float(flipped - 16 if flipped & 8 else flipped)


def e8m0(byte: int) -> float:
    return math.ldexp(1.0, byte - 127)


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if byte & 0x80 else value


def pack(codes: list[list[int]]) -> Tensor:
    """Codes, a row each, in bytes: the first of two in the low half."""
    rows = [[row[i] | row[i + 1] << 4 for i in range(0, len(row), 2)] for row in codes]
    return torch.tensor(rows, dtype=torch.uint8)


def pack_words(codes: list[list[int]]) -> Tensor:
    """Codes, a row each, in int32: the first of eight in the lowest bits."""
    rows = [
        [sum(code << 4 * j for j, code in enumerate(row[i : i + 8])) for i in range(0, len(row), 8)] for row in codes
    ]
    return torch.tensor([[word - (word >> 31 << 32) for word in row] for row in rows], dtype=torch.int32)


def quantise(weight_nc: Tensor, name: str, form: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that store a matrix `name` in a form, and the matrix that they decode to, float32."""
    kind, packed = form.removesuffix("-packed"), form.endswith("-packed")
    (n, c), group = weight_nc.shape, GROUPS[kind]
    blocks = weight_nc.float().view(n, c // group, group)
    largest = blocks.abs().amax(-1)
    values = torch.tensor([int4(code) if kind == INT4 else e2m1(code) for code in range(16)])
    stored: dict[str, Tensor] = {}
    stem = name.removesuffix("weight")
    if kind == INT4:
        scale = (largest / 7).bfloat16()
        stored |= {name + "_scale": scale, name + "_shape": torch.tensor([n, c], dtype=torch.int32)}
        used = scale.float()
    elif kind == MXFP4:
        exponent = (largest / 6).log2().ceil()
        byte = (exponent + 127).to(torch.uint8)
        stored[name + "_scale" if packed else stem + "scale"] = byte if packed else byte.view(torch.float8_e8m0fnu)
        used = exponent.exp2()
    else:
        of_all = largest.max() / (448 * 6)
        scale = (largest / 6 / of_all).to(torch.float8_e4m3fn)
        stored[name + "_scale"] = scale
        stored |= {name + "_global_scale": (1 / of_all)[None]} if packed else {name + "_scale_2": of_all}
        stored[stem + ("input_global_scale" if packed else "input_scale")] = torch.ones(1)
        stored |= {f"{stem}{each}_scale": torch.ones(()) for each in "kv"}  # of a cache in FP8
        used = scale.float() / (1 / of_all) if packed else scale.float() * of_all
    codes = ((blocks / used[..., None])[..., None] - values).abs().argmin(-1)
    rows = codes.view(n, c).tolist()
    if kind == INT4:
        stored[name + "_packed"] = pack_words(rows)
    else:
        bytes_ = pack(rows)
        stored[name + "_packed" if packed else name] = (
            bytes_.view(torch.int8) if kind == MXFP4 and not packed else bytes_
        )
    return stored, (values[codes] * used[..., None]).view(n, c)


def build_four_bit(path: Path, config: dict[str, Any], form: str = INT4, experts_only: bool = True) -> Checkpoint:
    """A random model whose experts (or all whose layers' projections) are stored in four bits; `model` and `tensors`
    have the decoded numbers, what is not quantised is bfloat16."""
    made = build(path, config)
    stored: dict[str, Tensor] = {}
    for name, tensor in made.tensors.items():
        if ".experts." in name or (not experts_only and "_proj" in name):
            parts, made.tensors[name] = quantise(tensor, name, form)
            stored |= parts
        else:
            whole = name.endswith("e_score_correction_bias") or not tensor.is_floating_point()
            stored[name] = tensor if whole else tensor.bfloat16()
            made.tensors[name] = stored[name].to(tensor.dtype)
    _load_published(made.model, made.tensors)
    write(path, stored)
    return made
