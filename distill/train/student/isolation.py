"""Whether a student can be trained, and whether its rows may be concatenated: proved at the start, on the model itself.

Families of the engine are proved by the tests. For any other causal language model of transformers, a small
copy is examined before anything is written: the model of the same config with two layers, or as many as have each kind
of layer, a small vocabulary, and random weights in float32. It must hold that

- a token's hidden state does not depend on later tokens, else the next token is not predicted but read;
- the logits are the head's product with the hidden states, times the scale and below the soft cap of the config where
  there are any: training applies the head by itself, in blocks, and anything else behind it would be left out silently;
- in a padded batch, each row is what it is alone.

Otherwise it is refused. Rows are concatenated only if, through the very pass of the training (`learn.forward`),

- a row's hidden states stay the same, bit by bit, when all tokens of the other row change. No shape changes, so every
  sum runs in the same order, and the least difference is a leak. A mixture of experts may differ by rounding here, as
  tokens move between experts: it loses speed, not truth;
- the layers give the attention nothing that it does not compute, such as a soft cap or sinks, however little that is
  with these weights;
- they are what the row has alone with the model's own attention, up to rounding.

Otherwise the rows are padded, and the reason is printed and recorded. What is asked of two rows is asked twice: of rows
of different lengths, each of which is a group of its own, and of similar ones, which share a padded group.

The copy has random weights because a trained or freshly made model may hide a leak behind a gate that is zero; every
parameter is drawn. Rejected: the loaded model, which is spread over devices or not there yet when the rows are encoded
and memory is planned, and would let ranks decide differently.

Sliding windows are made shorter than these rows. What short rows cannot show is read from the config: chunks of
attention that are shorter than `train.max_length`, and rotary embeddings whose frequencies depend on the longest row of
a batch.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from distill import model_families
from distill.errors import UserError
from distill.recipe import Training
from distill.train.learn import attention, forward, recurrent
from distill.train.learn.loss import shaped, shaping_of
from distill.train.rows.batches import Row, collate

# Tokens of two rows that share a batch, at most 16, the least `max_length`: of two groups, and of one that is padded.
LENGTHS = ((13, 9), (13, 11))
VOCABULARY = 64
SPREAD = 3.0  # standard deviation of a product with random weights and inputs of deviation 1: caps and sinks show
ROUNDING = 1e-3  # of the largest hidden state
WINDOW = 5  # tokens of a sliding window, at most: less than a row has
CHUNK = "attention_chunk_size"
# What `learn.attention` computes, and what passes through every layer and changes nothing.
TAKEN = ("rows", "scaling", "dropout", "sliding_window")
PASSED = ("position_ids", "use_cache", "cache_position", "past_key_values", "output_attentions", "output_hidden_states")
SPY = "distill_rows_examined"
BY_BATCH = ("dynamic", "longrope")  # rotary embeddings that depend on the longest row of the batch
Pair = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # two rows, and two that replace them
_examined: dict[tuple[str, int], str | None] = {}


def why_padded(config: PretrainedConfig, settings: Training) -> str | None:
    """Why the rows of a student are padded; None where they are concatenated. Errors: UserError for a model that cannot
    be trained."""
    if model_families.in_engine(config.model_type):  # tests prove it
        return None
    key = config.to_json_string(), settings.max_length
    if key not in _examined:
        reason = _examine(config)
        _examined[key] = _by_config(config, settings.max_length) or reason
    return _examined[key]


def implementation(config: PretrainedConfig, settings: Training) -> str | None:
    """The attention of a student in training; None for the model's own. Errors: as `why_padded`."""
    return attention.NAME if why_padded(config, settings) is None else None


def sentence(config: PretrainedConfig, settings: Training) -> str | None:
    """What the terminal says of padded rows; None where they are concatenated."""
    if (reason := why_padded(config, settings)) is None:
        return None
    how = "train.packing chooses the rows of a batch, and they are padded" if settings.packing else "rows are padded"
    return f"{how}, not concatenated: in models of type {config.model_type!r} {reason}"


def _by_config(config: PretrainedConfig, max_length: int) -> str | None:
    size = getattr(config, CHUNK, None)
    if isinstance(size, int) and size < max_length:
        return f"attention has an {CHUNK} of {size:,} tokens, less than train.max_length"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    return f"rotary embeddings ({kind}) depend on the longest row of a batch" if kind in BY_BATCH else None


