"""Supervised fine-tuning: the cross-entropy of the traces' own tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.objectives.base import BaseObjective, Criterion, Sampled, TopK

if TYPE_CHECKING:
    from torch import Tensor


class Sft(BaseObjective):
    """Learn the tokens of the traces."""

    kind: Literal["sft"]

    tag: ClassVar[str] = "sft"
    parts: ClassVar[Mapping[str, str]] = {"loss": "loss"}

    def criterion(self, targets_s: "Tensor", teacher: TopK | None, sampled: Sampled | None = None) -> Criterion:
        """Σ −log p(target), in nats; its gradient by the logits is softmax − one-hot."""
        import torch

        def cross_entropy(logits_rv: "Tensor", start: int, stop: int, learning: bool) -> "Tensor":
            targets_r1 = targets_s[start:stop, None]
            logits_rv.sub_(logits_rv.amax(1, keepdim=True))
            target_r1 = logits_rv.gather(1, targets_r1)
            sum_r1 = logits_rv.exp_().sum(1, keepdim=True)
            if learning:
                logits_rv.mul_(sum_r1.reciprocal()).scatter_add_(1, targets_r1, torch.full_like(sum_r1, -1.0))
            return (sum_r1.log() - target_r1).sum()[None]

        return cross_entropy
