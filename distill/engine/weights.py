"""The parameters of a model, as frozen dataclasses of tensors.

Matrices are packed: kept in the form that the kernels of a device read, which only they look into. Everything else is
a plain tensor.

Legend: v vocabulary, n outputs, c inputs or hidden, d head width, p width of a layer's own embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from distill.engine.kernels.ops import ExpertBank, Packed


@dataclass(frozen=True)
class Linear:
    """weight: [n, c], packed for the ops; bias [n] or None."""

    weight: Packed
    bias: Tensor | None = None


@dataclass(frozen=True)
class GqaWeights:
    """q_norm, k_norm, v_norm: over each head, [head_dim], in families that have them. rotated: whether queries and keys
    are. k None: the layer attends to the keys and values of another one. v None: its values are its keys."""

    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    rotated: bool
    v_norm: Tensor | None = None

    @property
    def reader(self) -> object:
        """The packed matrix (or bank) that reads the normalised state first."""
        return (self.k or self.q).weight


@dataclass(frozen=True)
class DeltaWeights:
    """A layer with a gated delta rule. qkv, gate, write, decay: projections of the hidden state, the last two to one
    number for each value head. conv: [taps, channels], oldest tap first. rate: −e^A_log, and rate_bias, [value heads].
    norm: over each head's output, [value_dim]. All four are float32."""

    qkv: Linear
    gate: Linear
    write: Linear
    decay: Linear
    conv: Tensor
    rate: Tensor
    rate_bias: Tensor
    norm: Tensor
    o: Linear

    @property
    def reader(self) -> object:
        """The packed matrix (or bank) that reads the normalised state first."""
        return self.qkv.weight


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
    (expand_v: latent → value). indexer: in layers that choose the tokens they attend to."""

    q_a: Linear | None
    q_norm: Tensor | None
    q: Linear
    kv_a: Linear
    kv_norm: Tensor
    absorb_q: Packed
    expand_k: Packed
    expand_v: Packed
    o: Linear
    indexer: IndexerWeights | None

    @property
    def reader(self) -> object:
        """The packed matrix (or bank) that reads the normalised state first."""
        return self.kv_a.weight


@dataclass(frozen=True)
class CompressorWeights:
    """From hidden states to entries: `x` and `gate` project a token's part and its weight, bias_wm is added to weights
    by the token's place in the window. [o · d] wide each, where o windows overlap."""

    x: Linear
    gate: Linear
    bias_wm: Tensor
    norm: Tensor


@dataclass(frozen=True)
class EntryIndexerWeights:
    """Ranks entries: q takes the normalised q latent, head_weights the hidden state, compressor makes the index
    keys."""

    q: Linear
    head_weights: Linear
    compressor: CompressorWeights


@dataclass(frozen=True)
class CompressedWeights:
    """Attention to a window and to compressed entries. ones_d: the norm over each head of q has no weights. o_a: one
    matrix for each group of heads. compressor, indexer: in layers with entries, and with entries that are chosen."""

    q_a: Linear
    q_norm: Tensor
    q: Linear
    ones_d: Tensor
    kv: Linear
    kv_norm: Tensor
    sink_h: Tensor
    o_a: Packed
    o_b: Linear
    compressor: CompressorWeights | None
    indexer: EntryIndexerWeights | None

    @property
    def reader(self) -> object:
        """The packed matrix (or bank) that reads the normalised state first."""
        return self.kv.weight


AttentionWeights = GqaWeights | MlaWeights | CompressedWeights | DeltaWeights


@dataclass(frozen=True)
class MixerWeights:
    """A hyper-connection, float32: ones_n for the norm over all streams, which has no weights; `project` gives the m
    weights of a token, which are scaled and shifted."""

    ones_n: Tensor
    project: Packed
    scale_m: Tensor
    base_m: Tensor


@dataclass(frozen=True)
class MlpWeights:
    """The gated MLP: down(silu(gate(x)) · up(x))."""

    gate: Linear
    up: Linear
    down: Linear

    @property
    def reader(self) -> object:
        """The packed matrix (or bank) that reads the normalised state first."""
        return self.gate.weight


@dataclass(frozen=True)
class MoeWeights:
    """Router and correction bias are float32 whatever the compute dtype. by_token_vk: the experts of each token of the
    vocabulary, where the router does not choose them."""

    router: Packed
    correction_bias: Tensor | None
    experts: ExpertBank[object]
    shared: MlpWeights | None
    by_token_vk: Tensor | None = None

    @property
    def reader(self) -> object:
        """The packed matrix (or bank) that reads the normalised state first."""
        return self.experts


@dataclass(frozen=True)
class LayerInputWeights:
    """What a layer adds of its own embedding of a token: project(gelu(gate(x)) · embedding), normalised, [c]."""

    gate: Linear
    project: Linear
    norm_c: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer: a norm before attention and one before the MLP, [c] each. In families that have them: a norm of what
    each of them adds, [c]; the layer's own embedding of the token; the factor on its result, [1]; mixers before
    attention and before the MLP, where the residual has several streams."""

    attention_norm_c: Tensor
    attention: AttentionWeights
    mlp_norm_c: Tensor
    mlp: MlpWeights | MoeWeights
    attention_post_norm_c: Tensor | None = None
    mlp_post_norm_c: Tensor | None = None
    inputs: LayerInputWeights | None = None
    scalar_1: Tensor | None = None
    mixers: tuple[MixerWeights, MixerWeights] | None = None


@dataclass(frozen=True)
class InputWeights:
    """The layers' own embeddings of a token, side by side, p wide each: of its id, [v, layers · p], and of its
    embedding, which is projected and normalised, [p]."""

    embed_vp: Tensor
    project: Linear
    norm_p: Tensor


@dataclass(frozen=True)
class DraftWeights:
    """The multi-token-prediction layer: `project` takes embedding and hidden state, both normalised, side by side."""

    embedding_norm_c: Tensor
    hidden_norm_c: Tensor
    project: Linear
    layer: LayerWeights
    norm_c: Tensor


Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """Where the numbers of a published tensor are: in tensors, and in packed matrices (in both, where the head is the
    embedding). form: what is made of the numbers before they become one of `tensors`."""

    shape: tuple[int, ...]
    tensors: list[Tensor] = field(default_factory=list)
    matrices: list[Packed] = field(default_factory=list)
    form: Form | None = None


@dataclass(frozen=True)
class ModelWeights:
    """stored: the form of the published matrices ("fp8-e4m3 block 128", "bfloat16", …). draft: where asked for. held:
    by published name, in the order of loading; complete for dense models that are not quantised. inputs: the layers'
    own embeddings, where they have some. mixer: before the final norm, where the residual has several streams."""

    embed_vc: Tensor
    layers: tuple[LayerWeights, ...]
    norm_c: Tensor
    head: Packed
    draft: DraftWeights | None
    stored: str
    held: Mapping[str, Held] = field(default_factory=dict)
    inputs: InputWeights | None = None
    mixer: MixerWeights | None = None
