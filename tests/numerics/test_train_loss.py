"""The loss, a few rows at a time, against torch's on whole logits; attention inside rows against transformers'."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_support as support

from distill.engine import families
from distill.model_families import trained_as
from distill.objectives import Sft
from distill.train.learn import attention, loss, recurrent
from distill.train.learn.attention import Rows
from distill.train.learn.learner import Learner
from distill.train.learn.loss import Shaping
from distill.train.rows.batches import Row, collate

S, V, D = 37, 211, 16
SFT = Sft(kind="sft")


def tensors(dtype=torch.float32, bias=False, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden_sd = torch.randn(S, D, generator=generator).to(device, dtype).requires_grad_()
    weight_vd = torch.randn(V, D, generator=generator).to(device, dtype).requires_grad_()
    bias_v = torch.randn(V, generator=generator).requires_grad_() if bias else None
    return hidden_sd, weight_vd, bias_v, torch.randint(V, (S,), generator=generator).to(device)


def grads(*leaves):
    return [leaf.grad for leaf in leaves if leaf is not None]


def assert_close(ours, theirs, bound):
    for a, b in zip(ours, theirs, strict=True):
        difference = (a.float() - b.float()).abs()
        assert difference.max() <= bound * b.float().abs().max(), (
            f"max {difference.max():.2e}, mean {difference.mean():.2e}"
        )


@pytest.mark.parametrize(
    "shaping", [Shaping(), Shaping(cap=5.0), Shaping(scale=0.25), Shaping(scale=3.0), Shaping(0.5, 5.0)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block, one_pass", [(10**9, 10**9), (V * 5, 10**9), (V * 5, V * 2), (1, 1)])
def test_a_few_rows_at_a_time_give_what_whole_logits_give(monkeypatch, block, one_pass, bias, shaping):
    monkeypatch.setattr(loss, "BLOCK", block)
    monkeypatch.setitem(loss.PASS, "cpu", one_pass)
    ours, theirs = tensors(bias=bias), tensors(bias=bias)
    value = loss.linear_loss(*ours[:3], SFT.criterion(ours[3], None), None, shaping)[0]
    (3 * value).backward()
    logits_sv = F.linear(*theirs[:3]) * shaping.scale
    if shaping.cap is not None:
        logits_sv = shaping.cap * torch.tanh(logits_sv / shaping.cap)
    reference = F.cross_entropy(logits_sv, theirs[3], reduction="sum")
    (3 * reference).backward()
    assert value.item() == pytest.approx(reference.item(), rel=1e-6)
    assert_close(grads(*ours[:3]), grads(*theirs[:3]), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("block", [10**9, V * 5])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here"))],
)
def test_half_precision_comes_as_near_as_the_plain_way(monkeypatch, device, block, scale):
    """Against float64: the error is that of rounding inputs and logits, which the plain way has, too."""
    monkeypatch.setattr(loss, "BLOCK", block)
    ours, plain = ([*tensors(torch.bfloat16, device=device)] for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in ours[:2]]
    loss.linear_loss(*ours[:3], SFT.criterion(ours[3], None), None, Shaping(scale))[0].backward()
    F.cross_entropy(F.linear(*plain[:2]).float() * scale, plain[3], reduction="sum").backward()
    F.cross_entropy(F.linear(*exact) * scale, ours[3], reduction="sum").backward()
    for mine, theirs, right in zip(grads(*ours[:2]), grads(*plain[:2]), grads(*exact), strict=True):
        errors = [(grad.double() - right).norm() / right.norm() for grad in (mine, theirs)]
        assert errors[0] < 1.2 * errors[1] + 1e-3


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch):
    hidden_sd, weight_vd, _, targets_s = tensors()
    weight_vd = weight_vd.detach()
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: products.append(args[0].shape) or real(*args, **kw))
    loss.linear_loss(hidden_sd, weight_vd, None, SFT.criterion(targets_s, None))[0].backward()
    assert products == [(S, D), (S, V)], "the logits, and the gradient of the hidden states"
    assert hidden_sd.grad is not None


def test_scoring_makes_no_gradient(monkeypatch):
    hidden_sd, weight_vd, _, targets_s = tensors()
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: products.append(args[0].shape) or real(*args, **kw))
    with torch.no_grad():
        value = loss.linear_loss(hidden_sd, weight_vd, None, SFT.criterion(targets_s, None))
    assert products == [(S, D)], "the logits"
    assert value.item() == pytest.approx(F.cross_entropy(hidden_sd @ weight_vd.T, targets_s, reduction="sum").item())


def test_the_logits_are_never_all_there():
    """Peak memory of 512 rows × 32,768 entries: whole logits in float32 are 64 MB, and the plain way keeps three."""
    generator = torch.Generator().manual_seed(0)
    hidden_sd = torch.randn(512, 8, generator=generator).requires_grad_()
    weight_vd = torch.randn(32768, 8, generator=generator).requires_grad_()
    targets_s = torch.randint(32768, (512,), generator=generator)
    sizes = {}
    for name in ("ours", "plain"):
        with torch.profiler.profile(profile_memory=True) as profile:
            if name == "ours":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(loss, "BLOCK", 1 << 20)
                    patch.setattr(loss, "_scratch", {})
                    loss.linear_loss(hidden_sd, weight_vd, None, SFT.criterion(targets_s, None))[0].backward()
            else:
                F.cross_entropy(hidden_sd @ weight_vd.T, targets_s, reduction="sum").backward()
        sizes[name] = max(event.cpu_memory_usage for event in profile.events())
    assert sizes["plain"] >= 64 << 20 and sizes["ours"] <= 12 << 20, sizes


@pytest.mark.parametrize("rows", [1, 271, 4097, 32768])
def test_blocks_of_a_vocabulary_of_248_320_are_no_larger_than_others(rows):
    """Qwen3.5's: at most 2^26 logits at a time, up to a row; 128 MB in bfloat16 where 32,768 rows have 16 GB."""
    ranges = loss.blocks(rows, 248_320, loss.BLOCK)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == rows
    assert max(stop - start for start, stop in ranges) * 248_320 <= loss.BLOCK + 248_320


