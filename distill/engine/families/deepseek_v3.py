"""DeepSeek-V3, V3.1 and R1: sigmoid router with a correction bias; a group of experts is scored by its best two."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.deepseek import Router, read_deepseek
from distill.engine.families.family import Family
from distill.engine.spec import ModelSpec

ROUTER = Router("sigmoid", "best two", ("noaux_tc",), correction_bias=True, normalise=True)


def read(config: Config) -> ModelSpec:
    """The spec of a V3 or R1 config."""
    return read_deepseek(config, "deepseek_v3", ROUTER)


FAMILY = Family("deepseek_v3", read, published_bytes=1, has_experts=True)
