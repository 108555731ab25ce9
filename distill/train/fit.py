"""From proved rows to the student's directory: the model is built as the recipe says, trained, gathered and written.

Every process of a world runs this, with the same arguments.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from distill.artefacts import TrainSummary
from distill.chat import Chat
from distill.console import say
from distill.errors import UserError
from distill.hardware import give_memory_back
from distill.recipe import Recipe, StudentCard, Train
from distill.train import card as cards
from distill.train import methods, student, teaching
from distill.train.checkpoint import Checkpoints, writing
from distill.train.data import TrainingSet
from distill.train.loop import Loop
from distill.train.objectives import Learner, Logits, Objective, Sft
from distill.train.prepare import TOKENS
from distill.train.world import World, whole

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Task:
    """What is to be trained. weights, template: of the student."""

    recipe: Recipe
    card: StudentCard
    weights: Path
    template: str | None
    directory: Path  # of the run
    shares: tuple[float, ...] = (1.0,)


def fit(task: Task, rows: TrainingSet, world: World) -> TrainSummary:
    """Train, from the newest checkpoint if there is one, and write the student. Returns the stage's summary."""
    recipe, settings = task.recipe, task.recipe.train
    transformers_logging.disable_progress_bar()  # ours is the only bar on the terminal,
    transformers_logging.set_verbosity_error()  # and what it would print of missing weights becomes one line
    set_seed(settings.seed)
    if settings.report_to:
        world.accelerator.init_trackers(recipe.name, config=settings.settings())
    checkpoints = Checkpoints(task.directory / "checkpoints", settings.save_total_limit, world)
    built = build(task, objective(settings, task.directory / TOKENS), world)
    loop = Loop(built.learner, rows, settings, checkpoints, world, task.shares, built.wrapped)
    loop.run()
    summary = loop.summary()
    weights = trained_weights(task, built, world)
    chat = Chat.load(task.weights, task.template)
    text = cards.model_card(recipe, task.card, summary, cards.filter_summary(task.directory))
    plain = student.empty(task.weights, settings, getattr(torch, settings.dtype))
    student.save(task.directory / "student", plain, weights, chat, text, world)
    if settings.report_to:
        world.accelerator.end_training()
    return summary


@dataclass(frozen=True)
class Built:
    """base: the model itself. adapted: PEFT's view of it, where adapters are trained."""

    base: PreTrainedModel
    adapted: "PeftModel | None"
    learner: Learner
    wrapped: nn.Module


def objective(settings: Train, tokens: Path) -> Objective:
    if settings.objective == "sft":
        return Sft()
    return Logits(teaching.load(tokens), settings.divergence, settings.logits_weight, settings.logits_temperature)


def build(task: Task, objective: Objective, world: World) -> Built:
    """The student with its objective, laid out over the world. Errors: UserError for weights that do not fit."""
    settings = task.recipe.train
    if world.device.type == "cpu":
        give_memory_back()
    sharded = world.layout == "fsdp"
    dtypes = methods.dtypes(settings, world.device, sharded)
    if world.main and settings.dtype == "bfloat16" and dtypes.compute == torch.float32:
        say("this processor does not multiply bfloat16: the forward pass runs in float32")
    quantization = methods.quantization(settings)
    if sharded and quantization:
        raise UserError("train.method qlora keeps the whole base on every device: set train.parallel to `ddp`")
    if sharded:
        base = student.empty(task.weights, settings, dtypes.weights)
    else:
        base = student.load(task.weights, settings, dtypes.weights, quantization)
    adapted = None if settings.method == "full" else methods.with_adapters(base, settings)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable(offload=settings.activation_offloading)
    learner = Learner(base, objective, dtypes.autocast)
    wrapped = world.lay_out(learner, list(base.get_decoder().layers), dtypes.compute)
    if sharded:
        materialise(learner, world.device)
        student.fill(base, task.weights)
        if adapted:
            methods.start_adapters(base)
    return Built(base, adapted, learner, wrapped)


def materialise(learner: Learner, device: torch.device) -> None:
    """Give a learner on the meta device memory, its buffers' values kept: no file has those."""
    buffers = {name: buffer.to(device) for name, buffer in learner.named_buffers()}
    learner.to_empty(device=device)
    learner.model.tie_weights()  # new memory was given to each of the two
    for name, buffer in learner.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def trained_weights(task: Task, built: Built, world: World) -> dict[str, Tensor]:
    """The student's weights as they are stored, on the first rank; nothing on the others. All ranks together.

    Adapters are stored beside the checkpoints, too, and merged into a base that is read again: into 4-bit weights
    nothing can be merged well.
    """
    dtype = getattr(torch, task.recipe.train.dtype)
    gathered: dict[str, Tensor] = {}
    for name, parameter in built.base.named_parameters():
        if parameter.requires_grad:
            full = whole(parameter.detach())
            if world.main:
                gathered[name] = full.cpu() if built.adapted else full.to(dtype).cpu()
    if built.adapted is None or not world.main:
        return gathered
    adapter = adapter_tensors(gathered)
    path = task.directory / "checkpoints" / "adapter"
    with writing(path.with_name(f"tmp-{path.name}"), path):
        built.adapted.save_pretrained(path.with_name(f"tmp-{path.name}"), state_dict=adapter)
    plain = student.merged(task.weights, task.recipe.train, adapter, dtype)
    return dict(plain.state_dict())


def adapter_tensors(gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that PEFT stores adapters under."""
    return {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in gathered.items()}
