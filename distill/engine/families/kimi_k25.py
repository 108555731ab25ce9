"""Kimi K2.5 and later: Kimi K2 with a vision model beside it, which is not read. Experts are in INT4."""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.deepseek import read_deepseek
from distill.engine.families.deepseek_v3 import ROUTER
from distill.engine.families.family import Family, Part
from distill.engine.families.kimi_k2 import SPLIT
from distill.engine.families.names import WeightNames
from distill.engine.spec import ModelSpec

TEXT = "language_model."
NAMES = WeightNames(
    embed=TEXT + "model.embed_tokens.weight",
    norm=TEXT + "model.norm.weight",
    head=TEXT + "lm_head.weight",
    layer=TEXT + "model.layers.{}.",
    beside=("vision_tower.", "mm_projector."),
)
PART = Part("text_config", tensors=TEXT + "model.", family="kimi_k2")


def read(config: Config) -> ModelSpec:
    """The spec of a Kimi K2.5 config's `text_config`."""
    config.only("model_type", ("kimi_k2", "deepseek_v3"))
    return read_deepseek(config, "kimi_k25", ROUTER)


FAMILY = Family("kimi_k25", read, names=NAMES, split=SPLIT, published_bytes=0.6, has_experts=True, part=PART)
