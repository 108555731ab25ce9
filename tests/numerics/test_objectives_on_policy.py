"""On-policy distillation against autograd over the whole vocabulary, by hand, and by repeated sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.objectives import Grpo, Logits, OnPolicy, Sampled, TopK
from distill.objectives.divergences import divergence
from distill.train.learn import loss

DIVERGENCES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
S, V, K = 12, 31, 6
LOSS, KL, ENTROPY, MISMATCH, CLIPPED, UNSCORED = range(6)


def objective(name="reverse_kl", beta=0.5, **fields):
    return OnPolicy(kind="on_policy", divergence=name, beta=beta, **fields)


def distributions(seed=0, rows=S, vocabulary=V):
    """Student's logits, teacher's ln p, and the tokens of the rows."""
    generator = torch.Generator().manual_seed(seed)
    logits_sv, teacher_sv = (1.5 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    return logits_sv, teacher_sv.log_softmax(1), torch.randint(vocabulary, (rows,), generator=generator)


def own(logprobs_s, own_s=None):
    zeros_s = torch.zeros_like(logprobs_s)
    return Sampled(logprobs_s, zeros_s, zeros_s, torch.ones_like(logprobs_s) if own_s is None else own_s)


def chosen(logp_sv, targets_s):
    return logp_sv.gather(1, targets_s[:, None])[:, 0]


def union(logits_sv, teacher_sv, k):
    """The k likeliest tokens of the student and of the teacher, padded with −∞."""
    ids_sk, logp_sk = torch.zeros(S, 2 * k, dtype=torch.int64), torch.full((S, 2 * k), -torch.inf)
    for s in range(S):
        ids = sorted({*teacher_sv[s].topk(k).indices.tolist(), *logits_sv[s].topk(k).indices.tolist()})
        ids_sk[s, : len(ids)], logp_sk[s, : len(ids)] = torch.tensor(ids), teacher_sv[s][ids]
    return TopK(ids_sk, logp_sk)


def run(criterion, logits_sv, cuts=(), learning=True):
    """The parts, and the gradient by the logits."""
    work_sv, total = logits_sv.clone(), 0.0
    for start, stop in zip((0, *cuts), (*cuts, len(logits_sv)), strict=True):
        total = total + criterion(work_sv[start:stop], start, stop, learning)
    return total, work_sv


def plain_divergence(name, beta, p, q):
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: (p * (p / q).log()).sum(),
        "reverse_kl": lambda: (q * (q / p).log()).sum(),
        "jsd": lambda: beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum(),
    }[name]()


def events(logp_v, ids):
    """Probabilities of some tokens and of all others together."""
    p_v = logp_v.exp()
    return torch.cat([p_v[ids], (1 - p_v[ids].sum())[None]])


# ---- the exact estimator


@pytest.mark.parametrize("name, beta", DIVERGENCES)
def test_gradients_over_the_whole_vocabulary_are_those_of_autograd(name, beta):
    logits_sv, teacher_sv, targets_s = distributions()
    logp_sk, ids_sk = teacher_sv.topk(V)
    criterion = objective(name, beta).criterion(
        targets_s, TopK(ids_sk, logp_sk), own(chosen(logits_sv.log_softmax(1), targets_s))
    )
    parts, gradient_sv = run(criterion, logits_sv)
    leaf_sv = logits_sv.double().requires_grad_()
    q_sv = leaf_sv.log_softmax(1).exp()
    reference = plain_divergence(name, beta, teacher_sv.double().exp(), q_sv)
    reference.backward()
    assert parts[LOSS].item() == pytest.approx(reference.item(), rel=1e-5)
    assert parts[KL] == parts[LOSS] and parts[UNSCORED] == 0
    assert parts[ENTROPY].item() == pytest.approx(-(q_sv * q_sv.log()).sum().item(), rel=1e-5)
    assert (gradient_sv - leaf_sv.grad).abs().max() < 1e-5


@pytest.mark.parametrize("name, beta", DIVERGENCES)
def test_gradients_on_the_likeliest_tokens_and_the_tail_are_those_of_autograd(name, beta):
    logits_sv, teacher_sv, targets_s = distributions()
    teacher = union(logits_sv, teacher_sv, K)
    assert (teacher.logprobs_sk == -torch.inf).any(), "padding is among the cases"
    criterion = objective(name, beta, top_k=K).criterion(targets_s, teacher, own(torch.full((S,), -1.0)))
    parts, gradient_sv = run(criterion, logits_sv)
    leaf_sv = logits_sv.double().requires_grad_()
    logq_sv, reference = leaf_sv.log_softmax(1), 0.0
    for s in range(S):
        ids = teacher.ids_sk[s][teacher.logprobs_sk[s] > -torch.inf]
        reference = reference + plain_divergence(
            name, beta, events(teacher_sv[s].double(), ids), events(logq_sv[s], ids)
        )
    reference.backward()
    assert parts[LOSS].item() == pytest.approx(reference.item(), rel=1e-5)
    assert (gradient_sv - leaf_sv.grad).abs().max() < 1e-5


@pytest.mark.parametrize("k", [K, V])
@pytest.mark.parametrize("name, beta", DIVERGENCES)
def test_a_teacher_that_is_the_student_gives_no_gradient(name, beta, k):
    logits_sv, _, targets_s = distributions()
    logp_sv = logits_sv.log_softmax(1)
    logp_sk, ids_sk = logp_sv.topk(k)
    criterion = objective(name, beta).criterion(targets_s, TopK(ids_sk, logp_sk), own(chosen(logp_sv, targets_s)))
    parts, gradient_sv = run(criterion, logits_sv)
    assert parts[KL].item() == pytest.approx(0, abs=1e-4)
    assert gradient_sv.abs().max() < 3e-6
    assert parts[MISMATCH].item() == pytest.approx(0, abs=1e-5)


def test_the_generalised_jsd_tends_to_the_two_divergences():
    """JSD_β / β → KL(p‖q) for β → 0, JSD_β / (1 − β) → KL(q‖p) for β → 1 (Agarwal et al. 2023, section 2)."""
    logits_sv, teacher_sv, _ = distributions()
    logp_rk, logq_rk = teacher_sv[:, :-1].double(), logits_sv.double().log_softmax(1)[:, :-1]
    for beta, scale, name in ((1e-5, 1e-5, "forward_kl"), (1 - 1e-5, 1e-5, "reverse_kl")):
        near = divergence("jsd", logp_rk, logq_rk, beta=beta)
        limit = divergence(name, logp_rk, logq_rk)
        assert torch.allclose(near[0] / scale, limit[0], rtol=1e-2)


def test_through_the_head_it_is_autograds_gradient_too(monkeypatch):
    """In blocks, with the gradients of hidden states and head."""
    monkeypatch.setattr(loss, "BLOCK", 2 * V)
    generator = torch.Generator().manual_seed(1)
    hidden_sd = torch.randn(S, 8, generator=generator).requires_grad_()
    weight_vd = torch.randn(V, 8, generator=generator).requires_grad_()
    _, teacher_sv, targets_s = distributions()
    logp_sk, ids_sk = teacher_sv.topk(V)
    criterion = objective().criterion(targets_s, TopK(ids_sk, logp_sk), own(torch.full((S,), -1.0)))
    loss.linear_loss(hidden_sd, weight_vd, None, criterion)[0].backward()
    ours = hidden_sd.grad, weight_vd.grad
    hidden_sd.grad = weight_vd.grad = None
    q_sv = (hidden_sd @ weight_vd.T).log_softmax(1).exp()
    plain_divergence("reverse_kl", 0.5, teacher_sv.exp(), q_sv).backward()
    for a, b in zip(ours, (hidden_sd.grad, weight_vd.grad), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


# ---- the sampled estimator

DRAWS, SMALL = 10_000, 8
CHI2_999 = 24.32  # 99.9 % quantile of χ² with SMALL − 1 = 7 degrees of freedom


def statistic(gradients_nv, exact_v):
    """Hotelling's T² = n (ḡ − g)ᵀ C⁺ (ḡ − g): χ² with v − 1 degrees of freedom, as gradients by logits sum to 0."""
    difference_v = gradients_nv.double().mean(0) - exact_v
    inverse_vv = torch.linalg.pinv(torch.cov(gradients_nv.double().T), rtol=1e-5, hermitian=True)
    return (len(gradients_nv) * difference_v @ inverse_vv @ difference_v).item()


