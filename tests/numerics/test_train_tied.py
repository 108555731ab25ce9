"""A tied head hands its gradient to the embedding: the same numbers as autograd's sum, in one matrix."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from distill.objectives import Sft
from distill.train.learn import attention, learner
from distill.train.learn.learner import Learner
from distill.train.rows.batches import Row, collate
from distill.train.student import methods

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SFT = Sft(kind="sft")


def make(autocast=None, tied=True, padding=None, adapter=None):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied, pad_token_id=padding, attn_implementation=attention.NAME)
    model = LlamaForCausalLM(config)
    if adapter:
        methods.with_adapters(model, adapter)
    return Learner(model, SFT, autocast)


def batches(count=2):
    """Rows with many repeated tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        [
            Row(("p", i), torch.randint(0, 40, (length,), generator=generator).int().numpy(), 3)
            for i, length in enumerate(lengths)
        ]
        for lengths in ((30, 17), (41,))
    ]
    return [collate(row) for row in rows[:count]]


def gradients(learned, given, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(learner, "tied_embedding", lambda model: None)
    for batch in given:
        (learned(batch)[0] / 7).backward()
    return {name: parameter.grad for name, parameter in learned.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_equals_the_sum_of_autograd_bit_for_bit(count, autocast, padding, monkeypatch):
    ours = gradients(make(autocast, padding=padding), batches(count))
    plain = gradients(make(autocast, padding=padding), batches(count), monkeypatch)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)


def test_equals_transformers():
    learned, (batch, _) = make(), batches()
    ours = gradients(learned, [batch])["model.model.embed_tokens.weight"]
    learned.zero_grad()
    losses, start = [], 0
    for length in batch.lengths:
        ids = batch.input_ids_t[start : start + length][None]
        learned.model.set_attn_implementation("sdpa")
        logits = learned.model(input_ids=ids).logits[0, 2:-1]
        losses.append(F.cross_entropy(logits, ids[0, 3:], reduction="sum") / 7)
        start += length
    sum(losses).backward()
    theirs = learned.model.model.embed_tokens.weight.grad
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs.abs().max() > 0.1


def test_only_a_trained_embedding_that_is_the_head(monkeypatch):
    from distill.recipe.adapters import Lora
    from distill.train.learn.tied import tied_embedding

    assert tied_embedding(make().model) is not None
    assert tied_embedding(make(tied=False).model) is None
    lora = make(adapter=Lora(kind="lora", r=4))
    assert tied_embedding(lora.model) is None
    assert gradients(lora, batches()) and gradients(make(tied=False), batches())


def test_without_gradients_nothing_waits():
    learned = make()
    with torch.no_grad():
        assert learned(batches()[0]).isfinite().all()
