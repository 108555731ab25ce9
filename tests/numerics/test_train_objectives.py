"""Learning from distributions: each divergence computes what it says, by hand and by autograd; alignment by text."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.objectives import Logits
from distill.objectives.divergences import divergence
from distill.train.learn import loss
from distill.train.rows.align import Projector, Vocabulary, byte_symbols, common, logaddexp
from distill.train.rows.batches import Row, collate
from distill.train.rows.teacher import Teaching

NAMES = ("forward_kl", "reverse_kl", "jsd")
P, Q = [0.5, 0.25], [0.25, 0.5]  # of two events; the tail has 0.25 in both


def by_hand(name, p, q):
    """Over whole distributions, the tail being one of the events."""
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kl = {
        "forward_kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "reverse_kl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
    }
    half = [sum(a * math.log(a / b) for a, b in zip(x, m, strict=True)) / 2 for x in (p, q)]
    return kl.get(name, sum(half))


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_worked_out_by_hand(name):
    value, *_ = divergence(name, torch.tensor([P]).log(), torch.tensor([Q]).log())
    # ½ ln 2 − ¼ ln 2, both ways; and for the mean of the two, ½ ln 4/3 + ¼ ln 2/3 twice halved
    expected = {"forward_kl": 0.25 * math.log(2), "reverse_kl": 0.25 * math.log(2)}
    expected["jsd"] = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert value.item() == pytest.approx(expected[name], rel=1e-5)
    assert expected[name] == pytest.approx(by_hand(name, [*P, 0.25], [*Q, 0.25]))


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_do_not_diverge_and_others_do(name):
    p = torch.tensor([[0.6, 0.3]]).log()
    assert divergence(name, p, p)[0].item() == pytest.approx(0, abs=1e-6)
    apart = divergence(name, p, torch.tensor([[1e-4, 1e-4]]).log())[0].item()
    assert apart > 0.5 and (name != "jsd" or apart < math.log(2))


def test_forward_covers_and_reverse_leaves():
    """A student that misses a mode of the teacher's costs much forwards; one that makes up a mode, backwards."""
    both, one = torch.tensor([[0.49, 0.49]]).log(), torch.tensor([[0.97, 0.01]]).log()
    missing = [divergence(name, both, one)[0].item() for name in ("forward_kl", "reverse_kl")]
    making_up = [divergence(name, one, both)[0].item() for name in ("forward_kl", "reverse_kl")]
    assert missing[0] > missing[1] and making_up[1] > making_up[0]


S, V, D, K = 9, 31, 8, 4


def setting(divergence_name, weight, temperature=1.0, unknown=(2, 5)):
    generator = torch.Generator().manual_seed(0)
    hidden_sd = torch.randn(S, D, generator=generator).requires_grad_()
    weight_vd = torch.randn(V, D, generator=generator).requires_grad_()
    teacher_sv = (2 * torch.randn(S, V, generator=generator)).log_softmax(1)
    logp_sk, ids_sk = teacher_sv.topk(K)
    logp_sk[1, 2:] = -torch.inf  # fewer are known there
    for s in unknown:
        logp_sk[s] = -torch.inf
    draw = np.random.default_rng(0)
    teaching = Teaching(ids_sk.numpy().astype(np.int32), logp_sk.numpy(), 0.0)
    batch = collate([teaching.with_row(Row(("p", 0), draw.integers(0, V, S + 3).astype(np.int32), 3))])
    objective = Logits(kind="logits", divergence=divergence_name, weight=weight, temperature=temperature, top_k=K)
    criterion = objective.criterion(batch.targets_s, batch.teacher)
    return hidden_sd, weight_vd, batch, criterion, logp_sk, ids_sk


def plain_divergence(name, p, q):
    m = (p + q) / 2
    return {
        "forward_kl": lambda: (p * (p / q).log()).sum(),
        "reverse_kl": lambda: (q * (q / p).log()).sum(),
        "jsd": lambda: ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
    }[name]()


def within(name, p, q, temperature):
    """The divergence inside the top k by the chain rule: of tempered distributions, each part times its mass."""
    masses = p.sum(), q.sum()
    soft_p, soft_q = (x / x.sum() for x in (p.pow(1 / temperature), q.pow(1 / temperature)))
    m = (masses[0] * soft_p + masses[1] * soft_q) / (masses[0] + masses[1])
    return {
        "forward_kl": lambda: masses[0] * (soft_p * (soft_p / soft_q).log()).sum(),
        "reverse_kl": lambda: masses[1] * (soft_q * (soft_q / soft_p).log()).sum(),
        "jsd": lambda: (
            (masses[0] * (soft_p * (soft_p / m).log()).sum() + masses[1] * (soft_q * (soft_q / m).log()).sum()) / 2
        ),
    }[name]()


