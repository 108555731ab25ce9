"""`distill plan`: which adapter and layout of a recipe's training fit on a machine, and what they cost.

Memory is that of `train.ranks.memory`, part by part. Time is the number of operations over the machine's rate:

    operations per token = 6 · parameters + 6 · layers · width · mean length   (Kaplan et al. 2020, arXiv 2001.08361,
                           with the causal half of attention), 8 instead of 6 with gradient checkpointing; a frozen base
                           needs no gradients of its weights: 4 (6 with checkpointing); of routed experts those that a
                           token is sent to

at `UTILISATION` of the data sheet's rate. Tokens are counted if the rows are already encoded, else given or assumed,
and the output says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill import catalog
from distill.console import bytes_text, say, short, table
from distill.errors import UserError
from distill.model_families import in_engine, published_bytes, trained_as
from distill.objectives import OnPolicy
from distill.plan.hardware import Hardware, parse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from distill.recipe import Recipe, StudentCard, Train
    from distill.recipe.adapters import Lora, Qlora
    from distill.train.ranks.memory import Memory
    from distill.train.ranks.world import Layout
    from distill.train.rollouts.memory import Engines

UTILISATION = 0.4  # share of the data sheet's rate at which dense models are commonly trained, with FSDP too
USABLE = 0.92  # share of a device's memory that a plan may fill: the rest is fragmentation
MACHINES = ("1x24GB", "1x80GB", "8x80GB", "4x8x80GB")
ASSUMED_TRACES = 100_000
ASSUMED_SHARE = 0.2  # mean length of a trace as a share of max_length: R1's traces have 5,000 to 8,000 tokens


@dataclass(frozen=True)
class Data:
    """The training data. tokens: per epoch. longest: tokens of one row. source: "counted", "given" or an assumption.
    steps: of a training on rollouts, its optimiser steps; rows and tokens are then those of all steps."""

    rows: int
    tokens: int
    longest: int
    source: str
    steps: int | None = None


@dataclass(frozen=True)
class Way:
    """One way to train on a machine. method: "full" or an adapter's kind. checkpointing, offloading: of activations."""

    hardware: Hardware
    method: str
    layout: str
    checkpointing: bool
    offloading: bool
    memory: "Memory"
    hours: float
    own: bool = False  # the recipe's own method
    float8: bool = False  # whether its products are in FP8

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.memory.total <= USABLE * self.hardware.memory

    @property
    def lacks_fp8(self) -> bool:
        """Whether it multiplies in FP8, and the GPU cannot."""
        return self.float8 and not self.hardware.has_fp8

    @property
    def runs(self) -> bool:
        """Whether the machine can run it."""
        return self.fits and not self.lacks_fp8


