"""Decoder layers whose element-wise work runs in one pass, with a backward pass that is written out. For a CPU.

A layer of transformers is some forty tensor ops, of which seven are products. On a CPU the others take as long as the
products: each reads and writes the whole hidden state, in memory that was just mapped, and autograd keeps most results.
Here a layer is three functions around the attention, made of products and of the compiled ops of
`distill.engine.kernels.cpu_training`:

    q, k, v = rotate(norm(x) · [Wq Wk Wv]ᵀ)        keeps x, and q, k, v
    x = x + attention · Woᵀ                        keeps the attention's output
    x = x + (silu(gate) · up) · Wdᵀ                keeps x, gate and up; gate, up = norm(x) · [Wg Wu]ᵀ

What can be recomputed by one pass (norm, silu · up) is. Weights are cast to the dtype of the forward pass, or only
laid below each other in float32, for each product, into memory that all layers share: the casts are a hundredth of the products, and autocast would keep them all
until the backward pass. Intermediate results are in shared memory, too: no pages are mapped for them.

Numbers are those of transformers, rounded less often: a sum of two products (the gradients by norm(x)) is one product
with a longer sum. `install` replaces the class of the layers by a subclass; parameters, names and hooks (DDP, FSDP2,
gradient checkpointing) stay. A layer with other linear layers than torch's (adapters, FP8), on a GPU, in other dtypes
or without the compiled kernels runs as transformers has it.

Rejected: torch.compile, which needs a compiler at run time and minutes for each shape of a batch.

Shapes: t tokens, d hidden, n columns of a product, h heads of queries, g of keys, c channels of a head, r = c/2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PretrainedConfig, PreTrainedModel

from distill.engine.families import FAMILIES
from distill.engine.kernels import cpu_training as kernels
from distill.train.learn import attention
from distill.train.learn.memory import scratch

SILU = ("SiLU", "SiLUActivation")
DTYPES = (torch.bfloat16, torch.float32)  # of products
Layer = Any  # transformers has no types for the parts of its layers


def install(model: PreTrainedModel) -> None:
    """Give the decoder layers and norms of a model their fused form, if its family's layers have one."""
    if not _known(model.config) or kernels.why_missing():
        return
    first: Layer = model.get_decoder().layers[0]
    layer, norm = type(first), type(first.input_layernorm)
    if layer in _subclasses.values():
        return
    for module in model.modules():
        if type(module) is layer:
            module.__class__ = _subclass(layer, fused_layer)
        elif type(module) is norm:
            module.__class__ = _subclass(norm, fused_norm)


def _known(config: PretrainedConfig) -> bool:
    return config.model_type in FAMILIES and FAMILIES[config.model_type].fused


