"""The experts of a layer on the GPU, those that stay there and those that are streamed to it.

An expert is one record of bytes: gate over up, [2f, c], then down, [c, f], codes first and their scales behind them;
each width is padded with zeros to whole blocks of 128. Resident records are contiguous on the device. The others
are contiguous in page-locked host memory; those of a layer are copied together, beside the computation, into one of two
arenas. Products read both places, so that the place of a record does not matter.

Legend: as in w8a8.py; f and c are the padded widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.kernels.gpu_gemm import Matrices, grouped
from distill.engine.kernels.stored import FP8_BLOCK, Place, Stored

_ALIGNED = 256


class ExpertBank:
    """As reference.Bank; filling is queued and not waited for."""

    queued = True
    product = staticmethod(grouped)  # of rows with the matrices of the experts, `gate_up` or `down`

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count, self.resident, self.fp8, self.ue8m0 = count, count, False, False
        self._dtype, self._device = dtype, device
        self._lent: list[tuple[Stored, Stored, Stored]] = []
        self._parts: dict[int, tuple[list[Matrices], ...]] = {}  # by the arena that streamed experts are read from

    def lend(self, expert: tuple[Stored, Stored, Stored], places: tuple[Place, ...] | None = None) -> None:
        """See reference.Bank."""
        if not self._lent:
            gate, _, down = expert
            quantised = [matrix.for_fp8_products(self._dtype) for matrix in expert]
            self.fp8 = None not in quantised
            self.ue8m0 = quantised[0] is not None and quantised[0].ue8m0
            (f, c), self.width = gate.shape, down.shape[0]
            self.f, self.c = padded(f), padded(c)
            self._offsets, at = [], 0
            for size in self._sizes(expert):
                self._offsets.append(at)
                at += -(-size // _ALIGNED) * _ALIGNED
            self.bytes_each = at
        self._lent.append(expert)

    def _sizes(self, expert: Sequence[Stored]) -> list[int]:
        """Bytes of a record's parts: gate over up, down, and the scales of both. expert: one like all."""
        item = 1 if self.fp8 else self._dtype.itemsize
        blocks = self.f // FP8_BLOCK, self.c // FP8_BLOCK, -(-self.width // FP8_BLOCK)
        return [
            2 * self.f * self.c * item,
            self.width * self.f * item,
            2 * blocks[0] * blocks[1] * 4 * self.fp8,
            blocks[2] * blocks[0] * 4 * self.fp8,
        ]

    def settle(self, resident: int | None = None) -> None:
        """Raises Damaged."""
        self.resident = self.count if resident is None else resident
        streamed = self.count - self.resident
        self._here = torch.zeros(self.resident * self.bytes_each, dtype=torch.uint8, device=self._device)
        pinned = self._device.type == "cuda" and streamed > 0
        self._there = torch.zeros(streamed * self.bytes_each, dtype=torch.uint8, pin_memory=pinned)
        for index, expert in enumerate(self._lent):
            where, number = (self._here, index) if index < self.resident else (self._there, index - self.resident)
            self._write(where[number * self.bytes_each :][: self.bytes_each], index, expert)
        self._lent = []
        self._filled = torch.cuda.Event() if pinned else None
        self._read_from(None)

    def _write(self, record: Tensor, index: int, lent: tuple[Stored, Stored, Stored]) -> None:
        expert = [matrix.on(record.device) for matrix in lent]  # where checking numbers is fast
        for part, matrix in enumerate(expert):
            matrix.check(index, part)
        self._fill_record(record, expert)

    def _fill_record(self, record: Tensor, expert: Sequence[Stored]) -> None:
        gate, up, down = expert
        at, f, c = self._offsets, self.f, self.c
        for offset, matrix, rows, columns in (
            (at[0], gate, f, c),
            (at[0] + f * c * self._item, up, f, c),
            (at[1], down, self.width, f),
        ):
            values = matrix.values.view(torch.uint8) if self.fp8 else matrix.dense(self._dtype)
            if values.shape != (rows, columns):
                values = F.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))
            put(record, offset, values)
        if self.fp8:
            scales = [matrix.scale for matrix in expert if matrix.scale is not None]
            for offset, scale in zip((at[2], at[2] + scales[0].nbytes, at[3]), scales, strict=True):
                put(record, offset, scale)

    @property
    def _item(self) -> int:
        return 1 if self.fp8 else self._dtype.itemsize

    def fill(self, arena: Tensor, chosen: Sequence[int] | None = None, background: bool = False) -> None:
        """Queue copies to `arena` behind all work queued so far, which may still read it."""
        wanted = None if chosen is None else [i - self.resident for i in chosen if i >= self.resident]
        if self._filled is None:
            self._copy(arena, wanted)
            return
        stream = _copies(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._copy(arena, wanted)
            self._filled.record(stream)

    def _copy(self, arena: Tensor, wanted: Sequence[int] | None) -> None:
        if wanted is None:
            arena[: len(self._there)].copy_(self._there, non_blocking=True)
            return
        for number in wanted:
            record = slice(number * self.bytes_each, (number + 1) * self.bytes_each)
            arena[record].copy_(self._there[record], non_blocking=True)

    def install(self, arena: Tensor) -> None:
        """Products queued from now on read the streamed experts from `arena`, once they are there."""
        if self._filled is not None:
            torch.cuda.current_stream().wait_event(self._filled)
        self._read_from(arena)

    def _read_from(self, arena: Tensor | None) -> None:
        """The experts' matrices from now on: `gate_up` and `down`, in one place or two."""
        key = 0 if arena is None else arena.data_ptr()
        if key not in self._parts:
            some = [(self._here, 0, self.resident)] if self.resident else []
            if arena is not None and self.resident < self.count:
                some.append((arena, self.resident, self.count - self.resident))
            self._parts[key] = tuple([self._matrices(*place, part) for place in some] for part in range(2))
        self.gate_up, self.down = self._parts[key]

    def _matrices(self, memory: Tensor, first: int, count: int, part: int) -> Matrices:
        """Gate over up (part 0) or down (1) of `count` experts, `first` and on, whose records `memory` begins with."""
        n, k = ((2 * self.f, self.c), (self.width, self.f))[part]
        scales = -(-n // FP8_BLOCK) * (k // FP8_BLOCK) if self.fp8 else 0
        dtype = torch.float8_e4m3fn if self.fp8 else self._dtype
        values = self._view(memory, count, part, dtype, (n, k))
        return Matrices(values, self._view(memory, count, 2 + part, torch.float32, (scales,)), first)

    def _view(self, memory: Tensor, count: int, part: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A part of the records of `count` experts as a tensor [count, *shape]."""
        item, strides = dtype.itemsize, torch.empty(shape, device="meta").stride()
        values = memory[: count * self.bytes_each].view(dtype)
        each, at = self.bytes_each // item, self._offsets[part] // item
        return values.as_strided((count, *shape), (each, *strides), at)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copies(device: torch.device) -> torch.cuda.Stream:
    """The device's stream for copies from the host."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def padded(width: int) -> int:
    """A width in whole blocks of 128."""
    return -(-width // FP8_BLOCK) * FP8_BLOCK


def put(record: Tensor, offset: int, values: Tensor) -> None:
    """Write a tensor into a record."""
    data = values.contiguous().view(torch.uint8).flatten()
    record[offset : offset + len(data)].copy_(data)
