"""Which families of models there are: those of the engine, and those that only transformers computes.

A family of the engine is a file in `engine/families/`, with what planning, training and the engine need to know of it.
Any other `model_type` that transformers has a causal language model for is sampled with transformers, more slowly
(`backends/fallback.py`), and trained where its head is one linear layer (`train/student/isolation.py`).

transformers is imported only for a name that the engine does not know: its table of models takes seconds to import.
"""

from pathlib import Path

from distill import model_files
from distill.engine.families import FAMILIES

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


def language_model(config: dict[str, object]) -> dict[str, object]:
    """A config.json with the keys of its language model at the top, where the engine reads that part alone."""
    family = config.get("model_type")
    section = FAMILIES[family].section if isinstance(family, str) and family in FAMILIES else None
    part = config.get(section) if section else None
    return config | part | {"model_type": family} if isinstance(part, dict) else config


def text_split(name: object) -> tuple[str, ...]:
    """The alternatives of the pattern by which a family's tiktoken.model splits text; none without such a file."""
    return FAMILIES[name].split if isinstance(name, str) and name in FAMILIES else ()


def composite(config: dict[str, object]) -> str | None:
    """The section by which a config.json describes several models, such as language and vision; None for one model."""
    return next((part for part in PARTS if isinstance(config.get(part), dict)), None)
