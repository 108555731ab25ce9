"""`distill plan`: which method and layout of a recipe's training fit on a machine, and what they cost.

Memory is that of `train.memory`, part by part. Time is operations over the machine's rate:

    operations a token = 6 · parameters + 6 · layers · width · mean length   (Kaplan et al. 2020, arXiv 2001.08361, with
                         the causal half of attention), 8 instead of 6 with gradient checkpointing; a frozen base needs
                         no gradients of its weights: 4 (6 with checkpointing)

divided by `REACHED` of the data sheet's rate. How many tokens there are is counted where the rows are there, and said
to be assumed where they are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill import catalog
from distill.console import say, table
from distill.errors import UserError
from distill.plan.hardware import Hardware, parse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from distill.recipe import Recipe, StudentCard, Train
    from distill.train.memory import Memory

REACHED = 0.4  # of the data sheet's rate: what dense models are commonly trained at, over FSDP too; a guess for any one
FILLED = 0.92  # of a device's memory that may be planned: the rest is fragmentation
MACHINES = ("1x24GB", "1x80GB", "8x80GB", "4x8x80GB")
METHODS = ("full", "lora", "qlora")
ASSUMED_TRACES = 100_000
ASSUMED_SHARE = 0.2  # of max_length that a trace has, where nobody has counted: R1's have 5,000 to 8,000 tokens


@dataclass(frozen=True)
class Data:
    """tokens: of an epoch. longest: of one row. how: whether they were counted, for the reader."""

    rows: int
    tokens: int
    longest: int
    how: str


@dataclass(frozen=True)
class Way:
    """One way to train on one machine."""

    hardware: Hardware
    method: str
    layout: str
    checkpointing: bool
    offloading: bool
    memory: "Memory"
    hours: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= FILLED * self.hardware.memory


def plan_training(
    recipe: "Recipe", directory: Path, machines: Sequence[str] = (), traces: int | None = None, mean: int | None = None
) -> list[Way]:
    """Print the table, and return what is in it. traces, mean: how many, and of how many tokens, if not counted.

    UserError for a machine that is not known, or a student whose shape nobody knows.
    """
    from distill.train import memory

    hardware = [parse(name) for name in machines or MACHINES]
    card = catalog.load_student(recipe.student)
    config = configuration(recipe, card)
    settings = recipe.train
    data = count(recipe, directory, traces, mean)
    shape = memory.shape(config)
    steps = -(-data.rows // (settings.batches_per_step(1) * settings.per_device_train_batch_size))
    epochs = settings.num_train_epochs
    say(f"{card.name}: {shape.total / 1e9:,.2f} B parameters, {shape.layers} layers, vocabulary {shape.vocabulary:,}")
    say(
        f"{data.rows:,} rows, {data.tokens:,} tokens an epoch ({data.how}); {epochs:g} epochs, rows of at most "
        f"{settings.max_length:,} tokens"
    )
    ways = [way for machine in hardware for way in ways_on(machine, recipe, config, data)]
    show(ways, settings)
    checkpoint = shape.total * 12
    say(
        f"about {settings.max_steps or round(steps * epochs):,} steps on one device at a time; checkpoints take up to "
        f"{(settings.save_total_limit + 1) * checkpoint / 1e9:,.0f} GB of disk (full), the student "
        f"{shape.total * 2 / 1e9:,.1f} GB; hours at {REACHED:.0%} of the data sheet's bfloat16 rate"
    )
    return ways


def ways_on(machine: Hardware, recipe: "Recipe", config: "PretrainedConfig", data: Data) -> list[Way]:
    """For every method the first that fits, or the leanest: ddp, fsdp; each as the recipe says, with checkpointing,
    then with what that keeps in the host's memory."""
    found = []
    layouts = ("ddp", "fsdp") if machine.devices > 1 else ("one",)
    for method in METHODS:
        tried = [
            way(machine, recipe, config, data, method, layout, checkpointing, offloading)
            for layout in layouts
            if not (method == "qlora" and layout == "fsdp")
            for checkpointing, offloading in _savings(recipe.train)
        ]
        found.append(next((one for one in tried if one.fits), min(tried, key=lambda one: one.memory.total)))
    return found


def _savings(settings: "Train") -> list[tuple[bool, bool]]:
    """(checkpointing, offloading): the recipe's own, and what saves more memory."""
    own = (settings.gradient_checkpointing, settings.activation_offloading)
    return [own, *(more for more in ((True, False), (True, True)) if more > own)]


