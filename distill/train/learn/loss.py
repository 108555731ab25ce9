"""The head and its loss in blocks of rows: the logits of a batch never exist at the same time.

A vocabulary has 150,000 entries, so a row's logits are twenty to fifty times as large as its hidden state: for 32,768
supervised tokens 10 GB in bfloat16, and autograd keeps several copies. But a loss over tokens is a sum, and so are its
gradients: for one block of rows at a time the logits are computed, replaced by their own gradient in place, multiplied
into the gradients of hidden states and head, and discarded. All of that happens in the forward pass; the backward pass
only scales the gradients. The three matrix products are those that any implementation needs; a fourth one, to recompute
the logits in the backward pass, is not needed.

Where a family scales its logits or bounds them, cap · tanh(logits / cap), the criterion sees the result, and its
gradient is multiplied by the slope of the bound and by the scale (`Shaping`).

The loss itself is a function of a block's logits (`distill.objectives.Criterion`).

Rejected: blocks of the vocabulary in addition to blocks of rows. They need the logits twice, and save little memory: a
block of rows is a few dozen megabytes.

Shapes: s supervised tokens, r of them in a block, v vocabulary, d hidden.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from transformers import PretrainedConfig

from distill.objectives import Criterion
from distill.train.learn.tied import HeadGradient

BLOCK = 1 << 26  # logits per block: 128 MB in bfloat16
KEPT = 1 << 24  # bytes of a block up to which its memory is kept between batches
PASS = {"cpu": 1 << 20, "cuda": 1 << 24}  # logits in float32 at a time; on a CPU they stay in its cache
FACTORS, DIVISORS = ("lm_head_multiplier", "logit_scale"), ("logits_scaling",)  # names of a scale in configs


class Shaping(NamedTuple):
    """What a model makes of the product of its head: scale · product, and cap · tanh(· / cap) of that. None: no cap."""

    scale: float = 1.0
    cap: float | None = None


def linear_loss(
    hidden_sd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    criterion: Criterion,
    tied: HeadGradient | None = None,
    shaping: Shaping = Shaping(),  # noqa: B008  immutable
) -> Tensor:
    """The sums of a criterion's loss parts over the rows of `hidden_sd` through a head, float32 [parts].

    tied: where the gradient by `weight_vd` is left for the embedding; None: it is returned to autograd. shaping: of the
    logits.

    Only the first part has a gradient. Matrix products run in the dtype of autocast, or of the hidden states without
    it; sums over the vocabulary run in float32.
    """
    device = hidden_sd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_sd.dtype
    apply: Callable[..., Tensor] = _LinearLoss.apply
    return apply(hidden_sd, weight_vd, bias_v, criterion, dtype, torch.is_grad_enabled(), tied, shaping)


def shaping_of(config: PretrainedConfig) -> Shaping:
    """What a model makes of the product of its head, as its config says. `student.isolation` examines whether it does:
    some family may have another meaning for one of these names, or another name."""
    scale = 1.0
    for name in (*FACTORS, *DIVISORS):
        if value := getattr(config, name, None):
            scale = float(value) if name in FACTORS else 1 / float(value)
    cap = getattr(config, "final_logit_softcapping", None)
    return Shaping(scale, None if cap is None else float(cap))


def shaped(product: Tensor, shaping: Shaping) -> Tensor:
    """The logits of a model, by the product of its head."""
    logits = product * shaping.scale
    return logits if shaping.cap is None else torch.tanh(logits / shaping.cap) * shaping.cap


class _Context(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradients: list[Tensor | None] | None
    tied: HeadGradient | None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_sd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        criterion: Criterion,
        dtype: torch.dtype,
        learning: bool,
        tied: HeadGradient | None,
        shaping: Shaping,
    ) -> Tensor:
        wanted = [learning and needed for needed in ctx.needs_input_grad[:3]]
        vocabulary, device = len(weight_vd), hidden_sd.device.type
        h_sd, w_vd = hidden_sd.to(dtype), weight_vd.to(dtype)
        bias = None if bias_v is None else bias_v.to(dtype)
        ranges = blocks(len(h_sd), vocabulary, BLOCK)
        buffer = scratch(max(stop - start for start, stop in ranges), vocabulary, h_sd)
        grad_h_sd = torch.empty_like(h_sd) if wanted[0] else None
        grad_w_vd = Sum(len(ranges), w_vd) if wanted[1] else None
        grad_b_v = torch.zeros_like(bias_v, dtype=torch.float32) if bias_v is not None and wanted[2] else None
        total: Tensor | None = None
        with torch.autocast(device, enabled=False):
            for start, stop in ranges:
                h_rd = h_sd[start:stop]
                logits_rv = torch.mm(h_rd, w_vd.T, out=buffer[: stop - start])
                if bias is not None:
                    logits_rv += bias
                sums = in_passes(logits_rv, start, criterion, any(wanted), shaping)
                total = sums if total is None else total + sums
                if grad_h_sd is not None:
                    torch.mm(logits_rv, w_vd, out=grad_h_sd[start:stop])
                if grad_w_vd is not None:
                    grad_w_vd.add_product(logits_rv.T, h_rd)
                if grad_b_v is not None:
                    grad_b_v += logits_rv.sum(0, dtype=torch.float32)
        assert total is not None, "a batch without a supervised token"
        by_weight = None if grad_w_vd is None else grad_w_vd.total
        ctx.tied = tied
        ctx.gradients = [
            None if grad_h_sd is None else grad_h_sd.to(hidden_sd.dtype),
            by_weight if by_weight is None or tied is not None else by_weight.to(weight_vd.dtype),
            None if grad_b_v is None or bias_v is None else grad_b_v.to(bias_v.dtype),
        ]
        return total

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0][0]
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the graph is not kept for a second backward pass"
        if ctx.tied is not None and gradients[1] is not None:
            ctx.tied.put(gradients[1], scale)
            gradients[1] = None
        scaled = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in gradients]
        return *scaled, None, None, None, None, None


class Sum:
    """A sum of matrix products, in float32 if there are several: bfloat16 would lose small addends. On a GPU a product
    accumulates into it directly; on a CPU it is computed separately and added."""

    def __init__(self, products: int, like: Tensor) -> None:
        widened = products > 1 and like.dtype != torch.float32
        self.total = torch.empty_like(like, dtype=torch.float32 if widened else like.dtype)
        self._empty = True
        self._widens = widened and like.device.type == "cuda"
        self._part = torch.empty_like(like) if widened and not self._widens else None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b."""
        if self._widens and self._empty:
            torch.mm(a, b, out_dtype=torch.float32, out=self.total)
        elif self._widens:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        elif self._part is not None:
            torch.mm(a, b, out=self._part)
            self.total = self.total.copy_(self._part) if self._empty else self.total.add_(self._part)
        elif self._empty:
            torch.mm(a, b, out=self.total)
        else:
            self.total.addmm_(a, b)
        self._empty = False


