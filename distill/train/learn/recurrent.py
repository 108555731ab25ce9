"""Layers with a recurrence or a convolution over time, where the rows of a batch are concatenated.

Such a layer does not know where a row begins: it would carry one row's state into the next. Kernels that accept the
boundaries of rows run only on GPUs; the PyTorch code that transformers uses elsewhere silently ignores them. So this
layer alone gets its rows apart: rows of similar length become a small padded batch, in the same groups as in the
attention (`learn.attention`), each with its prefix in front. The result is what each row has alone, on every device.

`install` replaces the class of these modules by a subclass; parameters, names and hooks stay. It is by the names that
transformers gives them, and not trusted: the families of the engine are proved by tests, any other one by
`student.isolation` on the model itself. A layer that is not told of rows runs as transformers has it.

Rejected: padding whole rows through the whole model (`learn.forward.padded`), which repeats norms, products and
attention for every group.

Shapes: t tokens of all rows, d hidden; b rows of a group, w tokens of its longest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.train.learn.attention import Group, Rows

NAMES = ("linear_attn", "mamba", "conv", "mixer")  # of these modules in a decoder layer
Layer = Any  # transformers has no types for the parts of its layers
_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def install(model: PreTrainedModel) -> None:
    """Give the recurrent and convolutional layers of a model the form that keeps rows apart."""
    for name, module in model.named_modules():
        kind = type(module)
        named = name.rpartition(".")[2] in NAMES and kind.__module__ != nn.Conv1d.__module__
        if named and "Attention" not in kind.__name__ and kind not in _subclasses.values():
            module.__class__ = _subclass(kind)


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _subclasses:
        _subclasses[base] = type(f"Rows{base.__name__}", (base,), {"forward": _forward, "plain": base.forward})
    return _subclasses[base]


def _forward(module: Layer, hidden_states: Tensor, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Tensor:
    """The forward pass of such a layer. hidden_states: [1, t, d] where there are rows; the result is so, too."""
    plain: Callable[[Tensor], Tensor] = partial(module.plain, *args, **kwargs)
    if rows is None:
        return plain(hidden_states)
    return torch.cat([_inside(plain, hidden_states[0], group) for group in rows.groups])[None]


def _inside(plain: Callable[[Tensor], Tensor], hidden_td: Tensor, group: Group) -> Tensor:
    """The tokens of a group, [·, d]. Padding comes after the tokens of a row, which do not see it."""
    own = hidden_td[group.start : group.stop] if group.gather is None else hidden_td.index_select(0, group.gather)
    out_td = plain(own.unflatten(0, (group.rows, group.width))).flatten(0, 1)
    return out_td if group.scatter is None else out_td.index_select(0, group.scatter)
