"""The student that is being trained, sampling: the trainer's weights in the local engine.

The engine is loaded once, from the base's directory, and takes the trainer's weights in place before each set of
rollouts (`Engine.update`): no files, no second checkpoint, and memory rises by one copy of the weights in the dtype of
the forward pass. On a CPU that copy is not there while the trainer computes, which is when memory is at its peak. Every
rank has an engine of its own and samples its share of the prompts; what a sample is depends on (seed, prompt, sample
number) and the weights alone, so that ranks and resumes change nothing.

Rejected: `generate` of transformers on the trained module, which needs no copy, but pads, keeps its cache in one tensor
per layer and is an order of magnitude slower; and a server that reads checkpoints, whose rollouts are late by the time
of writing and reading them.

Adapters (LoRA) are added to the base's weights one matrix at a time, while they are packed; a 4-bit base (QLoRA) is
dequantised first, as its forward pass does, so that the engine samples from the model that is trained. Sharded
parameters are gathered one at a time, by all ranks in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.backends import Job, SamplingParams, TrainedBackend
from distill.backends.collect import trace_of
from distill.hardware import trim_heap
from distill.model_families import trained_name
from distill.objectives import RolloutSettings
from distill.traces.rows import rounded
from distill.traces.trace import Trace
from distill.train.ranks.world import whole

MAX_BATCH = 256  # sequences decoded at once
LARGE = 256 << 20  # bytes of trained weights from which on new pages for each step are a hundredth of its time


class Rollout(NamedTuple):
    """An answer of the student. likeliest: its most likely tokens at each token of the answer, int32 [t, k], likeliest
    first; None where no teacher is asked for them."""

    trace: Trace
    likeliest: npt.NDArray[np.int32] | None = None


class StudentEngine:
    """The student as a backend that samples. backend: with weights of `trained`'s shapes. settings: of the rollouts."""

    def __init__(self, trained: PreTrainedModel, backend: TrainedBackend, settings: RolloutSettings, seed: int) -> None:
        self.trained, self.backend, self.settings, self.seed = trained, backend, settings, seed
        self.large = sum(parameter.nbytes for parameter in trained.parameters()) >= LARGE

    def update(self) -> None:
        """Take over the trainer's current weights. All ranks together. Errors: UserError."""
        if self.large:  # gradients and activations of the last step
            trim_heap()
        self.backend.update(tensors_of(self.trained))

    def release(self) -> None:
        """Give the memory of weights and cache of a large student back until the next `update`, where that is
        possible."""
        if self.large:
            self.backend.release()

    def sample(self, jobs: Sequence[Job], name: str, top_k: int | None) -> list[Rollout]:
        """The samples of these jobs, in no particular order, with the log-probabilities of their tokens.

        name: written into every trace as its teacher. top_k: most likely tokens to record at each position. Errors:
        UserError where the student computes numbers that are not finite.
        """
        sampling = SamplingParams(**self.settings.sampling.model_dump(), logprobs=top_k)
        rollouts = []
        for done in self.backend.complete(jobs, sampling, self.seed):
            trace = trace_of(replace(done, top=None), done.prompt, self.seed, name)
            rollouts.append(Rollout(rounded(trace), None if done.top is None else done.top.id_tk))
        return rollouts

    def likeliest(self, traces: Sequence[Trace], top_k: int) -> list[npt.NDArray[np.int32]]:
        """The most likely tokens of the current weights at each token of rollouts that are there already: [t, k]."""
        return [scored.top_id_tk for scored in self.backend.scored(traces, top_k)]


def tensors_of(model: nn.Module) -> Callable[[str], Tensor]:
    """A function from published names to the current weights of a model, with the adapters that are beside them. A
    student whose base has other models beside it is that base's language model alone."""
    parameters = dict(model.named_buffers()) | dict(model.named_parameters())
    scaled = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }

    @torch.no_grad()
    def tensor(name: str) -> Tensor:
        name = trained_name(name)
        if (parameter := parameters.get(name)) is not None:
            return whole(parameter.detach())
        module_name, _, kind = name.rpartition(".")
        base = unquantized(parameters[f"{module_name}.base_layer.{kind}"])
        if kind != "weight":
            return base
        return base + sum(updates_of(scaled[module_name]))

    return tensor


def unquantized(parameter: Tensor) -> Tensor:
    """A base's weight beside adapters, gathered if it is sharded, dequantised if it is in 4 bits."""
    if (state := getattr(parameter, "quant_state", None)) is None:
        return whole(parameter.detach())
    from bitsandbytes.functional import dequantize_4bit

    assert not getattr(state, "packing_format_for_cpu", False), "`keep_4_bit_layout` keeps the layout that is read here"
    dequantized: Tensor = dequantize_4bit(parameter.data, state)
    return dequantized


def updates_of(module: nn.Module) -> list[Tensor]:
    """What the adapters of a linear layer add to its weight: scaling · B A, one tensor per adapter."""
    ups, downs, scaling = (getattr(module, name) for name in ("lora_B", "lora_A", "scaling"))
    return [scaling[name] * whole(ups[name].weight.detach()) @ whole(downs[name].weight.detach()) for name in downs]
