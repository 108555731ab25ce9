"""Which families of models there are: those of the engine, and those that only transformers computes.

A family of the engine is a file in `engine/families/`, with what planning, training and the engine need to know of it.
Any other `model_type` that transformers has a causal language model for is sampled with transformers, more slowly
(`backends/fallback.py`), and trained where its head is one linear layer (`train/student/isolation.py`).

transformers is imported only for a name that the engine does not know: its table of models takes seconds to import.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from distill import model_files
from distill.engine.families import FAMILIES, spec_of

STUDENTS = [name for name, family in FAMILIES.items() if family.trains]  # of the engine's
BFLOAT16 = 2  # bytes per parameter, as other families publish their weights
PARTS = ("text_config", "vision_config", "audio_config")  # sections of a config that describe models inside a model


def in_engine(name: object) -> bool:
    """Whether the engine computes models of this `model_type`."""
    return name in FAMILIES


def in_transformers(name: object) -> bool:
    """Whether only transformers computes models of this `model_type`, as a causal language model."""
    if not isinstance(name, str) or name in FAMILIES:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_trained(name: object) -> bool:
    """Whether a student may be of this `model_type`."""
    return name in STUDENTS or in_transformers(name)


def renames(name: object) -> bool:
    """Whether files of this `model_type` may name or shape weights in another way than transformers has them."""
    return name not in FAMILIES or FAMILIES[str(name)].other_names is not None


def cached_elements(config: Mapping[str, object]) -> tuple[int, int]:
    """Numbers that the engine caches for each token of a model with this config, and those in float32 that a sequence
    has however long it is. Errors: ValueError for a config that the engine refuses."""
    spec = spec_of(cast(dict[str, Any], dict(config)))
    return spec.cache_elements_per_token(), spec.state_elements


def published_bytes(name: str) -> float:
    """Bytes per parameter of the weights as a family publishes them."""
    return FAMILIES[name].published_bytes if name in FAMILIES else BFLOAT16


def has_experts(name: str) -> bool:
    """Whether most weights of a family are experts, which the engine streams when they do not fit into memory."""
    return name in FAMILIES and FAMILIES[name].has_experts


def falls_back(directory: Path) -> bool:
    """Whether the model in a directory is sampled with transformers. False for what neither computes, and for a config
    that cannot be read: the engine names what is wrong with it."""
    config = directory / "config.json"
    return config.is_file() and in_transformers(model_files.read_object(config).get("model_type"))


def section(name: str) -> str | None:
    """The section of a config.json that describes the language model, in a family that has other models beside it."""
    part = FAMILIES[name].part if name in FAMILIES else None
    return None if part is None else part.section


def language_section(config: dict[str, object]) -> dict[str, object]:
    """What a config.json says of the language model: in most families the whole; else a section, and the whole where
    that says nothing."""
    values = config.get(section(str(config.get("model_type"))) or "")
    return config | values | {"model_type": config["model_type"]} if isinstance(values, dict) else config


def trained_as(name: str) -> str:
    """The family of the language model alone of a family that has other models beside it."""
    part = FAMILIES[name].part if name in FAMILIES else None
    return name if part is None else part.family


def beginnings() -> list[str]:
    """How published tensors begin that are called `model.…` in the language model alone, which is trained."""
    return [family.part.tensors for family in FAMILIES.values() if family.trains and family.part is not None]


def trained_name(tensor: str) -> str:
    """The name that a published tensor has in the language model alone."""
    beginning = next(filter(tensor.startswith, beginnings()), None)
    return tensor if beginning is None else "model." + tensor.removeprefix(beginning)


def text_split(name: object) -> tuple[str, ...]:
    """The alternatives of the pattern by which a family's tiktoken.model splits text; none without such a file."""
    return FAMILIES[name].split if isinstance(name, str) and name in FAMILIES else ()


def composite(config: dict[str, object]) -> str | None:
    """The section by which a config.json describes several models, such as language and vision; None for one model."""
    return next((part for part in PARTS if isinstance(config.get(part), dict)), None)
