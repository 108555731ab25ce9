"""Causal attention of many short rows as batched products, for a CPU.

torch's kernel for a CPU works one head of one row at a time, in tiles made for long rows. Rows of a few hundred tokens
leave it far below the rate of products: its backward pass takes most of a layer's time besides the products. Here the
query heads that share a key head are one matrix, the scores of a block of queries exist at a time, and the softmax is
one pass of the compiled kernels. The backward pass computes the probabilities again. Memory is shared by all layers.

A block of queries is multiplied by the keys up to its last query: the scores that nobody sees are those within its own
block. Gradients of keys and values are sums over blocks, in float32.

Rows longer than `LONGEST` tokens, where both take about the same time, are left to torch's kernel.

Shapes: b rows of w tokens, g key heads, q query heads to each, c channels; m = b · g matrices, n = w · q queries, those
of a token below each other.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from distill.engine.kernels import cpu_training as kernels
from distill.train.learn.memory import scratch

LONGEST = 2048
QUERIES = 160  # tokens of a block, about: of fewer, products are slower than what is saved
SCORES = 1 << 22  # at a time, about: 8 MB in bfloat16, which stay in a cache


def takes(q_bwhc: Tensor, dropout: float) -> bool:
    """Whether a group is computed here: short rows in bfloat16 on a CPU."""
    here = q_bwhc.device.type == "cpu" and q_bwhc.dtype == torch.bfloat16 and not kernels.why_missing()
    return here and q_bwhc.shape[1] <= LONGEST and not dropout


def attend(q_bwhc: Tensor, k_bwgc: Tensor, v_bwgc: Tensor, scale: float) -> Tensor:
    """Causal attention inside each row. Returns [b, w, h, c]."""
    apply: Callable[..., Tensor] = _Attention.apply
    _, width, query_heads, _ = q_bwhc.shape
    together = max(1, SCORES // (query_heads * width * min(width, QUERIES)))
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
        groups = k_bwgc.shape[2]
        q_mnc, k_mwc, v_mwc = (matrices(x, groups) for x in (q_bwhc, k_bwgc, v_bwgc))
        out_mnc = scratch("attention", q_mnc, q_mnc.dtype, *q_mnc.shape)
        for start, stop, queries in blocks(q_mnc, k_mwc):
            p_mnw = probabilities(q_mnc[:, queries], k_mwc[:, :stop], scale, start)
            out_mnc[:, queries] = torch.bmm(p_mnw, v_mwc[:, :stop])
        ctx.save_for_backward(q_mnc, k_mwc, v_mwc)
        ctx.scale, ctx.rows = scale, len(q_bwhc)
        return heads(out_mnc, ctx.rows, q_bwhc.shape[1]).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_mnc, k_mwc, v_mwc = ctx.saved_tensors
        rows, width, each = ctx.rows, k_mwc.shape[1], q_mnc.shape[1] // k_mwc.shape[1]
        grad_mnc = matrices(grads[0], len(k_mwc) // rows)
        k_gradient, v_gradient = (torch.zeros_like(x, dtype=torch.float32) for x in (k_mwc, v_mwc))
        for start, stop, queries in blocks(q_mnc, k_mwc):
            q_mrc, grad_mrc, k_msc, v_msc = q_mnc[:, queries], grad_mnc[:, queries], k_mwc[:, :stop], v_mwc[:, :stop]
            p_mrs = probabilities(q_mrc, k_msc, ctx.scale, start)
            v_gradient[:, :stop] += torch.bmm(p_mrs.transpose(1, 2), grad_mrc)
            s_gradient = scratch("score gradients", q_mnc, q_mnc.dtype, *p_mrs.shape)
            torch.bmm(grad_mrc, v_msc.transpose(1, 2), out=s_gradient)
            kernels.softmax_backward(p_mrs, s_gradient, ctx.scale, each, start)
            k_gradient[:, :stop] += torch.bmm(s_gradient.transpose(1, 2), q_mrc)
            grad_mnc[:, queries] = torch.bmm(s_gradient, k_msc)  # in place of what is used up
        k_gradient, v_gradient = k_gradient.to(k_mwc.dtype), v_gradient.to(v_mwc.dtype)
        return *(heads(x, rows, width) for x in (grad_mnc, k_gradient, v_gradient)), None


def blocks(q_mnc: Tensor, k_mwc: Tensor) -> Iterator[tuple[int, int, slice]]:
    """The first token of each block, the one after its last, and its queries."""
    width = k_mwc.shape[1]
    each, count = q_mnc.shape[1] // width, -(-width // QUERIES)
    for number in range(count):
        start, stop = width * number // count, width * (number + 1) // count
        yield start, stop, slice(start * each, stop * each)


def probabilities(q_mrc: Tensor, k_msc: Tensor, scale: float, start: int) -> Tensor:
    """The attention's probabilities [m, r, s] of a block of queries that begins at token `start` and ends with the
    last key, in scratch."""
    p_mrs = scratch("scores", q_mrc, q_mrc.dtype, *q_mrc.shape[:2], k_msc.shape[1])
    torch.bmm(q_mrc, k_msc.transpose(1, 2), out=p_mrs)
    kernels.softmax(p_mrs, scale, q_mrc.shape[1] // (k_msc.shape[1] - start), start)
    return p_mrs


def matrices(x_bwhc: Tensor, groups: int) -> Tensor:
    """The heads of a key head, [b · g, w · (h / g), c]; a copy."""
    rows, channels = len(x_bwhc), x_bwhc.shape[3]
    x_bgwqc = x_bwhc.unflatten(2, (groups, -1)).transpose(1, 2)
    out_mnc: Tensor = x_bgwqc.clone(memory_format=torch.contiguous_format).view(rows * groups, -1, channels)
    return out_mnc


def heads(x_mnc: Tensor, rows: int, width: int) -> Tensor:
    """The inverse of `matrices`, [b, w, h, c]; a view."""
    x_bgwqc = x_mnc.view(rows, len(x_mnc) // rows, width, -1, x_mnc.shape[2])
    return x_bgwqc.transpose(1, 2).flatten(2, 3)
