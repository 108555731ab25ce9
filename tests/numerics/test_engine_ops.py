"""Reference ops on cases small enough to work out by hand, and the FP8 code table."""

from __future__ import annotations

import math

import pytest
import torch
from random_models import dequantise, quantise

from distill.engine.kernels import OP_NAMES, TABLE, column_for, ops_for, reference, reference_attention
from distill.engine.kernels.stored import Fp8, dequantize_fp8_block


def test_every_op_has_an_implementation() -> None:
    for name, column in TABLE.items():
        assert set(column) == set(OP_NAMES)
        assert callable(ops_for(name).linear)
    assert ops_for("reference").linear is reference.linear
    with pytest.raises(ValueError, match="'tpu'"):
        column_for("tpu")


def test_rope_turns_the_right_pairs() -> None:
    """One quarter turn of the first pair, none of the second: (a, b) becomes (-b, a)."""
    cos_tr, sin_tr = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    for interleaved, turned in ((True, [-2.0, 1.0, 3.0, 4.0]), (False, [-3.0, 2.0, 1.0, 4.0])):
        x_thd = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        reference.rope(x_thd, cos_tr, sin_tr, interleaved)
        assert x_thd.tolist() == [[turned]]


def test_router_chooses_by_bias_and_weighs_without_it() -> None:
    """Four experts in two groups, one group kept, one expert chosen: the bias lifts group 1 although its scores are
    lower, and the weight is the expert's own score times the factor."""
    logits_tx = torch.tensor([[2.0, 2.0, -1.0, 0.0]])
    bias_x = torch.tensor([0.0, 0.0, 1.0, 1.0])
    experts, weights = reference.route(logits_tx, bias_x, "sigmoid", "best two", 2, 1, 1, False, 2.5)
    assert experts.tolist() == [[3]]
    assert weights.item() == pytest.approx(2.5 * 0.5)
    experts, weights = reference.route(logits_tx, bias_x, "sigmoid", "best two", 2, 1, 2, True, 2.5)
    assert sorted(experts[0].tolist()) == [2, 3]
    assert weights.sum().item() == pytest.approx(2.5)


def test_a_group_is_worth_its_two_best() -> None:
    """Group 0 holds the best expert, group 1 the best pair."""
    logits_tx = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    experts, _ = reference.route(logits_tx, torch.zeros(4), "sigmoid", "best two", 2, 1, 2, True, 1.0)
    assert sorted(experts[0].tolist()) == [2, 3]


def test_attention_over_pages() -> None:
    """Two tokens in a page that is not the first, queries that pick either; the junk behind them has no weight."""
    pool = torch.full((3, 1, 4, 2), 7.0)
    table_bp = torch.tensor([[2]])
    reference.paged_write(pool, torch.tensor([2, 2]), torch.tensor([0, 1]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    q_bhd = torch.tensor([[[50.0, 0.0], [0.0, 0.0]]])
    out = reference.decode_mla(q_bhd, pool, table_bp, torch.tensor([2]), 1.0, 1)
    assert out.flatten().tolist() == pytest.approx([1.0, 0.5])
    out = reference.decode_gqa(q_bhd, pool, pool, table_bp, torch.tensor([1]), 1.0)
    assert out.flatten().tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("elements", [1, 60, 1 << 24])
def test_causal_attention_is_the_same_in_any_block(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=generator) for s in ((5, 4, 6), (2, 8, 6), (2, 8, 3)))
    monkeypatch.setattr(reference_attention, "_SCORE_ELEMENTS", elements)
    out = reference_attention.attend_causal(q, k, v, 0.3)
    for t in range(5):
        for h in range(4):
            seen = 8 - 5 + t + 1
            probs = (0.3 * k[h // 2, :seen] @ q[t, h]).softmax(-1)
            torch.testing.assert_close(out[t, h], probs @ v[h // 2, :seen])


def _value_of(code: int) -> float:
    """e4m3fn by its definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


@pytest.mark.parametrize("activation", [1.0, 1e-2, 1e-4])
def test_all_finite_fp8_codes_through_the_dot_product(activation: float) -> None:
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    weight = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    scale = torch.tensor([[0.25], [0.5]])
    out = reference.linear(torch.tensor([[activation]]), reference.pack(Fp8(weight, scale), torch.float32))[0]
    x = torch.tensor(activation).item()
    for row, code in enumerate(codes):
        expected = _value_of(code) * (0.25 if row < 128 else 0.5) * x
        assert math.isclose(out[row].item(), expected, rel_tol=1e-6, abs_tol=0.0), hex(code)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 300), (576, 64)])
def test_dequantising_partial_blocks(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(weight)
    ours = dequantize_fp8_block(codes, scale, torch.float32)
    assert torch.equal(ours, dequantise(codes, scale))
    assert (ours - weight).abs().max() <= weight.abs().max() / 16