@pytest.mark.parametrize("sampler", ["student", "other"])
def test_the_sampled_estimators_mean_is_the_gradient_of_the_exact_reverse_kl(sampler):
    """Over 10,000 draws, within sampling error: T² below the 99.9 % quantile. With another sampler the importance
    weights restore the expectation; without them, or without the teacher, it is far outside."""
    logits_1v, teacher_1v, _ = distributions(3, 1, SMALL)
    logq_1v = logits_1v.log_softmax(1)
    mu_v = logq_1v[0].exp() if sampler == "student" else (0.5 * logits_1v[0]).softmax(0)
    targets_n = torch.multinomial(mu_v, DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))
    leaf_1v = logits_1v.double().requires_grad_()
    plain_divergence("reverse_kl", 0.5, teacher_1v.double().exp(), leaf_1v.log_softmax(1).exp()).backward()
    exact_v = leaf_1v.grad[0]

    def gradients(logmu_v, teacher_v):
        teacher = TopK(targets_n[:, None], teacher_v[targets_n][:, None])
        fields = objective(estimator="sampled", rollouts={"ratio_limit": 1e6})
        return run(
            fields.criterion(targets_n, teacher, own(logmu_v[targets_n])), logits_1v.expand(DRAWS, SMALL).contiguous()
        )

    parts, gradients_nv = gradients(mu_v.log(), teacher_1v[0])
    assert statistic(gradients_nv, exact_v) < CHI2_999
    assert gradients_nv.mean(0).norm() > 0.1, "there is a gradient to estimate"
    ratio_n = logq_1v[0, targets_n].exp() / mu_v[targets_n]
    kl = (logq_1v[0].exp() * (logq_1v[0] - teacher_1v[0])).sum().item()
    values_n = ratio_n * (logq_1v - teacher_1v)[0, targets_n]
    assert abs(parts[LOSS].item() / DRAWS - kl) < 3.3 * values_n.std().item() / math.sqrt(DRAWS)
    assert statistic(gradients(mu_v.log(), logq_1v[0] - 1)[1], exact_v) > 100
    if sampler == "other":
        assert statistic(gradients(logq_1v[0], teacher_1v[0])[1], exact_v) > 100


