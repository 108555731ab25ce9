"""Feed-forward: the gated MLP, and the mixture of experts with its router.

Tokens are sorted by expert, so that each expert multiplies one contiguous slice once; results go back by the inverse
permutation and the k results of a token are summed in the order its router listed them. A scatter-add was rejected: it
sums in whatever order threads arrive, and the text of a trace must not depend on that. Padding every expert to the same
number of tokens was rejected: real routing is uneven, and the waste grows with it.

Legend: t tokens, k experts per token, s = t·k (token, expert) pairs sorted by expert, c hidden, x experts, f expert
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.spec import Moe
from distill.engine.weights import MlpWeights, MoeWeights


def mlp(ops: Ops, w: MlpWeights, x_tc: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x))."""
    hidden = ops.swiglu(ops.linear(x_tc, w.gate_up.weight, w.gate_up.bias))
    return ops.linear(hidden, w.down.weight, w.down.bias)


def moe(dims: Moe, ops: Ops, w: MoeWeights, x_tc: Tensor) -> Tensor:
    """Σ over the chosen experts of weight · expert(x), plus the shared experts; the router works in float32."""
    logits_tx = ops.linear(x_tc.float(), w.router)
    experts_tk, weights_tk = ops.route_noaux_tc(
        logits_tx,
        w.correction_bias,
        dims.groups,
        dims.groups_kept,
        dims.per_token,
        dims.normalise,
        dims.routed_scale,
    )
    order_s = torch.argsort(experts_tk.flatten(), stable=True)
    counts = torch.bincount(experts_tk.flatten(), minlength=dims.num_experts).tolist()
    x_sc = x_tc.index_select(0, order_s // dims.per_token)
    hidden_sf = ops.swiglu(ops.grouped_linear(x_sc, w.gate_up_x2fc, counts))
    y_sc = ops.grouped_linear(hidden_sf, w.down_xcf, counts)
    back_s = torch.empty_like(order_s)
    back_s[order_s] = torch.arange(order_s.numel(), device=order_s.device)
    y_tkc = y_sc.index_select(0, back_s).unflatten(0, (-1, dims.per_token))
    routed_tc = (y_tkc * weights_tk[..., None]).sum(1).to(x_tc.dtype)
    return routed_tc if w.shared is None else routed_tc + mlp(ops, w.shared, x_tc)
