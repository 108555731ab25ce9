"""Layers with a gated delta rule: each part of them, left out, fails parity; their states follow the same rules as
pages; the op against the rule written as matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from random_models import Checkpoint
from torch import Tensor

from distill.engine import Engine, ModelSpec, Request, SamplingParams, loading
from distill.engine.cache import state_bytes
from distill.engine.delta import turns
from distill.engine.kernels import cpu, reference
from distill.engine.weights import DeltaWeights, LayerWeights

TOKENS = some_tokens(90)
GetCheckpoint = Callable[[str], Checkpoint]


def small(checkpoint: GetCheckpoint, **options: object) -> Engine:
    return Engine.load(checkpoint("qwen3_5").path, engine_options(**{"cache_tokens": 1024, **options}))


# ---- what a model without one of its parts says


def _only_newest(conv_kn: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(conv_kn[:-1]), conv_kn[-1:]))


DELTA_PARTS: dict[str, Callable[[DeltaWeights], dict[str, object]]] = {
    "decay": lambda w: {"rate": torch.zeros_like(w.rate)},
    "decay's bias": lambda w: {"rate_bias": torch.zeros_like(w.rate_bias)},
    "convolution": lambda w: {"conv": _only_newest(w.conv)},
    "order of the taps": lambda w: {"conv": w.conv.flip(0)},
    "norm": lambda w: {"norm": torch.ones_like(w.norm)},
}


def _changed(layer: LayerWeights, part: str) -> LayerWeights:
    w = layer.attention
    return replace(layer, attention=replace(w, **DELTA_PARTS[part](w))) if isinstance(w, DeltaWeights) else layer


@pytest.mark.parametrize("part", DELTA_PARTS)
def test_a_part_of_the_rule_left_out_fails_parity(part: str, checkpoint: GetCheckpoint) -> None:
    engine = small(checkpoint, kernels="reference")
    layers = tuple(_changed(layer, part) for layer in engine._model.weights.layers)
    engine._model = replace(engine._model, weights=replace(engine._model.weights, layers=layers))
    error, report = relative_error(engine_logits(engine, TOKENS), checkpoint("qwen3_5").logits(TOKENS))
    assert error > 1e-4, report


def _rule(**changed: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The op with some of its first four arguments changed."""
    names = ("qkv", "write", "decay", "gate")

    def rule(*args: Tensor) -> Tensor:
        given = [changed.get(name, lambda x: x)(x) for name, x in zip(names, args, strict=False)]
        return reference.delta_rule(*given, *args[4:])

    return rule


