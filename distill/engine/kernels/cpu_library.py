"""The compiled library of cpu.cpp: finding it, its argument structures, its threads.

It is compiled when the package is installed and is optional: `why_missing` says what its absence is due to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch


def struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from "type: name name; …", in the order of cpu.cpp."""
    types = {"int": c_int32, "long": c_int64, "float": c_float, "pointer": c_void_p}
    listed = [
        (field, types[kind.strip()])
        for kind, names in (part.split(":") for part in fields.split(";"))
        for field in names.split()
    ]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


PackedMatrix = struct("PackedMatrix", "int: kind n k groups; pointer: data scale")
LinearArgs = struct(
    "LinearArgs",
    "pointer: x; long: x_stride x_group; pointer: w bias out; long: out_stride out_group; int: rows parts add threads",
)
ExpertsArgs = struct(
    "ExpertsArgs",
    "pointer: x expert weight gate up down shared_gate shared_up shared_down out; "
    "int: tokens per_token experts parts add threads",
)
DecodeArgs = struct(
    "DecodeArgs",
    "pointer: q k v table length out; long: table_stride; "
    "int: rows heads kv_heads d e k_width v_width page_size wide threads; float: scale",
)
PrefillArgs = struct(
    "PrefillArgs",
    "pointer: q k v table uk uv out; "
    "int: rows length heads kv_heads d e k_width v_width page_size wide threads; float: scale",
)
RouteArgs = struct(
    "RouteArgs",
    "pointer: logits bias expert weight; "
    "int: tokens experts groups groups_kept per_token softmax group_by_best normalise; float: factor; int: threads",
)
RopeArgs = struct(
    "RopeArgs",
    "pointer: x; long: x_row x_head; pointer: cos sin out; long: out_row out_head; "
    "int: rows heads r interleaved threads unused",
)
WriteArgs = struct(
    "WriteArgs", "pointer: pool page offset x; long: x_row x_head; int: rows heads width page_size wide unused"
)
LayerArgs = struct(
    "LayerArgs",
    "pointer: attention_norm q_norm kv_norm mlp_norm correction q_a q kv_a absorb expand_v o q_a_bias kv_a_bias o_bias "
    "router gate up down shared_gate shared_up shared_down; "
    "int: c heads nope rope interleaved experts groups groups_kept per_token softmax group_by_best normalise parts; "
    "float: eps latent_eps scale factor; int: unused",
)
StepArgs = struct(
    "StepArgs", "pointer: x cos sin page offset table length; long: table_stride; int: rows page_size wide threads"
)
DrawArgs = struct(
    "DrawArgs",
    "pointer: logits row uniform temperature top_k top_p token logprob; int: draws vocabulary threads unused",
)
IndexArgs = struct(
    "IndexArgs", "pointer: q weight keys table out; int: rows length heads d page_size wide threads unused"
)
NormArgs = struct(
    "NormArgs",
    "pointer: x; long: x_stride; pointer: weight out; long: out_stride; int: rows c; float: eps; int: threads",
)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    found = sorted(Path(__file__).parent.glob("_cpu.*.so"))
    if not found:
        return "they were not compiled when distill was installed; install a C++20 compiler, then distill again"
    try:
        library = ctypes.CDLL(str(found[0]))
        library.distill_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"{found[0].name} cannot be loaded ({error}); install distill again"
    library.distill_packed_bytes.restype = c_int64
    return library


def why_missing() -> str | None:
    """Why the compiled kernels are not there, and the fix; None if they are."""
    library = _library()
    return library if isinstance(library, str) else None


def library() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str), library
    return library


def instruction_set(name: str | None = None) -> str:
    """The instruction set in use ("avx512_bf16", "avx512", "avx2", "portable"), after switching to `name` if given.

    ValueError if this machine does not have it.
    """
    used = library().distill_isa(name.encode() if name else None)
    if used is None:
        raise ValueError(f"this machine does not have the instruction set {name!r}")
    return str(used.decode())


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine has, the best first."""
    used, found = instruction_set(), []
    for name in ("avx512_bf16", "avx512", "avx2", "portable"):
        if library().distill_isa(name.encode()) is not None:
            found.append(name)
    instruction_set(used)
    return tuple(found)


_own_threads: int | None = None


@contextmanager
def session() -> Iterator[None]:
    """While it is open, torch's own ops run on one thread and the kernels on as many as torch had.

    What torch still does between kernels is small; its workers would spin on the cores that the kernels' need.
    """
    global _own_threads
    count, before = torch.get_num_threads(), _own_threads
    _own_threads = before or count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _own_threads = before


def threads() -> int:
    return _own_threads or torch.get_num_threads()
