"""What a model is: one frozen `ModelSpec` for every family.

A published config is read by its family (`families/`), and every quirk of it ends there. Nothing else in the engine
reads a foreign key, so the model code sees numbers only: RoPE is a tuple of inverse frequencies and one factor,
whatever scaling rule they came from; the softmax scale already carries YaRN's m²; biases are three booleans.

The file imports neither torch nor transformers: planning reads specs too, and must start fast. transformers' own
AutoConfig was rejected for that reason and because its defaults change between versions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# DeepSeek's code builds the norms on the q and kv latents with the default epsilon, not with `rms_norm_eps`.
LATENT_NORM_EPS = 1e-6

Scoring = Literal["sigmoid", "softmax", "sqrtsoftplus"]
GroupBy = Literal["best", "best two"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, as numbers.

    dim: how many dimensions of each head are rotated, the first ones or, with latent attention, the last. inv_freq:
    dim/2 angles per position, in radians. magnitude: factor on cos and sin (YaRN's attention factor; 1 elsewhere).
    interleaved: pairs are (x0,x1), (x2,x3)… rather than (x0, x[dim/2]), (x1, x[dim/2+1])….
    """

    dim: int
    inv_freq: tuple[float, ...]
    magnitude: float
    interleaved: bool


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). q_lora_rank None: a plain q_proj."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Indexer:
    """DeepSeek sparse attention (V3.2-Exp's report, section 2.1): a token attends to the `top_k` tokens that `heads`
    separate small heads, `head_dim` wide, rank highest. Their first dimensions are rotated, interleaved or as halves.
    shared_layers: layers without an indexer, which attend to the tokens that the last one before them chose."""

    heads: int
    head_dim: int
    top_k: int
    interleaved: bool = False
    shared_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sliding:
    """Layers with a sliding window, by number: a token attends to the last `window` tokens, itself included.

    Their key-value heads and their rotary embedding; the other layers have those of the spec.
    """

    window: int
    layers: frozenset[int]
    num_kv_heads: int
    head_dim: int
    rope: Rope


@dataclass(frozen=True)
class Streams:
    """Hyper-connections (arXiv:2512.24880): the residual is `count` streams, mixed by matrices that `iterations` rounds
    of Sinkhorn-Knopp make doubly stochastic. eps: added to weights and to sums that are divided by."""

    count: int
    iterations: int
    eps: float


