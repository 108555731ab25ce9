"""The hidden states of a batch of rows: by one pass over the concatenated rows, or by padded batches.

Concatenated is the default: no padding, and attention inside each row (`learn.attention`), as recurrences and
convolutions over time are (`learn.recurrent`). Where something else mixes tokens, or attention has another form (sinks,
biases) that is not what `learn.attention` computes, each row is a row of a padded batch, with the model's own attention
and a mask, as transformers has it. `student.isolation` decides.

Padded batches are groups of rows of similar length, the same as those of the attention, so that `packing` means the
same in both forms: it chooses the rows of a step, and a bin of one long and many short rows is not padded to the
longest.

Shapes: t tokens of a batch, d hidden, b rows of a group, w tokens of its longest.
"""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.train.learn.attention import Group, Rows
from distill.train.rows.batches import Batch


def concatenated(model: PreTrainedModel, batch: Batch, rows: Rows, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states of a batch by one pass, [t, d]. rows: the batch's. inputs: its tokens, as the decoder takes
    them."""
    hidden_td: Tensor = model.get_decoder()(
        **inputs, position_ids=batch.position_ids_t[None], rows=rows, use_cache=False
    ).last_hidden_state[0]
    return hidden_td


def padded(model: PreTrainedModel, batch: Batch, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """The hidden states of a batch by padded groups of its rows, [t, d]. inputs: as in `concatenated`; None: the token
    ids."""
    rows = Rows(batch.lengths, batch.input_ids_t.device, batch.prefixes)
    given = inputs or {"input_ids": batch.input_ids_t[None]}
    return torch.cat([_padded(model, group, given) for group in rows.groups])


def _padded(model: PreTrainedModel, group: Group, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states of the tokens of a group, [·, d]."""
    ((name, input_1t),) = inputs.items()
    input_t, device = input_1t[0], input_1t.device
    own = input_t[group.start : group.stop] if group.gather is None else input_t.index_select(0, group.gather)
    place_w = torch.arange(group.width, device=device)
    length_b1 = torch.tensor(group.lengths, device=device)[:, None]
    hidden_bwd = own_attention(model, own.unflatten(0, (group.rows, group.width)), place_w < length_b1, name)
    hidden_td = hidden_bwd.flatten(0, 1)
    return hidden_td if group.scatter is None else hidden_td.index_select(0, group.scatter)


def own_attention(model: PreTrainedModel, input_bw: Tensor, mask_bw: Tensor, name: str = "input_ids") -> Tensor:
    """The hidden states of rows that are padded at the end, by the model's own attention, [b, w, d]. mask_bw: where
    there is a token. name: of the input, token ids or their embeddings."""
    decoder = model.get_decoder()
    positions: dict[str, Tensor] = {}
    if "position_ids" in inspect.signature(decoder.forward).parameters:  # some families count from the mask
        positions["position_ids"] = torch.arange(mask_bw.shape[1], device=mask_bw.device).expand_as(mask_bw)
    hidden_bwd: Tensor = decoder(
        **{name: input_bw}, attention_mask=mask_bw.long(), use_cache=False, **positions
    ).last_hidden_state
    return hidden_bwd
