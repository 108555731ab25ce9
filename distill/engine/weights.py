"""Published checkpoints in, parameters out.

Names are data: the tables below say which published name fills which field. Every tensor's shape is checked against the
config, and a tensor that the config does not account for is an error, because a bias or norm that is silently left out
gives a model that is subtly wrong rather than one that fails.

FP8 is decided tensor by tensor, from the dtype and the presence of a scale, never from a list or from the config. A
matrix goes from the mapped file straight to the kernels' `pack`, which keeps it in the form that they read. Experts
come last, when it is known how much memory is left for them.

Knowingly not read: the layer past `num_layers` unless it is to draft (multi-token prediction; it does not change what
the model says), its copies of the embedding and the head, which it shares with the model (DeepSeek-V3,
arXiv:2412.19437, section 2.2), `rotary_emb.inv_freq` in old Llama files (computed from the config), and the head of
tied models.

Legend: v vocabulary, n outputs, c inputs or hidden, h heads, x experts, f expert width, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.engine.checkpoint import Checkpoint
from distill.engine.kernels import Ops
from distill.engine.kernels.stored import FP8_BLOCK, Damaged, Fp8, Plain, Stored
from distill.engine.spec import Indexer, Mla, ModelSpec, Moe

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{}."
ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
GQA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
MLA = {
    "q": "self_attn.q_proj",
    "q_a": "self_attn.q_a_proj",
    "q_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj",
    "o": "self_attn.o_proj",
}
DRAFT = {
    "embedding_norm": "enorm.weight",
    "hidden_norm": "hnorm.weight",
    "project": "eh_proj",
    "norm": "shared_head.norm.weight",
}
INDEXER = {
    "q": "self_attn.indexer.wq_b",
    "k": "self_attn.indexer.wk",
    "k_norm": "self_attn.indexer.k_norm.weight",
    "k_norm_bias": "self_attn.indexer.k_norm.bias",
    "head_weights": "self_attn.indexer.weights_proj",
}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MOE = {
    "router": "mlp.gate.weight",
    "correction_bias": "mlp.gate.e_score_correction_bias",
    "expert": "mlp.experts.{}.",
    "shared": "mlp.shared_experts.",
    "dense": "mlp.",
}


@dataclass(frozen=True)
class Linear:
    """weight: [n, c], packed for the ops; bias [n] or None."""

    weight: Any
    bias: Tensor | None = None


@dataclass(frozen=True)
class GqaWeights:
    """q_norm, k_norm: over each head, [head_dim], in families that have them."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def reader(self) -> Any:
        """What reads the layer's normalised state first."""
        return self.k.weight


@dataclass(frozen=True)
class IndexerWeights:
    """q takes the normalised q latent, k and head_weights the hidden state."""

    q: Linear
    k: Linear
    k_norm: Tensor
    k_norm_bias: Tensor
    head_weights: Linear


@dataclass(frozen=True)
class MlaWeights:
    """`q` takes the normalised q latent where there is a `q_a`, the hidden state otherwise. Per head, packed: the key
    rows of kv_b_proj transposed (absorb_q: query → latent) and as they are (expand_k: latent → key), and its value rows
    (expand_v: latent → value)."""

    q_a: Linear | None
    q_norm: Tensor | None
    q: Linear
    kv_a: Linear
    kv_norm: Tensor
    absorb_q: Any
    expand_k: Any
    expand_v: Any
    o: Linear
    indexer: IndexerWeights | None

    @property
    def reader(self) -> Any:
        """What reads the layer's normalised state first."""
        return self.kv_a.weight


@dataclass(frozen=True)
class MlpWeights:
    gate: Linear
    up: Linear
    down: Linear

    @property
    def reader(self) -> Any:
        """What reads the layer's normalised state first."""
        return self.gate.weight


@dataclass(frozen=True)
class MoeWeights:
    """Router and correction bias are float32 whatever the compute dtype. router is packed, experts a bank of them."""

    router: Any
    correction_bias: Tensor | None
    experts: Any
    shared: MlpWeights | None

    @property
    def reader(self) -> Any:
        """What reads the layer's normalised state first."""
        return self.experts


@dataclass(frozen=True)
class LayerWeights:
    attention_norm_c: Tensor
    attention: GqaWeights | MlaWeights
    mlp_norm_c: Tensor
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True)
class DraftWeights:
    """The multi-token-prediction layer: `project` takes embedding and hidden state, both normalised, side by side."""

    embedding_norm_c: Tensor
    hidden_norm_c: Tensor
    project: Linear
    layer: LayerWeights
    norm_c: Tensor


