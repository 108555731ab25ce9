"""Decode steps as CUDA graphs: a step is hundreds of small kernels, and launching them one by one takes longer than
they run. A graph replays them at once, on buffers that stay where they are.

There is a graph for each size of batch in a short list, captured when it is first needed; a batch takes the next size,
and the rows it does not fill decode a token of their own, into a page that belongs to nobody. One upload brings a
step's numbers, one download its tokens: sampling is part of the graph, and nothing waits in between.

On a device without graphs (the interpreter's) the same steps are run again instead of replayed.

Legend: b rows, p pages of one sequence, r half the rotated width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.engine.attention import Batch, Chunk, DecodeRows, rotations
from distill.engine.cache import PagedCache
from distill.engine.model import Model
from distill.engine.sampler import Draw, Drawn, draw_numbers, drawn_of

SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 1025, 32))
_WHOLE = ("id", "page", "offset", "length", "top_k")
_REAL = ("uniform", "temperature", "top_p")


class DecodeGraphs:
    """nowhere: a page of the cache that no sequence holds. longest: tokens of a sequence, at most."""

    def __init__(self, model: Model, cache: PagedCache, page_size: int, nowhere: int, longest: int, batch: int) -> None:
        self._model, self._cache, self._page_size, self._nowhere = model, cache, page_size, nowhere
        self._device = cache.pools[0][0].device
        size = next((size for size in SIZES if size >= batch), batch)
        self._sizes = [*(s for s in SIZES if s < size), size]
        pinned = self._device.type == "cuda"
        pages = -(-longest // page_size)
        self._host = [
            torch.zeros(len(_WHOLE), size, dtype=torch.int64, pin_memory=pinned),
            torch.zeros(len(_REAL), size, dtype=torch.float64, pin_memory=pinned),
            torch.zeros(size, pages, dtype=torch.int32, pin_memory=pinned),
        ]
        self._here = [torch.zeros_like(host, device=self._device) for host in self._host]
        self._graphs: dict[int, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if pinned else None

    def serve(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there is a graph for a step of these. Longer contexts than sparse attention keeps have none."""
        index = self._model.spec.indexer
        return 0 < len(chunks) <= self._sizes[-1] and all(index is None or c.end <= index.top_k for c in chunks)

    def step(self, chunks: Sequence[Chunk], draws: Sequence[Draw]) -> list[Drawn]:
        """Compute one token of each chunk's sequence and draw the next; draws[i] is from row i."""
        count = len(chunks)
        size = next(size for size in self._sizes if size >= count)
        self._upload(chunks, draws, size)
        if size not in self._graphs:
            self._graphs[size] = self._captured(size)
        token_b, logprob_b, logits_bv = self._graphs[size]()
        return drawn_of(draws, token_b[:count], logprob_b[:count], logits_bv)

    def _upload(self, chunks: Sequence[Chunk], draws: Sequence[Draw], size: int) -> None:
        count, page = len(chunks), self._page_size
        whole, real, table = (host.numpy() for host in self._host)
        whole[:, count:size] = np.array([0, self._nowhere, 0, 1, 0])[:, None]
        real[:, count:size] = 0
        table[count:size, 0] = self._nowhere
        uniforms, temperatures, top_k, top_p = draw_numbers(draws)
        whole[:, :count] = (
            [chunk.ids[0] for chunk in chunks],
            [chunk.pages[chunk.start // page] for chunk in chunks],
            [chunk.start % page for chunk in chunks],
            [chunk.end for chunk in chunks],
            top_k,
        )
        real[:, :count] = uniforms, temperatures, top_p
        used = 1
        for row, chunk in enumerate(chunks):
            pages = chunk.pages[: -(-chunk.end // page)]
            table[row, : len(pages)] = pages
            used = max(used, len(pages))
        for here, host in zip(self._here[:2], self._host[:2], strict=True):
            here.copy_(host, non_blocking=True)
        self._here[2][:size, :used].copy_(self._host[2][:size, :used], non_blocking=True)

    def _compute(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        whole, real, table = self._here
        id_b, page_b, offset_b, length_b, top_k_b = whole[:, :size].unbind()
        uniform_b, temperature_b, top_p_b = real[:, :size].unbind()
        cos_br, sin_br = rotations(self._model.spec.rope, length_b - 1)
        rows = DecodeRows(0, size, table[:size], length_b)
        hidden_bc = self._model.forward(Batch(id_b, page_b, offset_b, cos_br, sin_br, (rows,)), self._cache)
        logits_bv = self._model.logits(hidden_bc)
        row_b = torch.arange(size, device=self._device)
        drawn = self._model.ops.draw(logits_bv, row_b, uniform_b, temperature_b.float(), top_k_b, top_p_b)
        return *drawn, logits_bv

    def _captured(self, size: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """What computes a step of `size` rows again, on the same memory."""
        if self._device.type != "cuda":
            return lambda: self._compute(size)
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once before: kernels are compiled and libraries set up outside of a capture
            self._compute(size)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._compute(size)

        def replay() -> tuple[Tensor, Tensor, Tensor]:
            graph.replay()
            return result

        return replay
