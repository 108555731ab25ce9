"""The head and its loss, a few rows at a time: the logits of a batch are never all there.

A vocabulary has 150,000 entries, so a row's logits are twenty to fifty times as large as its hidden state: for 32,768
supervised tokens 10 GB in bfloat16, and autograd keeps several copies. But a loss over tokens is a sum, and so are its
gradients: for some rows at a time logits are made, turned into their own gradient in place, multiplied back into the
gradients of hidden states and head, and forgotten. All of that happens in the forward pass, as the gradients are there
already; the backward pass scales them. The three products are those that any implementation needs; a fourth, to make
the logits again in the backward pass, is not.

What the loss is, a function says that is given some rows' logits (`Criterion`): cross-entropy below, and what is learnt
from a teacher's distributions in `train.objectives`.

Rejected: blocks of the vocabulary beside blocks of rows. They need the logits twice, and save memory that nobody
misses: a block of rows is a few dozen megabytes.

Shapes: s supervised tokens, r of them in a block, v vocabulary, d hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 26  # logits made at once: 128 MB in bfloat16
PASS = {"cpu": 1 << 20, "cuda": 1 << 24}  # of them in float32 at once; on a CPU they stay in its cache

# Of the rows start … stop: given their logits [r, v] in float32, which it may overwrite, and whether a gradient is
# wanted, it returns the sums of the loss's parts [parts], of which the first is what is differentiated, and writes
# its gradient over the logits.
Criterion = Callable[[Tensor, int, int, bool], Tensor]


def linear_loss(hidden_sd: Tensor, weight_vd: Tensor, bias_v: Tensor | None, criterion: Criterion) -> Tensor:
    """The sums of a criterion's parts over the rows of `hidden_sd` through a head, float32 [parts].

    Only the first has a gradient; the others are told, not learnt. Products run in the dtype of autocast, or else of
    the hidden states; the sums over the vocabulary in float32.
    """
    device = hidden_sd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_sd.dtype
    parts: Tensor = _LinearLoss.apply(hidden_sd, weight_vd, bias_v, criterion, dtype, torch.is_grad_enabled())
    return parts


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_sd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        criterion: Criterion,
        dtype: torch.dtype,
        learning: bool,
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
                sums = in_passes(logits_rv, start, criterion, any(wanted))
                total = sums if total is None else total + sums
                if grad_h_sd is not None:
                    torch.mm(logits_rv, w_vd, out=grad_h_sd[start:stop])
                if grad_w_vd is not None:
                    grad_w_vd.add_product(logits_rv.T, h_rd)
                if grad_b_v is not None:
                    grad_b_v += logits_rv.sum(0, dtype=torch.float32)
        assert total is not None, "a batch without a supervised token"
        ctx.gradients = [
            None if grad is None or like is None else grad.to(like.dtype)
            for grad, like in (
                (grad_h_sd, hidden_sd),
                (grad_w_vd.total if grad_w_vd else None, weight_vd),
                (grad_b_v, bias_v),
            )
        ]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0][0]
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in gradients), None, None, None)


class Sum:
    """Of some products, in float32 where there are several: many small ones would be lost in bfloat16. A GPU's products
    add to it by themselves; on a CPU each is made apart."""

    def __init__(self, products: int, like: Tensor) -> None:
        widened = products > 1 and like.dtype != torch.float32
        self.total = torch.empty_like(like, dtype=torch.float32 if widened else like.dtype)
        self._empty = True
        self._widens = widened and like.device.type == "cuda"
        self._part = torch.empty_like(like) if widened and not self._widens else None

    def add_product(self, a: Tensor, b: Tensor) -> None:
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
    """Memory for the logits of a block. On a CPU it is kept: to be given new pages costs as much as filling them with
    exponentials. A GPU's allocator keeps them by itself."""
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    kept = _scratch.get(like.dtype)
    if kept is None or kept.numel() < rows * columns:
        kept = _scratch[like.dtype] = like.new_empty(rows * columns)
    return kept[: rows * columns].view(rows, columns)


def in_passes(logits_rv: Tensor, first: int, criterion: Criterion, learning: bool) -> Tensor:
    """The criterion's sums over a block of rows, whose logits become their gradient where `learning`."""
    total: Tensor | None = None
    in_float = logits_rv.dtype == torch.float32
    for start, stop in blocks(len(logits_rv), logits_rv.shape[1], PASS[logits_rv.device.type]):
        some_rv = logits_rv[start:stop] if in_float else logits_rv[start:stop].float()
        sums = criterion(some_rv, first + start, first + stop, learning)
        total = sums if total is None else total + sums
        if learning and not in_float:
            logits_rv[start:stop] = some_rv
    assert total is not None
    return total


def blocks(rows: int, columns: int, size: int) -> list[tuple[int, int]]:
    """Ranges of rows of about `size` elements each, as equal as can be."""
    count = min(rows, max(1, -(-rows * columns // size)))
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def cross_entropy(targets_s: Tensor) -> Criterion:
    """Σ −log p(target), in nats; its gradient is softmax − one-hot."""

    def criterion(logits_rv: Tensor, start: int, stop: int, learning: bool) -> Tensor:
        targets_r1 = targets_s[start:stop, None]
        logits_rv.sub_(logits_rv.amax(1, keepdim=True))
        target_r1 = logits_rv.gather(1, targets_r1)
        sum_r1 = logits_rv.exp_().sum(1, keepdim=True)
        if learning:
            logits_rv.mul_(sum_r1.reciprocal()).scatter_add_(1, targets_r1, torch.full_like(sum_r1, -1.0))
        return (sum_r1.log() - target_r1).sum()[None]

    return criterion
