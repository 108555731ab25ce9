"""What the dense families share: grouped-query attention and a gated MLP in every layer."""

from __future__ import annotations

from collections.abc import Collection

from distill.engine.config import MOST_LAYERS, WIDEST, WIDEST_HEAD, Config
from distill.engine.rope import THETA, RopeConfig
from distill.engine.spec import ModelSpec


def read_dense(
    config: Config,
    family: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    tied: bool = False,
    theta: float = THETA,
    kinds: Collection[str] = ("full_attention",),
    partial: float | None = None,
) -> ModelSpec:
    """The spec of a dense decoder. qkv_bias, o_bias: whether the attention's projections have biases; qk_norm: whether
    queries and keys are normalised head by head; tied, theta: what `tie_word_embeddings` and `rope_theta` are where the
    config does not say; kinds: what `layer_types` may have; partial: as in `RopeConfig`. Errors: ValueError naming
    file and key."""
    config.only("use_sliding_window", (False,))
    if other := sorted(set(config.texts("layer_types")).difference(kinds)):
        names = " and ".join(map(repr, kinds))
        raise ValueError(f"{config.where}: 'layer_types' has {', '.join(other)}; only {names} is supported")
    hidden, heads = config.int("hidden_size", most=WIDEST), config.int("num_attention_heads", most=WIDEST)
    if not (head_dim := config.int_or("head_dim", None, most=WIDEST_HEAD)):
        head_dim, rest = divmod(hidden, heads)
        if rest:
            raise ValueError(f"{config.where}: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}")
    kv_heads = config.int("num_key_value_heads", heads, most=WIDEST)
    if heads % kv_heads:
        raise ValueError(
            f"{config.where}: 'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}"
        )
    rope = RopeConfig(config, theta, partial)
    return ModelSpec(
        family=family,
        vocab_size=config.int("vocab_size", most=WIDEST),
        hidden_size=hidden,
        num_layers=config.int("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.int("intermediate_size", most=WIDEST),
        norm_eps=config.float("rms_norm_eps", 1e-6, above=0, most=1),
        softmax_scale=head_dim**-0.5,
        rope=rope.rope(int(head_dim * rope.share), interleaved=False),
        max_context=config.int("max_position_embeddings"),
        tied_embeddings=config.bool("tie_word_embeddings", tied),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=config.bool("mlp_bias", False),
        qk_norm=qk_norm,
    )
