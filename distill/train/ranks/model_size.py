"""How large a model is, by its config: parameters, and what autograd keeps of a token. No weight is read or made.

Parameters are counted on the model itself, on torch's meta device. Activations are not estimated by a formula but
measured: the model is run with tensors that have shapes and no memory (torch's FakeTensor), with one layer and with two
of each kind, and the sizes of the tensors that autograd keeps for the backward pass are added up.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distill.model_families import in_engine
from distill.recipe import Train
from distill.recipe.adapters import Lora, Qlora
from distill.train.learn import attention, fused, recurrent
from distill.train.student import float8, methods
from distill.train.student.methods import Dtypes, with_adapters

USED = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")  # names of the experts of a token
PROBE = 256  # tokens of the run without memory
TYPES = ("layer_types", "layers_block_type")  # what configs call the kinds of their layers

# torch logs a traceback where an operation has no form without memory; `activations` says what happens then.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

P = ParamSpec("P")
R = TypeVar("R")


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


@once
def idle(config: PretrainedConfig) -> int:
    """Parameters of the routed experts that take no part in a token; 0 without such."""
    used = experts_used(config)
    if used is None:
        return 0
    model, total = on_meta(config, config.num_hidden_layers), 0
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            sizes = [p.numel() for p in module.parameters()]
            count = len(module) if isinstance(module, nn.ModuleList) else len(next(module.parameters()))
            total += sum(sizes) * max(count - used, 0) // count
    return total


def experts_used(config: PretrainedConfig) -> int | None:
    """How many routed experts a token is sent to; None where the config does not say."""
    found = (getattr(config, name, None) for name in USED)
    return next((count for count in found if isinstance(count, int)), None)


def parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


@once
def converted(config: PretrainedConfig) -> float8.Layers:
    """The linear layers of one layer of the decoder that multiply in FP8. Of layers that differ, the parameters are
    their mean, and the largest matrix is that of all."""
    each = {at: float8.convertible(on_meta(config, 1, like=at).get_decoder()) for at in kinds(config)}
    return replace(
        each[0],
        parameters=round(mean(config, {at: layer.parameters for at, layer in each.items()})),
        largest=max(layer.largest for layer in each.values()),
        widest=max(layer.widest for layer in each.values()),
    )


@once
def adapters(config: PretrainedConfig, adapter: Lora | Qlora) -> int:
    """Trainable parameters of the adapters of all layers."""

    def count(layers: int) -> int:
        model = with_adapters(on_meta(config, layers), adapter)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    if _differ(config) or adapter.target_modules != "all-linear":  # a name may be that of a single layer
        return count(config.num_hidden_layers)
    one, two = count(1), count(2)
    return one + int(config.num_hidden_layers - 1) * (two - one)


def _differ(config: PretrainedConfig) -> bool:
    """Whether the layers of a model are of several kinds."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def kinds(config: PretrainedConfig) -> dict[int, int]:
    """Of each kind of layer the index of its first, and how many there are."""
    if not _differ(config):
        return {0: config.num_hidden_layers}
    types = config.layer_types[: config.num_hidden_layers]
    return {types.index(kind): types.count(kind) for kind in dict.fromkeys(types)}


def mean(config: PretrainedConfig, by_kind: Mapping[int, float]) -> float:
    """The mean over all layers of what was found for the first of each kind."""
    counts = kinds(config)
    return sum(count * by_kind[at] for at, count in counts.items()) / sum(counts.values())


def on_meta(
    config: PretrainedConfig, layers: int, dtype: torch.dtype = torch.float32, like: int | None = None
) -> PreTrainedModel:
    """The model with this number of layers, its parameters on torch's meta device: all of them as its layer `like`.
    None: as the first, if there are fewer than it has."""
    config = copy.deepcopy(config)
    if layers != config.num_hidden_layers or like is not None:
        like = like or 0
        types = {name: getattr(config, name, None) for name in TYPES}
        config.num_hidden_layers = layers
        _set(config, {name: its[like : like + 1] * layers for name, its in types.items() if its})
        if getattr(config, "num_kv_shared_layers", None):
            config.num_kv_shared_layers = 0
        differences = config.to_dict().get("per_layer_config") or {}
        if differences:  # sizes of layers that are not those of the others
            its = next((sizes for layer, sizes in differences.items() if int(layer) == like), None)
            config.per_layer_config = {layer: its for layer in range(layers) if its}
    implementation = attention.NAME if _has_rows(config) else None
    with init_empty_weights():
        model: PreTrainedModel = causal_lm(config)._from_config(config, dtype=dtype, attn_implementation=implementation)
    return model


