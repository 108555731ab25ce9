"""The table of ops and who implements each of them, per kind of device.

Which kernel runs where is committed here and never measured at start-up: a run can be repeated only if the code that
produced its numbers is known. `reference` implements every op and is its definition (see reference.py for signatures).
A faster kernel is a module with a function of the same name and one changed cell in `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from distill.engine.kernels import reference

IMPLEMENTATIONS = {"reference": reference}


@dataclass(frozen=True)
class Ops:
    """One implementation of each op. The model calls ops through this and never names a kernel."""

    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    linear: Callable[..., Any]
    dequantize_fp8_block: Callable[..., Any]
    linear_fp8_block: Callable[..., Any]
    swiglu: Callable[..., Any]
    grouped_linear: Callable[..., Any]
    route_noaux_tc: Callable[..., Any]
    paged_write: Callable[..., Any]
    paged_gather: Callable[..., Any]
    decode_gqa: Callable[..., Any]
    decode_mla: Callable[..., Any]
    attend_causal: Callable[..., Any]


OP_NAMES = tuple(field.name for field in fields(Ops))

# device type → op → implementation
TABLE: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(OP_NAMES, "reference"),
    "cuda": dict.fromkeys(OP_NAMES, "reference"),
}


def ops_for(device_type: str) -> Ops:
    """The ops that `TABLE` commits for a device type ("cpu", "cuda"). ValueError for one that has no column."""
    if device_type not in TABLE:
        raise ValueError(f"no kernels for device type {device_type!r}; there are some for {', '.join(TABLE)}")
    return Ops(**{op: getattr(IMPLEMENTATIONS[who], op) for op, who in TABLE[device_type].items()})


def describe(device_type: str) -> str:
    """Who computes, for the numerics fingerprint. Matrix products of a library may sum in another order for another
    batch, so that text can depend on batching where two tokens are nearly tied; kernels that sum in a fixed order will
    say otherwise here."""
    names = sorted(set(TABLE[device_type].values()))
    return f"{' + '.join(names)} kernels (library matrix products)"
