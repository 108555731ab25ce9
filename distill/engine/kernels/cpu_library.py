"""The compiled library of native/: finding it, checking that it fits, calling it, its threads.

The library is compiled when the package is installed and is optional: `why_missing` gives the reason of its absence. A
library that was compiled from other sources than this Python code is refused, because it would read the argument
structures at other offsets (cpu_structs.py).

It holds the kernels of several instruction sets and takes the fastest that this machine has. The environment variable
DISTILL_INSTRUCTION_SET names another, for this process and the workers that it starts. Products on AMX are chosen in
this way only: they were written on a machine without AMX and proven against an emulation of its definition, and a
processor whose bits differ would change every text. `AMX_BY_DEFAULT` makes them the default, to be set once
tests/numerics/test_amx.py has passed on a machine with AMX; a self-check (native/amx.h) runs in any case.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_bool, c_char_p, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.engine.kernels.cpu_structs import Arguments, layouts
from distill.errors import UserError

_OPS = (
    "linear",
    "swiglu_linear",
    "experts",
    "decode",
    "prefill",
    "index_scores",
    "route",
    "rope",
    "paged_write",
    "rms_norm",
    "draw",
    "likeliest",
    "decode_layers",
    "decode_dense_layers",
    "delta_rule",
    "sigmoid_gate",
    "train_norm",
    "train_gate",
    "train_rope",
    "train_softmax",
)
AMX_BY_DEFAULT = False
VARIABLE = "DISTILL_INSTRUCTION_SET"
SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")  # the fastest first
_REINSTALL = "reinstall distill (in a clone: python -m pip install -e .)"


def load(folder: Path) -> ctypes.CDLL | str:
    """The compiled kernels in a folder, or one line with the reason why there are none and what to do."""
    files = sorted(folder.glob("_cpu.*.so"))
    if not files:
        return "they were not compiled when distill was installed; install a C++20 compiler, then distill again"
    try:
        library = ctypes.CDLL(str(files[0]))
        for name in ("isa", "layouts", *_OPS):
            getattr(library, f"distill_{name}").restype = c_char_p
        library.distill_packed_bytes.restype = c_int64
        library.distill_pack.restype = library.distill_has_nan.restype = c_int
        library.distill_amx_missing.restype = c_char_p
        library.distill_tile_probe.restype = library.distill_tile_vectors.restype = c_bool
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error}); {_REINSTALL}"
    if library.distill_layouts().decode() != layouts():
        return f"{files[0].name} was compiled from other sources than those installed; {_REINSTALL}"
    return library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    library = load(Path(__file__).parent)
    if not isinstance(library, str):
        _choose(os.environ.get(VARIABLE), library)
    return library


def _choose(name: str | None, library: ctypes.CDLL) -> None:
    """Use the instruction set that the environment names, else the default. Errors: UserError if it cannot be used."""
    if not name and AMX_BY_DEFAULT and library.distill_isa(b"amx") is None:
        reason = library.distill_amx_missing().decode()
        if "other bits" in reason:
            print(f"warning: {reason}; the kernels for AVX-512 are used in its place", file=sys.stderr)
    if not name or library.distill_isa(name.encode()) is not None:
        return
    reason = library.distill_amx_missing().decode() if name == "amx" else "this machine does not have it"
    available = [known for known in reversed(SETS) if library.distill_isa(known.encode()) is not None]
    raise UserError(f"{VARIABLE} is {name!r}: {reason}; unset it, or set it to one of {', '.join(available)}")


def why_missing() -> str | None:
    """Why the compiled kernels cannot be used, and the fix; None if they can."""
    library = _library()
    return library if isinstance(library, str) else None


def library() -> ctypes.CDLL:
    """The compiled kernels, which must be there (`why_missing`)."""
    library = _library()
    assert not isinstance(library, str), library
    return library


def call(op: str, *arguments: Arguments | ctypes.Array[Any] | int) -> None:
    """Run an op on its arguments: structures, arrays of them or of addresses, counts.

    IndexError if a number that the op uses as a place (a page, a row, an expert) is out of range; nothing is computed.
    """
    wrong = getattr(library(), f"distill_{op}")(*(c_int(x) if isinstance(x, int) else byref(x) for x in arguments))
    if wrong is not None:
        raise IndexError(f"{op}: {wrong.decode()}")


def packed_bytes(kind: int, n: int, k: int) -> int:
    """Bytes of a packed matrix [n, k] of a kind (cpu_packing.py)."""
    return int(library().distill_packed_bytes(kind, n, k))


def instruction_set(name: str | None = None) -> str:
    """The instruction set in use, one of `SETS`, after switching to `name` if given.

    Tests may name the emulations of AMX, too: "amx_emulated" (with AVX-512) and "amx_emulated_portable".
    ValueError if this machine does not have it.
    """
    used = library().distill_isa(name.encode() if name else None)
    if used is None:
        raise ValueError(f"this machine does not have the instruction set {name!r}")
    return str(used.decode())


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine has, the fastest first."""
    used, available = instruction_set(), []
    for name in SETS:
        if library().distill_isa(name.encode()) is not None:
            available.append(name)
    instruction_set(used)
    return tuple(available)


def amx_missing() -> str | None:
    """Why products on AMX cannot be used: no such processor, refused by the system, or other bits; None if they can."""
    reason: bytes | None = library().distill_amx_missing()
    return None if reason is None else reason.decode()


def tile_probe(sums: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """One instruction on tiles, as the instruction set in use has them; False, and nothing done, if it has none.

    sums [16, 16] (float32, contiguous) += rows [16, 32] · columns [16 pairs of k, 16 × 2], both int16 bits of bfloat16.
    """
    addresses = (c_void_p(tensor.data_ptr()) for tensor in (sums, rows, columns))
    return bool(library().distill_tile_probe(*addresses))


def tile_vectors(used: bool) -> bool:
    """Set whether few rows are multiplied by vectors in place of tiles, which gives the same bits: tests compare both.

    They are by default. Returns False if the instruction set in use has no tiles.
    """
    return bool(library().distill_tile_vectors(c_bool(used)))


_own_threads: int | None = None


@contextmanager
def session() -> Iterator[None]:
    """While it is open, torch's own ops run on one thread and the kernels on as many as torch had.

    torch does little between kernels, and its idle workers would spin on the cores that the kernels use.
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
    """The number of threads that a kernel runs on: torch's, as it was when the session began."""
    return _own_threads or torch.get_num_threads()
