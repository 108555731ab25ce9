"""Memory that steps use again, for a CPU, where new pages cost more than filling them."""

import torch
from torch import Tensor

from distill.engine.kernels import cpu_training as kernels

_kept: dict[tuple[str, torch.dtype], Tensor] = {}


def scratch(name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory for an intermediate result that is used up before the next call with this name; its values are undefined.

    like: a tensor of the device. Elsewhere than on a CPU it is new memory.
    """
    if not kernels.has_memory(like):
        return like.new_empty(shape, dtype=dtype)
    size = torch.Size(shape).numel()
    kept = _kept.get((name, dtype))
    if kept is None or kept.numel() < size:
        kept = _kept[name, dtype] = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


def release() -> None:
    """Free the memory that is kept."""
    _kept.clear()
