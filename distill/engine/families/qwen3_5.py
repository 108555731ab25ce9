"""Qwen3.5, dense, as published: a language model beside a vision encoder, of which the former is read.

Training saves the language model alone, which is of the family `qwen3_5_text`.
"""

from __future__ import annotations

from distill.engine.config import Config
from distill.engine.families.family import Family
from distill.engine.families.qwen3_5_text import INSIDE, read_text
from distill.engine.spec import ModelSpec

SECTION = "text_config"


def read(config: Config) -> ModelSpec:
    """The spec of the language model in a published config."""
    text = config.section(SECTION)
    if text is None:
        raise ValueError(
            f"{config.where}: {SECTION!r} is missing; for a language model alone, 'model_type' is 'qwen3_5_text'"
        )
    tied = text.bool("tie_word_embeddings", False)
    config.only("tie_word_embeddings", (tied,))
    return read_text(text, "qwen3_5")


FAMILY = Family("qwen3_5", read, INSIDE, section=SECTION, trains=True, packs=False)
