"""The kernels of cpu.cpp as ops: weights packed once, activations float32 between ops.

A product reads activations rounded to bfloat16 (compute dtype bfloat16), or split into three bfloat16 whose sum is the
float32 itself (compute dtype float32: exact to float32, at a third of the speed). Weights keep their published form:
FP8 codes with their scales, bfloat16, or float32. Sums run in a fixed order, so that no result depends on what else is
in the batch, on chunks, or on the number of threads.

The library is compiled when the package is installed and is optional: `why_missing` says what its absence is due to.

Legend: as in reference.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import addressof, byref, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.engine.kernels.reference import FP8_BLOCK, Fp8, Stored

PANEL = 64  # outputs side by side in a packed matrix
_ALIGNMENT = 64
_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from "type: name name; …", in the order of cpu.cpp."""
    types = {"int": c_int32, "long": c_int64, "float": c_float, "pointer": c_void_p}
    listed = [
        (field, types[kind.strip()])
        for kind, names in (part.split(":") for part in fields.split(";"))
        for field in names.split()
    ]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


_Packed = _struct("_Packed", "int: kind n k groups; pointer: data scale")
_Linear = _struct(
    "_Linear", "pointer: x; long: x_stride; pointer: w bias out; long: out_stride; int: rows parts add threads"
)
_Experts = _struct(
    "_Experts", "pointer: x expert weight gate up down out; int: tokens per_token experts parts threads unused"
)
_Decode = _struct(
    "_Decode",
    "pointer: q k v table length out; long: table_stride; "
    "int: rows heads kv_heads d e k_width v_width page_size wide threads; float: scale",
)
_Prefill = _struct(
    "_Prefill",
    "pointer: q k v table uk uv out; "
    "int: rows length heads kv_heads d e k_width v_width page_size wide threads; float: scale",
)
_Route = _struct(
    "_Route",
    "pointer: logits bias expert weight; "
    "int: tokens experts groups groups_kept per_token softmax group_by_best normalise; float: factor; int: threads",
)
_Rope = _struct(
    "_Rope",
    "pointer: x; long: x_row x_head; pointer: cos sin out; long: out_row out_head; "
    "int: rows heads r interleaved threads unused",
)
_Write = _struct(
    "_Write", "pointer: pool page offset x; long: x_row x_head; int: rows heads width page_size wide unused"
)
_Norm = _struct(
    "_Norm", "pointer: x; long: x_stride; pointer: weight out; long: out_stride; int: rows c; float: eps; int: threads"
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


def _lib() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str), library
    return library


def instruction_set(name: str | None = None) -> str:
    """The instruction set in use ("avx512_bf16", "avx512", "avx2", "portable"), after switching to `name` if given.

    ValueError if this machine does not have it.
    """
    used = _lib().distill_isa(name.encode() if name else None)
    if used is None:
        raise ValueError(f"this machine does not have the instruction set {name!r}")
    return str(used.decode())


_own_threads: int | None = None


@contextmanager
def session() -> Iterator[None]:
    """While it is open, torch's own ops run on one thread and the kernels on as many as torch had.

    What torch still does between kernels is small; its workers would spin on the cores that the kernels' need.
    """
    global _own_threads
    threads, before = torch.get_num_threads(), _own_threads
    _own_threads = before or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _own_threads = before


def _threads() -> int:
    return _own_threads or torch.get_num_threads()


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 2-dimensional strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Memory:
    """Bytes for packed matrices, given out one after the other."""

    def __init__(self, size: int) -> None:
        self._data = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        self._end = self._data.data_ptr() + self._data.numel()
        self._next = self._data.data_ptr()

    def take(self, size: int) -> int:
        """The address of `size` bytes, aligned."""
        begin = self._next + -self._next % _ALIGNMENT
        self._next = begin + size
        assert self._next <= self._end
        return begin


class Packed:
    """A matrix [n, c], or `groups` of them, in panels. `parts`: bfloat16 parts that activations are split into.

    memory: where to put it; its own unless given.
    """

    def __init__(self, weights: list[Stored], dtype: torch.dtype, memory: Memory | None = None) -> None:
        self.parts = 1 if dtype == torch.bfloat16 else 3
        first = weights[0]
        codes = [w.codes if isinstance(w, Fp8) else w.to(_kept(w.dtype, dtype)) for w in weights]
        self.n, self.k = codes[0].shape
        kind = _KINDS[codes[0].dtype]
        size = _lib().distill_packed_bytes(kind, self.n, self.k)
        self._memory = memory or Memory(len(weights) * size)
        begin = self._memory.take(len(weights) * size)
        for index, matrix in enumerate(codes):
            matrix = _rows(matrix)
            _lib().distill_pack(
                kind,
                self.n,
                self.k,
                c_void_p(matrix.data_ptr()),
                c_int64(matrix.stride(0)),
                c_void_p(begin + index * size),
                _threads(),
            )
            _lib().distill_page_out(c_void_p(matrix.data_ptr()), c_int64(matrix.nbytes))
        self._scale: Tensor | None = None
        if isinstance(first, Fp8):  # one scale per panel and 128 columns
            rows = torch.arange(0, self.n, PANEL) // FP8_BLOCK
            self._scale = torch.stack([w.scale.float()[rows] for w in weights if isinstance(w, Fp8)]).contiguous()
        scale = None if self._scale is None else self._scale.data_ptr()
        self.struct = _Packed(kind, self.n, self.k, len(weights), begin, scale)
        self.address = addressof(self.struct)