_scratch: dict[torch.dtype, Tensor] = {}


def scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for the logits of a block. On a CPU that of small models is kept: getting new pages costs as much as
    filling them with exponentials. A large block is a percent of its step either way, and would be there at the end of
    the backward pass, when memory is at its peak. A GPU's allocator caches memory itself."""
    if like.device.type != "cpu" or rows * columns * like.itemsize > KEPT:
        return like.new_empty(rows, columns)
    kept = _scratch.get(like.dtype)
    if kept is None or kept.numel() < rows * columns:
        kept = _scratch[like.dtype] = like.new_empty(rows * columns)
    return kept[: rows * columns].view(rows, columns)


def in_passes(logits_rv: Tensor, first: int, criterion: Criterion, learning: bool, shaping: Shaping) -> Tensor:
    """The criterion's sums over a block of rows of the head's product, which is replaced by its gradient if
    `learning`."""
    scale, cap = shaping
    total: Tensor | None = None
    in_float = logits_rv.dtype == torch.float32
    for start, stop in blocks(len(logits_rv), logits_rv.shape[1], PASS[logits_rv.device.type]):
        part_rv = logits_rv[start:stop] if in_float else logits_rv[start:stop].float()
        slope_rv = None
        if scale != 1:
            part_rv.mul_(scale)
        if cap is not None:
            part_rv.div_(cap).tanh_()
            slope_rv = 1 - part_rv.square() if learning else None
            part_rv.mul_(cap)
        sums = criterion(part_rv, first + start, first + stop, learning)
        if slope_rv is not None:
            part_rv.mul_(slope_rv)
        if scale != 1 and learning:
            part_rv.mul_(scale)
        total = sums if total is None else total + sums
        if learning and not in_float:
            logits_rv[start:stop] = part_rv
    assert total is not None
    return total


def blocks(rows: int, columns: int, size: int) -> list[tuple[int, int]]:
    """Ranges of rows with about `size` elements each, of equal length up to one row."""
    count = min(rows, max(1, -(-rows * columns // size)))
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]