def test_a_teacher_that_is_the_student_gives_no_gradient_at_any_sampled_token():
    logits_sv, _, targets_s = distributions()
    logp_s = chosen(logits_sv.log_softmax(1), targets_s)
    criterion = objective(estimator="sampled").criterion(
        targets_s, TopK(targets_s[:, None], logp_s[:, None]), own(logp_s - 0.3)
    )
    parts, gradient_sv = run(criterion, logits_sv)
    assert gradient_sv.abs().max() < 1e-6 and parts[KL].item() == pytest.approx(0, abs=1e-5)


def test_importance_weights_worked_out_by_hand():
    """Student 1/4, 3/4 everywhere. Rows: token, μ, p → ratio, weight, excess ln q − ln p.

    0: 1, 3/4, 3/8 → 1, 1, ln 2
    1: 1, 1/2, 3/8 → 3/2, 3/2, ln 2
    2: 1, 1/4, 3/8 → 3, 2 (truncated), ln 2
    3: 0, 1/2, 1/2 → 1/2, 1/2, −ln 2
    """
    logits_sv = torch.tensor([[0.0, math.log(3)]]).repeat(4, 1)
    targets_s = torch.tensor([1, 1, 1, 0])
    mu_s, p_s = torch.tensor([3 / 4, 1 / 2, 1 / 4, 1 / 2]), torch.tensor([3 / 8, 3 / 8, 3 / 8, 1 / 2])
    teacher = TopK(targets_s[:, None], p_s.log()[:, None])
    parts, gradient_sv = run(objective(estimator="sampled").criterion(targets_s, teacher, own(mu_s.log())), logits_sv)
    ln2 = math.log(2)
    assert parts[LOSS].item() == pytest.approx((1 + 1.5 + 2 - 0.5) * ln2)
    assert parts[KL].item() == pytest.approx((1 + 1 + 1 - 1) * ln2)
    assert parts[MISMATCH].item() == pytest.approx(math.log(3 / 2) + math.log(3) + ln2)
    assert parts[CLIPPED] == 1 and parts[UNSCORED] == 0
    # weight · excess · (1[y] − q): for y = 1 (−1/4, 1/4), for y = 0 (3/4, −3/4)
    expected = [-ln2 / 4, -1.5 * ln2 / 4, -2 * ln2 / 4, -0.5 * ln2 * 3 / 4]
    assert gradient_sv[:, 0].tolist() == pytest.approx(expected)
    assert gradient_sv[:, 1].tolist() == pytest.approx([-x for x in expected])


