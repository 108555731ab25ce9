"""The objective as a module: a batch in, the summed cross-entropy of its supervised tokens out.

Two things are decided here. The head is applied to supervised positions only: a prompt's logits, 152,000 wide, would be
made to be thrown away. And the loss is a *sum*: the caller divides by the supervised tokens of the whole step, so that
every token weighs the same however the step was cut into batches (a mean of means does not do that).

It is a module around the model, and it is what Accelerate wraps: whatever hooks a parallel wrapper needs on `forward`
see one forward per batch.

Shapes: b rows, t tokens, d hidden, s supervised tokens, v vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill.train.data import Batch


class SupervisedLoss(nn.Module):
    """Σ −log p(target) in nats over a batch's supervised tokens; the weights stay as they are, float32, and the forward
    pass runs in `dtype`. For decoders whose head is one plain linear layer (the Qwen2 and Llama families)."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        ids_bt = batch.input_ids_bt
        with torch.autocast(ids_bt.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden_btd = self.model.get_decoder()(input_ids=ids_bt, use_cache=False).last_hidden_state
            hidden_sd = hidden_btd.flatten(0, 1).index_select(0, batch.positions_s)
            logits_sv = self.model.get_output_embeddings()(hidden_sd)
        return F.cross_entropy(logits_sv.float(), batch.targets_s, reduction="sum")
