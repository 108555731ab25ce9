"""Llama 2, 3 and the R1 distillations onto Llama: `attention_bias` is for all four projections."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family, Gguf
from distill.engine.spec import ModelSpec


def read(config: Config) -> ModelSpec:
    """The spec of a Llama config."""
    bias = config.bool("attention_bias", False)
    return read_dense(config, "llama", qkv_bias=bias, o_bias=bias)


FAMILY = Family("llama", read, trains=True, fused=True, gguf=Gguf("LlamaForCausalLM", interleaved=True, mlp_bias=True))