def plan_training(
    recipe: "Recipe",
    directory: Path,
    machines: Sequence[str] = (),
    traces: int | None = None,
    mean: int | None = None,
    expected: "Data | None" = None,
) -> tuple[list[Way], Data]:
    """Print the table; returns its rows and the data that they are for.

    traces: number of traces. mean: their mean tokens; both None if unknown. expected: the data where training has not
    encoded its rows.

    Errors: UserError for an unknown machine, or a student whose architecture is unknown.
    """
    from distill.train.ranks import model_size

    hardware = [parse(name) for name in machines or MACHINES]
    card = catalog.load_student(recipe.student)
    config = configuration(recipe, card)
    settings = recipe.train
    data = count(recipe, directory, traces, mean, expected)
    shape = model_size.shape(config)
    per_step = settings.batches_per_step(1) * rows_per_batch(settings, data)
    steps = data.steps or settings.max_steps or round(-(-data.rows // per_step) * settings.num_train_epochs)
    over = f"in {data.steps:,} steps" if data.steps else "per epoch"
    epochs = "" if data.steps else f"{settings.num_train_epochs:g} epochs, "
    say(f"{card.name}: {short(shape.total)} parameters, {shape.layers} layers, vocabulary {shape.vocabulary:,}")
    say(
        f"{data.rows:,} rows, {data.tokens:,} tokens {over} ({data.source}); {epochs}at most "
        f"{settings.max_length:,} tokens per row"
    )
    ways = [way for machine in hardware for way in ways_on(machine, recipe, config, data)]
    show(ways, settings)
    _say_engines(ways)
    checkpoints, student = disk_of(settings, config)
    say(
        f"about {steps:,} steps on one device; disk: up to {bytes_text(checkpoints)} of checkpoints, "
        f"{bytes_text(student)} for the student; hours at {UTILISATION:.0%} of the data sheet's bfloat16 rate"
    )
    return ways, data


def disk_of(settings: "Train", config: "PretrainedConfig") -> tuple[float, float]:
    """Bytes of the checkpoints at most, one more than are kept, and of the student: float32 values and both moments of
    what is trained; the student in its dtype."""
    from distill.train.ranks import model_size
    from distill.train.student import methods

    parameters = model_size.shape(config).total
    trained = parameters if settings.adapter is None else model_size.adapters(config, settings.adapter)
    checkpoints = (settings.save_total_limit + 1) * trained * 12
    return float(checkpoints), float(parameters * methods.stored_dtype(settings).itemsize)


def _say_engines(ways: Sequence[Way]) -> None:
    """The memory of the engines on the first machine, which the table has in its column `other`."""
    own = next(way for way in ways if way.own)
    engine, scoring = own.memory.rollouts, own.memory.scoring
    if engine:
        scorers = f", {_figure(scoring / 1e9)} GB for the local model that scores" if scoring else ""
        name = own.hardware.name
        say(f"other: on {name} also {_figure(engine / 1e9)} GB for the student's engine{scorers}; with their caches")
    if scoring > USABLE * own.hardware.memory:
        say("the model that scores is on every device: set engine.memory_budget, or name a `server` with the teacher")


def ways_on(machine: Hardware, recipe: "Recipe", config: "PretrainedConfig", data: Data) -> list[Way]:
    """For all weights and each of `_adapters` the first way that fits, else the one that needs the least memory.

    The order is DDP before FSDP; each as the recipe says, with gradient checkpointing, with activation offloading too.
    """
    ways = []
    layouts: tuple[Layout, ...] = ("ddp", "fsdp") if machine.devices > 1 else ("one",)
    for adapter in _adapters(recipe.train):
        settings = recipe.train.model_copy(update={"adapter": adapter})
        candidates = [
            way(
                machine, settings.model_copy(update=saving), config, data, layout, beside(recipe, config, data, machine)
            )
            for layout in layouts
            if not (settings.unsharded and layout == "fsdp")
            for saving in _savings(settings)
        ]
        fitting = (candidate for candidate in candidates if candidate.fits)
        best = next(fitting, min(candidates, key=lambda candidate: candidate.memory.total))
        ways.append(replace(best, own=adapter == recipe.train.adapter))
    return ways


def method(settings: "Train") -> str:
    """ "full", or the kind of the adapter."""
    return "full" if settings.adapter is None else settings.adapter.kind


def _adapters(settings: "Train") -> list["Lora | Qlora | None"]:
    """No adapter, LoRA and QLoRA; the recipe's own in place of the default of its kind. Not what training refuses:
    adapters beside FP8."""
    from distill.recipe.adapters import Lora, Qlora

    defaults: dict[str, Lora | Qlora | None] = {"full": None}
    if settings.dtype != "float8":
        defaults |= {"lora": Lora(kind="lora"), "qlora": Qlora(kind="qlora")}
    return list((defaults | {method(settings): settings.adapter}).values())


def _savings(settings: "Train") -> list[dict[str, bool]]:
    """The recipe's own memory settings, and those that need less."""
    own = (settings.gradient_checkpointing, settings.activation_offloading)
    choices = [own, *(more for more in ((True, False), (True, True)) if more > own)]
    return [{"gradient_checkpointing": first, "activation_offloading": second} for first, second in choices]


def beside(recipe: "Recipe", config: "PretrainedConfig", data: Data, machine: Hardware) -> "Engines | None":
    """The engines on each device of a training with rollouts; None of another."""
    from distill.train.ranks import model_size
    from distill.train.rollouts.memory import engines

    training = recipe.train
    if training.objective.rollout_settings is None:
        return None
    size, parameters = 4 if training.dtype == "float32" else 2, model_size.shape(config).total
    budget = recipe.engine.memory_budget
    return engines(config, training, parameters, size, data.longest, machine.devices, teacher_bytes(recipe), budget)


def teacher_bytes(recipe: "Recipe") -> list[float]:
    """The weights, as published, of each teacher that this machine's engine computes, bytes."""
    objective = recipe.train.objective
    cards = [catalog.load_teacher(recipe.teacher)] if catalog.server_of(recipe) is None else []
    if isinstance(objective, OnPolicy):
        others = map(catalog.load_teacher, objective.teachers.values())
        cards += [card for card in others if card.server is None]
    return [card.parameters * 1e9 * published_bytes(card.family) for card in cards]


def way(
    machine: Hardware,
    settings: "Train",
    config: "PretrainedConfig",
    data: Data,
    layout: "Layout",
    engines: "Engines | None" = None,
) -> Way:
    """Estimate one way to train. engines: on the same devices."""
    import torch

    from distill.train.ranks import memory
    from distill.train.student import methods

    dtypes = methods.dtypes(settings, torch.device("cuda"), sharded=layout == "fsdp")
    row = settings.max_length if settings.packing else min(settings.max_length, data.longest)
    batch = settings.per_device_train_batch_size * row
    needed = memory.estimate(config, settings, dtypes, batch, batch, layout, machine.devices, "cuda")
    needed = needed.beside(engines, machine.memory, "cuda")
    hours = operations(config, settings, data) / (machine.devices * machine.rate * UTILISATION) / 3600
    saving = (settings.gradient_checkpointing, settings.activation_offloading)
    float8 = settings.dtype == "float8" and settings.adapter is None
    return Way(machine, method(settings), layout, *saving, needed, hours, float8=float8)


def operations(config: "PretrainedConfig", settings: "Train", data: Data) -> float:
    """Floating-point operations of the whole training."""
    from distill.train.ranks import model_size

    shape = model_size.shape(config)
    products = shape.layers * shape.layer + shape.vocabulary * shape.width - model_size.idle(config)
    passes = 6 if settings.adapter is None else 4
    passes += 2 if settings.gradient_checkpointing else 0
    mean = data.tokens / max(data.rows, 1)
    token = passes * products + passes * shape.layers * shape.width * mean
    return float(token * trained_tokens(settings, data))


def trained_tokens(settings: "Train", data: Data) -> float:
    """Tokens that all epochs read, or those of `max_steps` full batches on one device; of rollouts, once each."""
    if data.steps:
        return float(data.tokens)
    if settings.max_steps:
        rows = settings.max_steps * settings.batches_per_step(1) * rows_per_batch(settings, data)
        return data.tokens / max(data.rows, 1) * rows
    return data.tokens * settings.num_train_epochs


def rows_per_batch(settings: "Train", data: Data) -> int:
    """Rows of one forward pass on a device; a pack holds as many as its tokens allow."""
    mean = data.tokens / max(data.rows, 1)
    packed = max(1, int(settings.max_length // max(mean, 1))) if settings.packing else 1
    return packed * settings.per_device_train_batch_size


def configuration(recipe: "Recipe", card: "StudentCard") -> "PretrainedConfig":
    """The student's config: its own if its weights are on this machine, else from its card. Errors: UserError."""
    from transformers import AutoConfig

    from distill.train.student import model

    if directory := catalog.local_weights("student", recipe.student):
        return model.configuration(directory, recipe.train)
    if card.architecture is None:
        raise UserError(
            f"{card.name}: its weights are not on this machine and its card has no `architecture`: download the "
            f"weights, or add the sizes in its config.json to the card"
        )
    known = {key: value for key, value in card.architecture.model_dump().items() if value is not None}
    family = trained_as(card.family)
    config: PretrainedConfig = AutoConfig.for_model(family, **known, max_position_embeddings=card.context)
    return config


def student_sizes(recipe: "Recipe") -> tuple[float, float]:
    """The student's parameters in billions: those that take part in a token, and all. Errors: UserError."""
    card = catalog.load_student(recipe.student)
    if in_engine(card.family) or (card.architecture is None and not catalog.local_weights("student", recipe.student)):
        return card.parameters, card.parameters
    from distill.train.ranks import model_size

    idle = model_size.idle(configuration(recipe, card))
    return card.parameters - idle / 1e9, card.parameters


def count(
    recipe: "Recipe", directory: Path, traces: int | None, mean: int | None, expected: Data | None = None
) -> Data:
    """Row counts: of the rows that training has encoded, else as expected, as given, or assumed. Rollouts are not
    encoded beforehand, so they are as expected."""
    from distill.artefacts import RunPaths
    from distill.train.rows import stored

    settings = recipe.train
    if expected is not None and expected.steps:
        return expected
    rows = stored.load(RunPaths(directory).tokens)
    if rows is not None and traces is None and mean is None:
        return Data(len(rows), rows.counts.tokens, int(rows.lengths.max()), "counted")
    if expected is not None:
        return expected
    assumed = []
    if traces is None:
        limits = [getattr(source, "limit", None) for source in (*recipe.prompts, *recipe.traces)]
        if limits and all(limits):
            traces = sum(limit for limit in limits if limit) * (recipe.generate.samples if recipe.prompts else 1)
        else:
            traces = ASSUMED_TRACES
            assumed.append("--traces")
    if mean is None:
        mean = round(ASSUMED_SHARE * settings.max_length)
        assumed.append("--mean-tokens")
    source = f"assumed; set {' and '.join(assumed)}" if assumed else "given"
    return Data(traces, traces * mean, settings.max_length, source)


def show(ways: Sequence[Way], settings: "Train") -> None:
    """Print the table."""
    rows = []
    for each in ways:
        parts = dict(each.memory.parts())
        own = [parts.pop(name) for name in ("weights", "gradients", "optimizer", "activations")]
        saving = "c" * each.checkpointing + "o" * each.offloading
        rows.append(
            (
                each.hardware.name,
                f"{'→ ' if each.method == method(settings) else '  '}{each.method}",
                each.layout + (f" +{saving}" if saving else ""),
                *(_figure(size / 1e9) for size in (*own, sum(parts.values()), each.memory.total)),
                _hours(each),
            )
        )
    columns = ("machine", "method", "layout", "model", "grads", "optim.", "activ.", "other", "total", "hours")
    table("Training: peak memory per device, GB", columns, rows, text_columns=3)
    say("→ the recipe's own; +c gradient checkpointing; +o activation offloading; other: casts, logits, libraries")
    if settings.dtype == "float8":
        say("float8 needs compute capability 8.9 or later (Ada, Hopper); LoRA and QLoRA are planned in bfloat16")


def _hours(way: Way) -> str:
    """The hours of a way, or why it is none."""
    if way.lacks_fp8:
        return "no FP8"
    return _figure(way.hours) if way.fits else "too big"


def _figure(value: float) -> str:
    """A figure of the table, short enough that a student of 70B stays within 80 columns."""
    if 0 < value < 0.05:
        return "< 0.1"
    return f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"
