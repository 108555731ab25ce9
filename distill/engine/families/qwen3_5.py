"""Qwen3.5, dense, as published: a language model beside a vision encoder, of which the former is read.

Training saves the language model alone, which is of the family `qwen3_5_text`.
"""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.family import Family, Part
from distill.engine.families.qwen3_5_text import INSIDE, LANGUAGE, read_text
from distill.engine.spec import ModelSpec


def read(config: Config) -> ModelSpec:
    """The spec of the language model."""
    return read_text(config, "qwen3_5")


FAMILY = Family(
    "qwen3_5",
    read,
    INSIDE,
    trains=True,
    part=Part("text_config", tensors=LANGUAGE, family="qwen3_5_text"),
)
