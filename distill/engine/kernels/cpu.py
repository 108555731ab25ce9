"""The kernels of cpu.cpp as ops: weights packed once, activations float32 between ops.

A product reads activations rounded to bfloat16 (compute dtype bfloat16), or split into three bfloat16 whose sum is the
float32 itself (compute dtype float32: exact to float32, at a third of the speed). Weights keep their published form:
FP8 codes with their scales, bfloat16, or float32. Sums run in a fixed order, so that no result depends on what else is
in the batch, on chunks, or on the number of threads.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int64, c_void_p
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import (
    DecodeArgs,
    DrawArgs,
    ExpertsArgs,
    IndexArgs,
    LinearArgs,
    NormArgs,
    PackedMatrix,
    PrefillArgs,
    RopeArgs,
    RouteArgs,
    WriteArgs,
    library,
    threads,
)
from distill.engine.kernels.cpu_library import instruction_set as instruction_set
from distill.engine.kernels.cpu_library import instruction_sets as instruction_sets
from distill.engine.kernels.cpu_library import session as session
from distill.engine.kernels.cpu_library import why_missing as why_missing
from distill.engine.kernels.reference import FP8_BLOCK, Damaged, Fp8, Place, Stored

PANEL = 64  # outputs side by side in a packed matrix
_ALIGNMENT = 64
# PackedMatrix and PackJob of cpu.cpp, for arrays of them.
_PACKED = np.dtype([("kind", "i4"), ("n", "i4"), ("k", "i4"), ("groups", "i4"), ("data", "u8"), ("scale", "u8")])
_JOB = np.dtype(
    [
        ("source", "u8"),
        ("row_stride", "i8"),
        ("offset", "i8"),
        ("out", "u8"),
        ("fd", "i4"),
        ("kind", "i4"),
        ("n", "i4"),
        ("k", "i4"),
    ]
)
_FLOAT32 = 2
_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: _FLOAT32}


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 2-dimensional strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Memory:
    """`size` bytes for packed matrices, from the aligned address `begin` on."""

    def __init__(self, size: int) -> None:
        self._data = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        self.begin = self._data.data_ptr() + -self._data.data_ptr() % _ALIGNMENT


class Packed:
    """A matrix [n, c], or `groups` of them, in panels. `parts`: bfloat16 parts that activations are split into."""

    def __init__(self, weights: list[Stored], dtype: torch.dtype, place: Place | None = None) -> None:
        self.parts = _parts(dtype)
        matrices = [_in_kept_form(weight, dtype) for weight in weights]
        self.n, self.k = matrices[0].shape
        self.kind = kind = _KINDS[matrices[0].dtype]
        size = library().distill_packed_bytes(kind, self.n, self.k)
        self._memory, self.bytes = Memory(len(weights) * size), len(weights) * size
        jobs = np.zeros(len(weights), _JOB)
        for index, (weight, matrix) in enumerate(zip(weights, matrices, strict=True)):
            jobs[index] = _job(weight, matrix, place)
            jobs[index]["out"] = self._memory.begin + index * size
        if _run_jobs(jobs, threads()) >= 0:
            raise Damaged("codes")
        self._scale = _panel_scales(weights, self.n)
        if self._scale is not None and not self._scale.isfinite().all():
            raise Damaged("scale")
        scale = None if self._scale is None else self._scale.data_ptr()
        self._struct = PackedMatrix(kind, self.n, self.k, len(weights), self._memory.begin, scale)
        self.address = addressof(self._struct)

    def reads_like(self, other: Packed) -> bool:
        """Whether both read activations in the same form: float32 as it is, or parts of it."""
        return (self.kind == _FLOAT32) == (other.kind == _FLOAT32)


def _in_kept_form(weight: Stored, compute: torch.dtype) -> Tensor:
    """Codes, bfloat16 or float32 with contiguous rows: never less exact than the compute dtype asks."""
    if isinstance(weight, Fp8):
        return _rows(weight.codes)
    narrow = compute == torch.bfloat16 or weight.dtype == torch.bfloat16
    return _rows(weight.to(torch.bfloat16 if narrow else torch.float32))


def _job(weight: Stored, matrix: Tensor, place: Place | None) -> tuple[int, ...]:
    """A PackJob without a destination, for the `matrix` that is kept of `weight`."""
    n, k = matrix.shape
    stored = weight.codes if isinstance(weight, Fp8) else weight
    if place is not None and matrix is stored:
        return (0, k, place.offset, 0, place.descriptor, _KINDS[matrix.dtype], n, k)
    return (matrix.data_ptr(), matrix.stride(0), 0, 0, -1, _KINDS[matrix.dtype], n, k)


def _run_jobs(jobs: np.ndarray, workers: int) -> int:
    """Pack; the number of a matrix with NaN codes, or -1."""
    jobs = np.ascontiguousarray(jobs)
    bad = int(library().distill_pack(c_void_p(jobs.ctypes.data), jobs.size, workers))
    if bad == -2:
        raise OSError("a weights file cannot be read any more; was it moved or changed?")
    return bad


def _parts(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bfloat16 else 3


def _panel_scales(weights: Sequence[Stored], n: int) -> Tensor | None:
    """FP8 matrices of n rows: one scale per matrix, panel and 128 columns."""
    scales = [w.scale.float() for w in weights if isinstance(w, Fp8)]
    return torch.stack(scales)[:, torch.arange(0, n, PANEL) // FP8_BLOCK].contiguous() if scales else None


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def has_nan_codes(codes: Tensor) -> bool:
    assert codes.is_contiguous()
    return bool(library().distill_has_nan(c_void_p(codes.data_ptr()), c_int64(codes.numel()), threads()))


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Packed:
    return Packed([weight], dtype, place)


def pack_heads(weights: Sequence[Stored], dtype: torch.dtype) -> Packed:
    return Packed(list(weights), dtype)


class ExpertBank:
    """As in reference.py. Packed experts lie one after the other, gate, up and down each; `arrays` holds what the
    kernel reads, a PackedMatrix for each part and expert."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.count, self.resident, self.parts = count, count, _parts(dtype)
        self._dtype = dtype
        self._lent: list[tuple[tuple[Stored, Stored, Stored], tuple[Place, ...] | None]] = []
        self._scales: list[Tensor | None] = []
        self._memory: Memory | None = None
        self._jobs = np.zeros((0, 3), _JOB)
        self.arrays = np.zeros((3, count), _PACKED)
        self.addresses = [self.arrays[part].ctypes.data for part in range(3)]

    def lend(self, expert: tuple[Stored, Stored, Stored], places: tuple[Place, ...] | None = None) -> None:
        self._lent.append((expert, places))

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of gate, up and down, packed."""
        kept = [_in_kept_form(weight, self._dtype) for weight in self._lent[0][0]]
        return [int(library().distill_packed_bytes(_KINDS[matrix.dtype], *matrix.shape)) for matrix in kept]

    @property
    def bytes_each(self) -> int:
        return sum(self._sizes)

    def settle(self, resident: int | None = None) -> None:
        assert len(self._lent) == self.count
        self.resident = self.count if resident is None else resident
        files = {place.file for _, places in self._lent for place in places or ()}
        converted = []  # matrices that are not kept as stored, until they are packed
        jobs = np.zeros((self.count, 3), _JOB)
        for index, (expert, places) in enumerate(self._lent):
            for part, weight in enumerate(expert):
                matrix = _in_kept_form(weight, self._dtype)
                jobs[index, part] = _job(weight, matrix, places[part] if places else None)
                if matrix is not (weight.codes if isinstance(weight, Fp8) else weight):
                    converted.append(matrix)
                    if index >= self.resident:
                        raise ValueError(
                            f"experts that are not stored as FP8 or {self._dtype} cannot be streamed; raise the memory "
                            "budget to hold them all, or convert the checkpoint to bfloat16 or FP8"
                        )
        for name in ("kind", "n", "k"):
            self.arrays[name] = jobs[name].T
        self.arrays["groups"] = 1
        for part in range(3):
            scale = _panel_scales([expert[part] for expert, _ in self._lent], int(jobs["n"][0, part]))
            self._scales.append(scale)
            if scale is not None:
                if not scale.isfinite().all():
                    raise Damaged("scale", int((~scale.isfinite()).flatten(1).any(1).nonzero()[0]), part)
                self.arrays["scale"][part] = scale.data_ptr() + np.arange(self.count) * (scale.stride(0) * 4)
        offsets = np.concatenate(([0], np.cumsum(self._sizes)[:-1]))
        self._offsets = (np.arange(self.count)[:, None] * self.bytes_each + offsets).astype(np.uint64)
        self._memory = Memory(self.resident * self.bytes_each)
        jobs["out"][: self.resident] = self._memory.begin + self._offsets[: self.resident]
        bad = _run_jobs(jobs, threads())
        if bad >= 0:
            raise Damaged("codes", *divmod(bad, 3))
        self.arrays["data"] = jobs["out"].T
        self._jobs = jobs[self.resident :].copy()
        self._offsets = self._offsets[: self.count - self.resident]
        # What is streamed is read from its place, and of that only the file is needed: it must stay open.
        self._lent = [(expert, places) for expert, places in self._lent[self.resident :] if places is None]
        self._files = files

    def fill(self, arena: Memory, chosen: Sequence[int] | None = None, background: bool = False) -> None:
        jobs = self._jobs.copy()
        jobs["out"] = arena.begin + self._offsets
        if chosen is not None:
            jobs = jobs[[i - self.resident for i in chosen if i >= self.resident]]
        _run_jobs(jobs, 1 if background else threads())

    def goes_with(self, shared: Packed) -> bool:
        """Whether the kernel can compute a shared expert beside these: both read activations in the same form."""
        return (shared.kind == _FLOAT32) == (int(self.arrays["kind"][0, 0]) == _FLOAT32)

    def install(self, arena: Memory) -> None:
        self.arrays["data"][:, self.resident :] = (arena.begin + self._offsets).T


def expert_bank(count: int, dtype: torch.dtype) -> ExpertBank:
    return ExpertBank(count, dtype)


def arena(size: int) -> Memory:
    return Memory(size)


def packed_bytes(packed: Packed) -> int:
    return packed.bytes


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
    library().distill_route(
        byref(
            RouteArgs(
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
                threads(),
            )
        )
    )
    return experts_tk, weights_tk


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    assert x_thd.stride(-1) == 1
    t, h, d = x_thd.shape
    library().distill_rope(
        byref(
            RopeArgs(
                x_thd.data_ptr(),
                x_thd.stride(0),
                x_thd.stride(1),
                cos_tr.data_ptr(),
                sin_tr.data_ptr(),
                x_thd.data_ptr(),
                x_thd.stride(0),
                x_thd.stride(1),
                t,
                h,
                d // 2,
                interleaved,
                threads(),
                0,
            )
        )
    )


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    x_tkd = _rows(x_tkd)
    t, heads, width = x_tkd.shape
    assert pool.is_contiguous() and pool.shape[1] == heads and pool.shape[3] == width
    library().distill_paged_write(
        byref(
            WriteArgs(
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
    library().distill_rms_norm(
        byref(
            NormArgs(x_tc.data_ptr(), x_tc.stride(0), weight_c.data_ptr(), out.data_ptr(), c, rows, c, eps, threads())
        )
    )
    return out


def _linear_args(x: Tensor, w: Packed, bias: Tensor | None, out: Tensor, add: bool = False) -> Any:
    """x [t, c] or [t, h, c], out [t, n] or [t, h, n], their last dimensions contiguous."""
    grouped = x.dim() == 3
    return LinearArgs(
        x.data_ptr(),
        x.stride(0),
        x.stride(1) if grouped else 0,
        w.address,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        out.stride(1) if grouped else 0,
        x.shape[0],
        w.parts,
        add,
        threads(),
    )


def linear(x_tc: Tensor, weight: Packed, bias_n: Tensor | None = None, onto_tn: Tensor | None = None) -> Tensor:
    x_tc = _rows(x_tc)
    assert x_tc.dtype == torch.float32 and x_tc.shape[1] == weight.k
    out = torch.empty(x_tc.shape[0], weight.n) if onto_tn is None else onto_tn
    assert out.stride(-1) == 1
    library().distill_linear(byref(_linear_args(x_tc, weight, bias_n, out, onto_tn is not None)))
    return out


def swiglu_linear(
    x_tc: Tensor, gate: Packed, up: Packed, gate_bias_f: Tensor | None = None, up_bias_f: Tensor | None = None
) -> Tensor:
    if gate_bias_f is not None or up_bias_f is not None:
        return torch.nn.functional.silu(linear(x_tc, gate, gate_bias_f)) * linear(x_tc, up, up_bias_f)
    x_tc = _rows(x_tc)
    out = torch.empty(x_tc.shape[0], gate.n)
    library().distill_swiglu_linear(byref(_linear_args(x_tc, gate, None, out)), c_void_p(up.address))
    return out


def per_head(x_thc: Tensor, weight: Packed) -> Tensor:
    x_thc = _rows(x_thc)
    out = torch.empty(*x_thc.shape[:2], weight.n)
    library().distill_linear(byref(_linear_args(x_thc, weight, None, out)))
    return out


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank,
    shared: tuple[Packed, Packed, Packed] | None,
    onto_tc: Tensor,
) -> Tensor:
    x_tc, experts_tk, weights_tk = x_tc.contiguous(), experts_tk.contiguous(), weights_tk.contiguous()
    t, k = experts_tk.shape
    assert onto_tc.is_contiguous()
    beside = shared is not None and bank.goes_with(shared[0])
    library().distill_experts(
        byref(
            ExpertsArgs(
                x_tc.data_ptr(),
                experts_tk.data_ptr(),
                weights_tk.data_ptr(),
                *bank.addresses,
                *([matrix.address for matrix in shared] if shared and beside else [None] * 3),
                onto_tc.data_ptr(),
                t,
                k,
                bank.count,
                bank.parts,
                True,
                threads(),
            )
        )
    )
    if shared is not None and not beside:
        linear(swiglu_linear(x_tc, *shared[:2]), shared[2], None, onto_tc)
    return onto_tc


def _decode(q: Tensor, k: Tensor, v: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    q = q.contiguous()
    b, h, d = q.shape
    assert table_bp.shape[0] == length_b.shape[0] == b and table_bp.stride(1) == 1
    out = torch.empty(b, h, e)
    library().distill_decode(
        byref(
            DecodeArgs(
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
                threads(),
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
    library().distill_prefill(
        byref(
            PrefillArgs(
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
                threads(),
                scale,
            )
        )
    )
    return out


def index_scores(q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int) -> Tensor:
    q_thd, weight_th = q_thd.contiguous(), weight_th.contiguous()
    t, h, d = q_thd.shape
    assert t <= length <= table_p.numel() * pool.shape[2] and table_p.is_contiguous()
    out = torch.empty(t, length)
    library().distill_index_scores(
        byref(
            IndexArgs(
                q_thd.data_ptr(),
                weight_th.data_ptr(),
                pool.data_ptr(),
                table_p.data_ptr(),
                out.data_ptr(),
                t,
                length,
                h,
                d,
                pool.shape[2],
                pool.dtype == torch.float32,
                threads(),
                0,
            )
        )
    )
    return out


def draw(
    logits_rv: Tensor,
    row_b: Tensor,
    uniform_b: Tensor,
    temperature_b: Tensor,
    top_k_b: Tensor,
    top_p_b: Tensor,
) -> tuple[Tensor, Tensor]:
    logits_rv = logits_rv.contiguous()
    token_b, logprob_b = torch.empty_like(row_b), torch.empty_like(temperature_b)
    library().distill_draw(
        byref(
            DrawArgs(
                logits_rv.data_ptr(),
                row_b.data_ptr(),
                uniform_b.data_ptr(),
                temperature_b.data_ptr(),
                top_k_b.data_ptr(),
                top_p_b.data_ptr(),
                token_b.data_ptr(),
                logprob_b.data_ptr(),
                len(row_b),
                logits_rv.shape[1],
                threads(),
                0,
            )
        )
    )
    return token_b, logprob_b
