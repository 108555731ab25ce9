"""The ops of compressed attention and hyper-connections in plain torch: a part of the definition (reference.py).

A row's bits must not depend on the rows beside it, so that text does not depend on company. Additions, products and
quotients are exact whatever is computed beside them; sums and exponentials of torch are not, since their order and
their instructions follow from the shape and the place in memory. So what sums or exponentiates is computed row by row,
on tensors of one shape, until a kernel does it.

Legend: n windows, w tokens of a window, d width of keys, t tokens, h heads, l rows that a token attends to, m weights
of hyper-connections, s streams.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_windows(x_nwd: Tensor, gate_nwd: Tensor) -> Tensor:
    """Σ over a window of softmax(gate) · x, element by element of d → [n, d] in x's dtype. float32 within."""
    out_nd = x_nwd.new_empty(len(x_nwd), x_nwd.shape[2])
    for window, (x_wd, gate_wd) in enumerate(zip(x_nwd, gate_nwd, strict=True)):
        out_nd[window] = (x_wd.float() * gate_wd.float().clone().softmax(0)).sum(0)
    return out_nd


def attend_rows(q_thd: Tensor, rows_nd: Tensor, row_tl: Tensor, sink_h: Tensor, scale: float) -> Tensor:
    """Each token attends to the rows of `rows_nd` that it names, in their order; -1 names none → [t, h, d].

    A row is key and value. The softmax has one more term per head, exp(sink), which has no value: a token may attend to
    little or nothing (StreamingLLM, arXiv:2309.17453, with a learned logit).
    """
    out_thd = torch.empty_like(q_thd)
    for token, (q_hd, row_l) in enumerate(zip(q_thd, row_tl, strict=True)):
        kv_ld = rows_nd.index_select(0, row_l[row_l >= 0]).to(q_thd.dtype)
        score_hl = ((q_hd * scale) @ kv_ld.T).float()
        share_hl = torch.cat((score_hl, sink_h.float()[:, None]), dim=1).softmax(1)[:, :-1]
        out_thd[token] = share_hl.to(q_thd.dtype) @ kv_ld
    return out_thd


def stream_weights(
    mix_tm: Tensor, scale_m: Tensor, base_m: Tensor, streams: int, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From m = s + s + s·s numbers of each token, float32, scaled and shifted:
    into a block, sigmoid + eps [t, s]; out of it, 2 · sigmoid [t, s]; from stream to stream, softmax over the last
    dimension + eps, then divided by its sums (+ eps) over the first and the last dimension by turns [t, s, s].
    """
    pre_ts, post_ts, logit_tp = (mix_tm * scale_m + base_m).split((streams, streams, streams * streams), dim=1)
    pre_ts = 1 / (1 + _exp(-pre_ts)) + eps
    post_ts = 2 / (1 + _exp(-post_ts))
    logit_tss = logit_tp.unflatten(1, (streams, streams))
    comb_tss = _exp((logit_tss - logit_tss.amax(-1, keepdim=True)).flatten(1)).view_as(logit_tss)
    comb_tss = comb_tss / _sum(comb_tss, 2) + eps
    comb_tss = comb_tss / (_sum(comb_tss, 1) + eps)
    for _ in range(iterations - 1):
        comb_tss = comb_tss / (_sum(comb_tss, 2) + eps)
        comb_tss = comb_tss / (_sum(comb_tss, 1) + eps)
    return pre_ts, post_ts, comb_tss


def _exp(x_tm: Tensor) -> Tensor:
    """exp, row by row on a CPU (see the module's docstring)."""
    if x_tm.device.type != "cpu" or not len(x_tm):
        return x_tm.exp()
    return torch.stack([x_m.clone().exp() for x_m in x_tm])


def _sum(x_tss: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, kept, in the order of its indices."""
    first, *rest = x_tss.unbind(dim)
    total = first.clone()
    for x_ts in rest:
        total += x_ts
    return total.unsqueeze(dim)
