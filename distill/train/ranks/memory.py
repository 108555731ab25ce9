"""The memory that a training needs on one device, by part, estimated before it begins.

Weights, gradients and the optimiser's state are counted. Activations are not estimated by a formula but measured: the
model itself is run with tensors that have shapes and no memory (torch's FakeTensor), with one layer and with two, and
the sizes of the tensors that autograd keeps for the backward pass are added up. The peak is the larger of two moments:

- in the head's loss: the activations of all layers, a block of logits, and the head's gradient; or, with FP8, soon
  after it: the casts of a product in place of the block
- at the end of the backward pass: all gradients, and that of a tied head as it has waited, in the dtype of its product

Not counted are fragmentation, and the libraries' own memory beyond `BASE`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import update_wrapper
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distill.errors import UserError
from distill.hardware import memory
from distill.model_families import packs
from distill.recipe import Recipe, Train
from distill.recipe.adapters import Lora, Qlora
from distill.train.learn import attention, fused, loss
from distill.train.ranks.world import Layout
from distill.train.rows.stored import TrainingSet
from distill.train.student import float8, methods
from distill.train.student.methods import Dtypes, with_adapters

if TYPE_CHECKING:
    from distill.train.rollouts.memory import Engines

BASE = {"cpu": 0.5e9, "cuda": 1.2e9}  # the process with its libraries; context, workspaces and NCCL's buffers
NF4 = 0.516  # bytes per parameter: 4 bits, and scales that are quantised in blocks of 256 (QLoRA, section 3)
PROBE = 256  # tokens of the run without memory
FLOAT8_CAST = 9  # bytes per element while a tensor is cast to FP8: scaled in float32, clamped, and the codes

P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. layers: their number. layer, embedding, head: parameters of each, a tied head counted as 0.

    width: of the hidden states. vocabulary: tokens.
    """

    layers: int
    layer: int
    embedding: int
    head: int
    width: int
    vocabulary: int

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return self.layers * self.layer + self.embedding + self.head + self.width


def once(function: Callable[Concatenate[PretrainedConfig, P], R]) -> Callable[Concatenate[PretrainedConfig, P], R]:
    """Cache the results: the table of a plan asks the same few questions often."""
    results: dict[tuple[str, ...], R] = {}

    def cached(config: PretrainedConfig, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (config.to_json_string(), *map(repr, args), *map(repr, kwargs.items()))
        if key not in results:
            results[key] = function(config, *args, **kwargs)
        return results[key]

    update_wrapper(cached, function)
    return cached


@once
def shape(config: PretrainedConfig) -> Shape:
    """The sizes of a model, counted on the model itself, without memory for it. Of layers that differ, a layer's size
    is their mean, and the embeddings of each layer are counted with that of the model."""
    if _differ(config):
        model = on_meta(config, config.num_hidden_layers)
        model.tie_weights()
        embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        layer = (parameters(model) - embeddings - head - config.hidden_size) // config.num_hidden_layers
        return Shape(config.num_hidden_layers, layer, embeddings, head, config.hidden_size, config.vocab_size)
    one, two = (parameters(on_meta(config, layers)) for layers in (1, 2))
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    return Shape(config.num_hidden_layers, two - one, embedding, head, config.hidden_size, config.vocab_size)


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


@once
def converted(config: PretrainedConfig) -> float8.Layers:
    """The linear layers of one layer of the decoder that multiply in FP8."""
    return float8.convertible(on_meta(config, 1).get_decoder())


@once
def adapters(config: PretrainedConfig, adapter: Lora | Qlora) -> int:
    """Trainable parameters of the adapters of all layers."""

    def count(layers: int) -> int:
        model = with_adapters(on_meta(config, layers), adapter)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    if _differ(config):
        return count(config.num_hidden_layers)
    one, two = count(1), count(2)
    return one + int(config.num_hidden_layers - 1) * (two - one)


def _differ(config: PretrainedConfig) -> bool:
    """Whether the layers of a model are of several kinds."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def on_meta(config: PretrainedConfig, layers: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with this number of layers, its parameters on torch's meta device: layers as its first one, if there
    are fewer than it has."""
    config = copy.deepcopy(config)
    if layers != config.num_hidden_layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        if getattr(config, "num_kv_shared_layers", None):
            config.num_kv_shared_layers = 0
        differences = config.to_dict().get("per_layer_config") or {}
        if differences:  # sizes of layers that are not those of the others
            first = next((sizes for layer, sizes in differences.items() if int(layer) == 0), None)
            config.per_layer_config = {layer: first for layer in range(layers) if first}
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME if _has_rows(config) else None
        )
    return model


