"""Qwen3, dense: queries and keys are normalised head by head."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family, Gguf
from distill.engine.spec import ModelSpec


def read(config: Config) -> ModelSpec:
    """The spec of a Qwen3 config."""
    bias = config.bool("attention_bias", False)
    return read_dense(config, "qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True)


FAMILY = Family("qwen3", read, trains=True, fused=True, gguf=Gguf("Qwen3ForCausalLM"))
