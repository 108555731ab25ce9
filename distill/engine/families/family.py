"""What a model family is: the facts and the one function that everything else asks for by the family's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from distill.engine.config import Config
from distill.engine.families.names import WeightNames
from distill.engine.spec import ModelSpec


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp stores a family, whose name it has in a file's metadata.

    architecture: the class of transformers. interleaved: rows of q and k are in the order of interleaved rotation.
    attention_bias, mlp_bias: whether a config.json of the family has these keys.
    """

    architecture: str
    interleaved: bool = False
    attention_bias: bool = True
    mlp_bias: bool = False


@dataclass(frozen=True)
class Part:
    """Where the language model is in a family whose files have other models beside it.

    section: of config.json. tensors: how the names of its tensors begin, in place of `model.`. family: of the language
    model alone, as which a student is trained and stored.
    """

    section: str
    tensors: str
    family: str


@dataclass(frozen=True)
class Family:
    """One family.

    name: `model_type` in its config.json, and `family` on a card; the name that transformers knows it by.
    read: its config → the spec. Errors: ValueError naming file and key for what the engine does not compute.
    names: of the tensors in its checkpoints. other_names: that some of its checkpoints have in their place.
    part: where its files have several models, the language model's, whose section of config.json `read` is given.
    split: where a tiktoken.model is published and no tokenizer.json, the alternatives of the pattern by which text is
    split before it is encoded.
    published_bytes: bytes per parameter of the weights as published: 2 for bfloat16, 1 for FP8, less with experts in
    four bits.
    has_experts: whether most weights are experts, which are streamed when they do not fit into memory.
    trains: whether a student may be of this family: it is dense, and rows that are concatenated in one batch learn what
    each would learn alone (tests/numerics/test_train_loss.py).
    fused: whether its decoder layers in transformers are what `train.learn.fused` computes.
    gguf: how GGUF files store it, None where they are not read.
    """

    name: str
    read: Callable[[Config], ModelSpec]
    names: WeightNames = field(default_factory=WeightNames)
    split: tuple[str, ...] = ()
    published_bytes: float = 2
    has_experts: bool = False
    other_names: WeightNames | None = None
    trains: bool = False
    fused: bool = False
    gguf: Gguf | None = None
    part: Part | None = None

    def names_in(self, holds: Callable[[str], bool]) -> WeightNames:
        """The names that a checkpoint has. holds: whether a tensor of this name is in it."""
        other = self.other_names
        return other if other and holds(other.embed) else self.names
