"""Which students' rows are concatenated: leaks are seen, and both forms of a batch give each row's own gradients."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_support as support

from distill.errors import UserError
from distill.objectives import Sampled, Sft
from distill.recipe import Train
from distill.train.learn import attention, forward, recurrent
from distill.train.learn.learner import Learner
from distill.train.rows.batches import Row, collate
from distill.train.student import isolation

SFT = Sft(kind="sft")
NEOX, WINDOW = {"intermediate_size": 96}, {"sliding_window": 64}
OSS = {"num_local_experts": 4, "head_dim": 8, "sliding_window": 256}
CHUNKS = {"sliding_window": None, "attention_chunk_size": 64}
SCALED = [  # as published
    ("granitemoehybrid", support.RECURRENT["granitemoehybrid"] | {"logits_scaling": 6.0}, None),
    ("falcon_h1", support.RECURRENT["falcon_h1"] | {"lm_head_multiplier": 0.0390625}, None),
]
LEAKS = "a row changes the logits of another one that it is concatenated with"
NOT_COMPUTED = "which that of concatenated rows does not compute"


def config_of(family, **config):
    return AutoConfig.for_model(family, **support.OTHER | config)


@pytest.mark.parametrize(
    "family, config, reason",
    [
        ("gpt_neox", NEOX, None),
        ("olmo2", {}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 256}, None),
        ("mistral", WINDOW, None),
        ("mistral", CHUNKS, "attention has an attention_chunk_size of 64 tokens, less than train.max_length"),
        ("jamba", support.JAMBA, LEAKS),
        ("granite", {"logits_scaling": 4.0}, None),
        ("cohere", {"logit_scale": 0.0625}, None),
        *SCALED,
        *((family, config, None) for family, config in support.RECURRENT.items()),
        ("gpt_oss", OSS, f"attention takes s_aux, {NOT_COMPUTED}"),  # sinks
        ("gemma2", {"head_dim": 8}, f"attention takes softcap, {NOT_COMPUTED}"),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}, f"attention takes softcap, {NOT_COMPUTED}"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "attention cannot be replaced by that of concatenated rows"),
    ],
)
def test_rows_are_concatenated_where_nothing_but_the_attention_mixes_tokens(family, config, reason):
    assert isolation.why_padded(config_of(family, **config), Train(max_length=256)) == reason


@pytest.mark.parametrize(
    "family, config, reason",
    [
        ("hyperclovax", {"logits_scaling": 4.0}, "their logits are not the product of the head and the hidden states"),
        ("bert", {}, "a token's state depends on later tokens"),
    ],
)
def test_a_model_that_training_would_misread_is_refused(family, config, reason):
    with pytest.raises(UserError, match=f"models of type '{family}' cannot be trained: {reason}"):
        isolation.why_padded(config_of(family, **config), Train(max_length=256))


class ConvolvedConfig(LlamaConfig):
    model_type = "convolved"
    leak = True


class ConvolvedForCausalLM(LlamaForCausalLM):
    """A Llama whose embeddings are mixed with those of the three tokens before, by a gate that begins closed."""

    config_class = ConvolvedConfig

    def __init__(self, config):
        super().__init__(config)
        self.taps = nn.Conv1d(config.hidden_size, config.hidden_size, 4, groups=config.hidden_size)
        nn.init.zeros_(self.taps.weight)
        if config.leak:
            self.model.embed_tokens.register_forward_hook(self._mixed)

    def _mixed(self, module, args, out):
        return out + self.taps(F.pad(out.transpose(1, 2), (3, 0))).transpose(1, 2)


AutoConfig.register("convolved", ConvolvedConfig)
AutoModelForCausalLM.register(ConvolvedConfig, ConvolvedForCausalLM)


@pytest.mark.parametrize("leak", [True, False])
def test_a_convolution_over_the_pack_is_seen_behind_a_closed_gate(leak):
    config = ConvolvedConfig(**support.OTHER)
    config.leak = leak
    assert isolation.why_padded(config, Train(max_length=256)) == (LEAKS if leak else None)


@pytest.mark.parametrize("family", support.RECURRENT)
def test_a_recurrence_that_is_not_told_of_rows_leaks(family, monkeypatch):
    """What keeps the rows of such a family apart is `recurrent`, and the examination sees where it is missing."""
    monkeypatch.setattr(recurrent, "install", lambda model: None)
    assert isolation._examine(config_of(family, **support.RECURRENT[family])) == LEAKS


def test_rows_that_the_attention_gets_apart_are_seen_to_leak_within_a_group(monkeypatch):
    """A group's rows as one: the recurrence of the second begins where the first ended."""

    def one_row(plain, hidden_td, group):
        return plain(hidden_td[group.start : group.stop][None])[0]

    monkeypatch.setattr(recurrent, "_inside", one_row)
    assert isolation._examine(config_of("lfm2", **support.RECURRENT["lfm2"])) == LEAKS


def test_the_rows_examined_are_two_groups_and_a_padded_one():
    apart, together = (attention.Rows(lengths, torch.device("cpu")).groups for lengths in isolation.LENGTHS)
    assert [group.rows for group in apart] == [1, 1]
    assert [group.rows for group in together] == [2] and together[0].gather is not None
    assert max(map(max, isolation.LENGTHS)) <= 16, "the least `max_length`"


