"""Fused layers, attention of short rows and shared prompts, against transformers and torch."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from distill.engine.kernels import cpu_training as kernels
from distill.objectives import Grpo
from distill.train.learn import attention, fused, short
from distill.train.learn.learner import Learner
from distill.train.rows.batches import Row, collate

pytestmark = pytest.mark.skipif(kernels.why_missing() is not None, reason="the compiled kernels are missing")

GRPO = Grpo(kind="grpo")
SHAPE = dict(
    vocab_size=97,
    hidden_size=72,  # no multiple of a vector
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, pad_token_id=None, no_rope_layers=[0, 1])),
}


def student(family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # gains of 1 and biases of 0 would hide their gradients' errors
            nn.init.normal_(parameter, 0.5, 0.3)
        else:
            parameter.data *= 5  # or attention is uniform
    model.set_attn_implementation(attention.NAME)
    return model


def rows_of(*shapes, prompts=None):
    """Rollouts with (length, prompt tokens), of prompts by number."""
    draw = np.random.default_rng(0)
    rows = []
    for number, (length, prompt) in enumerate(shapes):
        sampled = np.zeros((4, length - prompt), np.float32)
        sampled[0], sampled[1], sampled[3] = -4.6, draw.normal(), 1.0
        ids = draw.integers(0, 97, length).astype(np.int32)
        if prompts is not None:
            ids[:prompt] = np.random.default_rng(prompts[number]).integers(0, 97, prompt)
        rows.append(Row((f"p{number}", 0), ids, prompt, sampled=sampled))
    return rows


def learned(model, batches, autocast=None):
    """The loss parts, and every parameter's gradient."""
    model.zero_grad()
    learner = Learner(model, GRPO, autocast)
    total = sum(learner(batch) for batch in batches)
    total[0].backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(ours, theirs, tolerance):
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        scale = max(gradient.abs().max(), 1e-3 * largest)  # a key's bias has no gradient but rounding errors
        difference = (ours[name] - gradient).abs().max() / scale
        assert difference <= tolerance, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_learn_what_those_of_transformers_do(family):
    model, batches = student(family), [collate(rows_of((20, 4), (19, 9), (7, 1), (33, 30)))]
    parts, gradients = learned(model, batches)
    fused.install(model)
    assert type(model.model.layers[0]).__name__.startswith("Fused")
    fused_parts, fused_gradients = learned(model, batches)
    assert not all(torch.equal(gradients[name], fused_gradients[name]) for name in gradients), "nothing was fused"
    torch.testing.assert_close(fused_parts, parts, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(fused_gradients, gradients, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_they_are_as_near_to_float32_as_transformers(family):
    model, batches = student(family), [collate(rows_of((20, 4), (19, 9), (7, 1), (33, 30)))]
    exact = learned(model, batches)[1]
    errors = []
    for install in (False, True):
        if install:
            fused.install(model)
        gradients = learned(model, batches, torch.bfloat16)[1]
        difference = sum((gradients[name] - exact[name]).square().sum() for name in exact)
        errors.append((difference / sum(gradient.square().sum() for gradient in exact.values())).sqrt().item())
    assert errors[1] <= 1.3 * errors[0] < 0.2, errors


def test_checkpointing_recomputes_fused_layers_to_the_bit():
    model, batches = student("llama"), [collate(rows_of((20, 4), (19, 9)))]
    fused.install(model)
    kept = learned(model, batches)
    model.train()
    model.activation_checkpointing_enable()
    recomputed = learned(model, batches)
    assert torch.equal(kept[0], recomputed[0])
    assert all(torch.equal(kept[1][name], recomputed[1][name]) for name in kept[1])


def test_frozen_and_other_linear_layers_run_as_transformers_has_them():
    model, batches = student("qwen2"), [collate(rows_of((20, 4)))]
    fused.install(model)

    class Other(nn.Linear):
        """A linear layer with a forward pass of its own."""

        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Other
    parts = learned(model, batches)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DTYPES", ())
        torch.testing.assert_close(parts, learned(model, batches)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [8, 160])  # tokens of a block: several blocks, or one
@pytest.mark.parametrize("shape", [(3, 7, 4, 2, 8), (1, 20, 4, 4, 16), (2, 33, 9, 3, 64), (5, 1, 2, 1, 8)])
def test_attention_of_short_rows(shape, queries, monkeypatch):
    monkeypatch.setattr(short, "QUERIES", queries)
    monkeypatch.setattr(short, "SCORES", 2000)  # several calls
    b, w, h, g, c = shape
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(b, w, n, c, generator=draw).requires_grad_() for n in (h, g, g)]
    weights = torch.randn(b, w, h, c, generator=draw)

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)

    outs = {}
    for name, function in (("ours", lambda q, k, v: short.attend(q, k, v, 0.3)), ("torch", plain)):
        out = function(*leaves)
        outs[name] = (out.detach(), *torch.autograd.grad((out * weights).sum(), leaves))
    for ours, theirs in zip(outs["ours"], outs["torch"], strict=True):
        # Of one token alone, the gradients of query and key are zero but for rounding.
        scale = 1.0 if w == 1 else theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def test_every_instruction_set_agrees():
    from distill.engine.kernels.cpu_library import instruction_set, instruction_sets

    model, batches, results = student("llama"), [collate(rows_of((20, 4), (19, 9)))], {}
    fused.install(model)
    used = instruction_set()
    try:
        for name in instruction_sets():
            instruction_set(name)
            results[name] = learned(model, batches)[1]
    finally:
        instruction_set(used)
    for gradients in results.values():
        assert_equal_gradients(gradients, results[used], 1e-4)