@dataclass(frozen=True)
class ModelWeights:
    """`stored` describes the numbers as published, for the numerics fingerprint. head: packed. draft: if asked for."""

    embed_vc: Tensor
    layers: tuple[LayerWeights, ...]
    norm_c: Tensor
    head: Any
    draft: DraftWeights | None
    stored: str


def load_weights(
    model_dir: Path | str,
    spec: ModelSpec,
    ops: Ops,
    dtype: torch.dtype,
    *,
    drafts: bool = False,
    place: Callable[[ModelWeights, list[Any]], int | None] | None = None,
) -> ModelWeights:
    """Read a model directory. ValueError, one line with file, tensor and fix, where it is not what the config says.

    drafts: read the layer that drafts, too. place: how many experts of each layer to keep in memory (None: all), given
    everything else and the layers' banks of experts; those of the draft layer are always kept. Without `place` all are
    kept, and each layer is packed while the next ones are being read.
    """
    reader = _Reader(Checkpoint(Path(model_dir)), ops, dtype, spec.ue8m0, settles_at_once=place is None)
    head_name = EMBED if spec.tied_embeddings else HEAD
    layers_read = range(spec.num_layers + drafts)
    with reader.checkpoint.read_ahead([EMBED, *map(LAYER.format, layers_read), NORM, head_name]):
        embed_vc = reader.checked(EMBED, spec.vocab_size, spec.hidden_size).dense(dtype).to(ops.device())
        layers = tuple(_layer(reader, spec, index) for index in range(spec.num_layers))
        norm_c = reader.tensor(NORM, (spec.hidden_size,))
        head = reader.pack(reader.matrix(head_name, spec.vocab_size, spec.hidden_size), head_name)
        streamed = list(reader.banks)
        draft = _draft(reader, spec) if drafts else None
        reader.refuse_unread(spec)
        weights = ModelWeights(embed_vc, layers, norm_c, head, draft, reader.stored)
        resident = place(weights, [bank for _, bank in streamed]) if place else None
        for at, bank in reader.banks:
            reader.settle(at, bank, resident if (at, bank) in streamed else None)
    return weights


