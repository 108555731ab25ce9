"""Names of tensors in published checkpoints: data, so that a family with other names is a `replace` of these.

The defaults are the names of Hugging Face's Llama, which Qwen and DeepSeek share. A name that ends in a word rather
than in `.weight` is that of a linear layer: `.weight` and, where there is one, `.bias` are appended.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GqaNames:
    """Grouped-query attention, below a layer."""

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"


@dataclass(frozen=True)
class MlaNames:
    """Multi-head latent attention, below a layer. q: where queries have no latent."""

    q: str = "self_attn.q_proj"
    q_a: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm.weight"
    q_b: str = "self_attn.q_b_proj"
    kv_a: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm.weight"
    kv_b: str = "self_attn.kv_b_proj"
    o: str = "self_attn.o_proj"


@dataclass(frozen=True)
class DeltaNames:
    """A gated delta rule, below a layer."""

    qkv: str = "linear_attn.in_proj_qkv"
    gate: str = "linear_attn.in_proj_z"
    write: str = "linear_attn.in_proj_b"
    decay: str = "linear_attn.in_proj_a"
    conv: str = "linear_attn.conv1d.weight"
    rate: str = "linear_attn.A_log"
    rate_bias: str = "linear_attn.dt_bias"
    norm: str = "linear_attn.norm.weight"
    o: str = "linear_attn.out_proj"


@dataclass(frozen=True)
class IndexerNames:
    """The indexer of sparse attention, below a layer."""

    q: str = "self_attn.indexer.wq_b"
    k: str = "self_attn.indexer.wk"
    k_norm: str = "self_attn.indexer.k_norm.weight"
    k_norm_bias: str = "self_attn.indexer.k_norm.bias"
    head_weights: str = "self_attn.indexer.weights_proj"


@dataclass(frozen=True)
class CompressorNames:
    """What makes compressed entries, below an attention or its indexer."""

    x: str = "compressor.wkv"
    gate: str = "compressor.wgate"
    bias: str = "compressor.ape"
    norm: str = "compressor.norm.weight"


@dataclass(frozen=True)
class CompressedNames:
    """Attention to compressed entries, below a layer. attention, indexer: what its compressor's names begin with."""

    q_a: str = "attn.wq_a"
    q_norm: str = "attn.q_norm.weight"
    q_b: str = "attn.wq_b"
    kv: str = "attn.wkv"
    kv_norm: str = "attn.kv_norm.weight"
    sink: str = "attn.attn_sink"
    o_a: str = "attn.wo_a"
    o_b: str = "attn.wo_b"
    attention: str = "attn."
    indexer: str = "attn.indexer."
    index_q: str = "attn.indexer.wq_b"
    head_weights: str = "attn.indexer.weights_proj"
    compressor: CompressorNames = field(default_factory=CompressorNames)


@dataclass(frozen=True)
class MixerNames:
    """Hyper-connections: what their names begin with before attention and before experts, below a layer, and before the
    final norm; and how they end."""

    attention: str = "hc_attn_"
    mlp: str = "hc_ffn_"
    head: str = "hc_head_"
    project: str = "fn"
    base: str = "base"
    scale: str = "scale"


@dataclass(frozen=True)
class MlpNames:
    """The gated MLP, below `dense`, `shared` or an expert."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class MoeNames:
    """A mixture of experts, below a layer. expert: with the expert's number for `{}`. by_token: the table of hash
    routing."""

    router: str = "mlp.gate.weight"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    expert: str = "mlp.experts.{}."
    shared: str = "mlp.shared_experts."
    by_token: str = "mlp.gate.tid2eid"


@dataclass(frozen=True)
class DraftNames:
    """The multi-token-prediction layer, below the layer after the last."""

    embedding_norm: str = "enorm.weight"
    hidden_norm: str = "hnorm.weight"
    project: str = "eh_proj"
    norm: str = "shared_head.norm.weight"


@dataclass(frozen=True)
class InputNames:
    """The layers' own embeddings of a token: of the model, and below a layer what it adds of its own."""

    embed: str = "model.embed_tokens_per_layer.weight"
    project: str = "model.per_layer_model_projection"
    norm: str = "model.per_layer_projection_norm.weight"
    layer_gate: str = "per_layer_input_gate"
    layer_project: str = "per_layer_projection"
    layer_norm: str = "post_per_layer_input_norm.weight"


@dataclass(frozen=True)
class WeightNames:
    """All tensors of a model. layer: with the layer's number for `{}`. dense: a layer's MLP without experts.
    attention_post_norm, mlp_post_norm, scalar, inputs, compressed, mixer: in families that have them. computed: endings
    of tensors that some checkpoints carry although the config determines them. beside: beginnings of tensors that are
    not read: of other models in the same files, of parts that the engine does not compute."""

    embed: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    dense: str = "mlp."
    gqa: GqaNames = field(default_factory=GqaNames)
    mla: MlaNames = field(default_factory=MlaNames)
    indexer: IndexerNames = field(default_factory=IndexerNames)
    delta: DeltaNames = field(default_factory=DeltaNames)
    mlp: MlpNames = field(default_factory=MlpNames)
    moe: MoeNames = field(default_factory=MoeNames)
    draft: DraftNames = field(default_factory=DraftNames)
    compressed: CompressedNames = field(default_factory=CompressedNames)
    mixer: MixerNames = field(default_factory=MixerNames)
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    beside: tuple[str, ...] = ()
    attention_post_norm: str = "post_attention_layernorm.weight"
    mlp_post_norm: str = "post_feedforward_layernorm.weight"
    scalar: str = "layer_scalar"
    inputs: InputNames = field(default_factory=InputNames)
