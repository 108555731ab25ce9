"""Kimi K2: DeepSeek-V3's layers and router under a name of its own."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.deepseek import read_deepseek
from distill.engine.families.deepseek_v3 import ROUTER
from distill.engine.families.family import Family
from distill.engine.spec import ModelSpec


def read(config: Config) -> ModelSpec:
    """The spec of a Kimi K2 config."""
    return read_deepseek(config, "kimi_k2", ROUTER)


FAMILY = Family("kimi_k2", read, published_bytes=1, has_experts=True)