def test_an_exact_divergence_has_no_importance_weight():
    logits_sv, teacher_sv, targets_s = distributions()
    teacher = union(logits_sv, teacher_sv, K)
    near, far = (
        run(objective().criterion(targets_s, teacher, own(torch.full((S,), logp))), logits_sv) for logp in (-1.0, -9.0)
    )
    assert torch.equal(near[1], far[1]) and near[0][LOSS] == far[0][LOSS]
    assert near[0][CLIPPED] == far[0][CLIPPED] == 0 and near[0][MISMATCH] != far[0][MISMATCH]


# ---- what is known decides


def mixture():
    """One position per line of the table in the module's docstring: student's (4), teacher's (3)."""
    logits_sv, teacher_sv, targets_s = distributions(5, 7)
    ids_sk, logp_sk = torch.zeros(7, 3, dtype=torch.int64), torch.full((7, 3), -torch.inf)
    others = [[t for t in range(V) if t != y][:2] for y in targets_s.tolist()]
    known = {
        0: [others[0][0], targets_s[0].item(), others[0][1]],  # student's, several
        1: [targets_s[1].item()],  # student's, its own token
        2: [],  # student's, nothing
        3: others[3],  # student's, several, its own token not among them
        4: [targets_s[4].item(), *others[4]],  # teacher's, several
        5: [targets_s[5].item()],  # teacher's, its own token
        6: [],  # teacher's, nothing
    }
    for s, ids in known.items():
        ids_sk[s, : len(ids)], logp_sk[s, : len(ids)] = torch.tensor(ids, dtype=torch.int64), teacher_sv[s][ids]
    own_s = torch.tensor([1.0, 1, 1, 1, 0, 0, 0])
    sampled = own(chosen(logits_sv.log_softmax(1), targets_s) - 0.2, own_s)  # the weight is e^0.2
    return logits_sv, teacher_sv, targets_s, TopK(ids_sk, logp_sk), sampled, known


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_what_is_known_of_the_teacher_decides_at_each_position(estimator):
    logits_sv, teacher_sv, targets_s, teacher, sampled, known = mixture()
    parts, gradient_sv = run(objective(estimator=estimator).criterion(targets_s, teacher, sampled), logits_sv)
    leaf_sv = logits_sv.double().requires_grad_()
    logq_sv = leaf_sv.log_softmax(1)
    logq_s = chosen(logq_sv, targets_s)
    excess_s = (logq_s - chosen(teacher_sv, targets_s)).detach()
    weight = math.exp(0.2)
    exact = [0, 3, 4, 5] if estimator == "exact" else [4, 5]
    estimated = [1] if estimator == "exact" else [0, 1]
    divergences = {
        s: plain_divergence("reverse_kl", 0.5, events(teacher_sv[s].double(), known[s]), events(logq_sv[s], known[s]))
        for s in exact
    }
    surrogate = sum(divergences.values()) + sum(weight * excess_s[s] * logq_s[s] for s in estimated)
    (surrogate - logq_s[6]).backward()
    kl = sum(value.item() for value in divergences.values())
    excess = sum(excess_s[s].item() for s in estimated)
    assert parts[LOSS].item() == pytest.approx(kl + weight * excess - logq_s[6].item(), abs=1e-5)
    assert parts[KL].item() == pytest.approx(kl + excess, abs=1e-5)
    assert parts[MISMATCH].item() == pytest.approx(4 * 0.2, rel=1e-5), "of the student's tokens"
    assert parts[UNSCORED] == (1 if estimator == "exact" else 2)
    assert (gradient_sv - leaf_sv.grad).abs().max() < 1e-5
    assert (gradient_sv[2] == 0).all(), "a token without a teacher teaches nothing"


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_rows_of_the_teachers_are_learnt_as_logits_learns_them(name):
    logits_sv, _, targets_s, teacher, sampled, _ = mixture()
    teacher_only = sampled._replace(own_s=torch.zeros(7))
    expected, expected_sv = run(
        Logits(kind="logits", divergence=name).criterion(targets_s[4:], TopK(*(x[4:] for x in teacher))), logits_sv[4:]
    )
    for given_sampled in (None, Sampled(*(x_s[4:] for x_s in teacher_only))):
        criterion = objective(name).criterion(targets_s[4:], TopK(*(x[4:] for x in teacher)), given_sampled)
        parts, gradient_sv = run(criterion, logits_sv[4:])
        assert parts[LOSS].item() == pytest.approx(expected[0].item(), rel=1e-5)
        assert torch.allclose(gradient_sv, expected_sv, atol=1e-6)
        assert parts[MISMATCH] == parts[CLIPPED] == parts[UNSCORED] == 0


