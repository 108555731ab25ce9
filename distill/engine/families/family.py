"""What a model family is: the facts and the one function that everything else asks for by the family's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from distill.engine.config import Config
from distill.engine.families.names import WeightNames
from distill.engine.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """One family.

    name: `model_type` in its config.json, and `family` on a card; the name that transformers knows it by.
    read: its config → the spec. Errors: ValueError naming file and key for what the engine does not compute.
    names: of the tensors in its checkpoints.
    published_bytes: bytes per parameter of the weights as published: 1 for FP8, 2 for bfloat16.
    has_experts: whether most weights are experts, which are streamed when they do not fit into memory.
    trains: whether a student may be of this family: it is dense, and in transformers rows packed end to end learn what
    each would learn alone (tests/numerics/test_train_loss.py).
    """

    name: str
    read: Callable[[Config], ModelSpec]
    names: WeightNames = field(default_factory=WeightNames)
    published_bytes: int = 2
    has_experts: bool = False
    trains: bool = False