def _layer(reader: _Reader, spec: ModelSpec, index: int) -> LayerWeights:
    at = LAYER.format(index)
    return LayerWeights(
        attention_norm_c=reader.tensor(at + ATTENTION_NORM, (spec.hidden_size,)),
        attention=_mla(reader, spec, spec.mla, at) if spec.mla else _gqa(reader, spec, at),
        mlp_norm_c=reader.tensor(at + MLP_NORM, (spec.hidden_size,)),
        mlp=(
            _moe(reader, spec, spec.moe, at)
            if spec.moe and spec.is_moe_layer(index)
            else _mlp(reader, at + MOE["dense"], spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
        ),
    )


def _draft(reader: _Reader, spec: ModelSpec) -> DraftWeights:
    at, c = LAYER.format(spec.num_layers), spec.hidden_size
    return DraftWeights(
        embedding_norm_c=reader.tensor(at + DRAFT["embedding_norm"], (c,)),
        hidden_norm_c=reader.tensor(at + DRAFT["hidden_norm"], (c,)),
        project=reader.linear(at + DRAFT["project"], c, 2 * c),
        layer=_layer(reader, spec, spec.num_layers),
        norm_c=reader.tensor(at + DRAFT["norm"], (c,)),
    )


def _gqa(reader: _Reader, spec: ModelSpec, at: str) -> GqaWeights:
    c, q_width, kv_width = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return GqaWeights(
        q=reader.linear(at + GQA["q"], q_width, c, spec.qkv_bias),
        k=reader.linear(at + GQA["k"], kv_width, c, spec.qkv_bias),
        v=reader.linear(at + GQA["v"], kv_width, c, spec.qkv_bias),
        o=reader.linear(at + GQA["o"], c, q_width, spec.o_bias),
        q_norm=reader.tensor(at + GQA["q_norm"], (spec.head_dim,)) if spec.qk_norm else None,
        k_norm=reader.tensor(at + GQA["k_norm"], (spec.head_dim,)) if spec.qk_norm else None,
    )


def _mla(reader: _Reader, spec: ModelSpec, dims: Mla, at: str) -> MlaWeights:
    c, heads, q_width = spec.hidden_size, spec.num_heads, spec.num_heads * spec.head_dim
    per_head = dims.nope_dim + dims.v_dim
    kv_a = reader.linear(at + MLA["kv_a"], dims.kv_lora_rank + dims.rope_dim, c, spec.qkv_bias)
    if dims.q_lora_rank is None:
        q_a, q_norm = None, None
        q, kv_a = reader.beside(reader.linear(at + MLA["q"], q_width, c), kv_a)
    else:
        q_a = reader.linear(at + MLA["q_a"], dims.q_lora_rank, c, spec.qkv_bias)
        q_a, kv_a = reader.beside(q_a, kv_a)
        q_norm = reader.tensor(at + MLA["q_norm"], (dims.q_lora_rank,))
        q = reader.linear(at + MLA["q_b"], q_width, dims.q_lora_rank)
    to_keys: list[Stored] = []
    to_values: list[Stored] = []
    kv_b = reader.checked(at + MLA["kv_b"] + ".weight", heads * per_head, dims.kv_lora_rank)
    for begin in range(0, heads * per_head, per_head):
        to_keys.append(kv_b.rows(begin, begin + dims.nope_dim))
        to_values.append(kv_b.rows(begin + dims.nope_dim, begin + per_head))
    # Codes stay codes where the cache is bfloat16, which products with them can read.
    if not all(part.for_fp8_products(reader.dtype) for part in (*to_keys, *to_values)):
        to_keys = [Plain(part.dense(reader.dtype)) for part in to_keys]
        to_values = [Plain(part.dense(reader.dtype)) for part in to_values]
    return MlaWeights(
        q_a=q_a,
        q_norm=q_norm,
        q=q,
        kv_a=kv_a,
        kv_norm=reader.tensor(at + MLA["kv_norm"], (dims.kv_lora_rank,)),
        absorb_q=reader.ops.pack_heads([part.transposed() for part in to_keys], reader.dtype),
        expand_k=reader.ops.pack_heads(to_keys, reader.dtype),
        expand_v=reader.ops.pack_heads(to_values, reader.dtype),
        o=reader.linear(at + MLA["o"], c, heads * dims.v_dim, spec.o_bias),
        indexer=_indexer(reader, spec, spec.indexer, dims, at) if spec.indexer else None,
    )


def _indexer(reader: _Reader, spec: ModelSpec, index: Indexer, dims: Mla, at: str) -> IndexerWeights:
    assert dims.q_lora_rank is not None
    c, d = spec.hidden_size, index.head_dim
    return IndexerWeights(
        q=reader.linear(at + INDEXER["q"], index.heads * d, dims.q_lora_rank),
        k=reader.linear(at + INDEXER["k"], d, c),
        k_norm=reader.tensor(at + INDEXER["k_norm"], (d,)),
        k_norm_bias=reader.tensor(at + INDEXER["k_norm_bias"], (d,)),
        head_weights=reader.linear(at + INDEXER["head_weights"], index.heads, c),
    )


def _mlp(reader: _Reader, at: str, c: int, f: int, bias: bool = False) -> MlpWeights:
    gate, up = reader.beside(reader.linear(at + MLP["gate"], f, c, bias), reader.linear(at + MLP["up"], f, c, bias))
    return MlpWeights(gate, up, down=reader.linear(at + MLP["down"], c, f, bias))


def _moe(reader: _Reader, spec: ModelSpec, dims: Moe, at: str) -> MoeWeights:
    c, f = spec.hidden_size, dims.intermediate_size

    bank = reader.ops.expert_bank(dims.num_experts, reader.dtype)
    for index in range(dims.num_experts):
        gate, up, down = (at + MOE["expert"].format(index) + MLP[part] + ".weight" for part in ("gate", "up", "down"))
        expert = reader.matrix(gate, f, c), reader.matrix(up, f, c), reader.matrix(down, c, f)
        bank.lend(expert, tuple(map(reader.checkpoint.place, (gate, up, down))))
    if reader.settles_at_once:
        reader.settle(at, bank, None)
    else:
        reader.banks.append((at, bank))
    router = reader.unquantised(at + MOE["router"], (dims.num_experts, c))
    return MoeWeights(
        router=reader.ops.pack(Plain(router), torch.float32),
        correction_bias=(
            reader.tensor(at + MOE["correction_bias"], (dims.num_experts,), torch.float32)
            if dims.correction_bias
            else None
        ),
        experts=bank,
        shared=_mlp(reader, at + MOE["shared"], c, f * dims.shared_experts) if dims.shared_experts else None,
    )


class _Reader:
    """Parameters from the tensors of a model directory. `dtype` is the compute dtype; ue8m0: the spec's. Banks of
    experts are settled as they come, or collected in `banks`."""

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops, dtype: torch.dtype, ue8m0: bool, settles_at_once: bool
    ) -> None:
        self.checkpoint, self.ops, self.dtype, self.ue8m0 = checkpoint, ops, dtype, ue8m0
        self.settles_at_once = settles_at_once
        self.stored = ""
        self.banks: list[tuple[str, Any]] = []  # of the layers in order, with the beginning of their experts' names

    def linear(self, name: str, n: int, c: int, bias: bool = False) -> Linear:
        """`name.weight` and, if there is to be one, `name.bias`."""
        weight = self.pack(self.matrix(name + ".weight", n, c), name + ".weight")
        return Linear(weight, self.tensor(name + ".bias", (n,)) if bias else None)

    def beside(self, *some: Linear) -> list[Linear]:
        """The same, for ops that would rather have them side by side: they read the same activations."""
        weights = self.ops.side_by_side([one.weight for one in some])
        return [Linear(weight, one.bias) for weight, one in zip(weights, some, strict=True)]

    def pack(self, matrix: Stored, name: str) -> Any:
        try:
            return self.ops.pack(matrix, self.dtype, self.checkpoint.place(name))
        except Damaged as damage:
            raise self._damaged(name, damage) from None

    def matrix(self, name: str, n: int, c: int) -> Stored:
        """[n, c] as stored, FP8 with the scale that stands beside it. Packing looks at the numbers."""
        weight_nc = self.checkpoint.tensor(name, (n, c))
        if weight_nc.dtype != torch.float8_e4m3fn:
            self.stored = self.stored or _name(weight_nc.dtype)
            return Plain(weight_nc)
        self.stored = f"fp8-e4m3 block {FP8_BLOCK}"
        scale = name + "_scale_inv"
        if scale not in self.checkpoint:
            raise ValueError(
                f"{self.checkpoint.where(name)} is FP8 but {scale} is missing; download the checkpoint again"
            )
        blocks = -(-n // FP8_BLOCK), -(-c // FP8_BLOCK)
        return Fp8(weight_nc, self.checkpoint.tensor(scale, blocks).float(), self.ue8m0)

    def checked(self, name: str, n: int, c: int) -> Stored:
        """The same for those who do not pack it as it is."""
        matrix = self.matrix(name, n, c)
        try:
            self.ops.check(matrix)
        except Damaged as damage:
            raise self._damaged(name, damage) from None
        return matrix

    def settle(self, at: str, bank: Any, resident: int | None) -> None:
        """Pack a layer's first `resident` experts for good (None: all), and look at the numbers of all."""
        try:
            bank.settle(resident)
        except Damaged as damage:
            name = at + MOE["expert"].format(damage.expert) + tuple(MLP.values())[damage.part] + ".weight"
            raise self._damaged(name, damage) from None

    def _damaged(self, name: str, damage: Damaged) -> ValueError:
        if damage.what == "codes":
            return ValueError(
                f"{self.checkpoint.where(name)} holds FP8 NaN codes; the file is damaged, download it again"
            )
        if damage.what == "values":
            return ValueError(
                f"{self.checkpoint.where(name)} holds numbers that are not finite (NaN or infinity); the file is "
                "damaged, or its training diverged: download it again or use another checkpoint"
            )
        where = self.checkpoint.where(name + "_scale_inv")
        return ValueError(f"{where} is not finite and positive; the file is damaged, download it again")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is never quantised, in `dtype` (that of activations unless given); a copy."""
        stored = self.unquantised(name, shape)
        return stored.to(self.ops.device(), dtype or self.ops.activation_dtype(self.dtype), copy=True)

    def unquantised(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self.checkpoint.tensor(name, shape)
        if stored.dtype == torch.float8_e4m3fn:
            raise ValueError(
                f"{self.checkpoint.where(name)} is FP8; norms, biases and routers are expected unquantised"
            )
        if not stored.isfinite().all():
            raise self._damaged(name, Damaged("values"))
        return stored

    def refuse_unread(self, spec: ModelSpec) -> None:
        """ValueError if the checkpoint holds a tensor that the config gives no place to."""
        for name in self.checkpoint.unread():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            draft = layer is not None and spec.num_layers <= int(layer[1]) < (
                spec.num_layers + spec.num_nextn_predict_layers
            )
            tied_head = spec.tied_embeddings and name == HEAD
            if not (draft or tied_head or name.endswith("rotary_emb.inv_freq")):
                raise ValueError(
                    f"{self.checkpoint.where(name)} has no place in the model that config.json describes; "
                    "use the config.json that was published with these weights"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
