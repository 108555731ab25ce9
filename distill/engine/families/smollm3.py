"""SmolLM3: Llama without rotary embedding in every fourth layer (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from distill.engine.config import MOST_LAYERS, Config
from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family
from distill.engine.spec import ModelSpec

THETA = 2e6  # the base of its RoPE where the config does not say


def read(config: Config) -> ModelSpec:
    """The spec of a SmolLM3 config. Head and embedding are tied where it does not say otherwise."""
    bias = config.bool("attention_bias", False)
    spec = read_dense(config, "smollm3", qkv_bias=bias, o_bias=bias, tied=True, theta=THETA)
    return replace(spec, nope_layers=_nope_layers(config, spec.num_layers))


def _nope_layers(config: Config, layers: int) -> frozenset[int]:
    """By the list of flags (0: NoPE), or else every `no_rope_layer_interval`-th layer."""
    interval = config.int("no_rope_layer_interval", 4, most=MOST_LAYERS)
    if not config.has("no_rope_layers"):
        return frozenset(range(interval - 1, layers, interval))
    rotated = config.ints("no_rope_layers", most=1)
    if len(rotated) < layers:
        raise ValueError(f"{config.where}: 'no_rope_layers' has {len(rotated)} entries, and there are {layers} layers")
    return frozenset(layer for layer in range(layers) if not rotated[layer])


FAMILY = Family("smollm3", read, trains=True, fused=True)
