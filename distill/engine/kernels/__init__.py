"""The table of ops: which module implements each of them, per kind of device.

Which kernel runs where is committed here and never measured at start-up: a run can be repeated only if the code that
produced its numbers is known. `reference` implements every op and is its definition (see reference.py for what each
computes, ops.py for the signatures). A faster kernel is a module with a function of the same name and a changed cell in
`TABLE`.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from distill.engine.kernels import cpu
from distill.engine.kernels.ops import OP_NAMES as OP_NAMES
from distill.engine.kernels.ops import Ops as Ops

if TYPE_CHECKING:  # each module has the ops of a column, with the signatures of the protocol
    from torch import Tensor

    from distill.engine.kernels import cpu_four_bit, cpu_packing, gpu, gpu_experts, reference, w8a8
    from distill.engine.kernels.ops import Column, ExpertBank

    _arenas = dict[int, tuple[Tensor, Tensor]]
    _reference: Column[Tensor, Tensor, reference.ExpertBank, _arenas, Tensor] = reference
    _cpu_banks = cpu_packing.ExpertBank | cpu_four_bit.FourBitBank
    _cpu: Column[cpu_packing.Packed, cpu_packing.Packed, _cpu_banks, cpu_packing.Memory, Tensor] = cpu
    _gpu: Column[w8a8.Packed, Tensor, gpu_experts.ExpertBank, Tensor, w8a8.Activations] = gpu
    _in_memory = type[ExpertBank[cpu_packing.Memory]]
    _banks: tuple[type[ExpertBank[_arenas]], _in_memory, _in_memory, type[ExpertBank[Tensor]]] = (
        reference.ExpertBank,
        cpu_packing.ExpertBank,
        cpu_four_bit.FourBitBank,
        gpu_experts.ExpertBank,
    )

_PACKAGE = "distill.engine.kernels."  # of the implementations, which are imported when a table names them
_REFERENCE = dict.fromkeys(OP_NAMES, "reference")

# column → op → module: the columns of device types, and the definitions of what they compute, for any device
TABLE: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(OP_NAMES, "cpu") | {"decode_plan": "cpu_layer"},
    "cuda": dict.fromkeys(OP_NAMES, "gpu"),
    "reference": _REFERENCE,
    "w8a8": _REFERENCE
    | dict.fromkeys(
        (
            "pack",
            "repack",
            "linear",
            "linears",
            "swiglu_linear",
            "expert_bank",
            "experts",
            "paged_write",
            "write_latents",
            "decode_mla",
            "prefill_mla",
        ),
        "w8a8",
    ),
}


def column_for(device_type: str) -> str:
    """The column of `TABLE` that a device type ("cpu", "cuda") runs. ValueError for another type.

    Where the compiled kernels are missing, a CPU runs the reference.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"no kernels for device type {device_type!r}; expected cpu or cuda")
    return "reference" if device_type == "cpu" and cpu.why_missing() else device_type


def ops_for(column: str) -> Ops:
    """The ops that `TABLE` commits for a column."""
    ops = {op: getattr(import_module(_PACKAGE + module), op) for op, module in TABLE[column].items()}
    return cast(Ops, SimpleNamespace(**ops))


def describe(column: str) -> str:
    """The kernels of a column in words, for the numerics fingerprint.

    Matrix products of a library may sum in another order for another batch, so that text can depend on batching where
    two tokens are nearly tied; the CPU kernels sum in a fixed order.
    """
    if column == "cpu":
        return f"cpu kernels ({cpu.instruction_set()}, fixed order of sums)"
    if column in ("cuda", "w8a8"):
        name = "gpu kernels" if column == "cuda" else "reference kernels"
        return f"{name} (FP8 products with activations quantised 1x128, library matrix products)"
    return "reference kernels (library matrix products)"
