"""GRPO against a group that is worked out by hand, and against autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.objectives import Grpo, Sampled
from distill.objectives.grpo import advantages

LOSS, KL, ENTROPY, MISMATCH, CLIPPED = range(5)
LN2 = math.log(2)


def run(criterion, logits_sv, cuts=()):
    work_sv, total = logits_sv.clone(), 0.0
    for start, stop in zip((0, *cuts), (*cuts, len(logits_sv)), strict=True):
        total = total + criterion(work_sv[start:stop], start, stop, True)
    return total, work_sv


# ---- advantages


def test_advantages_worked_out_by_hand():
    assert advantages([1.0, 0.0, 0.0, 1.0], normalise=False) == [0.5, -0.5, -0.5, 0.5]
    # mean 1/4, variance (9/16 + 3 · 1/16)/3 = 1/4, deviation 1/2: (3/4)/(1/2) = 3/2, (−1/4)/(1/2) = −1/2
    assert advantages([1.0, 0.0, 0.0, 0.0], normalise=True) == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_a_member_that_cannot_be_verified_counts_neither_way():
    assert advantages([1.0, None, 0.0, 0.0], normalise=False) == pytest.approx([2 / 3, 0, -1 / 3, -1 / 3])
    assert advantages([1.0, None, 0.0], normalise=True) == pytest.approx([1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)])


@pytest.mark.parametrize("rewards", [[], [1.0], [None, None], [1.0, None], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_group_without_variance_is_skipped(rewards, normalise):
    assert advantages(rewards, normalise) is None


@given(st.lists(st.one_of(st.none(), st.floats(-3, 3)), min_size=2, max_size=16), st.booleans())
def test_advantages_sum_to_zero_and_keep_the_order(rewards, normalise):
    values = advantages(rewards, normalise)
    assume(values is not None)
    known = [(reward, value) for reward, value in zip(rewards, values, strict=True) if reward is not None]
    assert sum(value for _, value in known) == pytest.approx(0, abs=1e-6)
    assert [value for _, value in sorted(known)] == sorted(value for _, value in known)
    assert all(value == 0 for reward, value in zip(rewards, values, strict=True) if reward is None)
    if normalise:
        assert np.std([value for _, value in known], ddof=1) == pytest.approx(1)


def test_row_weights_turn_a_mean_over_tokens_into_the_published_normalisations():
    """Rows of 3, 2, 2 and 1 tokens; the sum over tokens is divided by 8.

    Dr. GRPO with a limit of 4: every token has 1/(4 · 4) = 1/16, so the factor is 8/16. GRPO: every row has 1/4, so a
    token of a row of 2 has 1/8 and the factor is 1.
    """
    sampling = {"sampling": {"max_new_tokens": 4}}
    plain, published = (Grpo(kind="grpo", normalise=normalise, rollouts=sampling) for normalise in (False, True))
    assert [plain.row_weight(length, 8, 4) for length in (3, 2, 1)] == [0.5, 0.5, 0.5]
    assert [published.row_weight(length, 8, 4) for length in (3, 2, 1)] == pytest.approx([2 / 3, 1, 2])


# ---- the surrogate

# The student has 1/4 and 3/4 everywhere. Rewards 1, 0, 0 and unverifiable: advantages 2/3, −1/3, −1/3, 0. Times the row
# weight 1/2 (8 tokens, 4 rows, at most 4 tokens): 1/3, −1/6, −1/6, 0. Clip 0.8 … 1.28, limit 2.
#
#   row  y  μ     ratio  A     −min(min(r, 2) A, clamp(r) A)   d/d ln q(y)
#   A    1  3/4   1      1/3   −1/3                            −1/3
#   A    1  1/2   1.5    1/3   −1.28/3, clipped above           0
#   A    0  1/2   0.5    1/3   −0.5/3                          −0.5/3
#   B    0  1/2   0.5   −1/6    0.8/6, clipped below            0
#   B    0  1/5   1.25  −1/6    1.25/6                          1.25/6
#   C    1  1/2   1.5   −1/6    1.5/6                           1.5/6
#   C    1  1/4   3     −1/6    2/6, at the limit               0
#   D    1  1/4   3      0      0                               0
GROUP = [
    # y, μ, row, loss, pull
    (1, 3 / 4, 0, -1 / 3, -1 / 3),
    (1, 1 / 2, 0, -1.28 / 3, 0),
    (0, 1 / 2, 0, -0.5 / 3, -0.5 / 3),
    (0, 1 / 2, 1, 0.8 / 6, 0),
    (0, 1 / 5, 1, 1.25 / 6, 1.25 / 6),
    (1, 1 / 2, 2, 1.5 / 6, 1.5 / 6),
    (1, 1 / 4, 2, 2 / 6, 0),
    (1, 1 / 4, 3, 0, 0),
]


def group(objective, reference=None):
    """Targets, what is known of the sampled tokens, and the student's logits."""
    factors = advantages([1.0, 0.0, 0.0, None], objective.normalise)
    lengths = [3, 2, 2, 1]
    scaled = [a * objective.row_weight(n, 8, 4) for a, n in zip(factors, lengths, strict=True)]
    targets_s = torch.tensor([y for y, *_ in GROUP])
    mu_s = torch.tensor([mu for _, mu, *_ in GROUP])
    advantages_s = torch.tensor([scaled[row] for _, _, row, *_ in GROUP])
    reference_s = torch.zeros(8) if reference is None else reference.log()
    sampled = Sampled(mu_s.log(), advantages_s, reference_s, torch.ones(8))
    return targets_s, sampled, torch.tensor([[0.0, math.log(3)]]).repeat(8, 1)


