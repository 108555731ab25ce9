"""What is learnt of a batch: a model and an objective as one module, which is what DDP and FSDP wrap.

One forward pass of that module gives the sums of the objective's parts over the batch's supervised tokens: the first is
learnt, the others are logged. They are *sums*: the caller divides by the supervised tokens of the whole step, so that
every token weighs the same however a step was cut into batches and ranks (a mean of means does not do that).

The head is applied to supervised positions only, some at a time (`train.loss`).

Shapes: t tokens, s supervised, d hidden.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.train.attention import Rows
from distill.train.batches import Batch
from distill.train.loss import Criterion, cross_entropy, linear_loss


class Objective(Protocol):
    """parts: names of the sums that `criterion` gives, the first of which is learnt: "loss"."""

    parts: tuple[str, ...]

    def criterion(self, batch: Batch) -> Criterion: ...


class Sft:
    """Cross-entropy of the traces' own tokens."""

    parts: tuple[str, ...] = ("loss",)

    def criterion(self, batch: Batch) -> Criterion:
        return cross_entropy(batch.targets_s)


class Learner(nn.Module):
    """A decoder whose head is one linear layer (Qwen2, Qwen3, Llama), with an objective.

    autocast: the dtype of the forward pass where the weights are float32; None where the weights' own dtype is it.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast

    def forward(self, batch: Batch) -> Tensor:
        """The sums of the objective's parts, float32 [parts]."""
        device = batch.input_ids_t.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden_td = self.model.get_decoder()(
                input_ids=batch.input_ids_t[None],
                position_ids=batch.position_ids_t[None],
                rows=Rows(batch.lengths, device),
                use_cache=False,
            ).last_hidden_state[0]
            hidden_sd = hidden_td.index_select(0, batch.positions_s)
            head = self.model.get_output_embeddings()
            return linear_loss(hidden_sd, head.weight, head.bias, self.objective.criterion(batch)).clone()