@dataclass(frozen=True)
class Compressed:
    """Attention to the last `window` tokens and to compressed entries, one for `rates[layer]` tokens (0: none), with a
    sink per head. Keys are values, one for all heads.

    sparse_layers: layers whose entries overlap, and are chosen by `indexer`. rope: of layers with entries; those
    without take the spec's. q_rank: of the queries' latent. o_groups, o_rank: the output is projected group by group of
    heads.
    """

    window: int
    rates: tuple[int, ...]
    sparse_layers: frozenset[int]
    rope: Rope
    indexer: Indexer
    q_rank: int
    o_groups: int
    o_rank: int

    def overlap(self, layer: int) -> int:
        """Entries that a token's inputs enter into: its window's and, in sparse layers, the next one's."""
        return 2 if layer in self.sparse_layers else 1

    def most_rows(self, context: int) -> int:
        """Cached rows that a token attends to at most: of the window, and entries."""
        entries = [
            min(context // rate, self.indexer.top_k) if layer in self.sparse_layers else context // rate
            for layer, rate in enumerate(self.rates)
            if rate
        ]
        return self.window + max(entries, default=0)

    def cache_dims(self, layer: int, head_dim: int) -> tuple[int, ...]:
        """Width of what a layer caches of a token: (key), or (key and entry, inputs of entries), in sparse layers
        followed by (index entry, inputs of index entries). The entry of a window is cached with its last token."""
        if not self.rates[layer]:
            return (head_dim,)
        inputs = 2 * self.overlap(layer)
        index = (self.indexer.head_dim, inputs * self.indexer.head_dim) if layer in self.sparse_layers else ()
        return (2 * head_dim, inputs * head_dim, *index)


@dataclass(frozen=True)
class Moe:
    """Mixture of experts. group_by: how a group of experts is scored; correction_bias: whether the router has one.
    by_token: layers whose experts a table names for each token. limit: of gate (above) and of up (in size) in an
    expert.
    """

    first_layer: int
    num_experts: int
    per_token: int
    groups: int
    groups_kept: int
    shared_experts: int
    intermediate_size: int
    scoring: Scoring
    group_by: GroupBy
    correction_bias: bool
    normalise: bool
    routed_scale: float
    by_token: frozenset[int] = frozenset()
    limit: float | None = None


@dataclass(frozen=True)
class DeltaNet:
    """Layers with a gated delta rule in place of attention (Gated DeltaNet, arXiv:2412.06464).

    layers: their numbers. key_heads: of queries and keys, each shared by as many value heads; *_dim: widths of a head.
    taps: tokens that the short convolution in front sees, the newest included.
    """

    layers: frozenset[int]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """Queries, keys and values of one token, which the convolution takes."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What one sequence leaves for its next token in a layer, in float32: the last inputs of the convolution, and
        the matrix of each head."""
        return (self.taps - 1, self.channels), (self.value_heads, self.key_dim, self.value_dim)


@dataclass(frozen=True)
class ModelSpec:
    """One model, all families.

    family: its name in `FAMILIES`. Sizes are in elements. softmax_scale: factor on q·k. head_dim: width of q and k.
    nope_layers: numbers of the layers without rotary embedding (NoPE). output_gate: attention's output is multiplied by
    a gate that the query projection gives, too. centred_norms: norms are stored as differences from one. delta:
    layers with a recurrent state. ue8m0: quantised activations have scales that are powers of two.

    sliding: the layers with a sliding window. shared_kv_layers: how many of the last layers have no keys and values,
    and attend to those of the last layer of their kind before them; shared_kv_mlp: the width of their MLPs.
    keys_as_values: the values of layers without a window are their keys before norm and rotation. value_norm: values
    are normalised head by head, without a weight. post_norms: what attention and MLP add is normalised.
    layer_input_dim: width of the embedding of a token that each layer has for itself, 0 for none. layer_scalars: each
    layer's result is multiplied by a number. embedding_scale: factor on embeddings. logit_cap: the bound that logits
    approach, cap · tanh(logit / cap).
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    softmax_scale: float
    rope: Rope
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool = False
    nope_layers: frozenset[int] = frozenset()
    output_gate: bool = False
    centred_norms: bool = False
    delta: DeltaNet | None = None
    mla: Mla | None = None
    indexer: Indexer | None = None
    moe: Moe | None = None
    compressed: Compressed | None = None
    streams: Streams | None = None
    num_nextn_predict_layers: int = 0
    ue8m0: bool = False
    sliding: Sliding | None = None
    shared_kv_layers: int = 0
    shared_kv_mlp: int = 0
    keys_as_values: bool = False
    value_norm: bool = False
    post_norms: bool = False
    activation: Activation = "silu"
    layer_input_dim: int = 0
    layer_scalars: bool = False
    embedding_scale: float = 1.0
    logit_cap: float | None = None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` has experts."""
        return self.moe is not None and layer >= self.moe.first_layer

    def window(self, layer: int) -> Sliding | None:
        """The sliding window of layer number `layer`, None where a token attends to all before it."""
        return self.sliding if self.sliding is not None and layer in self.sliding.layers else None

    def heads(self, layer: int) -> Sliding | ModelSpec:
        """Where the key-value heads and the rotary embedding of layer number `layer` are: its window, or the spec."""
        return self.window(layer) or self

    def cached_by(self, layer: int) -> int:
        """The number of the layer whose keys and values layer number `layer` attends to."""
        own = self.num_layers - self.shared_kv_layers
        if layer < own or not self.shared_kv_layers:
            return layer
        return max(each for each in range(own) if self.window(each) is self.window(layer))

    def mlp_width(self, layer: int) -> int:
        """The width of a dense MLP."""
        return self.intermediate_size if self.cached_by(layer) == layer else self.shared_kv_mlp

    def cache_heads(self, layer: int) -> int:
        """Heads cached per token in layer number `layer`: 1 for MLA, whose latent all heads share, and for
        compressed attention."""
        return 1 if self.mla else self.heads(layer).num_kv_heads

    def has_indexer(self, layer: int) -> bool:
        """Whether layer number `layer` chooses the tokens that it attends to."""
        return self.indexer is not None and layer not in self.indexer.shared_layers

    def is_delta_layer(self, layer: int) -> bool:
        """Whether layer number `layer` has a recurrent state in place of cached tokens."""
        return self.delta is not None and layer in self.delta.layers

    @property
    def state_elements(self) -> int:
        """Numbers, in float32, that a sequence's recurrent layers keep, however long it is."""
        if self.delta is None:
            return 0
        return len(self.delta.layers) * sum(map(math.prod, self.delta.state_shapes))

    def cache_dims(self, layer: int) -> tuple[int, ...]:
        """Width of each cached tensor of a layer: (latent + rope,) for MLA, (latent + rope, index key) with an indexer,
        `Compressed.cache_dims`, none with a recurrent state or where another layer's are read, (keys, values)
        otherwise."""
        if self.compressed:
            return self.compressed.cache_dims(layer, self.head_dim)
        if self.is_delta_layer(layer) or self.cached_by(layer) != layer:
            return ()
        if self.mla:
            latent = self.mla.kv_lora_rank + self.mla.rope_dim
            return (latent, self.indexer.head_dim) if self.indexer and self.has_indexer(layer) else (latent,)
        return (self.heads(layer).head_dim,) * 2

    def cache_elements_per_token(self, drafts: bool = False) -> int:
        """Numbers cached for one token over all layers; `drafts`: and over the draft layer."""
        layers = range(self.num_layers + drafts)
        return sum(self.cache_heads(layer) * sum(self.cache_dims(layer)) for layer in layers)
