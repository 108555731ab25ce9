"""Feed-forward: the gated MLP, and the mixture of experts with its router.

Legend: t tokens, k experts per token, c hidden, x experts.
"""

from __future__ import annotations

from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.offload import ExpertStream
from distill.engine.residual import added, gelu_tanh
from distill.engine.spec import Activation, Moe
from distill.engine.weights import MlpWeights, MoeWeights


def mlp(
    ops: Ops,
    w: MlpWeights,
    x_tc: Tensor,
    onto_tc: Tensor,
    activation: Activation = "silu",
    post_norm_c: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """down(activation(gate(x)) · up(x)), added to `onto`, in place. post_norm_c, eps: the norm of what is added, where
    there is one."""
    if activation == "silu":
        hidden = ops.swiglu_linear(x_tc, w.gate.weight, w.up.weight, w.gate.bias, w.up.bias, w.down.weight)
    else:
        gate_tf, up_tf = ops.linears(x_tc, (w.gate.weight, w.up.weight), (w.gate.bias, w.up.bias))
        hidden = gelu_tanh(gate_tf) * up_tf
    return added(ops, hidden, w.down, onto_tc, post_norm_c, eps)


def moe(
    dims: Moe,
    ops: Ops,
    w: MoeWeights,
    x_tc: Tensor,
    stream: ExpertStream | None,
    onto_tc: Tensor,
    ids_t: Tensor | None = None,
) -> Tensor:
    """Σ over the chosen experts of weight · expert(x), plus the shared experts, added to `onto`, in place; the router
    works in float32.

    stream: brings the experts that are not in memory. ids_t: the tokens, by which a layer with a table of experts (hash
    routing) chooses them.
    """
    given_tk = None
    if w.by_token_vk is not None:
        assert ids_t is not None
        given_tk = w.by_token_vk.index_select(0, ids_t)
    logits_tx = ops.linear(x_tc.float(), w.router)
    experts_tk, weights_tk = ops.route(
        logits_tx,
        w.correction_bias,
        dims.scoring,
        dims.group_by,
        dims.groups,
        dims.groups_kept,
        dims.per_token,
        dims.normalise,
        dims.routed_scale,
        *(() if given_tk is None else (given_tk,)),
    )
    if stream is not None:
        stream.bring(w.experts, experts_tk)
    shared = None if w.shared is None else (w.shared.gate.weight, w.shared.up.weight, w.shared.down.weight)
    return ops.experts(x_tc, experts_tk, weights_tk, w.experts, shared, onto_tc, dims.limit)
