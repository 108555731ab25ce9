"""What layers add to the hidden state besides plain products: sums behind a norm, GELU, and embeddings of their own.

In a model whose layers have their own embeddings of a token (`ModelSpec.layer_input_dim`), a layer's is
    (norm(project(e) / √c) + √p · row of the token's id) / √2
with e the embedding that the first layer takes, and the layer adds norm(project(gelu(gate(x)) · own)) to its result x.

Legend: t tokens, r requested rows, c hidden, f width of an MLP, p width of a layer's own embedding, n inputs of a
product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.spec import ModelSpec
from distill.engine.weights import InputWeights, LayerInputWeights, Linear


def added(ops: Ops, x_rn: Tensor, w: Linear, onto_rc: Tensor, post_norm_c: Tensor | None, eps: float) -> Tensor:
    """A linear layer's result, normalised where there is a norm, added to `onto`, in place."""
    if post_norm_c is None:
        return ops.linear(x_rn, w.weight, w.bias, onto_rc)
    return onto_rc.add_(ops.rms_norm(ops.linear(x_rn, w.weight, w.bias), post_norm_c, eps))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (arXiv:1606.08415, section 2), in float32. torch's function for it gives a number other bits at the
    end of a tensor than elsewhere, on a CPU."""
    x_float = x.float()
    inner = (x_float + 0.044715 * (x_float * x_float * x_float)) * math.sqrt(2 / math.pi)
    return (0.5 * x_float * (1 + torch.tanh(inner))).to(x.dtype)


def scaled(x: Tensor, factor: float, stored: torch.dtype) -> Tensor:
    """x times a factor, rounded to the dtype of the weights, as models with scaled embeddings are trained."""
    return x * torch.tensor(factor, dtype=stored).item()


def layer_inputs(spec: ModelSpec, ops: Ops, w: InputWeights, ids_t: Tensor, x_tc: Tensor) -> Tensor:
    """The layers' own embeddings of the tokens, [t, layers, p]. x: what the first layer takes."""
    p = spec.layer_input_dim
    projected_tn = ops.linear(x_tc, w.project.weight) * spec.hidden_size**-0.5
    of_context_tlp = ops.rms_norm(projected_tn.view(-1, p), w.norm_p, spec.norm_eps).view(len(x_tc), -1, p)
    of_id_tn = w.embed_vp.index_select(0, ids_t).to(x_tc.dtype)
    return (of_context_tlp + scaled(of_id_tn, p**0.5, w.embed_vp.dtype).view_as(of_context_tlp)) * 2**-0.5


def add_input(ops: Ops, w: LayerInputWeights, input_rp: Tensor, x_rc: Tensor, eps: float) -> Tensor:
    """Add to x, in place, what a layer makes of its own embedding of the tokens."""
    hidden_rp = gelu_tanh(ops.linear(x_rc, w.gate.weight)) * input_rp
    return added(ops, hidden_rp, w.project, x_rc, w.norm_c, eps)


def capped(logits_rv: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap); the logits themselves without a cap."""
    return logits_rv if cap is None else torch.tanh(logits_rv / cap) * cap