def _has_rows(config: PretrainedConfig) -> bool:
    """Whether the attention of concatenated rows is measured; where rows are padded, the model's own is."""
    return packs(config.model_type)


def fake_parameters(model: nn.Module) -> None:
    """Replace the parameters of a model on the meta device by tensors of the active FakeTensor mode, on a CPU."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
            module._parameters[name] = made[id(old)]


@dataclass(frozen=True)
class Activations:
    """Bytes per token that autograd keeps: for each layer, and outside the layers."""

    layer: float
    rest: float


@once
def activations(config: PretrainedConfig, settings: Train, dtypes: Dtypes, device: str = "cpu") -> Activations:
    """Measure the activations of a training with these settings."""
    try:
        kept = {
            (layers, tokens): saved_bytes(config, settings, dtypes, layers, tokens, device)
            for layers in (1, 2)
            for tokens in (PROBE, 2 * PROBE)
        }
    except RuntimeError:  # sizes that depend on the data, as of routed experts, have no FakeTensors
        if _has_rows(config):
            raise
        return _typical(config, dtypes)
    one, two = ((kept[layers, 2 * PROBE] - kept[layers, PROBE]) / PROBE for layers in (1, 2))
    return Activations(two - one, one - (two - one))


def _typical(config: PretrainedConfig, dtypes: Dtypes) -> Activations:
    """The activations of a family that cannot be measured, as those of a dense decoder: inputs and outputs of each
    product, and of each element-wise step. Routed experts count as often as a token is sent to one."""
    used = getattr(config, "num_experts_per_tok", None) or 1
    inner = used * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return Activations(dtypes.compute.itemsize * (16 * config.hidden_size + 5 * inner), 8.0 * config.hidden_size)


def saved_bytes(
    config: PretrainedConfig, settings: Train, dtypes: Dtypes, layers: int, tokens: int, device: str = "cpu"
) -> int:
    """Bytes that autograd keeps of a forward pass of one row with this number of tokens, without the weights.

    Layers that multiply in FP8 keep the same inputs, uncast: the model is not converted, and torchao need not be there.
    """
    storages: dict[int, int] = {}
    model = on_meta(config, layers, dtype=dtypes.weights if dtypes.autocast else dtypes.compute)
    if device == "cpu" and not dtypes.float8:
        fused.install(model)
    if settings.adapter is not None:
        with_adapters(model, settings.adapter)
    with FakeTensorMode(allow_non_fake_inputs=True):  # buffers are real
        fake_parameters(model)
        model.train()
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable()
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage.nbytes()
            held.append(tensor)  # else another tensor could get its number
            return tensor

        held: list[torch.Tensor] = []
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtypes.autocast or torch.bfloat16, enabled=dtypes.autocast is not None),
        ):
            if _has_rows(config):
                out = model.get_decoder()(
                    input_ids=ids,
                    position_ids=ids,
                    rows=attention.Rows((tokens,), torch.device("cpu")),
                    use_cache=False,
                ).last_hidden_state
            else:
                out = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        storages[out.untyped_storage()._cdata] = out.untyped_storage().nbytes()
    return sum(storages.values())


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
    several_batches = settings.batches_per_step(ranks) > ranks
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
        gathered = float(half * model.layer)  # the casts of one layer
    elif dtypes.autocast is not None and full:  # casts to the forward dtype, which autograd keeps, unlike those to FP8
        cast = model.layer - (converted(config).parameters if dtypes.float8 else 0)
        gathered = float(half * model.layers * cast)

    whole = activations(config, settings.model_copy(update={"gradient_checkpointing": False}), dtypes, device)
    if settings.gradient_checkpointing:  # one layer at a time is recomputed, with all its activations
        lean = activations(config, settings.model_copy(update={"activation_offloading": False}), dtypes, device)
        layers = 0 if settings.activation_offloading else model.layers
        kept = tokens * (layers * lean.layer + lean.rest + whole.layer)
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
