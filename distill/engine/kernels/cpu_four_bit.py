"""Experts in four bits on a CPU: codes stay codes in memory, and an expert is decoded when it is used.

Memory is that of the published checkpoint, and so is what is read from its files when experts are streamed. The price
is time: an expert is decoded and packed again in each step that uses it, whatever the number of its tokens, so that
large batches lose little and a single sequence much. Decoding all experts of a layer at once, for the op that computes
them together, was rejected: those of Kimi K2 take 34 GB in bfloat16. Products of the codes themselves, as of FP8, would
be one more form in the compiled kernels.

An expert's rows are multiplied by the ops that multiply any matrix, whose bits do not depend on other rows. A token's
experts are added in the order in which they were chosen.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.engine.kernels.cpu_packing import Memory, Packed
from distill.engine.kernels.four_bit import FourBit
from distill.engine.kernels.pages import discard
from distill.engine.kernels.stored import Place, Stored

_ALIGNED = 64

Expert = tuple[Stored, Stored, Stored]


class FourBitBank:
    """As reference.Bank. A record in memory has codes and scales of gate, up and down, one after the other."""

    queued = False

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.count, self.resident, self.dtype = count, count, dtype
        self._lent: list[tuple[FourBit, ...]] = []
        self._mapped = False
        self._memory, self._arena = Memory(0), Memory(0)

    def lend(self, expert: Expert, places: tuple[Place, ...] | None = None) -> None:
        """See reference.Bank. places: given where the tensors are views of a mapped file, whose memory is then given
        back after each reading."""
        matrices = tuple(matrix for matrix in expert if isinstance(matrix, FourBit))
        assert len(matrices) == len(expert)
        self._lent.append(matrices)
        self._mapped = places is not None

    def _tensors(self, index: int) -> list[Tensor]:
        return [tensor for matrix in self._lent[index] for tensor in (matrix.codes, matrix.scales)]

    @property
    def bytes_each(self) -> int:
        """See reference.Bank."""
        return sum(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in self._tensors(0))

    def settle(self, resident: int | None = None) -> None:
        """See reference.Bank."""
        assert len(self._lent) == self.count
        self.resident = self.count if resident is None else resident
        self._memory = Memory(self.resident * self.bytes_each)
        for index, expert in enumerate(self._lent):
            for part, matrix in enumerate(expert):
                matrix.check(index, part)
            if index < self.resident:
                self._copy(index, self._memory, index)
                self._lent[index] = self._in(self._memory, index, expert)
            elif self._mapped:
                self._give_back(index)

    def _in(self, memory: Memory, record: int, like: tuple[FourBit, ...]) -> tuple[FourBit, ...]:
        """The matrices of a record."""
        at, matrices = record * self.bytes_each, []
        for matrix in like:
            parts = []
            for tensor in (matrix.codes, matrix.scales):
                parts.append(memory.part(at, tensor))
                at += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
            matrices.append(matrix.of(*parts))
        return tuple(matrices)

    def _copy(self, index: int, memory: Memory, record: int) -> None:
        lent = self._lent[index]
        for here, there in zip(self._in(memory, record, lent), lent, strict=True):
            here.codes.copy_(there.codes)
            here.scales.view(torch.uint8).copy_(there.scales.view(torch.uint8))
        if self._mapped:
            self._give_back(index)

    def _give_back(self, index: int) -> None:
        """Give back the memory in which the file's pages are mapped."""
        for tensor in self._tensors(index):
            discard(tensor.data_ptr(), tensor.nbytes)

    def fill(self, arena: Memory, chosen: Sequence[int] | None = None, background: bool = False) -> None:
        """See reference.Bank."""
        wanted = range(self.resident, self.count) if chosen is None else [i for i in chosen if i >= self.resident]
        for index in wanted:
            self._copy(index, arena, index - self.resident)

    def install(self, arena: Memory) -> None:
        """See reference.Bank."""
        self._arena = arena

    def matrices(self, index: int) -> tuple[Packed, Packed, Packed]:
        """Gate, up and down of an expert that is in memory, decoded. IndexError for a number that no expert has."""
        if not 0 <= index < self.count:
            raise IndexError(f"expert {index} is out of range (0 to {self.count - 1})")
        lent = self._lent[index]
        stored = lent if index < self.resident else self._in(self._arena, index - self.resident, lent)
        gate, up, down = (Packed([matrix], self.dtype) for matrix in stored)
        return gate, up, down