def _examine(config: PretrainedConfig) -> str | None:
    """As `why_padded`, of short rows."""
    kind = config.model_type
    pairs = [_pair(lengths) for lengths in LENGTHS]
    (a, _), (c, _) = pairs[0]
    transformers_logging.set_verbosity_error()  # about weights, which are random here
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model = small(config)
            alone = [[_alone(model, row) for row in rows] for rows, _ in pairs]
            logits_tv = model(input_ids=a[None], use_cache=False).logits[0]
        except Exception as error:  # whatever a config leads to inside transformers
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"models of type {kind!r} cannot be trained; transformers: {reason}") from error
        if not torch.equal(_alone(model, torch.cat([a[:-1], c[-1:]]))[:-1], alone[0][0][:-1]):
            raise UserError(f"models of type {kind!r} cannot be trained: a token's state depends on later tokens")
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"models of type {kind!r} cannot be trained: their head is not one linear layer")
        if not _close(shaped(head(alone[0][0]), shaping_of(model.config)), logits_tv):
            raise UserError(
                f"models of type {kind!r} cannot be trained: their logits are not the product of the head and the "
                f"hidden states, times the scale and below the soft cap of the config, which training assumes"
            )
        for (rows, _), states in zip(pairs, alone, strict=True):
            if not all(map(_close, _together(model, *rows, padded=True), states)):
                raise UserError(f"models of type {kind!r} cannot be trained: padded rows are not what they are alone")
        return _why_not_concatenated(model, pairs, alone)


def _why_not_concatenated(model: PreTrainedModel, pairs: list[Pair], alone: list[list[Tensor]]) -> str | None:
    """alone: the hidden states of the rows of each pair."""
    if not model._can_set_attn_implementation():
        return "attention cannot be replaced by that of concatenated rows"
    given = set[str]()

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        given.update(name for name, argument in kwargs.items() if argument is not None)
        return attention.attend(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(SPY, spy)
    model.set_attn_implementation(SPY)
    recurrent.install(model)
    for ((a, b), (c, d)), states in zip(pairs, alone, strict=True):
        try:
            first, second = _together(model, a, b, padded=False)
            changed = _together(model, a, d, padded=False)[0], _together(model, c, b, padded=False)[1]
        except (TypeError, AttributeError, RuntimeError, ValueError, AssertionError) as error:
            return f"the forward pass does not take concatenated rows ({type(error).__name__})"
        if other := sorted(given.difference(TAKEN, PASSED)):
            return f"attention takes {', '.join(other)}, which that of concatenated rows does not compute"
        if not all(map(torch.equal, changed, (first, second))):
            return "a row changes the logits of another one that it is concatenated with"
        if not all(map(_close, (first, second), states)):
            return "a row is not what it is alone when it is concatenated with another one"
    return None


@torch.no_grad()
def small(config: PretrainedConfig) -> PreTrainedModel:
    """A model of a config with few layers and tokens, all of its parameters random, in float32 on the CPU."""
    config = copy.deepcopy(config)
    kinds = list(getattr(config, "layer_types", None) or ())
    layers = min(config.num_hidden_layers, max(2, *(kinds.index(kind) + 1 for kind in set(kinds)), 0))
    config.num_hidden_layers = layers
    if kinds and len(config.layer_types) != layers:  # not computed from the number of layers
        config.layer_types = kinds[:layers]
    config.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    if getattr(config, "sliding_window", None):
        config.sliding_window = min(config.sliding_window, WINDOW)
    if getattr(config, CHUNK, None):  # what short rows cannot show is read from the config
        setattr(config, CHUNK, max(getattr(config, CHUNK), 2 * max(map(max, LENGTHS))))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape)
        if parameter.ndim >= 2:
            parameter.copy_(drawn * SPREAD / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(drawn * 0.2)
    return model.eval()


def _pair(lengths: tuple[int, int]) -> Pair:
    a, b, c, d = (_tokens(length, seed) for seed, length in enumerate(lengths * 2))
    return (a, b), (c, d)


def _tokens(length: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, VOCABULARY, length))


def _alone(model: PreTrainedModel, ids_t: Tensor) -> Tensor:
    """The hidden states of one row, [t, d], as transformers has them."""
    return forward.own_attention(model, ids_t[None], torch.ones_like(ids_t[None], dtype=torch.bool))[0]


def _together(model: PreTrainedModel, first: Tensor, second: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
    """The hidden states of two rows in one batch of the training."""
    rows = [Row((str(n), 0), ids_t.numpy().astype(np.int32), 1) for n, ids_t in enumerate((first, second))]
    batch = collate(rows)
    if padded:
        hidden_td = forward.padded(model, batch)
    else:
        boundaries = attention.Rows(batch.lengths, batch.input_ids_t.device, batch.prefixes)
        hidden_td = forward.concatenated(model, batch, boundaries, {"input_ids": batch.input_ids_t[None]})
    return hidden_td[: len(first)], hidden_td[len(first) :]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= ROUNDING * theirs.abs().max())
