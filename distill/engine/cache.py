"""Pages: who holds which part of the key-value cache.

The cache is one pool of pages per layer and cached tensor; a sequence owns a list of page numbers, the same in every
layer. Pages have reference counts, so that the n samples of a prompt share its pages: forking copies no numbers. Full
pages are never written again; a partial last page is written by the sequence that continues, so the first writer that
finds it shared takes a private copy (copy on write), and the last holder keeps the original. The recurrent states of a
sequence (delta.py) are one more thing to hold, a slot: a page of another pool, allocated and shared by the same rules.

Two classes, because they fail differently: `PageAllocator` is bookkeeping in plain Python (an error there is a leak,
and is tested against a model of it), `PagedCache` is the tensors.

Rejected: a prefix tree over all prompts (offline prompts rarely share more than a template of some tokens, and n
samples of one prompt are covered by forking); one contiguous cache per sequence (its worst case must be reserved).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.kernels.pages import discard, zeros
from distill.engine.kernels.stored import FP8_BLOCK
from distill.engine.kernels.w8a8 import fp8_row_bytes
from distill.engine.spec import ModelSpec


class PageAllocator:
    """Reference counts over pages 0 … num_pages-1. Every page is either free (count 0) or held."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0 and page_size > 0
        self.num_pages, self.page_size = num_pages, page_size
        self.refs = [0] * num_pages
        # A stack: the page freed last is used first, so a small load touches little memory.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """The number of pages that no sequence holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill, the last one perhaps partly."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. The caller has checked `free_pages`."""
        assert 0 <= count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            assert self.refs[page] == 0, f"page {page} was free and held"
            self.refs[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """Add a reference to each page, for a fork."""
        for page in pages:
            assert self.refs[page] > 0, f"page {page} is shared but has no holder"
            self.refs[page] += 1
        return list(pages)

    def is_shared(self, page: int) -> bool:
        """Whether a page has more than one holder."""
        return self.refs[page] > 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page; a page without references becomes free."""
        for page in reversed(pages):
            assert self.refs[page] > 0, f"page {page} is released but has no holder"
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self._free.append(page)


def pool_forms(spec: ModelSpec, layer: int, dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
    """(width, dtype) of each tensor that layer number `layer` caches. dtype uint8: latents as FP8 rows of bytes
    (kernels/w8a8.py), the index keys beside them in bfloat16. Errors: ValueError for a model whose cache cannot take
    that form."""
    if dtype != torch.uint8:
        return [(width, dtype) for width in spec.cache_dims(layer)]
    if spec.mla is None or spec.mla.kv_lora_rank % FP8_BLOCK:
        raise ValueError("kv_cache_dtype is 'fp8'; this model caches no latents of whole blocks of 128: set 'auto'")
    row = fp8_row_bytes(spec.mla.kv_lora_rank, spec.mla.rope_dim)
    return [(row, torch.uint8), *((width, torch.bfloat16) for width in spec.cache_dims(layer)[1:])]


def token_bytes(spec: ModelSpec, layers: int, dtype: torch.dtype) -> int:
    """Bytes of one token in a cache of `layers` layers."""
    forms = ((layer, *form) for layer in range(layers) for form in pool_forms(spec, layer, dtype))
    return sum(spec.cache_heads(layer) * width * form.itemsize for layer, width, form in forms)


def state_bytes(spec: ModelSpec, slots: int) -> int:
    """Bytes of the recurrent states of `slots` sequences."""
    return slots * spec.state_elements * torch.float32.itemsize


class PagedCache:
    """The tensors: for each layer, one pool [pages, heads, page_size, width] per entry of `pool_forms`. states: by
    layer with a recurrent state, two tensors [slots, …] in float32 (`DeltaNet.state_shapes`)."""

    def __init__(
        self,
        spec: ModelSpec,
        ops: Ops,
        layers: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: int = 0,
    ) -> None:
        self._ops, self._device = ops, device
        self.pools: list[tuple[Tensor, ...]] = [
            tuple(
                _zeros((num_pages, spec.cache_heads(layer), page_size, width), form, device)
                for width, form in pool_forms(spec, layer, dtype)
            )
            for layer in range(layers)
        ]
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        if spec.delta is not None:
            conv, matrix = spec.delta.state_shapes
            for layer in sorted(spec.delta.layers):
                self.states[layer] = (
                    _zeros((slots, *conv), torch.float32, device),
                    _zeros((slots, *matrix), torch.float32, device),
                )

    def write(self, layer: int, page_t: Tensor, offset_t: Tensor, *values_tkd: Tensor) -> None:
        """Store what one layer computed for the tokens of a step, one tensor per pool of the layer."""
        for pool, x_tkd in zip(self.pools[layer], values_tkd, strict=True):
            self._ops.paged_write(pool, page_t, offset_t, x_tkd)

    def copy_pages(self, copies: dict[int, int]) -> None:
        """Copy whole pages in every layer; `copies` maps destination to source. All are read before any is written."""
        self._copy(self.pools, copies)

    def copy_slots(self, copies: dict[int, int]) -> None:
        """As `copy_pages`, of recurrent states."""
        self._copy(self.states.values(), copies)

    def _copy(self, layers: Iterable[tuple[Tensor, ...]], copies: dict[int, int]) -> None:
        if not copies:
            return
        to, source = (torch.tensor(list(numbers), device=self._device) for numbers in (copies, copies.values()))
        for pools in layers:
            for pool in pools:
                pool.index_copy_(0, to, pool.index_select(0, source))

    def discard(self) -> None:
        """Give the memory back to the system; all pages read as zeros. On a GPU nothing happens."""
        for pools in (*self.pools, *self.states.values()):
            for pool in pools:
                if pool.device.type == "cpu":
                    discard(pool.data_ptr(), pool.nbytes)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty: attention multiplies the junk behind a sequence's end by zero, which NaN would survive. On a
    CPU they take memory only where they are written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
