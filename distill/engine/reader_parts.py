"""From the tensors of a checkpoint to the parameters of what some families have and others do not: compressed
attention, gated delta rules, hyper-connections, hash routing, embeddings of each layer. The rest is in reader.py.

Legend: c hidden, d width of keys, h value heads, k experts per token, m weights of a hyper-connection, n all streams'
width, p width of a layer's embedding, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distill.engine.checkpoint import Checkpoint
from distill.engine.families.names import WeightNames
from distill.engine.kernels import Ops
from distill.engine.kernels.stored import Plain, Stored
from distill.engine.spec import Compressed, DeltaNet, ModelSpec, Moe, Streams
from distill.engine.weights import (
    CompressedWeights,
    CompressorWeights,
    DeltaWeights,
    EntryIndexerWeights,
    Form,
    Held,
    InputWeights,
    LayerInputWeights,
    Linear,
    MixerWeights,
)


class Reader(Protocol):
    """What is asked of the reader of a checkpoint (reader.py)."""

    checkpoint: Checkpoint
    names: WeightNames
    ops: Ops
    dtype: torch.dtype

    def linear(self, name: str, n: int, c: int) -> Linear:
        """`name.weight`."""

    def hold(self, name: str, shape: tuple[int, ...]) -> Held:
        """The entry in `held` of a published tensor."""

    def checked(self, name: str, n: int, c: int) -> Stored:
        """A matrix as stored, its numbers checked."""

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, form: Form | None = None
    ) -> Tensor:
        """A copy of a tensor that is never quantised. form: as in `Held`."""

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


def delta(reader: Reader, spec: ModelSpec, dims: DeltaNet, at: str) -> DeltaWeights:
    """A gated delta rule whose names begin with `at`. Errors: ValueError, as `load_weights`."""
    names, c, h, single = reader.names.delta, spec.hidden_size, dims.value_heads, torch.float32
    values, conv = h * dims.value_dim, (dims.channels, 1, dims.taps)
    return DeltaWeights(
        qkv=reader.linear(at + names.qkv, dims.channels, c),
        gate=reader.linear(at + names.gate, values, c),
        write=reader.linear(at + names.write, h, c),
        decay=reader.linear(at + names.decay, h, c),
        conv=reader.tensor(at + names.conv, conv, single, lambda weight_n1k: weight_n1k[:, 0].T.contiguous()),
        rate=reader.tensor(at + names.rate, (h,), single, lambda log_h: -log_h.exp()),
        rate_bias=reader.tensor(at + names.rate_bias, (h,), single),
        norm=reader.tensor(at + names.norm, (dims.value_dim,), single),
        o=reader.linear(at + names.o, c, values),
    )


def inputs(reader: Reader, spec: ModelSpec, dtype: torch.dtype) -> InputWeights:
    """The layers' own embeddings of tokens. dtype: of what is computed. Errors: ValueError, as `load_weights`."""
    names, p = reader.names.inputs, spec.layer_input_dim
    embed_vp = reader.checked(names.embed, spec.vocab_size, spec.num_layers * p).dense(dtype).to(reader.ops.device())
    reader.hold(names.embed, embed_vp.shape).tensors.append(embed_vp)
    return InputWeights(
        embed_vp=embed_vp,
        project=reader.linear(names.project, spec.num_layers * p, spec.hidden_size),
        norm_p=reader.tensor(names.norm, (p,)),
    )


def layer_inputs(reader: Reader, c: int, p: int, at: str) -> LayerInputWeights:
    """What a layer does with its embedding, p wide, of a token. Errors: ValueError, as `load_weights`."""
    names = reader.names.inputs
    return LayerInputWeights(
        gate=reader.linear(at + names.layer_gate, p, c),
        project=reader.linear(at + names.layer_project, c, p),
        norm_c=reader.tensor(at + names.layer_norm, (c,)),
    )


def by_token(reader: Reader, spec: ModelSpec, dims: Moe, name: str) -> Tensor:
    """The table of hash routing, int64 [v, k]. Errors: ValueError for a number that no expert has, or that is twice
    there."""
    table_vk = reader.checkpoint.tensor(name, (spec.vocab_size, dims.per_token), ("I32", "I64")).long()
    sorted_vk = table_vk.sort(1).values
    if table_vk.min() < 0 or table_vk.max() >= dims.num_experts or (sorted_vk[:, 1:] == sorted_vk[:, :-1]).any():
        raise ValueError(
            f"{reader.checkpoint.where(name)} does not name {dims.per_token} of {dims.num_experts} experts for each "
            "token; the file is damaged, download it again"
        )
    return table_vk.to(reader.ops.device())
