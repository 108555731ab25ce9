"""A model and an objective as one module, which is what DDP and FSDP wrap.

One forward pass returns the sums of the objective's loss parts over the batch's supervised tokens: the first is
minimised, the others are logged. They are *sums*: the caller divides by the supervised tokens of the whole step, so
that every token has the same weight however a step is split into batches and ranks (a mean of means does not do that).

The head is applied to supervised positions only, in blocks (`learn.loss`).

Shapes: t tokens, s supervised ones, d hidden.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.objectives import BaseObjective
from distill.train.learn import forward
from distill.train.learn.loss import linear_loss
from distill.train.rows.batches import Batch


class Learner(nn.Module):
    """A decoder whose head is one linear layer, with an objective.

    autocast: the dtype of the forward pass where the weights are float32; None where the weights have that dtype
    themselves. padded: whether rows are padded, because the model would mix concatenated ones (`student.isolation`).
    """

    def __init__(
        self, model: PreTrainedModel, objective: BaseObjective, autocast: torch.dtype | None, padded: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast
        self.padded = padded

    def forward(self, batch: Batch) -> Tensor:
        """The sums of the objective's loss parts, float32 [parts]."""
        device = batch.input_ids_t.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden_td = forward.hidden(self.model, batch, self.padded)
            hidden_sd = hidden_td.index_select(0, batch.positions_s)
            head = self.model.get_output_embeddings()
            criterion = self.objective.criterion(batch.targets_s, batch.teacher, batch.sampled)
            return linear_loss(hidden_sd, head.weight, head.bias, criterion).clone()