def moves(pulls, targets_s):
    """pull · (1[y] − q), first entry: 3/4 for y = 0, −1/4 for y = 1; the second entry is its negative."""
    return [pull * (3 / 4 if y == 0 else -1 / 4) for pull, y in zip(pulls, targets_s.tolist(), strict=True)]


def test_a_group_worked_out_by_hand():
    objective = Grpo(kind="grpo", rollouts={"sampling": {"max_new_tokens": 4}})
    targets_s, sampled, logits_sv = group(objective)
    parts, gradient_sv = run(objective.criterion(targets_s, None, sampled), logits_sv)
    assert parts[LOSS].item() == pytest.approx(sum(loss for *_, loss, _ in GROUP), abs=1e-6)
    expected = moves([pull for *_, pull in GROUP], targets_s)
    assert gradient_sv[:, 0].tolist() == pytest.approx(expected, abs=1e-7)
    assert gradient_sv[:, 1].tolist() == pytest.approx([-x for x in expected], abs=1e-7)
    assert parts[CLIPPED] == 3, "above, below and at the limit; a member without advantage is not clipped"
    assert parts[KL] == 0
    # |ln ratio|: 0, ln 3/2, ln 2, ln 2, ln 5/4, ln 3/2, ln 3, ln 3
    assert parts[MISMATCH].item() == pytest.approx(2 * math.log(1.5) + 2 * LN2 + math.log(1.25) + 2 * math.log(3))
    assert parts[ENTROPY].item() == pytest.approx(8 * (math.log(4) - 0.75 * math.log(3)), rel=1e-5)


def test_the_kl_term_worked_out_by_hand():
    """Base 3/8 where the student has 3/4 (y = 1): d = −ln 2, k3 = 1/2 + ln 2 − 1. Base 1/2 where it has 1/4 (y = 0):
    d = ln 2, k3 = 2 − ln 2 − 1. Weight 0.1 times the ratio, at most 2; derivative by ln q(y): −0.1 · ratio · d."""
    objective = Grpo(kind="grpo", kl_weight=0.1, rollouts={"sampling": {"max_new_tokens": 4}})
    without = Grpo(kind="grpo", rollouts={"sampling": {"max_new_tokens": 4}})
    targets_s = torch.tensor([y for y, *_ in GROUP])
    base_s = torch.where(targets_s == 1, 3 / 8, 1 / 2)
    _, sampled, logits_sv = group(objective, base_s)
    parts, gradient_sv = run(objective.criterion(targets_s, None, sampled), logits_sv)
    plain, plain_sv = run(without.criterion(targets_s, None, sampled), logits_sv)
    ratios = [1, 1.5, 0.5, 0.5, 1.25, 1.5, 2, 2]
    k3 = [LN2 - 0.5 if y == 1 else 1 - LN2 for y in targets_s.tolist()]
    assert parts[KL].item() == pytest.approx(sum(k3), rel=1e-5)
    assert (parts[LOSS] - plain[LOSS]).item() == pytest.approx(
        0.1 * sum(r * k for r, k in zip(ratios, k3, strict=True)), rel=1e-5
    )
    pulls = [0.1 * r * (LN2 if y == 1 else -LN2) for r, y in zip(ratios, targets_s.tolist(), strict=True)]
    assert (gradient_sv - plain_sv)[:, 0].tolist() == pytest.approx(moves(pulls, targets_s), abs=1e-6)