OPS: dict[str, dict[str, Callable[..., object]]] = {
    "gate of the rule's output": {"delta_rule": _rule(gate=lambda x: torch.full_like(x, 1.2784645))},  # silu: 1
    "strength of writing": {"delta_rule": _rule(write=lambda x: torch.full_like(x, 30.0))},
    "decay by the token": {"delta_rule": _rule(decay=torch.zeros_like)},
    "gate of attention": {"sigmoid_gate": lambda x, gate: x},
    "rotation": {"rope": lambda *args, **kwargs: None},
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_that_leaves_a_part_out_fails_parity(name: str, checkpoint: GetCheckpoint) -> None:
    engine = small(checkpoint, kernels="reference")
    engine._model = replace(engine._model, ops=SimpleNamespace(**vars(engine._model.ops) | OPS[name]))
    error, report = relative_error(engine_logits(engine, TOKENS), checkpoint("qwen3_5").logits(TOKENS))
    assert error > 1e-4, report


def _whole_heads(spec: ModelSpec) -> ModelSpec:
    freqs = tuple(1e4 ** (-2 * i / spec.head_dim) for i in range(spec.head_dim // 2))
    return replace(spec, rope=replace(spec.rope, dim=spec.head_dim, inv_freq=freqs))


def test_whole_heads_rotated_fail_parity(checkpoint: GetCheckpoint) -> None:
    engine = small(checkpoint, kernels="reference")
    assert (engine.spec.rope.dim, engine.spec.head_dim) == (12, 24)
    engine.spec = _whole_heads(engine.spec)
    engine._model = replace(engine._model, spec=engine.spec)
    error, report = relative_error(engine_logits(engine, TOKENS), checkpoint("qwen3_5").logits(TOKENS))
    assert error > 1e-4, report


def test_norms_as_they_are_stored_fail_parity(checkpoint: GetCheckpoint) -> None:
    engine = small(checkpoint, kernels="reference")
    weights = engine._model.weights
    assert torch.equal(weights.norm_c, 1 + checkpoint("qwen3_5").tensors["model.norm.weight"])
    engine._model = replace(engine._model, weights=replace(weights, norm_c=weights.norm_c - 1))
    error, report = relative_error(engine_logits(engine, TOKENS), checkpoint("qwen3_5").logits(TOKENS))
    assert error > 1e-4, report


# ---- states


def texts(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], tuple[int, ...]]:
    done = {(c.request_id, c.sample): (c.token_ids, c.logprobs) for c in engine.generate(requests)}
    assert engine._slots is not None and engine._pages.free_pages == engine._pages.num_pages
    assert engine._slots.free_pages == engine._slots.num_pages and not any(engine._slots.refs)
    return done


def request(number: int, samples: int = 1, length: int = 40) -> Request:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=20)
    prompt = tuple(some_tokens(length, seed=number))
    return Request(f"r{number}", prompt, sampling, 3, number, tuple(range(samples)))


def test_a_batch_of_64_forks_chunks_and_preemption_give_the_bits_of_one_alone(
    checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities too, not only tokens, on the compiled kernels: 21 prompts with three or four samples each."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    requests = [request(n, 3 + (n == 0), 5 + 3 * n) for n in range(21)]
    together = texts(small(checkpoint, max_batch=64, cache_tokens=8192), requests)
    assert len(together) == 64
    alone: dict[tuple[str, int], object] = {}
    for each in requests[::4]:
        for sample in each.samples:
            alone |= texts(small(checkpoint, max_batch=1), [replace(each, samples=(sample,))])
    assert alone == {key: together[key] for key in alone}
    from distill.engine.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, s: (preempted.append(s), preempt(self, s)))
    for options in ({"max_step_tokens": 7, "max_batch": 5}, {"cache_tokens": 256, "max_context": 100}):
        assert texts(small(checkpoint, **options), requests) == together, options
    assert preempted


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 4), (33, 48, 77), tuple(range(1, 90))])
def test_any_cut_of_a_prompt_gives_the_same_bits(cuts: tuple[int, ...], checkpoint: GetCheckpoint) -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    engine = small(checkpoint, kernels="cpu")
    assert torch.equal(engine_logits(engine, TOKENS, cuts=cuts), engine_logits(engine, TOKENS))


def test_samples_share_the_state_of_their_prompt_until_they_write(checkpoint: GetCheckpoint) -> None:
    engine = small(checkpoint, max_batch=2)
    assert engine._slots is not None and engine._slots.num_pages == 3
    engine.add(request(1, samples=5))
    engine.step()  # the prompt
    assert engine._slots.free_pages == 2, "five samples share one slot"
    engine.step()  # two run
    assert engine._slots.free_pages == 0
    while engine.has_work:
        engine.step()
    assert engine._slots.free_pages == 3