def plainly(name, weight, temperature, logits_sv, batch, logp_sk, ids_sk):
    """The same by whole distributions over the events, and autograd."""
    logq_sv = logits_sv.double().log_softmax(1)
    nll = -logq_sv[torch.arange(S), batch.targets_s]
    total = 0.0
    for s in range(S):
        known = logp_sk[s] > -torch.inf
        value = nll[s]
        if known.any():
            p, q = logp_sk[s][known].double().exp(), logq_sv[s][ids_sk[s][known]].exp()
            if temperature == 1:
                value = plain_divergence(name, *(torch.cat([x, (1 - x.sum())[None]]) for x in (p, q)))
            else:
                together = [torch.stack([x.sum(), 1 - x.sum()]) for x in (p, q)]
                value = plain_divergence(name, *together) + temperature**2 * within(name, p, q, temperature)
        total = total + weight * value + (1 - weight) * nll[s]
    return total


@pytest.mark.parametrize("block", [10**9, V * 2])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_autograd_on_whole_distributions(monkeypatch, name, temperature, weight, block):
    monkeypatch.setattr(loss, "BLOCK", block)
    hidden_sd, weight_vd, batch, criterion, logp_sk, ids_sk = setting(name, weight, temperature)
    parts = loss.linear_loss(hidden_sd, weight_vd, None, criterion)
    parts[0].backward()
    ours = [hidden_sd.grad, weight_vd.grad]
    hidden_sd.grad = weight_vd.grad = None
    reference = plainly(name, weight, temperature, hidden_sd @ weight_vd.T, batch, logp_sk, ids_sk)
    reference.backward()
    assert parts[0].item() == pytest.approx(reference.item(), rel=1e-5)
    assert parts[0].item() == pytest.approx((weight * parts[2] + (1 - weight) * parts[1]).item(), rel=1e-6)
    for a, b in zip(ours, [hidden_sd.grad, weight_vd.grad], strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max(), f"{(a - b).abs().max():.2e} of {b.abs().max():.2e}"


@pytest.mark.parametrize("masses", [(0.02, 0.02), (0.02, 0.6), (0.9, 0.3)])
@pytest.mark.parametrize("beta", [0.5, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_near_1_is_the_plain_divergence(name, beta, masses):
    """However little of the mass is in the top k: what is inside it counts as much as it has."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.7, 0.2, 0.1], [0.15, 0.25, 0.6]))
    given = [(mass * x)[None].log() for mass, x in zip(masses, (p, q), strict=True)]
    plain = divergence(name, *given, beta=beta)
    for near in (1 - 1e-6, 1 + 1e-6):
        for ours, theirs in zip(divergence(name, *given, temperature=near, beta=beta), plain, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * plain[1].abs().max().item())
    assert plain[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_known_it_is_cross_entropy(name):
    hidden_sd, weight_vd, _, criterion, *_ = setting(name, 1.0, unknown=range(S))
    total, sft, logits = loss.linear_loss(hidden_sd, weight_vd, None, criterion).tolist()
    assert total == pytest.approx(sft) == pytest.approx(logits)


def test_forward_kl_is_cross_entropy_less_the_teachers_entropy_in_the_mean():
    """Over what the teacher samples; which is why the two are at one scale and may be mixed."""
    torch.manual_seed(0)
    teacher_v, student_v = (torch.randn(6).log_softmax(0) for _ in range(2))
    logp, order = teacher_v.topk(5)
    kl = divergence("forward_kl", logp[None], student_v[order][None])[0].item()
    cross = -(teacher_v.exp() * student_v).sum().item()
    entropy = -(teacher_v.exp() * teacher_v).sum().item()
    assert kl == pytest.approx(cross - entropy, rel=1e-4)


# ---- alignment


def vocabulary(*pieces, stops=()):
    return Vocabulary([piece.encode() for piece in pieces], frozenset(stops))


def projector(teacher, student, end):
    """The student's tokeniser takes the longest piece that fits."""

    def encode(text):
        ids, rest = [], text.encode()
        while rest:
            fitting = [i for i, piece in enumerate(student.pieces) if piece and rest.startswith(piece)]
            ids.append(max(fitting, key=lambda i: len(student.pieces[i])))
            rest = rest[len(student.pieces[ids[-1]]) :]
        return ids

    return Projector(teacher, student, end, encode)


TEACHER = vocabulary("<end>", "hel", "lo", "a", " b", "bye", stops=[0])
STUDENT = vocabulary("hello", "a", " ", "b", "by", "e", "<stop>", "h", "e", "l", "lo", stops=[6])


def probabilities(masses):
    return {id_: round(math.exp(logprob), 6) for id_, logprob in masses.items()}


def test_alignment_worked_out_by_hand():
    """Teacher: hel·lo·a·␣b·end. Student: hello·a·␣·b·stop."""
    log = math.log
    logprobs = [log(0.5), log(0.8), log(0.6), log(0.9), log(0.7)]
    tops = [
        [(1, log(0.5)), (5, log(0.3)), (3, log(0.1))],  # hel, bye, a
        [(2, log(0.8)), (3, log(0.1))],
        [(3, log(0.6)), (0, log(0.2)), (1, log(0.1))],  # a, the end, hel
        [(4, log(0.9)), (3, log(0.05))],  # ␣b, a
        [(0, log(0.7)), (3, log(0.2))],
    ]
    found = projector(TEACHER, STUDENT, 6).project(b"", [1, 2, 3, 4, 0], logprobs, tops, [0, 1, 2, 3, 6])
    assert probabilities(found[0]) == {0: 0.4, 4: 0.3, 1: 0.1}  # hello: 0.5 · 0.8; bye begins with `by`; a is a
    assert probabilities(found[1]) == {1: 0.6, 6: 0.2, 7: 0.1}  # the end is the student's end; hel begins with h there
    assert probabilities(found[2]) == {2: 0.9, 1: 0.05}  # ␣b begins with a blank
    assert found[3] is None  # inside ␣b
    assert probabilities(found[4]) == {6: 0.7, 1: 0.2}


def test_what_the_teacher_was_given_has_no_distribution():
    found = projector(TEACHER, STUDENT, 6).project(b"hello", [3, 0], [0.0, 0.0], [[(3, 0.0)], [(0, 0.0)]], [0, 1, 6])
    assert found[0] is None and probabilities(found[1]) == {1: 1.0} and probabilities(found[2]) == {6: 1.0}


def test_after_a_difference_between_the_texts_nothing_is_said():
    tops = [[(3, 0.0)], [(5, 0.0)], [(0, 0.0)]]
    found = projector(TEACHER, STUDENT, 6).project(b"", [3, 5, 0], [0.0] * 3, tops, [1, 1, 6])  # `abye` against `aa`
    assert probabilities(found[0]) == {1: 1.0} and found[1:] == [None, None]


def assert_same(arrays, projected):
    """What `arrays` returns is what `project` does."""
    ids, logprobs = arrays
    for row, values, masses in zip(ids.tolist(), logprobs.tolist(), projected, strict=True):
        known = {id_: value for id_, value in zip(row, values, strict=True) if value > -math.inf}
        assert known == pytest.approx(masses or {}, abs=1e-5)
        assert values == sorted(values, reverse=True)


@given(st.data())
def test_arrays_of_parts_that_only_one_prompt_has_opened(data):
    """The teacher's own token is always a candidate; what one prompt has opened, the other's text begins with."""
    text = data.draw(st.text(alphabet="ab", min_size=3, max_size=12))
    teacher, student = (
        vocabulary("<end>", "a", "b", "ab", "ba", stops=[0]),
        vocabulary("<end>", "a", "b", "bb", stops=[0]),
    )
    split = data.draw(st.integers(0, 2))
    opens = data.draw(st.booleans())
    whole = projector(teacher, teacher, 0)._encode, projector(student, student, 0)._encode
    theirs, ours = whole[0](text[split:] if opens else text), whole[1](text if opens else text[split:])
    given, skipped = (text[:split].encode(), b"") if opens else (b"", text[:split].encode())
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids = np.stack([draw.permutation(5)[:2] for _ in [*theirs, 0]]).astype(np.int32)
    values = np.log(np.sort(draw.uniform(0.05, 0.4, ids.shape), 1)[:, ::-1]).astype(np.float32)
    own = np.log(draw.uniform(0.01, 0.04, len(ids))).astype(np.float32)
    for place, token in enumerate([*theirs, 0]):
        if token in ids[place]:
            own[place] = values[place][ids[place] == token][0]
    tops = [
        [*zip(row, logprobs, strict=True), *([] if token in row else [(token, logprob)])]
        for row, logprobs, token, logprob in zip(ids.tolist(), values.tolist(), [*theirs, 0], own.tolist(), strict=True)
    ]
    both = projector(teacher, student, 0)
    projected = both.project(given, [*theirs, 0], own.tolist(), tops, [*ours, 0], skipped)
    assert_same(both.arrays(given, [*theirs, 0], own, ids, values, [*ours, 0], skipped), projected)
    assert projected[-1] is not None


def test_log_probabilities_are_listed_once_however_long_the_text():
    """The student's tokens are longer than the teacher's everywhere."""

    class Counted(np.ndarray):
        listed = 0

        def tolist(self):
            Counted.listed += 1
            return super().tolist()

    teacher, student = vocabulary("<end>", "a", stops=[0]), vocabulary("<end>", "a", "aa", stops=[0])
    completion = [1] * 20 + [0]
    ids = np.array(completion, np.int32)[:, None]
    own = np.full(21, -0.5, np.float32)
    given = own.view(Counted), ids, own[:, None], [2] * 10 + [0]
    got, logprobs = projector(teacher, student, 0).arrays(b"", completion, *given)
    assert got[:, 0].tolist() == [2] * 10 + [0] and logprobs[:, 0].tolist() == [-1.0] * 10 + [-0.5]
    assert Counted.listed == 1


def test_an_id_of_a_padded_embedding_has_no_text():
    """A student that samples may write one; the teacher says what it expects in its place."""
    tops = [[(3, 0.0)], [(0, 0.0)]]
    found = projector(TEACHER, STUDENT, 6).project(b"", [3, 0], [0.0, 0.0], tops, [1, 11, 6])
    assert [probabilities(masses) for masses in found] == [{1: 1.0}, {6: 1.0}, {6: 1.0}]
    found = projector(TEACHER, STUDENT, 6).project(b"", [3, 6, 0], [0.0] * 3, [*tops, [(0, 0.0)]], [1, 6])
    assert probabilities(found[0]) == {1: 1.0}  # the teacher's own


@given(st.lists(st.sampled_from([3, 5, 1, 2]), min_size=1, max_size=8), st.data())
def test_one_tokenizer_is_the_identity(completion, data):
    k = data.draw(st.integers(1, 4))
    tops = [
        [(id_, -float(i + 1)) for i, id_ in enumerate(data.draw(st.permutations(range(6)))[:k])] for _ in completion
    ]
    same = vocabulary("<end>", "hel", "lo", "a", " b", "bye", stops=[0])
    found = projector(TEACHER, same, 0).project(b"", completion, [0.0] * len(completion), tops, completion)
    assert found == [dict(top) for top in tops]


@given(st.text(alphabet="ab ", min_size=1, max_size=30), st.data())
def test_masses_are_never_more_than_the_teacher_has(text, data):
    """Whatever two tokenisers cut a text into: no distribution sums to more than one; the text's own token is in it."""
    teacher, student = (
        vocabulary(
            "<end>", *sorted({"a", "b", " ", *data.draw(st.sets(st.text("ab ", min_size=2, max_size=4)))}), stops=[0]
        )
        for _ in range(2)
    )
    ours, theirs = (projector(v, v, 0)._encode(text) for v in (student, teacher))
    tops, logprobs = [], []
    for id_ in [*theirs, 0]:
        weights = data.draw(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
        ids = list(dict.fromkeys([id_, *data.draw(st.permutations(range(len(teacher.pieces))))]))[:3]
        top = [(i, math.log(w / (sum(weights) + 0.1))) for i, w in zip(ids, weights, strict=False)]
        tops.append(top)
        logprobs.append(top[0][1])
    found = projector(teacher, student, 0).project(b"", [*theirs, 0], logprobs, tops, [*ours, 0])
    ids = np.array([[id_ for id_, _ in top] for top in tops], np.int32)
    values = np.array([[logprob for _, logprob in top] for top in tops], np.float32)
    given = b"", [*theirs, 0], np.array(logprobs, np.float32), ids, values, [*ours, 0]
    assert_same(projector(teacher, student, 0).arrays(*given), found)
    for id_, masses in zip([*ours, 0], found, strict=True):
        if masses is not None:
            assert sum(math.exp(logprob) for logprob in masses.values()) < 1 + 1e-6
            assert id_ in masses
    assert found[0] is not None or len(teacher.pieces[theirs[0]]) != len(student.pieces[ours[0]])


def test_small_helpers():
    assert math.exp(logaddexp(math.log(0.2), math.log(0.3))) == pytest.approx(0.5)
    assert logaddexp(-math.inf, -2.0) == -2.0
    assert [common(a, b) for a, b in ((b"abc", b"abd"), (b"", b"a"), (b"ab", b"ab"), (b"x", b"y"))] == [2, 0, 2, 0]
    symbols = byte_symbols()
    assert len(set(symbols)) == 256 and symbols[ord("a")] == "a" and symbols[ord(" ")] == "Ġ" and symbols[10] == "Ċ"
