"""The table of ops and who implements each of them, per kind of device.

Which kernel runs where is committed here and never measured at start-up: a run can be repeated only if the code that
produced its numbers is known. `reference` implements every op and is its definition (see reference.py for signatures).
A faster kernel is a module with a function of the same name and a changed cell in `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from distill.engine.kernels import cpu

_HERE = "distill.engine.kernels."  # of the implementations, which are imported when a table names them


@dataclass(frozen=True)
class Ops:
    """One implementation of each op. The model calls ops through this and never names a kernel."""

    device: Callable[..., Any]
    session: Callable[..., Any]
    activation_dtype: Callable[..., Any]
    has_nan_codes: Callable[..., Any]
    pack: Callable[..., Any]
    pack_heads: Callable[..., Any]
    side_by_side: Callable[..., Any]
    packed_bytes: Callable[..., Any]
    expert_bank: Callable[..., Any]
    arena: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    linear: Callable[..., Any]
    linears: Callable[..., Any]
    swiglu_linear: Callable[..., Any]
    per_head: Callable[..., Any]
    experts: Callable[..., Any]
    route: Callable[..., Any]
    paged_write: Callable[..., Any]
    write_latents: Callable[..., Any]
    decode_gqa: Callable[..., Any]
    decode_mla: Callable[..., Any]
    prefill_gqa: Callable[..., Any]
    prefill_mla: Callable[..., Any]
    index_scores: Callable[..., Any]
    draw: Callable[..., Any]
    decode_plan: Callable[..., Any]


OP_NAMES = tuple(field.name for field in fields(Ops))
_REFERENCE = dict.fromkeys(OP_NAMES, "reference")

# column → op → implementation: the columns of device types, and the definitions of what they compute, for any device
TABLE: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(OP_NAMES, "cpu") | {"decode_plan": "cpu_layer"},
    "cuda": dict.fromkeys(OP_NAMES, "gpu"),
    "reference": _REFERENCE,
    "w8a8": _REFERENCE
    | dict.fromkeys(
        (
            "pack",
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
    """The column of `TABLE` that a device type ("cpu", "cuda") runs. ValueError for one that has none.

    Where the compiled kernels are missing, a CPU runs the reference.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"no kernels for device type {device_type!r}; there are some for cpu and cuda")
    return "reference" if device_type == "cpu" and cpu.why_missing() else device_type


def ops_for(column: str) -> Ops:
    """The ops that `TABLE` commits for a column."""
    return Ops(**{op: getattr(import_module(_HERE + who), op) for op, who in TABLE[column].items()})


def describe(column: str) -> str:
    """Who computes, for the numerics fingerprint.

    Matrix products of a library may sum in another order for another batch, so that text can depend on batching where
    two tokens are nearly tied; the CPU kernels sum in a fixed order.
    """
    if column == "cpu":
        return f"cpu kernels ({cpu.instruction_set()}, fixed order of sums)"
    if column in ("cuda", "w8a8"):
        who = "gpu kernels" if column == "cuda" else "reference kernels"
        return f"{who} (FP8 products with activations quantised 1x128, library matrix products)"
    return "reference kernels (library matrix products)"
