"""From proved rows to the student's directory: build the model as the recipe says, train it, gather it, write it.

Every process of a world runs this, with the same arguments.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from distill.artefacts import FilterSummary, RunPaths, TrainSummary
from distill.chat import Chat
from distill.console import say
from distill.hardware import give_memory_back
from distill.models import Models
from distill.recipe import Recipe, Train
from distill.train.learn import fused
from distill.train.learn.learner import Learner
from distill.train.learn.loop import Loop
from distill.train.ranks.checkpoint import Checkpoints, writing
from distill.train.ranks.world import World, whole
from distill.train.rows import teacher
from distill.train.rows.feed import Feed, StoredFeed
from distill.train.rows.stored import TrainingSet
from distill.train.student import card as cards
from distill.train.student import float8, isolation, methods, model

if TYPE_CHECKING:
    from peft import PeftModel

    from distill.train.rollouts.questions import Questions

# Bytes from which on a block of memory is mapped by itself (`give_memory_back`): fused layers and small models free few
# large ones, layers as transformers has them would leave a gigabyte of a heap unused.
MAPPED, MAPPED_OF_PLAIN = 32 << 20, 1 << 20
SMALL = 64 << 20  # bytes of the base's weights


@dataclass(frozen=True)
class Task:
    """One training. paths: of the run. fingerprint: of the settings that decide the student, which its checkpoints
    carry. shares: how often an epoch sees the rows of each source. questions: of a training with rollouts, where they
    have been read."""

    recipe: Recipe
    models: Models
    paths: RunPaths
    fingerprint: str = ""
    shares: tuple[float, ...] = (1.0,)
    questions: "Questions | None" = None


def fit(task: Task, rows: TrainingSet | None, world: World) -> TrainSummary:
    """Train, from the newest checkpoint if there is one, and write the student. Returns the stage's summary.

    rows: None for an objective that trains on rollouts alone.

    Errors: WorkError when a loss is not finite or the disk is full; UserError for weights that cannot be trained.
    """
    recipe, settings, paths = task.recipe, task.recipe.train, task.paths
    transformers_logging.disable_progress_bar()  # there is one progress bar, and it is ours
    transformers_logging.set_verbosity_error()  # warnings about weights are errors of `student.model`
    set_seed(settings.seed)
    if settings.report_to:
        world.accelerator.init_trackers(recipe.name, config=scalars(settings))
    checkpoints = Checkpoints(paths.checkpoints, settings.save_total_limit, world, task.fingerprint)
    built = build(task, world)
    with feeding(task, rows, built, world) as feed:
        loop = Loop(built.learner, feed, settings, checkpoints, world, built.wrapped)
        loop.run()
        reason = isolation.why_padded(model.configuration(task.models.base.directory, settings), settings)
        summary = loop.summary().model_copy(update={"padded_rows": reason})
    weights = trained_weights(task, built, world)
    chat = Chat.load(task.models.base.directory, task.models.training_template)
    filtered = cards.summary(paths, "filter", FilterSummary)
    text = cards.model_card(recipe, task.models.student_card, summary, filtered)
    plain = model.empty(task.models.base.directory, settings, methods.stored_dtype(settings))
    assert not world.main or model.stored_tensors(plain).keys() <= weights.keys(), "a tensor of the student is missing"
    model.save(paths.student, plain, weights, chat, text, world)
    if settings.report_to:
        world.accelerator.end_training()
    return summary


def scalars(settings: Train) -> dict[str, JsonValue]:
    """The settings as trackers take them: TensorBoard has no lists and no mappings."""
    values = settings.settings().items()
    return {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in values}


@contextmanager
def feeding(task: Task, rows: TrainingSet | None, built: "Built", world: World) -> Iterator[Feed]:
    """The feed of a training: encoded rows, rollouts, or both."""
    settings = task.recipe.train
    stored = None
    if rows is not None:
        teaching = teacher.load(task.paths.tokens) if settings.objective.teacher_top_k else None
        stored = StoredFeed(rows, settings, world.size, task.shares, teaching)
    if settings.objective.rollout_settings is None:
        assert stored is not None
        yield stored
        return
    from distill.train.rollouts.setup import rollout_feed

    trained = built.adapted.get_base_model() if built.adapted else built.base
    with rollout_feed(task.recipe, task.models, task.paths, trained, world, task.questions, stored) as feed:
        yield feed


@dataclass(frozen=True)
class Built:
    """base: the model itself. adapted: PEFT's view of it, with adapters. wrapped: the learner in the world's layout."""

    base: PreTrainedModel
    adapted: "PeftModel | None"
    learner: Learner
    wrapped: nn.Module


def build(task: Task, world: World) -> Built:
    """The student with its objective, laid out over the world. Errors: UserError for weights that cannot be trained."""
    settings, weights = task.recipe.train, task.models.base.directory
    sharded = world.layout == "fsdp"
    dtypes = methods.dtypes(settings, world.device, sharded)
    if world.device.type == "cpu":
        size = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
        runs_fused = settings.adapter is None and fused.runs(model.configuration(weights, settings), dtypes.compute)
        give_memory_back(MAPPED if size < SMALL or (runs_fused and not dtypes.float8) else MAPPED_OF_PLAIN)
    if world.main and settings.dtype != "float32" and dtypes.compute == torch.float32:
        say("this processor has no bfloat16 matrix products: the forward pass runs in float32")
    quantization = methods.quantization(settings)
    assert not (sharded and settings.unsharded), "the recipe and the memory check choose DDP"
    if sharded:
        base = model.empty(weights, settings, dtypes.weights)
    else:
        base = model.load(weights, settings, dtypes.weights, quantization)
    if dtypes.float8:
        say_converted(float8.convert(base, world.device, dtypes.compute), world)
    adapted = None if settings.adapter is None else methods.with_adapters(base, settings.adapter)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable(offload=settings.activation_offloading)
    padded = isolation.sentence(model.configuration(weights, settings), settings)
    if padded and world.main:
        say(padded)
    learner = Learner(base, settings.objective, dtypes.autocast, padded=padded is not None)
    wrapped = world.lay_out(learner, model.layers(base), dtypes.compute)
    if sharded:
        materialise(learner, world.device)
        model.fill(base, weights)
        if adapted:
            methods.start_adapters(base)
    return Built(base, adapted, learner, wrapped)


def say_converted(layers: float8.Layers, world: World) -> None:
    """Print how many layers multiply in FP8, and whether they only emulate it."""
    if not world.main:
        return
    skipped = layers.total - layers.converted
    why = f"; {skipped} skipped, with dimensions that are not multiples of 16" if skipped else ""
    say(f"FP8 products in {layers.converted} of the decoder's {layers.total} linear layers{why}")
    if world.device.type == "cpu":
        say("FP8 is emulated on the processor: same rounding, slower than train.dtype bfloat16")


def materialise(learner: Learner, device: torch.device) -> None:
    """Allocate a learner on the meta device, keeping the values of its buffers, which no file has."""
    buffers = {name: buffer.to(device) for name, buffer in learner.named_buffers()}
    learner.to_empty(device=device)
    learner.model.tie_weights()  # each of the two has got memory of its own
    for name, buffer in learner.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def trained_weights(task: Task, built: Built, world: World) -> dict[str, Tensor]:
    """The student's weights as they are stored, on the first rank; nothing on the others. All ranks together.

    Adapters are stored beside the checkpoints, too, and merged into a base that is read again: nothing can be merged
    well into 4-bit weights. Tensors that are not trained, such as the routing bias of experts, keep their values.
    """
    settings = task.recipe.train
    dtype = methods.stored_dtype(settings)
    gathered: dict[str, Tensor] = {}
    for name, parameter in built.base.named_parameters():
        if parameter.requires_grad or built.adapted is None:
            full = whole(parameter.detach())
            rounded = parameter.requires_grad and not built.adapted and not model.is_float32(built.base, name)
            if world.main:
                gathered[name] = (full.to(dtype) if rounded else full).cpu()
    if built.adapted is None or settings.adapter is None or not world.main:
        buffers = model.stored_buffers(built.base) if world.main else {}
        return gathered | {name: buffer.cpu() for name, buffer in buffers.items()}
    adapter = adapter_tensors(gathered)
    path = task.paths.checkpoints / "adapter"
    with writing(path) as scratch:
        built.adapted.save_pretrained(scratch, state_dict=adapter)
    plain = model.merged(task.models.base.directory, settings, settings.adapter, adapter, dtype)
    return dict(plain.state_dict())


def adapter_tensors(gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that PEFT stores adapters under."""
    return {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in gathered.items()}
