"""The memory that a training needs on one device, by part, estimated before it begins.

Weights, gradients and the optimiser's state are counted, activations are measured (model_size.py). The peak is the
larger of two moments:

- in the head's loss: the activations of all layers, a block of logits, and the head's gradient; or, with FP8, soon
  after it: the casts of a product in place of the block
- at the end of the backward pass: all gradients, and that of a tied head as it has waited, in the dtype of its product

Not counted are fragmentation, and the libraries' own memory beyond `BASE`.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from distill.errors import UserError
from distill.hardware import memory
from distill.recipe import Recipe, Train
from distill.recipe.adapters import Qlora
from distill.train.learn import fused, loss
from distill.train.ranks.model_size import activations, adapters, converted, shape
from distill.train.ranks.world import Layout
from distill.train.rows.stored import TrainingSet
from distill.train.student import methods
from distill.train.student.methods import Dtypes

if TYPE_CHECKING:
    from distill.train.rollouts.memory import Engines

BASE = {"cpu": 0.5e9, "cuda": 1.2e9}  # the process with its libraries; context, workspaces and NCCL's buffers
NF4 = 0.516  # bytes per parameter: 4 bits, and scales that are quantised in blocks of 256 (QLoRA, section 3)
FLOAT8_CAST = 9  # bytes per element while a tensor is cast to FP8: scaled in float32, clamped, and the codes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak. gathered: weights in the dtype of the forward pass, besides the stored ones.
    rollouts: what the student's engine adds; scoring: the teacher, or the base, on the same device; both with their
    caches."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    head: float
    base: float
    rollouts: float = 0.0
    scoring: float = 0.0

    def parts(self) -> list[tuple[str, float]]:
        """(name, bytes) of each part."""
        return [(part.name, getattr(self, part.name)) for part in fields(self)]

    @property
    def total(self) -> float:
        """Sum of all parts, bytes."""
        return sum(size for _, size in self.parts())

    def beside(self, engines: "Engines | None", room: float, device: str) -> "Memory":
        """With engines on the same device, which has `room` bytes.

        On a CPU the student's engine has memory only between the steps, when the trainer has no gradients.
        """
        if engines is None:
            return self
        rollouts, scoring = engines.within(room - self.weights, device)
        if device == "cpu":
            rollouts = max(0.0, rollouts - self.gradients - self.gathered - self.activations - self.head)
        return replace(self, rollouts=rollouts, scoring=scoring)


def estimate(
    config: PretrainedConfig,
    settings: Train,
    dtypes: Dtypes,
    tokens: int,
    supervised: int,
    layout: Layout = "one",
    ranks: int = 1,
    device: str = "cpu",
) -> Memory:
    """The peak memory of one device. tokens, supervised: of the largest batch of a forward pass."""
    model = shape(config)
    shards = ranks if layout == "fsdp" else 1
    several_batches = accumulates(settings, ranks)
    half = 2 if dtypes.compute == torch.bfloat16 else 4
    head_size = model.vocabulary * model.width
    full = settings.adapter is None
    if settings.adapter is None:
        trained, weights = model.total, 4.0 * model.total
    else:
        trained = adapters(config, settings.adapter)
        frozen = NF4 * (model.total - model.embedding - model.head) + half * (model.embedding + model.head)
        quantized = isinstance(settings.adapter, Qlora)
        weights = (frozen if quantized else float(half * model.total)) + 4 * trained
    states = 2 if settings.optim == "adamw_8bit" else 8

    gradients = 4.0 * trained / shards * (2 if layout == "ddp" else 1)  # DDP's buckets
    gathered = 0.0
    if layout == "fsdp":  # the layer that computes, the one that is prefetched, the one whose gradients are reduced
        root = model.embedding + model.head
        gathered = half * (2 * model.layer + root) + (4 * model.layer if full else 0)
    elif device == "cpu" and full and not dtypes.float8 and fused.runs(config, dtypes.compute):
        gathered = float(half * model.layer)  # the casts of one layer, in float32 copies side by side
    elif dtypes.autocast is not None and full:  # casts to the forward dtype, which autograd keeps, unlike those to FP8
        cast = model.layer - (converted(config).parameters if dtypes.float8 else 0)
        gathered = float(half * model.layers * cast)

    whole = activations(config, settings.model_copy(update={"gradient_checkpointing": False}), dtypes, device)
    if settings.gradient_checkpointing:  # one layer at a time is recomputed, with all its activations
        lean = activations(config, settings.model_copy(update={"activation_offloading": False}), dtypes, device)
        layers = 0 if settings.activation_offloading else model.layers
        kept = tokens * (layers * lean.layer + lean.rest + whole.largest)
    else:
        kept = tokens * (model.layers * whole.layer + whole.rest)
    block = min(supervised * model.vocabulary, loss.BLOCK) * half
    floats = min(supervised * model.vocabulary, loss.PASS[device]) * 4 * 2
    temporary = block + floats
    if dtypes.float8:
        layer = converted(config)
        temporary = max(temporary, FLOAT8_CAST * (layer.largest + tokens * layer.widest))
    in_loss = temporary + supervised * model.width * 8
    one_block = supervised * model.vocabulary <= loss.BLOCK
    if full and half == 2 and one_block and not model.head:
        in_loss += head_size * 2  # its gradient, which is cast at the end of the backward pass
    elif full:  # on a CPU a product is computed separately, which a GPU accumulates directly
        in_loss += head_size * (6 if half == 2 and device == "cpu" else 4)
    in_loss += head_size * half if dtypes.autocast is not None else 0  # its cast
    at_end = block if device == "cpu" and block <= loss.KEPT else 0
    at_end += head_size * 2 if full and half == 2 and one_block and not model.head else 0
    loss_moment = kept + in_loss + (gradients if several_batches else 0)
    end_moment = at_end + gradients
    if loss_moment >= end_moment:
        held, head, activation = gradients if several_batches else 0.0, float(in_loss), kept
    else:
        held, head, activation = gradients, float(at_end), 0.0
    return Memory(
        weights / shards,
        held,
        float(states * trained / shards),
        gathered,
        activation,
        head,
        BASE[device],
    )


def accumulates(settings: Train, ranks: int) -> bool:
    """Whether a device adds up the gradients of several batches in a step. Rollouts of a set are one step, or shared
    out among its updates."""
    rollouts = settings.objective.rollout_settings
    if rollouts is None:
        return settings.batches_per_step(ranks) > ranks
    return -(-rollouts.rows // rollouts.updates) > ranks * settings.per_device_train_batch_size


def check(
    recipe: Recipe,
    rows: TrainingSet | tuple[int, int],
    config: PretrainedConfig,
    processes: int,
    engines: "Engines | None" = None,
) -> Layout:
    """The layout that the recipe asks for, or the first that fits. Errors: UserError when the training cannot fit.

    rows: the encoded rows, or the (tokens, supervised tokens) of the largest batch. engines: of a training with
    rollouts, on each device.

    On a CPU processes share the memory; on GPUs each has its own.
    """
    settings, device = recipe.train, "cuda" if torch.cuda.is_available() else "cpu"
    room = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else memory()[1] / processes
    layouts: tuple[Layout, ...] = ("one",) if processes == 1 else ("ddp", "fsdp")
    if processes > 1 and settings.parallel != "auto":
        layouts = (settings.parallel,)
    elif processes > 1 and settings.unsharded:
        layouts = ("ddp",)
    tokens, supervised = rows if isinstance(rows, tuple) else largest_batch(rows, settings)
    tried: dict[Layout, Memory] = {}
    for layout in layouts:
        dtypes = methods.dtypes(settings, torch.device(device), sharded=layout == "fsdp")
        needed = estimate(config, settings, dtypes, tokens, supervised, layout, processes, device)
        tried[layout] = needed.beside(engines, room, device)
        if tried[layout].total <= room:
            return layout
    layout, needed = min(tried.items(), key=lambda item: item[1].total)
    name, part = max(needed.parts(), key=lambda item: item[1])
    remedies = "train.adapter, gradient_checkpointing, a shorter max_length, more devices"
    if engines is not None:
        remedies += (
            ", engine.memory_budget or a server for the teacher" if needed.scoring else ", fewer rollouts per step"
        )
    raise UserError(
        f"training needs about {needed.total / 1e9:,.1f} GB {'per GPU' if device == 'cuda' else 'of memory'} at its "
        f"peak ({part / 1e9:,.1f} GB of it for {name}), and {room / 1e9:,.1f} GB are available: `distill plan` shows "
        f"what fits ({remedies})"
    )


def largest_batch(rows: TrainingSet, settings: Train) -> tuple[int, int]:
    """(tokens, supervised tokens) of the largest batch of a forward pass."""
    if settings.packing:
        size = settings.max_length * settings.per_device_train_batch_size
        share = rows.counts.supervised / rows.counts.tokens
        return min(size, rows.counts.tokens), round(min(size, rows.counts.tokens) * share)
    longest = sorted(rows.lengths.tolist(), reverse=True)[: settings.per_device_train_batch_size]
    supervised = sorted((rows.lengths - rows.prompt_tokens).tolist(), reverse=True)
    return sum(longest), sum(supervised[: settings.per_device_train_batch_size])
