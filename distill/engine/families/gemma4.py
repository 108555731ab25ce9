"""Gemma 4 as it is published: the language model of `gemma4_text` beside models of images and sound, which are not
read."""

from __future__ import annotations

from dataclasses import replace

from distill.engine.config import Config
from distill.engine.families.family import Family, Part
from distill.engine.families.gemma4_text import NAMES, read_text
from distill.engine.spec import ModelSpec

LANGUAGE = "model.language_model."


def read(config: Config) -> ModelSpec:
    """The spec of the language model."""
    return read_text(config, "gemma4")


PUBLISHED = replace(
    NAMES,
    embed=LANGUAGE + "embed_tokens.weight",
    norm=LANGUAGE + "norm.weight",
    layer=LANGUAGE + "layers.{}.",
    inputs=replace(
        NAMES.inputs,
        embed=LANGUAGE + "embed_tokens_per_layer.weight",
        project=LANGUAGE + "per_layer_model_projection",
        norm=LANGUAGE + "per_layer_projection_norm.weight",
    ),
    beside=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
)

FAMILY = Family(
    "gemma4", read, names=PUBLISHED, trains=True, part=Part("text_config", tensors=LANGUAGE, family="gemma4_text")
)
