"""Weights in the form that the CPU kernels read: panels of 64 outputs, packed once.

FP8 codes stay codes, with one scale per panel and 128 columns; bfloat16 stays bfloat16; other numbers become
float32, or bfloat16 where the compute dtype is bfloat16. Matrices that are in a file are read from there a panel at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import library, packed_bytes, threads
from distill.engine.kernels.cpu_structs import PackedMatrix, PackJob
from distill.engine.kernels.pages import discard
from distill.engine.kernels.stored import FP8_BLOCK, Damaged, Place, Stored

PANEL = 64  # outputs side by side in a packed matrix
_ALIGNMENT = 64
_PACKED, _JOB = np.dtype(PackedMatrix), np.dtype(PackJob)  # for arrays of them
_FLOAT32 = 2
_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: _FLOAT32}


def with_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 2-dimensional strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Memory:
    """`size` bytes for packed matrices, from the aligned address `begin` on."""

    def __init__(self, size: int) -> None:
        self._data, self.size = torch.empty(size + _ALIGNMENT, dtype=torch.uint8), size
        self.begin = self._data.data_ptr() + -self._data.data_ptr() % _ALIGNMENT

    def part(self, offset: int, like: Tensor) -> Tensor:
        """The tensor of the shape and dtype of `like` that begins `offset` bytes after `begin`."""
        at = self.begin - self._data.data_ptr() + offset
        return self._data[at : at + like.nbytes].view(like.dtype).view(like.shape)


class ExpertMatrix(Protocol):
    """What a product reads of a packed matrix: its PackedMatrix is at `address`."""

    n: int
    k: int
    address: int
    parts: int


@dataclass
class _OfBank:
    """A matrix of an expert in a bank. See ExpertMatrix."""

    n: int
    k: int
    address: int
    parts: int


class Packed:
    """A matrix [n, c], or `groups` of them, in panels. `parts`: bfloat16 parts that activations are split into."""

    def __init__(self, weights: list[Stored], dtype: torch.dtype, place: Place | None = None) -> None:
        self._dtype, self.parts = dtype, _parts(dtype)
        self.n, self.k = weights[0].shape
        self._memory, self.nbytes = Memory(0), 0
        self.struct = PackedMatrix(kind=0, n=self.n, k=self.k, groups=len(weights), data=None, scale=None)
        self.address = addressof(self.struct)
        self.fill(weights, place)

    def fill(self, weights: list[Stored], place: Place | None = None) -> None:
        """Pack these matrices, of the same shapes, in place of those that are packed. Raises Damaged.

        Memory is allocated only where another amount is needed.
        """
        self.kind = kind = _KINDS[weights[0].kept_dtype(self._dtype)]
        matrices = [with_rows(_packable(weight, self._dtype)) for weight in weights]
        size = packed_bytes(kind, self.n, self.k)
        if self.nbytes != len(weights) * size:
            self._memory, self.nbytes = Memory(len(weights) * size), len(weights) * size
        jobs = np.zeros(len(weights), _JOB)
        for index, (weight, matrix) in enumerate(zip(weights, matrices, strict=True)):
            jobs[index] = _job(weight, matrix, kind, place)
            jobs[index]["out"] = self._memory.begin + index * size
        if (number := _run_jobs(jobs, threads())) >= 0:
            raise Damaged(weights[number].damage)
        self._scale = _panel_scales(weights, self.n)
        for weight in weights:
            weight.check_scale()
        self.struct.kind, self.struct.data = kind, self._memory.begin
        self.struct.scale = None if self._scale is None else self._scale.data_ptr()

    def discard(self) -> None:
        """Give the memory back to the system. The matrix has no numbers until `fill`."""
        discard(self._memory.begin, self._memory.size)

    def reads_like(self, other: Packed) -> bool:
        """Whether both read activations in the same form: float32 as it is, or parts of it."""
        return (self.kind == _FLOAT32) == (other.kind == _FLOAT32)


def _packable(weight: Stored, dtype: torch.dtype) -> Tensor:
    """A matrix as stored or as it is kept, on the CPU, in a form that packing reads: float32 is rounded on the way."""
    direct = weight.values.dtype in (weight.kept_dtype(dtype), torch.float32)
    return (weight.values if direct else weight.kept(dtype)).cpu()


def _job(weight: Stored, matrix: Tensor, kind: int, place: Place | None) -> tuple[int, ...]:
    """A PackJob without a destination, for `matrix`, which is `weight` as stored or as it is kept."""
    (n, k), stored = matrix.shape, _KINDS[matrix.dtype]
    if place is not None and matrix is weight.values:
        return (0, k, place.offset, 0, place.descriptor, stored, kind, n, k)
    return (matrix.data_ptr(), matrix.stride(0), 0, 0, -1, stored, kind, n, k)


def _run_jobs(jobs: np.ndarray, workers: int) -> int:
    """Pack; the number of a matrix with NaN codes or numbers that are not finite, or -1."""
    jobs = np.ascontiguousarray(jobs)
    bad = int(library().distill_pack(c_void_p(jobs.ctypes.data), jobs.size, workers))
    if bad == -2:
        raise OSError("a weights file cannot be read any more; was it moved or changed?")
    return bad


def _parts(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bfloat16 else 3


def _panel_scales(weights: Sequence[Stored], n: int) -> Tensor | None:
    """FP8 matrices of n rows: one scale per matrix, panel and 128 columns."""
    scales = [weight.scale.float() for weight in weights if weight.scale is not None]
    return torch.stack(scales)[:, torch.arange(0, n, PANEL) // FP8_BLOCK].contiguous() if scales else None


class ExpertBank:
    """As reference.Bank. Packed experts follow each other in memory, gate, up and down each; `arrays` holds the
    kernel's view of them, a PackedMatrix for each part and expert. All experts are kept in one form."""

    queued = False

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
        """See reference.Bank."""
        self._lent.append((expert, places))

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of gate, up and down, packed."""
        kept = [weight.kept(self._dtype) for weight in self._lent[0][0]]
        return [packed_bytes(_KINDS[matrix.dtype], *matrix.shape) for matrix in kept]

    @property
    def bytes_each(self) -> int:
        """See reference.Bank."""
        return sum(self._sizes)

    def settle(self, resident: int | None = None) -> None:
        """See reference.Bank. ValueError for streamed experts that would have to be converted each time."""
        assert len(self._lent) == self.count
        self.resident = self.count if resident is None else resident
        files = {place.file for _, places in self._lent for place in places or ()}
        converted = []  # matrices that are not kept as stored, until they are packed
        jobs = np.zeros((self.count, 3), _JOB)
        for index, (expert, places) in enumerate(self._lent):
            for part, weight in enumerate(expert):
                matrix = with_rows(weight.kept(self._dtype))
                place = places[part] if places else None
                jobs[index, part] = _job(weight, matrix, _KINDS[matrix.dtype], place)
                if matrix is not weight.values:
                    converted.append(matrix)
                    if index >= self.resident:
                        raise ValueError(
                            f"experts that are not stored as FP8 or {self._dtype} cannot be streamed; raise the memory "
                            "budget to hold them all, or convert the checkpoint to bfloat16 or FP8"
                        )
        for name in ("kind", "n", "k"):
            self.arrays[name] = jobs[name].T
        kinds = self.arrays["kind"]
        assert (kinds == kinds[:, :1]).all() and len(set((kinds[:, 0] == _FLOAT32).tolist())) == 1
        self.arrays["groups"] = 1
        for part in range(3):
            scale = _panel_scales([expert[part] for expert, _ in self._lent], int(jobs["n"][0, part]))
            self._scales.append(scale)
            if scale is not None:
                usual = (scale > 0) & scale.isfinite()
                for index in (~usual).flatten(1).any(1).nonzero()[:, 0].tolist():
                    self._lent[index][0][part].check_scale(index, part)
                self.arrays["scale"][part] = scale.data_ptr() + np.arange(self.count) * (scale.stride(0) * 4)
        offsets = np.concatenate(([0], np.cumsum(self._sizes)[:-1]))
        self._offsets = (np.arange(self.count)[:, None] * self.bytes_each + offsets).astype(np.uint64)
        self._memory = Memory(self.resident * self.bytes_each)
        jobs["out"][: self.resident] = self._memory.begin + self._offsets[: self.resident]
        bad = _run_jobs(jobs, threads())
        if bad >= 0:
            index, part = divmod(bad, 3)
            raise Damaged(self._lent[index][0][part].damage, index, part)
        self.arrays["data"] = jobs["out"].T
        self._jobs = jobs[self.resident :].copy()
        self._offsets = self._offsets[: self.count - self.resident]
        # Streamed experts are read from their places, for which their files must stay open.
        self._lent = [(expert, places) for expert, places in self._lent[self.resident :] if places is None]
        self._files = files

    def fill(self, arena: Memory, chosen: Sequence[int] | None = None, background: bool = False) -> None:
        """See reference.Bank."""
        assert arena.size >= len(self._jobs) * self.bytes_each
        jobs = self._jobs.copy()
        jobs["out"] = arena.begin + self._offsets
        if chosen is not None:
            jobs = jobs[[i - self.resident for i in chosen if i >= self.resident]]
        _run_jobs(jobs, 1 if background else threads())

    def matrices(self, index: int) -> tuple[ExpertMatrix, ExpertMatrix, ExpertMatrix]:
        """Gate, up and down of an expert that is in memory. IndexError for a number that no expert has."""
        if not 0 <= index < self.count:
            raise IndexError(f"expert {index} is out of range (0 to {self.count - 1})")
        gate, up, down = (
            _OfBank(int(part["n"]), int(part["k"]), begin + index * _PACKED.itemsize, self.parts)
            for part, begin in zip(self.arrays[:, index], self.addresses, strict=True)
        )
        return gate, up, down

    def goes_with(self, shared: Sequence[Packed]) -> bool:
        """Whether the kernel can compute a shared expert beside these: all read activations in the same form."""
        wide = int(self.arrays["kind"][0, 0]) == _FLOAT32
        return all((matrix.kind == _FLOAT32) == wide for matrix in shared)

    def install(self, arena: Memory) -> None:
        """See reference.Bank."""
        self.arrays["data"][:, self.resident :] = (arena.begin + self._offsets).T