def test_threads_change_no_bit():
    """Kernels that take several chunks of rows, on the threads of torch's own ops."""
    x_tc, weight_c = torch.randn(130, 72), torch.randn(72)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out_tc, factor_t, scores_mww = torch.empty_like(x_tc), torch.empty(130), torch.empty(6, 40, 40)
            kernels.norm(x_tc, weight_c, 1e-6, out_tc, factor_t)
            kernels.softmax(scores_mww.copy_(x_tc[:40, :40]), 0.5, 1, 0)
            by_x = torch.empty_like(x_tc)
            by_weight = kernels.norm_backward(x_tc, weight_c, factor_t, out_tc, None, by_x)
            results.append((out_tc, scores_mww, by_x, by_weight))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(ours.equal(theirs) for ours, theirs in zip(result, results[0], strict=True))


# ---- prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_that_share_a_prompt_learn_what_each_would_learn_alone(family):
    rows = rows_of((20, 5), (19, 9), (30, 5), (12, 9), (8, 5), (7, 6), prompts=(1, 2, 1, 2, 1, 3))
    model, batch = student(family), collate(rows)
    assert len(batch.input_ids_t) == sum(len(row.ids) for row in rows) - 5 - 5 - 9
    parts, gradients = learned(model, [collate([row]) for row in rows])
    shared_parts, shared_gradients = learned(model, [batch])
    torch.testing.assert_close(shared_parts, parts, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(shared_gradients, gradients, 2e-5)


def test_a_batch_with_a_shared_prompt_worked_out_by_hand():
    sampled = np.zeros((4, 2), np.float32)
    first, other, second = (
        Row((name, 0), np.array(ids, np.int32), 2, sampled=sampled + number)
        for number, (name, ids) in enumerate([("a", [1, 2, 10, 11]), ("b", [3, 4, 20, 21]), ("a", [1, 2, 30, 31])])
    )
    batch = collate([first, other, second])
    assert batch.input_ids_t.tolist() == [1, 2, 10, 11, 30, 31, 3, 4, 20, 21]
    assert batch.position_ids_t.tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3]
    assert batch.lengths == (4, 2, 4) and batch.prefixes == ((0, 0), (0, 2), (6, 0))
    # 10 and 30 are both predicted by the prompt's last token.
    assert batch.positions_s.tolist() == [1, 2, 1, 4, 7, 8]
    assert batch.targets_s.tolist() == [10, 11, 30, 31, 20, 21]
    assert batch.sampled.own_s.tolist() == [0, 0, 2, 2, 1, 1]
    traces = collate([dataclasses.replace(row, sampled=None) for row in (first, other, second)])
    assert traces.input_ids_t.tolist() == [1, 2, 10, 11, 3, 4, 20, 21, 1, 2, 30, 31], "traces keep their order"
