"""Published checkpoints in, parameters out.

Files are safetensors, one or sharded with an index, memory-mapped and read tensor by tensor. Names are data: the tables
below say which published name fills which field. Every tensor's shape is checked against the config, and a tensor that
the config does not account for is an error, because a bias or norm that is silently left out gives a model that is
subtly wrong rather than one that fails.

FP8 is decided tensor by tensor, from the dtype and the presence of a scale, never from a list or from the config. A
matrix goes from the mapped file straight to the kernels' `pack`, which keeps it in the form that they read.

Knowingly not read: the layer past `num_layers` unless it is to draft (multi-token prediction; it does not change what
the model says), its copies of the embedding and the head, which it shares with the model (DeepSeek-V3,
arXiv:2412.19437, section 2.2), `rotary_emb.inv_freq` in old Llama files (computed from the config), and the head of
tied models.

Legend: v vocabulary, n outputs, c inputs or hidden, h heads, x experts, f expert width, d head width.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.kernels.reference import FP8_BLOCK, Fp8, Stored, dense
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

_STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


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


@dataclass(frozen=True)
class MlpWeights:
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class MoeWeights:
    """Router and correction bias are float32 whatever the compute dtype. router and experts are packed."""

    router: Any
    correction_bias: Tensor | None
    experts: Any
    shared: MlpWeights | None


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
    model_dir: Path | str, spec: ModelSpec, ops: Ops, dtype: torch.dtype, drafts: bool = False
) -> ModelWeights:
    """Read a model directory. ValueError, one line with file, tensor and fix, where it is not what the config says.

    drafts: read the layer that drafts, too.
    """
    reader = _Reader(Path(model_dir), ops, dtype)
    embed = reader.matrix(EMBED, spec.vocab_size, spec.hidden_size)
    layers = tuple(_layer(reader, spec, index) for index in range(spec.num_layers))
    draft = _draft(reader, spec) if drafts else None
    norm_c = reader.tensor(NORM, (spec.hidden_size,))
    head = embed if spec.tied_embeddings else reader.matrix(HEAD, spec.vocab_size, spec.hidden_size)
    reader.refuse_unread(spec)
    return ModelWeights(dense(embed, dtype), layers, norm_c, ops.pack(head, dtype), draft, reader.stored)


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
    if dims.q_lora_rank is None:
        q_a, q_norm, q = None, None, reader.linear(at + MLA["q"], q_width, c)
    else:
        q_a = reader.linear(at + MLA["q_a"], dims.q_lora_rank, c, spec.qkv_bias)
        q_norm = reader.tensor(at + MLA["q_norm"], (dims.q_lora_rank,))
        q = reader.linear(at + MLA["q_b"], q_width, dims.q_lora_rank)
    kv_b = dense(reader.matrix(at + MLA["kv_b"] + ".weight", heads * per_head, dims.kv_lora_rank), reader.dtype)
    uk_hnc, uv_hec = kv_b.unflatten(0, (heads, per_head)).split((dims.nope_dim, dims.v_dim), dim=1)
    return MlaWeights(
        q_a=q_a,
        q_norm=q_norm,
        q=q,
        kv_a=reader.linear(at + MLA["kv_a"], dims.kv_lora_rank + dims.rope_dim, c, spec.qkv_bias),
        kv_norm=reader.tensor(at + MLA["kv_norm"], (dims.kv_lora_rank,)),
        absorb_q=reader.ops.pack_heads(uk_hnc.transpose(1, 2), reader.dtype),
        expand_k=reader.ops.pack_heads(uk_hnc, reader.dtype),
        expand_v=reader.ops.pack_heads(uv_hec, reader.dtype),
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
    return MlpWeights(
        gate=reader.linear(at + MLP["gate"], f, c, bias),
        up=reader.linear(at + MLP["up"], f, c, bias),
        down=reader.linear(at + MLP["down"], c, f, bias),
    )


def _moe(reader: _Reader, spec: ModelSpec, dims: Moe, at: str) -> MoeWeights:
    c, f = spec.hidden_size, dims.intermediate_size

    def expert(index: int) -> tuple[Stored, Stored, Stored]:
        expert_at = at + MOE["expert"].format(index)
        gate, up, down = (expert_at + MLP[part] + ".weight" for part in ("gate", "up", "down"))
        return reader.matrix(gate, f, c), reader.matrix(up, f, c), reader.matrix(down, c, f)

    router = reader.tensor(at + MOE["router"], (dims.num_experts, c), torch.float32)
    return MoeWeights(
        router=reader.ops.pack(router, torch.float32),
        correction_bias=(
            reader.tensor(at + MOE["correction_bias"], (dims.num_experts,), torch.float32)
            if dims.correction_bias
            else None
        ),
        experts=reader.ops.pack_experts(map(expert, range(dims.num_experts)), dims.num_experts, reader.dtype),
        shared=_mlp(reader, at + MOE["shared"], c, f * dims.shared_experts) if dims.shared_experts else None,
    )


class _Reader:
    """The tensors of a model directory by name, checked. `dtype` is the compute dtype."""

    def __init__(self, model_dir: Path, ops: Ops, dtype: torch.dtype) -> None:
        self.ops, self.dtype = ops, dtype
        self._read: set[str] = set()
        self.stored = ""
        index = model_dir / "model.safetensors.index.json"
        single = model_dir / "model.safetensors"
        if index.is_file():
            self._file_of = self._from_index(index)
        elif single.is_file():
            self._file_of = dict.fromkeys(_open(single).keys(), single)
        else:
            raise ValueError(
                f"{model_dir}: neither {single.name} nor {index.name} is there; download the weights, as safetensors"
            )
        self._open = {path: _open(path) for path in sorted(set(self._file_of.values()))}
        self.model_dir = model_dir

    @staticmethod
    def _from_index(index: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            file_of = {str(name): index.parent / str(shard) for name, shard in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r}); download it again") from error
        missing = sorted({path.name for path in file_of.values() if not path.is_file()})
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{index.parent / missing[0]}: shard is missing{more}; download it (the index names it)")
        return file_of

    def linear(self, name: str, n: int, c: int, bias: bool = False) -> Linear:
        """`name.weight` and, if there is to be one, `name.bias`."""
        weight = self.ops.pack(self.matrix(name + ".weight", n, c), self.dtype)
        return Linear(weight, self.tensor(name + ".bias", (n,)) if bias else None)

    def matrix(self, name: str, n: int, c: int) -> Stored:
        """[n, c] as stored; FP8 with the scale that stands beside it."""
        weight_nc = self._stored_tensor(name, (n, c))
        if weight_nc.dtype != torch.float8_e4m3fn:
            self.stored = self.stored or _name(weight_nc.dtype)
            return weight_nc
        self.stored = f"fp8-e4m3 block {FP8_BLOCK}"
        where, scale_name = self._where(name), name + "_scale_inv"
        if scale_name not in self._file_of:
            raise ValueError(f"{where} is FP8 but {scale_name} is missing; download the checkpoint again")
        if self.ops.has_nan_codes(weight_nc):
            raise ValueError(f"{where} holds FP8 NaN codes; the file is damaged, download it again")
        scale = self._stored_tensor(scale_name, (-(-n // FP8_BLOCK), -(-c // FP8_BLOCK))).float()
        if not scale.isfinite().all():
            raise ValueError(f"{self._where(scale_name)} is not finite; the file is damaged, download it again")
        return Fp8(weight_nc, scale)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is never quantised, in `dtype` (that of activations unless given)."""
        stored = self._stored_tensor(name, shape)
        if stored.dtype == torch.float8_e4m3fn:
            raise ValueError(f"{self._where(name)} is FP8; norms, biases and routers are expected unquantised")
        return stored.to(dtype or self.ops.activation_dtype(self.dtype))

    def refuse_unread(self, spec: ModelSpec) -> None:
        """ValueError if the checkpoint holds a tensor that the config gives no place to."""
        for name in sorted(set(self._file_of) - self._read):
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            draft = layer is not None and spec.num_layers <= int(layer[1]) < (
                spec.num_layers + spec.num_nextn_predict_layers
            )
            tied_head = spec.tied_embeddings and name == HEAD
            if not (draft or tied_head or name.endswith("rotary_emb.inv_freq")):
                raise ValueError(
                    f"{self._where(name)} has no place in the model that config.json describes; "
                    "use the config.json that was published with these weights"
                )

    def _where(self, name: str) -> str:
        return f"{self._file_of[name]}: tensor {name}"

    def _stored_tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self.model_dir}: tensor {name} is missing; config.json and weights do not match")
        self._read.add(name)
        file = self._open[self._file_of[name]]
        try:
            stored_shape = tuple(file.get_slice(name).get_shape())
            if stored_shape != shape:
                raise ValueError(
                    f"{self._where(name)} has shape {list(stored_shape)}, config.json makes it {list(shape)}; "
                    "config.json and weights do not match"
                )
            stored = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._where(name)} cannot be read ({error}); download the file again") from error
        allowed = (*_STORED, torch.float8_e8m0fnu) if name.endswith("_scale_inv") else _STORED
        if stored.dtype not in allowed:
            raise ValueError(f"{self._where(name)} is {_name(stored.dtype)}; supported are float32, bf16, f16 and FP8")
        return stored


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); download it again") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
