"""Causal attention of many short rows as batched products, for a CPU.

torch's kernel for a CPU works one head of one row at a time, in tiles made for long rows. Rows of a few hundred tokens
leave it far below the rate of products: its backward pass takes most of a layer's time besides the products. Here all
scores of a group exist at a time, the query heads that share a key head are one matrix, and the softmax is one pass of
the compiled kernels. The backward pass computes the probabilities again. Memory is shared by all layers.

The work grows with the square of a row's padded length, where torch's kernel skips what lies above the diagonal:
rows longer than `LONGEST` tokens, where both take the same time, are left to it.

Shapes: b rows of w tokens, g key heads, q query heads to each, c channels; m = b · g matrices, n = q · w queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from distill.engine.kernels import cpu_training as kernels
from distill.train.learn.memory import scratch

LONGEST = 1024
SCORES = 1 << 24  # at a time, about: 32 MB in bfloat16


def takes(q_bwhc: Tensor, dropout: float) -> bool:
    """Whether a group is computed here: short rows in bfloat16 on a CPU."""
    here = q_bwhc.device.type == "cpu" and q_bwhc.dtype == torch.bfloat16 and not kernels.why_missing()
    return here and q_bwhc.shape[1] <= LONGEST and not dropout


def attend(q_bwhc: Tensor, k_bwgc: Tensor, v_bwgc: Tensor, scale: float) -> Tensor:
    """Causal attention inside each row. Returns [b, w, h, c]."""
    apply: Callable[..., Tensor] = _Attention.apply
    _, width, query_heads, _ = q_bwhc.shape
    together = max(1, SCORES // (query_heads * width**2))
    parts = zip(*(x.split(together) for x in (q_bwhc, k_bwgc, v_bwgc)), strict=True)
    outs = [apply(*part, scale) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    scale: float
    rows: int


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, q_bwhc: Tensor, k_bwgc: Tensor, v_bwgc: Tensor, scale: float) -> Tensor:
        rows, groups = len(q_bwhc), k_bwgc.shape[2]
        q_mnc, k_mwc, v_mwc = (matrices(x, groups) for x in (q_bwhc, k_bwgc, v_bwgc))
        p_mnw = probabilities(q_mnc, k_mwc, scale)
        out_mnc = torch.bmm(p_mnw, v_mwc, out=scratch("attention", q_mnc, q_mnc.dtype, *q_mnc.shape))
        ctx.save_for_backward(q_mnc, k_mwc, v_mwc)
        ctx.scale, ctx.rows = scale, rows
        return heads(out_mnc, rows, q_bwhc.shape[1]).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_mnc, k_mwc, v_mwc = ctx.saved_tensors
        rows, width = ctx.rows, k_mwc.shape[1]
        grad_mnc = matrices(grads[0], len(k_mwc) // rows)
        p_mnw = probabilities(q_mnc, k_mwc, ctx.scale)
        v_gradient = torch.bmm(p_mnw.transpose(1, 2), grad_mnc)
        s_gradient = torch.bmm(
            grad_mnc, v_mwc.transpose(1, 2), out=scratch("score gradients", q_mnc, q_mnc.dtype, *p_mnw.shape)
        )
        kernels.softmax_backward(p_mnw, s_gradient, ctx.scale)
        q_gradient = torch.bmm(s_gradient, k_mwc, out=grad_mnc)
        k_gradient = torch.bmm(s_gradient.transpose(1, 2), q_mnc)
        return *(heads(x, rows, width) for x in (q_gradient, k_gradient, v_gradient)), None


def probabilities(q_mnc: Tensor, k_mwc: Tensor, scale: float) -> Tensor:
    """The attention's probabilities [m, n, w], in scratch."""
    p_mnw = scratch("scores", q_mnc, q_mnc.dtype, *q_mnc.shape[:2], k_mwc.shape[1])
    torch.bmm(q_mnc, k_mwc.transpose(1, 2), out=p_mnw)
    kernels.softmax(p_mnw, scale)
    return p_mnw


def matrices(x_bwhc: Tensor, groups: int) -> Tensor:
    """The heads of a key head below each other, [b · g, (h / g) · w, c]; a copy."""
    rows, _, _, channels = x_bwhc.shape
    x_bgqwc = x_bwhc.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    out_mnc: Tensor = x_bgqwc.clone(memory_format=torch.contiguous_format).view(rows * groups, -1, channels)
    return out_mnc


def heads(x_mnc: Tensor, rows: int, width: int) -> Tensor:
    """The inverse of `matrices`, [b, w, h, c]; a view."""
    x_bgqwc = x_mnc.view(rows, len(x_mnc) // rows, -1, width, x_mnc.shape[2])
    return x_bgqwc.permute(0, 3, 1, 2, 4).flatten(2, 3)