def runs(config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether the layers of a model run fused on this processor, with products in `dtype`."""
    if not _known(config) or dtype not in DTYPES or kernels.why_missing():
        return False
    return config.hidden_act == "silu" and not getattr(config, "mlp_bias", False)


_subclasses: dict[Layer, type] = {}


def _subclass(base: Layer, forward: Callable[..., Tensor]) -> type:
    """A subclass with another forward pass. transformers wraps that of a layer for gradient checkpointing."""
    if base not in _subclasses:
        _subclasses[base] = type(f"Fused{base.__name__}", (base,), {"forward": forward, "plain": base.forward})
    return _subclasses[base]


def forward_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products: autocast's, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fusable(x: Tensor) -> bool:
    """Whether the compiled ops take a tensor. FakeTensors, which have no memory, pass: they measure what is kept."""
    return x.device.type == "cpu" and forward_dtype(x) in DTYPES and x.dtype in (torch.float32, torch.bfloat16)


def fused_norm(module: Layer, hidden_states: Tensor) -> Tensor:
    """The forward pass of an RMSNorm, in the dtype of the products that follow."""
    if not fusable(hidden_states):
        plain: Tensor = module.plain(hidden_states)
        return plain
    x_tc = hidden_states.reshape(-1, hidden_states.shape[-1])
    apply: Callable[..., Tensor] = _Norm.apply
    out_tc = apply(x_tc, module.weight, module.variance_epsilon, forward_dtype(hidden_states))
    return out_tc.view(hidden_states.shape)


def linears(layer: Layer) -> list[nn.Module]:
    """The linear layers of a decoder layer."""
    heads, mlp = layer.self_attn, layer.mlp
    return [heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def fused_layer(layer: Layer, hidden_states: Tensor, *args: Layer, **kwargs: Layer) -> Tensor:
    """The forward pass of a decoder layer. hidden_states: [1, t, d]. The last layer returns the wanted rows only, where
    `Rows.wanted` names some: what follows the attention is not computed for the others."""
    heads, mlp, rows = layer.self_attn, layer.mlp, kwargs.get("rows")
    plain_linear = all(type(module) is nn.Linear for module in linears(layer))
    silu = type(mlp.act_fn).__name__ in SILU
    unbiased = mlp.gate_proj.bias is None and mlp.up_proj.bias is None and mlp.down_proj.bias is None
    if args or rows is None or not (fusable(hidden_states) and plain_linear and silu and unbiased):
        plain: Tensor = layer.plain(hidden_states, *args, **kwargs)
        return plain
    x_td = hidden_states[0]
    dtype = forward_dtype(x_td)
    cos_tr, sin_tr = (x[0, :, : heads.head_dim // 2].float().contiguous() for x in kwargs["position_embeddings"])
    projections = (heads.q_proj, heads.k_proj, heads.v_proj)
    normed, rotated = hasattr(heads, "q_norm"), bool(getattr(heads, "use_rope", True))  # SmolLM3: not in all layers
    qkv: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Projections.apply
    q_thc, k_tgc, v_tgc = qkv(
        x_td,
        layer.input_layernorm.weight,
        layer.input_layernorm.variance_epsilon,
        dtype,
        heads.head_dim,
        (cos_tr, sin_tr) if rotated and not normed else None,
        *(module.weight for module in projections),
        *(module.bias for module in projections),
    )
    if normed:
        q_thc, k_tgc = heads.q_norm(q_thc), heads.k_norm(k_tgc)
    if normed and rotated:
        turn: Callable[..., Tensor] = _Turn.apply
        q_thc, k_tgc = turn(q_thc, cos_tr, sin_tr), turn(k_tgc, cos_tr, sin_tr)
    dropout = heads.attention_dropout if layer.training else 0.0
    out_thc = attention.inside_rows(q_thc, k_tgc, v_tgc, rows, heads.scaling, dropout)
    out_tn = out_thc.flatten(1)
    if rows.wanted is not None and heads.layer_idx == heads.config.num_hidden_layers - 1:
        x_td, out_tn = (x.index_select(0, rows.wanted) for x in (x_td, out_tn))
        rows.narrowed = True
    add: Callable[..., Tensor] = _AddProduct.apply
    x_td = add(x_td, out_tn, heads.o_proj.weight, heads.o_proj.bias, dtype)
    add_mlp: Callable[..., Tensor] = _AddMlp.apply
    norm = layer.post_attention_layernorm
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    return add_mlp(x_td, norm.weight, norm.variance_epsilon, dtype, *weights)[None]


# ---- shared memory


def cast(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in `dtype`: the tensor itself, or a copy in scratch."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    return scratch(name, x, dtype, *x.shape).copy_(x)


def stacked(name: str, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights [·, d] below each other in `dtype`, in scratch: one product in place of several."""
    if len(weights) == 1:
        return cast(name, weights[0], dtype)
    out_nd = scratch(name, weights[0], dtype, sum(len(weight) for weight in weights), weights[0].shape[1])
    start = 0
    for weight in weights:
        out_nd[start : start + len(weight)].copy_(weight)
        start += len(weight)
    return out_nd


def weight_gradients(grad_tn: Tensor, x_td: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of stacked weights by that of their product."""
    out_nd = scratch("weight gradient", x_td, x_td.dtype, grad_tn.shape[1], x_td.shape[1])
    torch.mm(grad_tn.T, x_td, out=out_nd)
    parts = out_nd.split([len(weight) for weight in weights])
    return [part.to(weight.dtype, copy=True) for part, weight in zip(parts, weights, strict=True)]


def normed(x_td: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype, factor_t: Tensor) -> Tensor:
    """RMSNorm in scratch."""
    out_td = scratch("normed", x_td, dtype, *x_td.shape)
    kernels.norm(x_td, weight_d.float(), eps, out_td, factor_t)
    return out_td


# ---- functions with a backward pass


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    eps: float
    dtype: torch.dtype
    head_dim: int
    turned: bool
    biased: bool


Gradients = tuple[Tensor | None, ...]


class _Norm(torch.autograd.Function):
    """RMSNorm."""

    @staticmethod
    def forward(ctx: _Context, x_tc: Tensor, weight_c: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_tc = x_tc.contiguous()
        out_tc, factor_t = x_tc.new_empty(x_tc.shape, dtype=dtype), x_tc.new_empty(len(x_tc), dtype=torch.float32)
        kernels.norm(x_tc, weight_c.float(), eps, out_tc, factor_t)
        ctx.save_for_backward(x_tc, weight_c, factor_t)
        return out_tc

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> Gradients:
        x_tc, weight_c, factor_t = ctx.saved_tensors
        out_tc = torch.empty_like(x_tc)
        weight_gradient = kernels.norm_backward(x_tc, weight_c.float(), factor_t, grads[0].contiguous(), None, out_tc)
        return out_tc, weight_gradient.to(weight_c.dtype), None, None


class _Turn(torch.autograd.Function):
    """Rotary embedding of heads."""

    @staticmethod
    def forward(ctx: _Context, x_thc: Tensor, cos_tr: Tensor, sin_tr: Tensor) -> Tensor:
        out_thc = torch.empty_like(x_thc, memory_format=torch.contiguous_format)
        kernels.turn(x_thc, cos_tr, sin_tr, out_thc)
        ctx.save_for_backward(cos_tr, sin_tr)
        return out_thc

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> Gradients:
        cos_tr, sin_tr = ctx.saved_tensors
        grad_thc = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        out_thc = torch.empty_like(grad_thc, memory_format=torch.contiguous_format)
        kernels.turn(grad_thc, cos_tr, sin_tr, out_thc, backward=True)
        return out_thc, None, None


class _Projections(torch.autograd.Function):
    """Queries, keys and values of a layer's input: norm, one product, rotation."""

    @staticmethod
    def forward(
        ctx: _Context,
        x_td: Tensor,
        norm_d: Tensor,
        eps: float,
        dtype: torch.dtype,
        head_dim: int,
        rotation: tuple[Tensor, Tensor] | None,
        *weights_biases: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, biases = weights_biases[:3], weights_biases[3:]
        x_td = x_td.contiguous()
        factor_t = x_td.new_empty(len(x_td), dtype=torch.float32)
        with torch.autocast(x_td.device.type, enabled=False):
            normed_td = normed(x_td, norm_d, eps, dtype, factor_t)
            out_tn = torch.mm(normed_td, stacked("weights", weights, dtype).T)
        if biases[0] is not None:
            out_tn += torch.cat(biases).to(dtype)
        q_thc, k_tgc, v_tgc = split_heads(out_tn, weights, head_dim)
        if rotation is not None:
            for x in (q_thc, k_tgc):
                kernels.turn(x, *rotation, x)
        ctx.save_for_backward(x_td, norm_d, factor_t, *weights, *(rotation or ()))
        ctx.eps, ctx.dtype, ctx.head_dim, ctx.turned = eps, dtype, head_dim, rotation is not None
        ctx.biased = biases[0] is not None
        return q_thc, k_tgc, v_tgc

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> Gradients:
        x_td, norm_d, factor_t, *rest = ctx.saved_tensors
        weights = rest[:3]
        grad_tn = scratch("wide", x_td, ctx.dtype, len(x_td), sum(len(weight) for weight in weights))
        for number, (into, grad) in enumerate(zip(split_heads(grad_tn, weights, ctx.head_dim), grads, strict=True)):
            if ctx.turned and number < 2:
                cos_tr, sin_tr = rest[3:]
                kernels.turn(grad if grad.stride(-1) == 1 else grad.contiguous(), cos_tr, sin_tr, into, backward=True)
            else:
                into.copy_(grad)
        normed_td = normed(x_td, norm_d, ctx.eps, ctx.dtype, factor_t)
        by_weight = weight_gradients(grad_tn, normed_td, weights)
        by_bias: list[Tensor | None] = [None] * 3
        if ctx.biased:
            sums = grad_tn.sum(0, dtype=torch.float32).split([len(weight) for weight in weights])
            by_bias = [part.to(weight.dtype) for part, weight in zip(sums, weights, strict=True)]
        by_normed = torch.mm(grad_tn, stacked("weights", weights, ctx.dtype), out=normed_td)
        by_x = torch.empty_like(x_td)
        by_norm = kernels.norm_backward(x_td, norm_d.float(), factor_t, by_normed, None, by_x)
        return by_x, by_norm.to(norm_d.dtype), None, None, None, None, *by_weight, *by_bias


def split_heads(x_tn: Tensor, weights: Sequence[Tensor], head_dim: int) -> tuple[Tensor, ...]:
    """The columns of each weight as heads, [t, ·, c]; views."""
    parts = x_tn.split([len(weight) for weight in weights], dim=1)
    return tuple(part.unflatten(1, (-1, head_dim)) for part in parts)


class _AddProduct(torch.autograd.Function):
    """x + a · Wᵀ + b."""

    @staticmethod
    def forward(
        ctx: _Context, x_td: Tensor, a_tn: Tensor, weight_dn: Tensor, bias_d: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        a_tn = a_tn.to(dtype).contiguous()
        with torch.autocast(x_td.device.type, enabled=False):
            product_td = scratch("product", x_td, dtype, *x_td.shape)
            torch.mm(a_tn, stacked("weights", [weight_dn], dtype).T, out=product_td)
        ctx.save_for_backward(a_tn, weight_dn)
        ctx.dtype, ctx.biased = dtype, bias_d is not None
        return x_td + (product_td if bias_d is None else product_td.add_(bias_d))

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> Gradients:
        a_tn, weight_dn = ctx.saved_tensors
        grad_td = cast("product", grads[0], ctx.dtype)
        (by_weight,) = weight_gradients(grad_td, a_tn, [weight_dn])
        by_a = torch.mm(grad_td, stacked("weights", [weight_dn], ctx.dtype))
        by_bias = grads[0].sum(0).to(weight_dn.dtype) if ctx.biased else None
        return grads[0], by_a, by_weight, by_bias, None


class _AddMlp(torch.autograd.Function):
    """x + (silu(gate) · up) · Wdᵀ, where gate and up are products of norm(x)."""

    @staticmethod
    def forward(
        ctx: _Context,
        x_td: Tensor,
        norm_d: Tensor,
        eps: float,
        dtype: torch.dtype,
        gate_nd: Tensor,
        up_nd: Tensor,
        down_dn: Tensor,
    ) -> Tensor:
        x_td = x_td.contiguous()
        factor_t = x_td.new_empty(len(x_td), dtype=torch.float32)
        with torch.autocast(x_td.device.type, enabled=False):
            normed_td = normed(x_td, norm_d, eps, dtype, factor_t)
            both_t2n = torch.mm(normed_td, stacked("weights", [gate_nd, up_nd], dtype).T)
            inner_tn = scratch("inner", x_td, dtype, len(x_td), len(gate_nd))
            kernels.gate(both_t2n, inner_tn)
            product_td = scratch("product", x_td, dtype, *x_td.shape)
            torch.mm(inner_tn, stacked("weights", [down_dn], dtype).T, out=product_td)
        ctx.save_for_backward(x_td, norm_d, factor_t, both_t2n, gate_nd, up_nd, down_dn)
        ctx.eps, ctx.dtype = eps, dtype
        return x_td + product_td

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> Gradients:
        x_td, norm_d, factor_t, both_t2n, gate_nd, up_nd, down_dn = ctx.saved_tensors
        grad_td = cast("product", grads[0], ctx.dtype)
        inner_tn = scratch("inner", x_td, ctx.dtype, len(x_td), len(gate_nd))
        torch.mm(grad_td, stacked("weights", [down_dn], ctx.dtype), out=inner_tn)
        grad_t2n = scratch("wide", x_td, ctx.dtype, *both_t2n.shape)
        kernels.gate_backward(both_t2n, inner_tn, grad_t2n)
        (by_down,) = weight_gradients(grad_td, inner_tn, [down_dn])
        normed_td = normed(x_td, norm_d, ctx.eps, ctx.dtype, factor_t)
        by_gate, by_up = weight_gradients(grad_t2n, normed_td, [gate_nd, up_nd])
        by_normed = torch.mm(grad_t2n, stacked("weights", [gate_nd, up_nd], ctx.dtype), out=normed_td)
        by_x = torch.empty_like(x_td)
        residual_td = grads[0].contiguous()
        by_norm = kernels.norm_backward(x_td, norm_d.float(), factor_t, by_normed, residual_td, by_x)
        return by_x, by_norm.to(norm_d.dtype), None, None, by_gate, by_up, by_down