def way(
    machine: Hardware,
    recipe: "Recipe",
    config: "PretrainedConfig",
    data: Data,
    method: str,
    layout: str,
    checkpointing: bool,
    offloading: bool,
) -> Way:
    import torch

    from distill.train import memory, methods

    settings = recipe.train.model_copy(
        update={
            "method": method,
            "gradient_checkpointing": checkpointing,
            "activation_offloading": offloading,
        }
    )
    dtypes = methods.dtypes(settings, torch.device("cuda"), sharded=layout == "fsdp")
    row = settings.max_length if settings.packing else min(settings.max_length, data.longest)
    batch = settings.per_device_train_batch_size * row
    found = memory.estimate(config, settings, dtypes, batch, batch, layout, machine.devices, "cuda")  # type: ignore[arg-type]
    hours = operations(config, settings, data) / (machine.devices * machine.rate * REACHED) / 3600
    return Way(machine, method, layout, checkpointing, offloading, found, hours)


def operations(config: "PretrainedConfig", settings: "Train", data: Data) -> float:
    """Of the whole training."""
    from distill.train import memory

    shape = memory.shape(config)
    products = shape.layers * shape.layer + shape.vocabulary * shape.width
    passes = 6 if settings.method == "full" else 4
    passes += 2 if settings.gradient_checkpointing else 0
    mean = data.tokens / max(data.rows, 1)
    token = passes * products + passes * shape.layers * shape.width * mean
    if settings.max_steps:
        rows = settings.max_steps * settings.batches_per_step(1) * settings.per_device_train_batch_size
        return float(token * mean * rows)
    return float(token * data.tokens * settings.num_train_epochs)


def configuration(recipe: "Recipe", card: "StudentCard") -> "PretrainedConfig":
    """The student's config: its own where its weights lie here, else of the shape its card tells."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    from distill.train import student

    if directory := catalog.local_weights("student", recipe.student):
        return student.configuration(directory, recipe.train)
    if card.architecture is None:
        raise UserError(
            f"{card.name}: its weights are not on this machine and its card has no `architecture`: download it, or "
            f"add the shape of its config.json to the card"
        )
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[card.family]
    known = {key: value for key, value in card.architecture.model_dump().items() if value is not None}
    return kind(**known, max_position_embeddings=card.context)


def count(recipe: "Recipe", directory: Path, traces: int | None, mean: int | None) -> Data:
    """Of the rows that training prepared, or what was said, or what is assumed."""
    from distill.train import data
    from distill.train.prepare import TOKENS

    settings = recipe.train
    rows = data.load(directory / TOKENS)
    if rows is not None and traces is None and mean is None:
        return Data(len(rows), rows.counts.tokens, int(rows.lengths.max()), "counted")
    assumed = []
    if traces is None:
        limits = [getattr(source, "limit", None) for source in (*recipe.prompts, *recipe.traces)]
        if limits and all(limits):
            traces = sum(limit for limit in limits if limit) * (recipe.generate.samples if recipe.prompts else 1)
        else:
            traces = ASSUMED_TRACES
            assumed.append("how many: --traces")
    if mean is None:
        mean = round(ASSUMED_SHARE * settings.max_length)
        assumed.append("how long: --mean-tokens")
    return Data(
        traces, traces * mean, settings.max_length, f"assumed; say {', '.join(assumed)}" if assumed else "as said"
    )


def show(ways: Sequence[Way], settings: "Train") -> None:
    rows = []
    for one in ways:
        parts = {name: size / 1e9 for name, size in one.memory.parts()}
        own = [parts.pop(name) for name in ("weights", "gradients", "optimizer", "activations")]
        saved = "c" * one.checkpointing + "o" * one.offloading
        rows.append(
            (
                one.hardware.name,
                f"{'→ ' if one.method == settings.method else '  '}{one.method}",
                one.layout + (f" +{saved}" if saved else ""),
                *(f"{size:,.1f}" for size in (*own, sum(parts.values()))),
                f"{one.memory.total / 1e9:,.1f}",
                f"{one.hours:,.1f}" if one.fits else "too big",
            )
        )
    columns = ("machine", "method", "layout", "model", "grads", "optim.", "activ.", "other", "total", "hours")
    table("Training, GB a device at its peak", columns, rows, text_columns=3)
    say(
        "→ the recipe's method; c gradient checkpointing, o activations offloaded; other: casts, the head's logits, "
        "what torch takes; too big: over the device's memory"
    )
