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

from distill.model_families import in_engine
from distill.objectives import BaseObjective
from distill.train.learn import forward
from distill.train.learn.attention import Rows
from distill.train.learn.loss import linear_loss, shaping_of
from distill.train.learn.tied import HeadGradient, embed, tied_embedding
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
            tied, given = self._inputs(batch.input_ids_t)
            if self.padded:
                hidden_sd = forward.padded(self.model, batch, given).index_select(0, batch.positions_s)
            else:
                rows = Rows(batch.lengths, device, batch.prefixes, batch.positions_s)
                hidden_td = forward.concatenated(self.model, batch, rows, given)
                hidden_sd = hidden_td if rows.narrowed else hidden_td.index_select(0, batch.positions_s)
            head = self.model.get_output_embeddings()
            criterion = self.objective.criterion(batch.targets_s, batch.teacher, batch.sampled)
            shaping = shaping_of(self.model.config)
            return linear_loss(hidden_sd, head.weight, head.bias, criterion, tied, shaping).clone()

    def _inputs(self, ids_t: Tensor) -> tuple[HeadGradient | None, dict[str, Tensor]]:
        """What the decoder is called with, and where the gradient of a head that is the embedding as well waits."""
        embedding = tied_embedding(self.model) if in_engine(self.model.config.model_type) else None
        if embedding is None or not torch.is_grad_enabled():
            return None, {"input_ids": ids_t[None]}
        tied = HeadGradient()
        return tied, {"inputs_embeds": embed(embedding, ids_t, tied)[None]}