def _kept(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """In which of the kernels' forms a dense matrix is kept: never less exact than the compute dtype asks."""
    return torch.bfloat16 if compute == torch.bfloat16 or stored == torch.bfloat16 else torch.float32


def _packed_bytes(weight: Stored, dtype: torch.dtype) -> int:
    matrix = weight.codes if isinstance(weight, Fp8) else weight
    kept = matrix.dtype if isinstance(weight, Fp8) else _kept(matrix.dtype, dtype)
    n, k = matrix.shape
    return int(_lib().distill_packed_bytes(_KINDS[kept], n, k)) + _ALIGNMENT


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def has_nan_codes(codes: Tensor) -> bool:
    assert codes.is_contiguous()
    return bool(_lib().distill_has_nan(c_void_p(codes.data_ptr()), c_int64(codes.numel()), _threads()))


def pack(weight: Stored, dtype: torch.dtype) -> Packed:
    return Packed([weight], dtype)


def pack_heads(weight_hnc: Tensor, dtype: torch.dtype) -> Packed:
    return Packed([head.contiguous() for head in weight_hnc.to(dtype)], dtype)


class Experts:
    """The three matrices of every expert of a layer."""

    def __init__(self, experts: Iterable[tuple[Stored, Stored, Stored]], count: int, dtype: torch.dtype) -> None:
        self.matrices: list[tuple[Packed, ...]] = []
        memory = None
        for expert in experts:
            if memory is None:
                memory = Memory(count * sum(_packed_bytes(matrix, dtype) for matrix in expert))
            self.matrices.append(tuple(Packed([matrix], dtype, memory) for matrix in expert))
        assert len(self.matrices) == count
        self.parts = self.matrices[0][0].parts
        self.arrays = [
            (_Packed * len(self.matrices))(*(matrices[part].struct for matrices in self.matrices)) for part in range(3)
        ]
        self.addresses = [addressof(array) for array in self.arrays]


def pack_experts(experts: Iterable[tuple[Stored, Stored, Stored]], count: int, dtype: torch.dtype) -> Experts:
    return Experts(experts, count, dtype)


def route(
    logits_tx: Tensor,
    bias_x: Tensor | None,
    scoring: str,
    group_by: str,
    groups: int,
    groups_kept: int,
    per_token: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits_tx = logits_tx.contiguous()
    t, x = logits_tx.shape
    experts_tk, weights_tk = torch.empty(t, per_token, dtype=torch.int64), torch.empty(t, per_token)
    _lib().distill_route(
        byref(
            _Route(
                logits_tx.data_ptr(),
                None if bias_x is None else bias_x.data_ptr(),
                experts_tk.data_ptr(),
                weights_tk.data_ptr(),
                t,
                x,
                groups,
                groups_kept,
                per_token,
                scoring == "softmax",
                group_by == "best",
                normalise,
                scale,
                _threads(),
            )
        )
    )
    return experts_tk, weights_tk


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> Tensor:
    x_thd = _rows(x_thd)
    t, h, d = x_thd.shape
    out = torch.empty(t, h, d)
    _lib().distill_rope(
        byref(
            _Rope(
                x_thd.data_ptr(),
                x_thd.stride(0),
                x_thd.stride(1),
                cos_tr.data_ptr(),
                sin_tr.data_ptr(),
                out.data_ptr(),
                h * d,
                d,
                t,
                h,
                d // 2,
                interleaved,
                _threads(),
                0,
            )
        )
    )
    return out


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    x_tkd = _rows(x_tkd)
    t, heads, width = x_tkd.shape
    assert pool.is_contiguous() and pool.shape[1] == heads and pool.shape[3] == width
    _lib().distill_paged_write(
        byref(
            _Write(
                pool.data_ptr(),
                page_t.data_ptr(),
                offset_t.data_ptr(),
                x_tkd.data_ptr(),
                x_tkd.stride(0),
                x_tkd.stride(1),
                t,
                heads,
                width,
                pool.shape[2],
                pool.dtype == torch.float32,
                0,
            )
        )
    )


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float) -> Tensor:
    x_tc = _rows(x_tc)
    rows, c = x_tc.shape
    out = torch.empty(rows, c)
    _lib().distill_rms_norm(
        byref(_Norm(x_tc.data_ptr(), x_tc.stride(0), weight_c.data_ptr(), out.data_ptr(), c, rows, c, eps, _threads()))
    )
    return out


def _linear_args(x: Tensor, x_stride: int, w: Packed, bias: Tensor | None, out: Tensor, rows: int) -> Any:
    return _Linear(
        x.data_ptr(),
        x_stride,
        w.address,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.shape[1] if out.dim() == 2 else out.shape[1] * out.shape[2],
        rows,
        w.parts,
        0,
        _threads(),
    )


def linear(x_tc: Tensor, weight: Packed, bias_n: Tensor | None = None) -> Tensor:
    x_tc = _rows(x_tc)
    assert x_tc.dtype == torch.float32 and x_tc.shape[1] == weight.k
    out = torch.empty(x_tc.shape[0], weight.n)
    _lib().distill_linear(byref(_linear_args(x_tc, x_tc.stride(0), weight, bias_n, out, x_tc.shape[0])))
    return out


def swiglu_linear(
    x_tc: Tensor, gate: Packed, up: Packed, gate_bias_f: Tensor | None = None, up_bias_f: Tensor | None = None
) -> Tensor:
    if gate_bias_f is not None or up_bias_f is not None:
        return torch.nn.functional.silu(linear(x_tc, gate, gate_bias_f)) * linear(x_tc, up, up_bias_f)
    x_tc = _rows(x_tc)
    out = torch.empty(x_tc.shape[0], gate.n)
    args = _linear_args(x_tc, x_tc.stride(0), gate, None, out, x_tc.shape[0])
    _lib().distill_swiglu_linear(byref(args), c_void_p(up.address))
    return out


def per_head(x_thc: Tensor, weight: Packed) -> Tensor:
    t, h, c = x_thc.shape
    if x_thc.stride(2) != 1 or x_thc.stride(1) != c:
        x_thc = x_thc.contiguous()
    out = torch.empty(t, h, weight.n)
    _lib().distill_linear(byref(_linear_args(x_thc, x_thc.stride(0), weight, None, out, t)))
    return out


def experts(x_tc: Tensor, experts_tk: Tensor, weights_tk: Tensor, packed: Experts) -> Tensor:
    x_tc, experts_tk, weights_tk = x_tc.contiguous(), experts_tk.contiguous(), weights_tk.contiguous()
    t, k = experts_tk.shape
    out = torch.empty_like(x_tc)
    _lib().distill_experts(
        byref(
            _Experts(
                x_tc.data_ptr(),
                experts_tk.data_ptr(),
                weights_tk.data_ptr(),
                *packed.addresses,
                out.data_ptr(),
                t,
                k,
                len(packed.matrices),
                packed.parts,
                _threads(),
                0,
            )
        )
    )
    return out


def _decode(q: Tensor, k: Tensor, v: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    q = q.contiguous()
    b, h, d = q.shape
    assert table_bp.shape[0] == length_b.shape[0] == b and table_bp.stride(1) == 1
    out = torch.empty(b, h, e)
    _lib().distill_decode(
        byref(
            _Decode(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                table_bp.data_ptr(),
                length_b.data_ptr(),
                out.data_ptr(),
                table_bp.stride(0),
                b,
                h,
                k.shape[1],
                d,
                e,
                k.shape[3],
                v.shape[3],
                k.shape[2],
                k.dtype == torch.float32,
                _threads(),
                scale,
            )
        )
    )
    return out


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float
) -> Tensor:
    return _decode(q_bhd, k_pool, v_pool, table_bp, length_b, scale, v_pool.shape[3])


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    return _decode(q_bhd, pool, pool, table_bp, length_b, scale, e)


def prefill_gqa(q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float) -> Tensor:
    return _prefill(q_thd, k_pool, v_pool, None, None, table_p, length, v_pool.shape[3], scale)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k: Packed, expand_v: Packed, scale: float
) -> Tensor:
    return _prefill(q_thd, pool, None, expand_k, expand_v, table_p, length, expand_v.n, scale)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    expand_k: Packed | None,
    expand_v: Packed | None,
    table_p: Tensor,
    length: int,
    e: int,
    scale: float,
) -> Tensor:
    q = q.contiguous()
    t, h, d = q.shape
    assert t <= length <= table_p.numel() * k.shape[2] and table_p.is_contiguous()
    out = torch.empty(t, h, e)
    _lib().distill_prefill(
        byref(
            _Prefill(
                q.data_ptr(),
                k.data_ptr(),
                None if v is None else v.data_ptr(),
                table_p.data_ptr(),
                None if expand_k is None else expand_k.address,
                None if expand_v is None else expand_v.address,
                out.data_ptr(),
                t,
                length,
                h,
                k.shape[1],
                d,
                e,
                k.shape[3],
                0 if v is None else v.shape[3],
                k.shape[2],
                k.dtype == torch.float32,
                _threads(),
                scale,
            )
        )
    )
    return out