# ---- attention


@pytest.mark.parametrize("window", [None, 2, 4, 9])
@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (9, 8, 8, 3, 1), (1, 20, 2)])
def test_attention_inside_rows_is_a_causal_block_diagonal_mask(lengths, window):
    t, h, g, c = sum(lengths), 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, n, t, c, generator=generator).requires_grad_() for n in (h, g, g)]
    weights = torch.randn(1, t, h, c, generator=generator)
    rows = Rows(lengths, torch.device("cpu"))
    out, _ = attention.attend(None, *leaves, None, rows=rows, scaling=0.3, sliding_window=window)
    (out * weights).sum().backward()
    ours = grads(*leaves)
    for leaf in leaves:
        leaf.grad = None
    row_t = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask_tt = (row_t[:, None] == row_t) & torch.ones(t, t, dtype=torch.bool).tril().triu(1 - (window or t))
    plain = F.scaled_dot_product_attention(*leaves, attn_mask=mask_tt, scale=0.3, enable_gqa=True).transpose(1, 2)
    (plain * weights).sum().backward()
    assert_close([out.detach()], [plain.detach()], 1e-5)
    assert_close(ours, grads(*leaves), 1e-5)


def test_rows_of_like_length_share_a_call_and_others_do_not():
    groups = Rows((100, 98, 90, 40, 39, 3), torch.device("cpu")).groups
    assert [(group.rows, group.width) for group in groups] == [(3, 100), (2, 40), (1, 3)]
    assert [(group.start, group.stop) for group in groups] == [(0, 288), (288, 367), (367, 370)]


SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SLIDING, WHOLE = "sliding_attention", "full_attention"
GEMMA4 = dict(
    **SHAPE | {"num_hidden_layers": 5, "vocab_size_per_layer_input": 97, "initializer_range": 0.2},
    **{"head_dim": 8, "global_head_dim": 16, "sliding_window": 5, "final_logit_softcapping": 3.0},
    layer_types=[SLIDING, WHOLE, SLIDING, SLIDING, WHOLE],
)
SMALL_SIZES = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
LARGE_SIZES = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
FAMILIES = {
    "gemma4_text": lambda: Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA4, **SMALL_SIZES)),
    "gemma4_text-large": lambda: Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA4, **LARGE_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, pad_token_id=None, no_rope_layers=[1, 0])),
    "qwen3_5_text": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SHAPE, **DELTA)),
    "qwen3_5_text-tied": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SHAPE, **DELTA, tie_word_embeddings=True)),
}
DELTA = dict(
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=12,
    linear_value_head_dim=8,
    pad_token_id=None,
)


def test_every_family_that_trains_is_proved_here():
    assert {trained_as(name) for name, family in families.FAMILIES.items() if family.trains} == {
        name.partition("-")[0] for name in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_to_end_learn_what_each_would_learn_alone(family):
    """Loss and every gradient, against transformers on one row after the other with its own attention and loss."""
    torch.manual_seed(0)
    theirs = FAMILIES[family]()
    ours = FAMILIES[family]()
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation(attention.NAME)
    recurrent.install(ours)
    draw = np.random.default_rng(0)
    rows = [
        Row(("p", i), draw.integers(0, 97, length).astype(np.int32), prompt)
        for i, (length, prompt) in enumerate([(20, 4), (19, 9), (7, 1), (33, 30)])
    ]
    value = Learner(ours, SFT, None)(collate(rows))[0]
    value.backward()
    total = 0.0
    for row in rows:
        ids_1t = torch.from_numpy(row.ids.astype(np.int64))[None]
        logits_tv = theirs(ids_1t).logits[0]
        alone = F.cross_entropy(logits_tv[row.prompt_tokens - 1 : -1], ids_1t[0, row.prompt_tokens :], reduction="sum")
        alone.backward()
        total += alone.item()
    assert value.item() == pytest.approx(total, rel=1e-6)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        difference = (a.grad - b.grad).abs()
        assert difference.max() <= 1e-5 * b.grad.abs().max(), f"{name}: {difference.max():.2e}"


def test_a_changed_row_changes_nothing_in_its_neighbours(tmp_path):
    """Not a bit: hidden states of the others are compared before and after."""
    model = AutoModelForCausalLM.from_pretrained(support.make_student(tmp_path), attn_implementation=attention.NAME)
    lengths = (12, 30, 17)
    generator = torch.Generator().manual_seed(0)
    ids_t = torch.randint(200, (sum(lengths),), generator=generator)
    positions_t = torch.cat([torch.arange(n) for n in lengths])

    def hidden(ids_t):
        rows = Rows(lengths, torch.device("cpu"))
        return model.model(input_ids=ids_t[None], position_ids=positions_t[None], rows=rows, use_cache=False)[0][0]

    changed_t = ids_t.clone()
    changed_t[12:42] = torch.randint(200, (30,), generator=generator)
    before, after = hidden(ids_t), hidden(changed_t)
    assert torch.equal(before[:12], after[:12]) and torch.equal(before[42:], after[42:])
    assert not torch.equal(before[12:42], after[12:42])