def random_batch(seed, rows=20, vocabulary=13):
    generator = torch.Generator().manual_seed(seed)
    logits_sv = torch.randn(rows, vocabulary, generator=generator)
    targets_s = torch.randint(vocabulary, (rows,), generator=generator)
    logq_s = logits_sv.log_softmax(1).gather(1, targets_s[:, None])[:, 0]
    noise_s, reference_s, advantages_s = (torch.randn(rows, generator=generator) for _ in range(3))
    sampled = Sampled(logq_s + 0.4 * noise_s, advantages_s, logq_s + 0.3 * reference_s, torch.ones(rows))
    return logits_sv, targets_s, sampled


@pytest.mark.parametrize("kl_weight", [0.0, 0.05])
def test_the_gradient_is_that_of_autograd(kl_weight):
    logits_sv, targets_s, sampled = random_batch(0)
    objective = Grpo(kind="grpo", kl_weight=kl_weight, rollouts={"ratio_limit": 20})
    parts, gradient_sv = run(objective.criterion(targets_s, None, sampled), logits_sv)
    leaf_sv = logits_sv.double().requires_grad_()
    logq_s = leaf_sv.log_softmax(1).gather(1, targets_s[:, None])[:, 0]
    ratio_s, d_s = (logq_s - sampled.logprobs_s).exp(), sampled.reference_s - logq_s
    a_s = sampled.advantages_s
    surrogate_s = torch.minimum(ratio_s * a_s, ratio_s.clamp(0.8, 1.28) * a_s)
    reference = (kl_weight * ratio_s * (d_s.exp() - d_s - 1) - surrogate_s).sum()
    reference.backward()
    assert parts[LOSS].item() == pytest.approx(reference.item(), rel=1e-5)
    assert (gradient_sv - leaf_sv.grad).abs().max() < 1e-5
    assert 0 < parts[CLIPPED] < len(targets_s)


def test_the_kl_terms_mean_gradient_is_that_of_the_exact_kl_from_the_base():
    """Expectation over the student's tokens, weighted by their probabilities; without the ratio it would be that of
    KL(base‖student)."""
    generator = torch.Generator().manual_seed(0)
    logits_v, base_v = torch.randn(6, generator=generator), torch.randn(6, generator=generator).log_softmax(0)
    logq_v, targets_s = logits_v.log_softmax(0), torch.arange(6)
    objective = Grpo(kind="grpo", kl_weight=1.0)
    sampled = Sampled(logq_v, torch.zeros(6), base_v, torch.ones(6))
    parts_sv = run(objective.criterion(targets_s, None, sampled), logits_v.repeat(6, 1))[1]
    leaf_v = logits_v.double().requires_grad_()
    q_v = leaf_v.softmax(0)
    (q_v * (q_v.log() - base_v)).sum().backward()
    mean_v = (logq_v.exp()[:, None] * parts_sv).sum(0)
    assert (mean_v - leaf_v.grad).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 19), unique=True).map(sorted), st.integers(0, 3))
def test_splitting_a_batch_into_blocks_changes_nothing(cuts, seed):
    logits_sv, targets_s, sampled = random_batch(seed)
    criterion = Grpo(kind="grpo", kl_weight=0.1).criterion(targets_s, None, sampled)
    whole, whole_sv = run(criterion, logits_sv)
    parts, gradient_sv = run(criterion, logits_sv, cuts)
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient_sv.numpy(), whole_sv.numpy(), rtol=1e-5, atol=1e-6)