def test_without_a_teacher_the_traces_are_learnt_by_cross_entropy():
    logits_sv, _, targets_s = distributions()
    parts, _ = run(objective().criterion(targets_s, None), logits_sv, learning=False)
    reference = torch.nn.functional.cross_entropy(logits_sv, targets_s, reduction="sum")
    assert parts[LOSS].item() == pytest.approx(reference.item(), rel=1e-5)


# ---- blocks


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), unique=True).map(sorted),
    st.sampled_from(["exact", "sampled"]),
    st.sampled_from(["reverse_kl", "forward_kl", "jsd"]),
)
def test_splitting_a_batch_into_blocks_changes_nothing(cuts, estimator, name):
    logits_sv, _, targets_s, teacher, sampled, _ = mixture()
    name = name if estimator == "exact" else "reverse_kl"
    criterion = objective(name, estimator=estimator).criterion(targets_s, teacher, sampled)
    whole, whole_sv = run(criterion, logits_sv)
    parts, gradient_sv = run(criterion, logits_sv, cuts)
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient_sv.numpy(), whole_sv.numpy(), rtol=1e-5, atol=1e-6)
    scored, untouched_sv = run(criterion, logits_sv, cuts, learning=False)
    assert torch.equal(scored, parts), "scoring without a gradient gives the same sums"
    assert not torch.equal(untouched_sv, gradient_sv)


@pytest.mark.parametrize("kind", ["on_policy", "grpo"])
def test_one_copy_of_the_logits_is_all_the_memory(kind):
    """Peak memory of a block of 64 × 8,192 logits (2 MB in float32) beside the block."""
    rows, vocabulary = 64, 8192
    logits_sv, teacher_sv, targets_s = distributions(0, rows, vocabulary)
    logp_sk, ids_sk = teacher_sv.topk(8)
    sampled = own(torch.full((rows,), -1.0))
    criterion = (
        objective().criterion(targets_s, TopK(ids_sk, logp_sk), sampled)
        if kind == "on_policy"
        else Grpo(kind="grpo", kl_weight=0.1).criterion(targets_s, None, sampled)
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        criterion(logits_sv, 0, rows, True)
    held = peak = 0
    events_of_memory = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events_of_memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert rows * vocabulary * 4 <= peak < 1.1 * rows * vocabulary * 4
