"""Qwen3.5, dense, as a language model alone: a gated delta rule in three of four layers, gated attention in the fourth.

The delta rule is Qwen3-Next's (Gated DeltaNet, arXiv:2412.06464). Attention has a gate on its output, which the query
projection gives, and rotates a quarter of each head. Norms are stored as differences from one, but for that on the
delta rule's output. For text the three positions of mRoPE are the same, so `mrope_section` changes nothing.

The multi-token layer (`mtp.`) is not read: it would draft tokens, and a recurrent state cannot take a draft back.
"""

from __future__ import annotations

from dataclasses import replace

from distill.engine.config import MOST_LAYERS, WIDEST, WIDEST_HEAD, Config
from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family
from distill.engine.families.names import WeightNames
from distill.engine.spec import DeltaNet, ModelSpec

DELTA, ATTENTION = "linear_attention", "full_attention"
PARTIAL = 0.25  # share of a head that is rotated where the config does not say
INTERVAL = 4  # every so many layers, one has attention
MOST_TAPS = 1 << 10

LANGUAGE = "model.language_model."
ALONE = WeightNames(beside=("mtp.", "model.visual."))
INSIDE = replace(
    ALONE,
    embed=LANGUAGE + "embed_tokens.weight",
    norm=LANGUAGE + "norm.weight",
    layer=LANGUAGE + "layers.{}.",
)


def read(config: Config) -> ModelSpec:
    """The spec of a config of the language model alone."""
    return read_text(config, "qwen3_5_text")


def read_text(config: Config, family: str) -> ModelSpec:
    """The spec of a Qwen3.5 language model. Keys whose defaults are other than those of dense families are required."""
    config.int("head_dim", most=WIDEST_HEAD)
    config.int("num_key_value_heads", most=WIDEST)
    config.only("mlp_bias", (False,))
    config.only("attn_output_gate", (True,))
    config.only("output_gate_type", ("swish", "silu"))  # of the delta rule
    config.only("mamba_ssm_dtype", ("float32",))
    bias = config.bool("attention_bias", False)
    spec = read_dense(
        config,
        family,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        kinds=(DELTA, ATTENTION),
        partial=PARTIAL,
    )
    return replace(spec, output_gate=True, centred_norms=True, delta=_delta(config, spec.num_layers))


def _delta(config: Config, layers: int) -> DeltaNet | None:
    """None where every layer has attention."""
    every = config.int("full_attention_interval", INTERVAL, most=MOST_LAYERS)
    kinds = config.texts("layer_types") or [DELTA if (layer + 1) % every else ATTENTION for layer in range(layers)]
    if ATTENTION not in kinds:
        raise ValueError(f"{config.where}: 'layer_types' has no {ATTENTION!r}; at least one such layer is needed")
    numbers = frozenset(layer for layer, kind in enumerate(kinds) if kind == DELTA)
    dims = DeltaNet(
        layers=numbers,
        key_heads=config.int("linear_num_key_heads", most=WIDEST),
        value_heads=config.int("linear_num_value_heads", most=WIDEST),
        key_dim=config.int("linear_key_head_dim", most=WIDEST_HEAD),
        value_dim=config.int("linear_value_head_dim", most=WIDEST_HEAD),
        taps=config.int("linear_conv_kernel_dim", least=2, most=MOST_TAPS),
    )
    if dims.value_heads % dims.key_heads:
        raise ValueError(
            f"{config.where}: 'linear_num_value_heads' {dims.value_heads} is no multiple of 'linear_num_key_heads' "
            f"{dims.key_heads}"
        )
    return dims if numbers else None


# transformers saves a model that it took out of a published directory under the names that it has there.
FAMILY = Family("qwen3_5_text", read, ALONE, other_names=INSIDE, trains=True)