def _set(config: PretrainedConfig, values: dict[str, object]) -> None:
    """Set attributes of a config, those that its class computes from others, too."""
    computed = [name for name in values if isinstance(getattr(type(config), name, None), property)]
    if computed:
        config.__class__ = type(type(config).__name__, (type(config),), dict.fromkeys(computed))
    for name, value in values.items():
        setattr(config, name, value)


def causal_lm(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a config's model, which `_set` may have given another class."""
    mapping = AutoModelForCausalLM._model_mapping
    found: type[PreTrainedModel] = next(mapping[kind] for kind in type(config).__mro__ if kind in mapping)
    return found


def _has_rows(config: PretrainedConfig) -> bool:
    """Whether the attention of concatenated rows is measured; where rows are padded, the model's own is."""
    return in_engine(config.model_type)


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
    """Bytes per token that autograd keeps: for a layer, the mean and the largest, and outside the layers."""

    layer: float
    rest: float
    largest: float


@once
def activations(config: PretrainedConfig, settings: Train, dtypes: Dtypes, device: str = "cpu") -> Activations:
    """Measure the activations of a training with these settings: with one layer and with two, of each kind."""
    layer, rest = {}, 0.0
    for at in kinds(config):
        try:
            one, two = (per_token(config, settings, dtypes, layers, device, like=at) for layers in (1, 2))
        except RuntimeError:  # sizes that depend on the data, as of routed experts, have no FakeTensors
            if _has_rows(config):
                raise
            return _typical(config, dtypes)
        layer[at], rest = two - one, 2 * one - two
    return Activations(mean(config, layer), rest, max(layer.values()))


def _within(model: PreTrainedModel, adapter: Lora | Qlora) -> Lora | Qlora:
    """The adapter with those of its `target_modules` that a model with few layers has; where it has none, with all."""
    linear = methods.linear_layers(model)
    here = tuple(t for t in adapter.target_modules if any(methods.named_by(t, name) for name in linear))
    return adapter.model_copy(update={"target_modules": here or "all-linear"})


def per_token(config: PretrainedConfig, settings: Train, dtypes: Dtypes, layers: int, device: str, like: int) -> float:
    """`saved_bytes` that one more token adds."""
    few, many = (saved_bytes(config, settings, dtypes, layers, tokens, device, like) for tokens in (PROBE, 2 * PROBE))
    return (many - few) / PROBE


def _typical(config: PretrainedConfig, dtypes: Dtypes) -> Activations:
    """The activations of a family that cannot be measured, as those of a dense decoder: inputs and outputs of each
    product, and of each element-wise step. Routed experts count as often as a token is sent to one."""
    used = experts_used(config) or 1
    widths = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
    inner = used * (next(filter(None, widths), None) or 4 * config.hidden_size)
    layer = float(dtypes.compute.itemsize * (16 * config.hidden_size + 5 * inner))
    return Activations(layer, 8.0 * config.hidden_size, layer)


def saved_bytes(
    config: PretrainedConfig,
    settings: Train,
    dtypes: Dtypes,
    layers: int,
    tokens: int,
    device: str = "cpu",
    like: int | None = None,
) -> int:
    """Bytes that autograd keeps of a forward pass of one row with this number of tokens, without the weights; of a
    model with layers like this one.

    Layers that multiply in FP8 keep the same inputs, uncast: the model is not converted, and torchao need not be there.
    """
    storages: dict[int, int] = {}
    model = on_meta(config, layers, dtypes.weights if dtypes.autocast else dtypes.compute, like)
    recurrent.install(model)
    if device == "cpu" and not dtypes.float8:
        fused.install(model)
    if settings.adapter is not None:
        with_adapters(model, _within(model, settings.adapter))
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
