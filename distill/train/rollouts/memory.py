"""The memory that learning from rollouts takes beside the trainer: the student's engine, and the models that judge.

Engines share the device with the trainer. Their weights are there whole; a cache takes what the engine gives it: all
sequences at once, but at most `CACHE` of what is free when the engine is loaded, which is after the trainer's weights
and before its activations. A teacher of experts would stream those that do not fit, but its engine does not know what
the training will need, so it counts as a whole, unless `engine.memory_budget` bounds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.model_families import cached_elements, in_engine
from distill.recipe import Training
from distill.train.rollouts.student import MAX_BATCH

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 1 << 30
CACHE = 0.9 * 0.2  # share of a GPU's free memory that an engine's cache takes at most
CPU_CACHE = 0.5 * GIB  # on a CPU, where there is no budget


@dataclass(frozen=True)
class Engines:
    """Bytes on one device. weights: of the student's engine. context: of the cache of one sequence; sequences: of all
    that are decoded at once. judges: weights of each local model that scores. budget: `engine.memory_budget`."""

    weights: float
    context: float
    sequences: float
    judges: tuple[float, ...] = ()
    budget: float | None = None

    def within(self, free: float, device: str) -> tuple[float, float]:
        """Bytes of the student's engine, and of the models that score. free: bytes beside the trainer's weights."""

        def cache(left: float) -> float:
            return CACHE * max(0.0, left) if device == "cuda" else CPU_CACHE

        student = self.weights + min(self.sequences, max(cache(free), self.context))
        scoring = 0.0
        for weights in self.judges:
            whole = weights + cache(free - student - scoring - weights)
            scoring += whole if self.budget is None else min(whole, self.budget)
        return student, scoring


def _cached(config: "PretrainedConfig") -> int:
    """Numbers cached for a token, at most: layers that attend to another one's keys are counted, too. Of a model
    without attention none."""
    if not getattr(config, "num_attention_heads", None):
        return 0
    if getattr(config, "is_heterogeneous", False):  # where it may not be asked for the sizes of all layers
        layers = [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    else:
        layers = [config] * config.num_hidden_layers
    return sum(
        2
        * (getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
        for layer in layers
    )


def engines(
    config: "PretrainedConfig",
    training: Training,
    parameters: int,
    size: int,
    context: int,
    ranks: int,
    teachers: Sequence[float],
    budget: float | None,
) -> Engines:
    """The engines of a training with rollouts.

    config, parameters: of the student. size: bytes of a number in its forward pass. context: tokens of the longest
    rollout with its prompt. teachers: bytes of the weights of each teacher in the local engine. budget:
    `engine.memory_budget`, GiB.
    """
    rollouts = training.objective.rollout_settings
    assert rollouts is not None
    try:
        token, state = cached_elements(config.to_dict()) if in_engine(config.model_type) else (_cached(config), 0)
    except ValueError as error:  # the engine, which samples, does not compute what the config says
        raise UserError(str(error)) from error
    each = float(token * size * context + 4 * state)
    judges = list(teachers) if training.objective.teacher_top_k is not None else []
    judges += [2.0 * parameters] if training.objective.needs_reference else []
    batch = min(MAX_BATCH, -(-rollouts.rows // ranks))
    copied = parameters if in_engine(config.model_type) else 0  # else the trainer's own weights sample
    return Engines(size * copied, each, each * batch, tuple(judges), None if budget is None else budget * GIB)
