"""The embedding of a model whose head is the same matrix, with one dense gradient in place of two.

The head's gradient is there after the loss, that of the embedding at the end of the backward pass, as a second matrix
of the same size of which only the rows of the batch's tokens are not zero. The two are a quarter of the memory of a
model of 135 M parameters that is not its weights. Here the head hands its gradient to the embedding, which adds its
rows to it: `HeadGradient` is where it waits, in the dtype of the product.

The sum is that of autograd, bit for bit: the rows of a token are added to each other in the order of the batch first.

Rejected: a sparse gradient of the embedding, which autograd would add to the head's: it adds repeated tokens one by
one, and DDP and AdamW do not take one where the head is not tied.

Shapes: t tokens, u different ones, v vocabulary, d hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel


class HeadGradient:
    """The gradient of a head, from its backward pass to that of the embedding of the same forward pass."""

    def __init__(self) -> None:
        self._total_vd: Tensor | None = None
        self._scale = torch.ones(())

    def put(self, total_vd: Tensor, scale: Tensor) -> None:
        """Leave `scale · total_vd`."""
        self._total_vd, self._scale = total_vd, scale

    def take(self, dtype: torch.dtype) -> Tensor:
        """The gradient in `dtype`; the caller owns it."""
        assert self._total_vd is not None, "the head's backward pass comes before the embedding's, and each comes once"
        total_vd, self._total_vd = self._total_vd.to(dtype), None
        return total_vd.mul_(self._scale.to(dtype))


def tied_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding of a model if it is trained, is the head as well, and does nothing but look up rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.weight is not embedding.weight:
        return None
    plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return embedding if plain and embedding.weight.requires_grad else None


def embed(embedding: nn.Embedding, ids_t: Tensor, head: HeadGradient) -> Tensor:
    """The rows of these tokens, [t, d]. head: where the gradient of the head waits at the backward pass."""
    apply: Callable[..., Tensor] = _Embed.apply
    return apply(embedding.weight, ids_t, embedding.padding_idx, head)


class _Context(FunctionCtx):
    ids_t: Tensor
    padding: int | None
    head: HeadGradient
    dtype: torch.dtype


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, weight_vd: Tensor, ids_t: Tensor, padding: int | None, head: HeadGradient) -> Tensor:
        ctx.ids_t, ctx.padding, ctx.head, ctx.dtype = ids_t, padding, head, weight_vd.dtype
        return weight_vd.index_select(0, ids_t)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids_t, grad_td = ctx.ids_t, grads[0]
        if ctx.padding is not None:  # as nn.Embedding, which never trains that row as an input
            own_t = ids_t != ctx.padding
            ids_t, grad_td = ids_t[own_t], grad_td[own_t]
        ids_u, place_t = ids_t.unique(return_inverse=True)
        # The op of nn.Embedding, for the tokens that are there: the order of its sums, on any device.
        rows_ud = torch.ops.aten.embedding_dense_backward(grad_td, place_t, len(ids_u), -1, False)
        return ctx.head.take(ctx.dtype).index_add_(0, ids_u, rows_ud), None, None, None
