"""From the tensors of a checkpoint to the parameters of compressed attention and of hyper-connections.

Legend: c hidden, d width of keys, m weights of a hyper-connection, n all streams' width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distill.engine.families.names import WeightNames
from distill.engine.kernels import Ops
from distill.engine.kernels.stored import Plain, Stored
from distill.engine.spec import Compressed, ModelSpec, Streams
from distill.engine.weights import CompressedWeights, CompressorWeights, EntryIndexerWeights, Linear, MixerWeights


class Reader(Protocol):
    """What is asked of the reader of a checkpoint (reader.py)."""

    names: WeightNames
    ops: Ops
    dtype: torch.dtype

    def linear(self, name: str, n: int, c: int) -> Linear:
        """`name.weight`."""

    def checked(self, name: str, n: int, c: int) -> Stored:
        """A matrix as stored, its numbers checked."""

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a tensor that is never quantised."""

    def unquantised(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor as stored."""


def compressed(reader: Reader, spec: ModelSpec, dims: Compressed, at: str, index: int) -> CompressedWeights:
    """The attention of a layer whose names begin with `at`. Errors: ValueError, as `load_weights`."""
    names, c, d = reader.names.compressed, spec.hidden_size, spec.head_dim
    width, sparse = spec.num_heads * d, index in dims.sparse_layers
    o_a = reader.checked(at + names.o_a + ".weight", dims.o_groups * dims.o_rank, width // dims.o_groups)
    groups: Sequence[Stored] = [
        o_a.rows(begin, begin + dims.o_rank) for begin in range(0, dims.o_groups * dims.o_rank, dims.o_rank)
    ]
    if not all(group.for_fp8_products(reader.dtype) for group in groups):
        groups = [Plain(group.dense(reader.dtype)) for group in groups]
    rate, overlap = dims.rates[index], dims.overlap(index)
    return CompressedWeights(
        q_a=reader.linear(at + names.q_a, dims.q_rank, c),
        q_norm=reader.tensor(at + names.q_norm, (dims.q_rank,)),
        q=reader.linear(at + names.q_b, width, dims.q_rank),
        ones_d=torch.ones(d, dtype=reader.ops.activation_dtype(reader.dtype), device=reader.ops.device()),
        kv=reader.linear(at + names.kv, d, c),
        kv_norm=reader.tensor(at + names.kv_norm, (d,)),
        sink_h=reader.tensor(at + names.sink, (spec.num_heads,), torch.float32),
        o_a=reader.ops.pack_heads(groups, reader.dtype),
        o_b=reader.linear(at + names.o_b, c, dims.o_groups * dims.o_rank),
        compressor=_compressor(reader, c, d, rate, overlap, at + names.attention) if rate else None,
        indexer=_indexer(reader, spec, dims, at, rate) if sparse else None,
    )


def _indexer(reader: Reader, spec: ModelSpec, dims: Compressed, at: str, rate: int) -> EntryIndexerWeights:
    names, index, c = reader.names.compressed, dims.indexer, spec.hidden_size
    return EntryIndexerWeights(
        q=reader.linear(at + names.index_q, index.heads * index.head_dim, dims.q_rank),
        head_weights=reader.linear(at + names.head_weights, index.heads, c),
        compressor=_compressor(reader, c, index.head_dim, rate, 2, at + names.indexer),
    )


def _compressor(reader: Reader, c: int, d: int, rate: int, overlap: int, at: str) -> CompressorWeights:
    names = reader.names.compressed.compressor
    return CompressorWeights(
        x=reader.linear(at + names.x, overlap * d, c),
        gate=reader.linear(at + names.gate, overlap * d, c),
        bias_wm=reader.tensor(at + names.bias, (rate, overlap * d), torch.float32),
        norm=reader.tensor(at + names.norm, (d,)),
    )


def mixer(reader: Reader, spec: ModelSpec, dims: Streams, at: str, last: bool = False) -> MixerWeights:
    """A hyper-connection whose names begin with `at`. last: that before the final norm, which has only the first of the
    three parts; the others become zeros. Errors: ValueError, as `load_weights`."""
    names, s, n = reader.names.mixer, dims.count, dims.count * spec.hidden_size
    sizes = (s, s, s * s)
    here = s if last else sum(sizes)
    project_mn = torch.zeros(sum(sizes), n)
    project_mn[:here] = reader.unquantised(at + names.project, (here, n))
    base_m = torch.zeros(sum(sizes), device=reader.ops.device())
    base_m[:here] = reader.tensor(at + names.base, (here,), torch.float32)
    scale = torch.zeros(3, device=reader.ops.device())
    scale[: 1 if last else 3] = reader.tensor(at + names.scale, (1,) if last else (3,), torch.float32)
    return MixerWeights(
        ones_n=torch.ones(n, device=reader.ops.device()),
        project=reader.ops.pack(Plain(project_mn), torch.float32),
        scale_m=scale.repeat_interleave(torch.tensor(sizes, device=scale.device)),
        base_m=base_m,
    )