def test_states_take_a_quarter_of_the_memory_at_most(
    checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer slots than sequences fewer run at once, and give the same bits."""
    requests = [request(n, samples=3, length=9) for n in range(6)]
    expected = texts(small(checkpoint, max_batch=8), requests)
    each = state_bytes(small(checkpoint).spec, 1)
    for memory, slots in ((0, 2), (4 * 3 * each, 3), (1 << 40, 9)):
        monkeypatch.setattr(loading, "host_memory", lambda memory=memory: memory)
        engine = small(checkpoint, max_batch=8)
        assert engine._slots is not None and engine._slots.num_pages == slots
        assert texts(engine, requests) == expected


def test_scores_need_a_free_state(checkpoint: GetCheckpoint) -> None:
    engine = small(checkpoint, max_batch=1)
    assert engine._slots is not None
    taken = engine._slots.allocate(2)
    with pytest.raises(
        ValueError, match="sequence 0 needs a recurrent state, and all slots are in use; raise max_batch"
    ):
        engine.score([TOKENS])
    engine._slots.release(taken)
    assert len(engine.score([TOKENS, TOKENS[:5], TOKENS[:7]])) == 3


def test_memory_of_states_is_planned(checkpoint: GetCheckpoint) -> None:
    """By hand: three layers with 3 inputs of 2·2·12 + 4·20 channels and four matrices of 12 by 20; one caches."""
    spec = small(checkpoint).spec
    assert spec.state_elements == 3 * (3 * 128 + 4 * 12 * 20)
    assert spec.cache_elements_per_token() == 2 * spec.head_dim * spec.num_kv_heads
    engine = small(checkpoint, max_batch=7)
    states = engine._cache.states
    assert sorted(states) == [0, 1, 2] and engine._cache.pools[0] == ()
    assert sum(t.numel() for both in states.values() for t in both) == 8 * spec.state_elements


# ---- the op


def test_rows_of_a_sequence_are_taken_in_order() -> None:
    """A sequence that is computed again has generated tokens before those of its prompt in the batch."""
    order = turns([7, 4, 4, 7, 7], [3, 0, 1, 1, 2], torch.device("cpu"))
    assert order.row_t.tolist() == [1, 2, 3, 4, 0]
    assert order.first_s.tolist() == [0, 2, 5] and order.slot_s.tolist() == [4, 7] and order.fresh_s.tolist() == [1, 0]


def test_the_rule_is_its_matrix_form() -> None:
    _compare(reference.delta_rule)


def test_the_compiled_rule_is_its_matrix_form_on_every_instruction_set(isa: str) -> None:
    _compare(cpu.delta_rule)
    x, gate = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cpu.sigmoid_gate(x, gate), reference.sigmoid_gate(x, gate), rtol=1e-6, atol=1e-6)


def _compare(rule: Callable[..., Tensor]) -> None:
    """S ← decay · S (I − write · k kᵀ) + write · v kᵀ and o = S q, a head and a token at a time, in float64."""
    g = torch.Generator().manual_seed(0)
    t, groups, h, d, e, taps = 9, 2, 4, 5, 3, 4
    n = 2 * groups * d + h * e
    qkv, write, decay, gate = (torch.randn(t, width, generator=g) for width in (n, h, h, h * e))
    conv, rate, bias, norm = (torch.randn(*shape, generator=g) for shape in ((taps, n), (h,), (h,), (e,)))
    rate = -rate.exp()
    pools = torch.randn(3, taps - 1, n, generator=g), torch.randn(3, h, d, e, generator=g)
    begun = [pool.double().clone() for pool in pools]
    row, first = torch.tensor([2, 5, 8, 7, 0, 1, 3, 4, 6]), torch.tensor([0, 4, 9])
    slot, fresh = torch.tensor([2, 0]), torch.tensor([0, 1])
    ours = rule(qkv, write, decay, gate, conv, rate, bias, norm, 1e-6, *pools, row, first, slot, fresh)
    for begin, end, place, anew in ((0, 4, 2, 0), (4, 9, 0, 1)):
        own = row[begin:end]
        before = torch.zeros_like(begun[0][place]) if anew else begun[0][place]
        inputs = torch.cat((before, qkv[own].double()))
        mixed = torch.stack([(inputs[i : i + taps] * conv).sum(0) for i in range(len(own))])
        mixed = mixed * mixed.sigmoid()
        q, k, v = mixed.split((groups * d, groups * d, h * e), dim=1)
        for head in range(h):
            at = slice(head // (h // groups) * d, (head // (h // groups) + 1) * d)
            state = torch.zeros(e, d).double() if anew else begun[1][place, head].T.clone()
            for i, r in enumerate(own.tolist()):
                key, query = (x[i, at] / (x[i, at].square().sum() + 1e-6).sqrt() for x in (k, q))
                beta = write[r, head].double().sigmoid()
                alpha = (rate[head] * torch.nn.functional.softplus(decay[r, head] + bias[head])).double().exp()
                value = v[i, head * e : (head + 1) * e]
                state = alpha * state @ (torch.eye(d) - beta * key[:, None] * key) + beta * value[:, None] * key
                out = state @ query * d**-0.5
                z = gate[r, head * e : (head + 1) * e].double()
                expected = out / (out.square().mean() + 1e-6).sqrt() * norm * z * z.sigmoid()
                assert torch.allclose(ours[r, head * e : (head + 1) * e].double(), expected, atol=1e-5, rtol=1e-4)
            assert torch.allclose(pools[1][place, head].double(), state.T, atol=1e-5)
        assert torch.equal(pools[0][place], inputs[1 - taps :].float())
    assert torch.equal(pools[0][1].double(), begun[0][1]) and torch.equal(pools[1][1].double(), begun[1][1])
