"""Decode steps as CUDA graphs: a step is hundreds of small kernels, and launching them one by one takes longer than
they run. A graph replays them at once, on buffers that stay where they are.

There is a graph for each size of batch in a short list, captured when it is first needed; a batch takes the next size,
and the rows that it does not fill decode a dummy token, into a page that no sequence holds. One upload brings a
step's numbers, one download its tokens: sampling is part of the graph, and nothing waits in between.

A step may be launched before the tokens of the one before it are known here: its rows take them where that step has
left them. The buffers on this side are there twice, because the other pair is still being read.

On a device without graphs (the interpreter's) the same steps are run again instead of replayed.

Legend: b rows, p pages of one sequence, r half the rotated width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.engine.batch import Batch, Chunk, DecodeRows, Local, rotations
from distill.engine.cache import PagedCache
from distill.engine.kernels import Ops
from distill.engine.model import Model
from distill.engine.sampler import Draw, Drawn, draw_numbers, drawn_of

SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 1025, 32))
_WHOLE = ("id", "source", "page", "offset", "length", "top_k")
_REAL = ("uniform", "temperature", "top_p")


@dataclass(frozen=True)
class Launched:
    """A step that the device computes."""

    ops: Ops
    draws: Sequence[Draw]
    _token_b: Tensor
    _logprob_b: Tensor
    _logits_bv: Tensor
    _done: torch.cuda.Event | None

    def drawn(self) -> list[Drawn]:
        """The drawn tokens; waits for the step. With alternatives requested, call it before the next launch, which
        overwrites the logits."""
        if self._done is not None:
            self._done.synchronize()
        return drawn_of(self.ops, self.draws, self._token_b, self._logprob_b, self._logits_bv)


class _Host:
    """The buffers of uploads and downloads, in memory that the device accesses directly."""

    def __init__(self, size: int, pages: int, pinned: bool) -> None:
        self.up = [
            torch.zeros(len(_WHOLE), size, dtype=torch.int64, pin_memory=pinned),
            torch.zeros(len(_REAL), size, dtype=torch.float64, pin_memory=pinned),
            torch.zeros(size, pages, dtype=torch.int32, pin_memory=pinned),
        ]
        self.down = [torch.zeros(size, dtype=dtype, pin_memory=pinned) for dtype in (torch.int64, torch.float32)]
        self._written: list[Sequence[int]] = [()] * size

    def write_pages(self, row: int, pages: Sequence[int]) -> None:
        """A row of the table of pages; mostly it has them already."""
        if self._written[row] != pages:
            self.up[2].numpy()[row, : len(pages)] = pages
            self._written[row] = pages


class DecodeGraphs:
    """nowhere: a page of the cache that no sequence holds. longest: tokens of a sequence, at most."""

    def __init__(self, model: Model, cache: PagedCache, page_size: int, nowhere: int, longest: int, batch: int) -> None:
        self._model, self._cache, self._page_size, self._nowhere = model, cache, page_size, nowhere
        self._device = cache.pools[0][0].device
        size = next((size for size in SIZES if size >= batch), batch)
        self._sizes = [*(s for s in SIZES if s < size), size]
        pinned = self._device.type == "cuda"
        pages = -(-longest // page_size)
        self._hosts = [_Host(size, pages, pinned) for _ in range(2)]
        self._here = [torch.zeros_like(host, device=self._device) for host in self._hosts[0].up]
        self._token_b = torch.zeros(size, dtype=torch.int64, device=self._device)  # of the last step
        self._graphs: dict[int, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if pinned else None

    def serve(self, rows: int, longest: int) -> bool:
        """Whether there is a graph for a step of `rows` rows after which the longest sequence has `longest` tokens: not
        for sequences longer than what sparse attention keeps, or than a sliding window."""
        index, local = self._model.spec.indexer, self._model.spec.sliding
        whole = (index is None or longest <= index.top_k) and (local is None or longest <= local.window)
        return 0 < rows <= self._sizes[-1] and whole

    def launch(self, chunks: Sequence[Chunk], draws: Sequence[Draw], sources: Sequence[int]) -> Launched:
        """Start computing one token of each chunk's sequence and drawing the next; draws[i] is from row i. sources[i]:
        the row of the step before whose token is row i's, or -1 for the chunk's own id."""
        count = len(chunks)
        size = next(size for size in self._sizes if size >= count)
        self._hosts.reverse()
        host = self._hosts[0]
        self._upload(host, chunks, draws, sources, size)
        if size not in self._graphs:
            self._graphs[size] = self._captured(size)
        token_b, logprob_b, logits_bv = self._graphs[size]()
        for to, made in zip(host.down, (token_b, logprob_b), strict=True):
            to[:count].copy_(made[:count], non_blocking=True)
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Launched(self._model.ops, draws, host.down[0][:count], host.down[1][:count], logits_bv, done)

    def _upload(
        self, host: _Host, chunks: Sequence[Chunk], draws: Sequence[Draw], sources: Sequence[int], size: int
    ) -> None:
        count, page = len(chunks), self._page_size
        whole, real = (host.up[i].numpy() for i in (0, 1))
        whole[:, count:size] = np.array([0, -1, self._nowhere, 0, 1, 0])[:, None]
        real[:, count:size] = 0
        uniforms, temperatures, top_k, top_p = draw_numbers(draws)
        whole[:, :count] = (
            [chunk.ids[0] for chunk in chunks],
            sources,
            [chunk.pages[chunk.start // page] for chunk in chunks],
            [chunk.start % page for chunk in chunks],
            [chunk.end for chunk in chunks],
            top_k,
        )
        real[:, :count] = uniforms, temperatures, top_p
        used = 1
        for row, chunk in enumerate(chunks):
            pages = chunk.pages[: -(-chunk.end // page)]
            host.write_pages(row, pages)
            used = max(used, len(pages))
        for row in range(count, size):
            host.write_pages(row, [self._nowhere])
        for here, up in zip(self._here[:2], host.up[:2], strict=True):
            here.copy_(up, non_blocking=True)
        self._here[2][:size, :used].copy_(host.up[2][:size, :used], non_blocking=True)

    def _compute(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        whole, real, table = self._here
        given_b, source_b, page_b, offset_b, length_b, top_k_b = whole[:, :size].unbind()
        id_b = torch.where(source_b < 0, given_b, self._token_b[source_b.clamp(min=0)])
        uniform_b, temperature_b, top_p_b = real[:, :size].unbind()
        spec, rows = self._model.spec, DecodeRows(0, size, table[:size], length_b)
        local = None if spec.sliding is None else Local(*rotations(spec.sliding.rope, length_b - 1), (rows,))
        batch = Batch(id_b, page_b, offset_b, *rotations(spec.rope, length_b - 1), (rows,), local)
        hidden_bc = self._model.forward(batch, self._cache)
        logits_bv = self._model.logits(hidden_bc)
        row_b = torch.arange(size, device=self._device)
        token_b, logprob_b = self._model.ops.draw(logits_bv, row_b, uniform_b, temperature_b.float(), top_k_b, top_p_b)
        self._token_b[:size] = token_b
        return token_b, logprob_b, logits_bv

    def _captured(self, size: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """What computes a step of `size` rows again, on the same memory."""
        if self._device.type != "cuda":
            return lambda: self._compute(size)
        before_b = self._token_b.clone()
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once before: kernels are compiled and libraries set up outside of a capture
            self._compute(size)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._compute(size)
        self._token_b.copy_(before_b)

        def replay() -> tuple[Tensor, Tensor, Tensor]:
            graph.replay()
            return result

        return replay