def test_a_leak_between_the_rows_of_a_padded_batch_is_refused(monkeypatch):
    """It shows where rows share a group alone; a batch of one row has nothing to leak from."""

    def averaged(self, module, args, out):
        return out + (out.mean(0, keepdim=True) - out) / 4

    monkeypatch.setattr(ConvolvedForCausalLM, "_mixed", averaged)
    config = ConvolvedConfig(**support.OTHER, attention_dropout=0.1)  # another one than is examined elsewhere
    with pytest.raises(UserError, match="'convolved' cannot be trained: padded rows are not what they are alone"):
        isolation.why_padded(config, Train(max_length=256))


def test_positions_that_are_counted_from_the_beginning_of_the_pack_are_seen(monkeypatch):
    """No row changes another one, and the second is not what it is alone."""

    def counted(self, module, args, out):
        return out + torch.arange(out.shape[1])[None, :, None] / 4

    monkeypatch.setattr(ConvolvedForCausalLM, "_mixed", counted)
    config = ConvolvedConfig(**support.OTHER, attention_bias=True)
    reason = "a row is not what it is alone when it is concatenated with another one"
    assert isolation.why_padded(config, Train(max_length=256)) == reason


def test_the_reason_says_what_packing_does():
    config = config_of("jamba", **support.JAMBA)
    why = "not concatenated: in models of type 'jamba' a row changes the logits of another one"
    assert f"rows are padded, {why}" in str(isolation.sentence(config, Train(max_length=256)))
    packed = str(isolation.sentence(config, Train(max_length=256, packing=True)))
    assert f"train.packing chooses the rows of a batch, and they are padded, {why}" in packed


def rows_of(lengths, vocab=272):
    draw = np.random.default_rng(0)
    return [Row((str(n), 0), draw.integers(1, vocab, size).astype(np.int32), 3) for n, size in enumerate(lengths)]


def drawn(family, config, padded):
    """A model of a family with weights that make its attention sharp, as the trainer has it."""
    model = isolation.small(config_of(family, **config))
    if not padded:
        model.set_attn_implementation(attention.NAME)
        recurrent.install(model)
    return model


@pytest.mark.parametrize(
    "family, config, padded",
    [
        ("gpt_neox", NEOX, False),
        ("gpt_neox", NEOX, True),
        ("mistral", WINDOW, False),
        ("gemma2", {"head_dim": 8}, True),
        ("qwen3_5_text", support.HYBRID, False),
        ("qwen3_5_text", support.HYBRID, True),
        ("cohere", {"logit_scale": 0.0625}, True),
        *((family, config, False) for family, config, _ in SCALED),
        *((family, config, False) for family, config in support.RECURRENT.items()),
    ],
)
def test_gradients_of_a_batch_are_those_of_its_rows_alone(family, config, padded):
    rows = rows_of((7, 23, 20, 5), isolation.VOCABULARY)
    model = drawn(family, config, padded)
    Learner(model, SFT, None, padded=padded)(collate(rows))[0].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    alone = drawn(family, config, padded=True)
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logits = alone(input_ids=ids[None], use_cache=False).logits[0, row.prompt_tokens - 1 : -1]
        F.cross_entropy(logits, ids[row.prompt_tokens :], reduction="sum").backward()
    theirs = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and ours
    largest = {name: gradient.abs().max().clamp(min=1e-6) for name, gradient in theirs.items()}
    for name, gradient in theirs.items():
        # In transformers the recurrence is in float32 whatever the model's dtype: the gradient of a decay or of a skip
        # is a sum of many terms of either sign, which rounds to more than 1e-5 of itself, so it is held against the
        # whole gradient.
        scale = max(largest.values()) if name.endswith(("A_log", "mamba.D")) else largest[name]
        assert (ours[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_that_rollouts_share_is_before_each_of_them(padded):
    prompt, sampled = np.arange(1, 7, dtype=np.int32), np.zeros((len(Sampled._fields), 5), np.float32)
    rows = [
        Row(("p", n), np.concatenate([prompt, np.arange(10 * n + 8, 10 * n + 13, dtype=np.int32)]), 6, sampled=sampled)
        for n in range(3)
    ]
    model, alone = (drawn("qwen3_5_text", support.HYBRID, form) for form in (padded, True))
    batch = collate(rows)
    assert any(length for _, length in batch.prefixes), "the prompt is there once"
    with torch.no_grad():
        if padded:
            states_td = forward.padded(model, batch)
        else:
            boundaries = attention.Rows(batch.lengths, torch.device("cpu"), batch.prefixes)
            states_td = forward.concatenated(model, batch, boundaries, {"input_ids": batch.input_ids_t[None]})
        each = [alone.model(input_ids=torch.from_numpy(row.ids.astype(np.int64))[None]) for row in rows]
    theirs = torch.cat([out.last_hidden_state[0, 5:-1] for out in each])
    ours = states_td.index_select(0, batch.positions_s)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
