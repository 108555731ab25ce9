"""The compiled library of native/: finding it, checking that it fits, calling it, its threads.

The library is compiled when the package is installed and is optional: `why_missing` gives the reason of its absence. A
library that was compiled from other sources than this Python code is refused, because it would read the argument
structures at other offsets (cpu_structs.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from distill.engine.kernels.cpu_structs import Arguments, layouts

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
    "decode_layer",
    "decode_dense_layer",
    "train_norm",
    "train_gate",
    "train_rope",
    "train_softmax",
)
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
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error}); {_REINSTALL}"
    if library.distill_layouts().decode() != layouts():
        return f"{files[0].name} was compiled from other sources than those installed; {_REINSTALL}"
    return library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    return load(Path(__file__).parent)


def why_missing() -> str | None:
    """Why the compiled kernels cannot be used, and the fix; None if they can."""
    library = _library()
    return library if isinstance(library, str) else None


def library() -> ctypes.CDLL:
    """The compiled kernels, which must be there (`why_missing`)."""
    library = _library()
    assert not isinstance(library, str), library
    return library


def call(op: str, *structures: Arguments, pools: Sequence[int] = ()) -> None:
    """Run an op on its argument structures; pools: addresses of caches, for ops that take them after the structures.

    IndexError if a number that the op uses as a place (a page, a row, an expert) is out of range; nothing is computed.
    """
    arguments = [byref(structure) for structure in structures]
    wrong = getattr(library(), f"distill_{op}")(*arguments, *map(c_void_p, pools))
    if wrong is not None:
        raise IndexError(f"{op}: {wrong.decode()}")


def packed_bytes(kind: int, n: int, k: int) -> int:
    """Bytes of a packed matrix [n, k] of a kind (cpu_packing.py)."""
    return int(library().distill_packed_bytes(kind, n, k))


def instruction_set(name: str | None = None) -> str:
    """The instruction set in use ("avx512_bf16", "avx512", "avx2", "portable"), after switching to `name` if given.

    ValueError if this machine does not have it.
    """
    used = library().distill_isa(name.encode() if name else None)
    if used is None:
        raise ValueError(f"this machine does not have the instruction set {name!r}")
    return str(used.decode())


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine has, the fastest first."""
    used, available = instruction_set(), []
    for name in ("avx512_bf16", "avx512", "avx2", "portable"):
        if library().distill_isa(name.encode()) is not None:
            available.append(name)
    instruction_set(used)
    return tuple(available)


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
