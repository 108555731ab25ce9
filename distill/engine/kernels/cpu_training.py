"""The compiled element-wise ops of a training step (native/isa/training.h), on tensors of torch.

They have no gradient of their own: `distill.train.learn.fused` is made of them. All tensors are contiguous unless a
docstring says otherwise, and float32 or bfloat16; arithmetic is in float32. A tensor without memory (FakeTensor), by
which training estimates its memory, is left as it is.

Shapes: t rows, c columns, n inner columns, h heads, r pairs of a head, m matrices of n × w.
"""

import torch
from torch import Tensor, nn

from distill.engine.kernels.cpu_library import call, threads, why_missing
from distill.engine.kernels.cpu_structs import TrainGateArgs, TrainNormArgs, TrainRopeArgs, TrainSoftmaxArgs, address

CHUNK = 16  # TRAIN_CHUNK of native/arguments.h

__all__ = [
    "gate",
    "gate_backward",
    "has_memory",
    "norm",
    "norm_backward",
    "softmax",
    "softmax_backward",
    "turn",
    "why_missing",
]


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has numbers that a kernel can read."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"


def _half(x: Tensor) -> int:
    assert x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous(), (x.dtype, x.stride())
    return int(x.dtype == torch.bfloat16)


def norm(x_tc: Tensor, weight_c: Tensor, eps: float, out_tc: Tensor, factor_t: Tensor) -> None:
    """RMSNorm into `out_tc`, and 1/√(mean x² + eps) into `factor_t`. weight_c, factor_t: float32.

    out_tc: bfloat16 where x_tc is.
    """
    _norm(x_tc, weight_c, eps, out_tc, factor_t)


def norm_backward(
    x_tc: Tensor, weight_c: Tensor, factor_t: Tensor, grad_tc: Tensor, residual_tc: Tensor | None, out_tc: Tensor
) -> Tensor:
    """The gradient by x, plus `residual_tc`, into `out_tc`, all of x's dtype; returns that by the weight, float32 [c].

    grad_tc: by the norm's output, in its dtype.
    """
    weight_gradient = torch.empty(-(-len(x_tc) // CHUNK), x_tc.shape[1], dtype=torch.float32, device=x_tc.device)
    _norm(x_tc, weight_c, 0.0, grad_tc, factor_t, residual_tc, out_tc, weight_gradient)
    return weight_gradient.sum(0)


def _norm(
    x_tc: Tensor,
    weight_c: Tensor,
    eps: float,
    out_tc: Tensor,
    factor_t: Tensor,
    residual_tc: Tensor | None = None,
    x_gradient: Tensor | None = None,
    weight_gradient: Tensor | None = None,
) -> None:
    if not has_memory(x_tc):
        return
    assert weight_c.dtype == factor_t.dtype == torch.float32 and weight_c.is_contiguous()
    assert residual_tc is None or (residual_tc.dtype == x_tc.dtype and residual_tc.is_contiguous())
    call(
        "train_norm",
        TrainNormArgs(
            x=address(x_tc),
            weight=address(weight_c),
            factor=address(factor_t),
            out=address(out_tc),
            residual=address(residual_tc),
            x_gradient=address(x_gradient),
            weight_gradient=address(weight_gradient),
            rows=len(x_tc),
            c=x_tc.shape[1],
            x_half=_half(x_tc),
            out_half=_half(out_tc),
            backward=x_gradient is not None,
            threads=threads(),
            eps=eps,
            unused=0,
        ),
    )


def gate(both_t2n: Tensor, out_tn: Tensor) -> None:
    """silu(gate) · up into `out_tn`. both_t2n: gate and up, [t, 2n]."""
    _gate(both_t2n, out_tn, None)


def gate_backward(both_t2n: Tensor, grad_tn: Tensor, out_t2n: Tensor) -> None:
    """The gradients of gate and up into `out_t2n`; the gradient of the product is replaced by the product."""
    _gate(both_t2n, grad_tn, out_t2n)


def _gate(both_t2n: Tensor, out_tn: Tensor, gradient_t2n: Tensor | None) -> None:
    if not has_memory(both_t2n):
        return
    assert both_t2n.dtype == out_tn.dtype and out_tn.is_contiguous()
    call(
        "train_gate",
        TrainGateArgs(
            both=address(both_t2n),
            out=address(out_tn),
            gradient=address(gradient_t2n),
            rows=len(out_tn),
            n=out_tn.shape[1],
            half=_half(both_t2n),
            backward=gradient_t2n is not None,
            threads=threads(),
            unused=0,
        ),
    )


def turn(x_thc: Tensor, cos_tr: Tensor, sin_tr: Tensor, out_thc: Tensor, backward: bool = False) -> None:
    """Rotary embedding of heads into `out_thc`, which may be `x_thc`; backward: the other way.

    Pair i of a head is (x[i], x[i + r]).

    x_thc, out_thc: a head's numbers are contiguous. cos_tr, sin_tr: float32.
    """
    if not has_memory(x_thc):
        return
    assert x_thc.stride(2) == out_thc.stride(2) == 1 and x_thc.dtype == out_thc.dtype
    assert cos_tr.dtype == sin_tr.dtype == torch.float32 and cos_tr.is_contiguous() and sin_tr.is_contiguous()
    call(
        "train_rope",
        TrainRopeArgs(
            x=address(x_thc),
            x_row=x_thc.stride(0),
            x_head=x_thc.stride(1),
            cos=address(cos_tr),
            sin=address(sin_tr),
            out=address(out_thc),
            out_row=out_thc.stride(0),
            out_head=out_thc.stride(1),
            rows=len(x_thc),
            heads=x_thc.shape[1],
            r=cos_tr.shape[1],
            half=int(x_thc.dtype == torch.bfloat16),
            backward=backward,
            threads=threads(),
        ),
    )


def softmax(scores_mnw: Tensor, scale: float, heads: int, first: int) -> None:
    """Causal softmax of scale · scores in place: query i sees keys 0 … i; other probabilities become 0.

    A matrix has the `heads` rows of a query below each other, and begins with query `first`.
    """
    _softmax(scores_mnw, None, scale, heads, first)


def softmax_backward(p_mnw: Tensor, grad_mnw: Tensor, scale: float, heads: int, first: int) -> None:
    """Replace the gradient of the probabilities by that of the scores."""
    _softmax(p_mnw, grad_mnw, scale, heads, first)


def _softmax(scores_mnw: Tensor, grad_mnw: Tensor | None, scale: float, heads: int, first: int) -> None:
    if not has_memory(scores_mnw):
        return
    _, rows, width = scores_mnw.shape
    queries = rows // heads
    assert queries * heads == rows and 0 <= first <= width - queries
    assert grad_mnw is None or (grad_mnw.shape, grad_mnw.dtype) == (scores_mnw.shape, scores_mnw.dtype)
    assert grad_mnw is None or grad_mnw.is_contiguous()
    call(
        "train_softmax",
        TrainSoftmaxArgs(
            scores=address(scores_mnw),
            gradient=address(grad_mnw),
            rows=scores_mnw.numel() // width,
            width=width,
            heads=heads,
            queries=queries,
            first=first,
            half=_half(scores_mnw),
            backward=grad_mnw is not None,
            threads=threads(),
            scale=scale,
        ),
    )
