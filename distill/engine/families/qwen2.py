"""Qwen2 and Qwen2.5: biases on q, k and v, and on them alone, without a key that says so."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family, Gguf
from distill.engine.spec import ModelSpec


def read(config: Config) -> ModelSpec:
    """The spec of a Qwen2 config."""
    return read_dense(config, "qwen2", qkv_bias=True)


FAMILY = Family("qwen2", read, trains=True, fused=True, gguf=Gguf("Qwen2ForCausalLM", attention_bias=False))
