"""The layer that drafts: equal to transformers', and never seen in the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_checks import engine_options, relative_error, some_tokens
from hypothesis import given
from hypothesis import strategies as st
from random_models import Checkpoint
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from distill.engine import Completion, Engine, Request, SamplingParams
from distill.engine.batch import Chunk
from distill.engine.kernels import cpu
from distill.engine.mtp import accepted
from distill.engine.scheduler import Scheduler

TINY_R1 = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"
TOKENS = some_tokens(60)
GetCheckpoint = Callable[[str], Checkpoint]


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    return str(request.param)


def test_drafts_are_those_of_transformers(
    kernels: str, checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the states that follow the model's, prefilled and row by row, then a draft further, on the layer's own."""
    path = checkpoint("v3-drafts").path
    # transformers knows the layer of the published model by its number, 61.
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    model = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    mtp, cache = MtpModel.from_pretrained(model).float().eval(), MtpCache(config=model.config.get_mtp_config())
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state
        position = torch.arange(1, len(TOKENS))[None]
        state = mtp.forward_layer(0, hidden[:, :-1], position, cache, input_ids=ids[:, 1:])
        first = mtp._project_to_logits(state)[0]
        token = first[-1:].argmax(-1, keepdim=True)
        state = mtp.forward_layer(0, state[:, -1:], position[:, -1:] + 1, cache, input_ids=token)
        second = mtp._project_to_logits(state)[0]

        engine = Engine.load(path, engine_options(cache_tokens=1024, kernels=kernels, num_speculative_tokens=2))
        pages = engine._pages.allocate(8)
        ours_hidden = engine._forward([], [Chunk(TOKENS, 0, pages)])
        whole = engine._batch([], [Chunk(TOKENS[1:], 0, pages)])
        state = engine._model.draft(ours_hidden[:-1], whole, engine._cache)
        prefilled = engine._model.logits(state)
        rows = [
            engine._model.draft(
                ours_hidden[p : p + 1], engine._batch([Chunk(TOKENS[p + 1 : p + 2], p, pages)], []), engine._cache
            )
            for p in range(len(TOKENS) - 1)
        ]
        by_row = engine._model.logits(torch.cat(rows))
        further = engine._batch([Chunk([int(token)], len(TOKENS) - 1, pages)], [])
        ours_second = engine._model.logits(engine._model.draft(rows[-1], further, engine._cache))
    assert first.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    for what, ours, theirs in (
        ("prefilled", prefilled, first),
        ("by row", by_row, first),
        ("further", ours_second, second),
    ):
        error, report = relative_error(ours, theirs)
        assert error <= 1e-4, f"{what}: {report}"


def run(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Completion]:
    done = {(c.request_id, c.sample): c for c in engine.generate(requests)}
    assert len(done) == sum(len(r.samples) for r in requests)
    assert engine._pages.free_pages == engine._pages.num_pages and not any(engine._pages.refs)
    return done


@pytest.mark.slow
def test_the_text_with_drafts_is_the_text_without() -> None:
    """1,000 samples of the embedded teacher, whose draft layer is trained, at four settings of the sampler: tokens and
    log-probabilities are equal, bit for bit, for one draft and for three."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels, and the text depends on batching at near-ties without: {why}")
    settings = [
        SamplingParams(temperature=t, top_p=p, top_k=k, max_new_tokens=32, stop_token_ids=(1,), logprobs=2)
        for t, p, k in ((0.0, 1.0, 0), (0.6, 0.95, 0), (1.0, 1.0, 0), (1.5, 0.8, 20))
    ]
    requests = [
        Request(str(n), (0, *some_tokens(4 + n % 30, vocab=256, seed=n)), settings[n % 4], 3, n, tuple(range(4)))
        for n in range(250)
    ]

    def completions(drafts: int) -> tuple[dict[tuple[str, int], Completion], tuple[int, int]]:
        engine = Engine.load(TINY_R1, engine_options(cache_tokens=20_000, num_speculative_tokens=drafts))
        return run(engine, requests), (engine.usage.drafts_proposed, engine.usage.drafts_accepted)

    plain, none = completions(0)
    assert none == (0, 0) and len(plain) == 1000
    for drafts in (1, 3):
        drafted, (proposed, stood) = completions(drafts)
        assert drafted == plain
        assert 0.1 * proposed < stood < proposed, f"{stood} of {proposed} drafts stood"


@pytest.mark.slow
def test_drafts_survive_company_and_lack_of_memory(
    kernels: str, checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forks whose prompt fills its last page, chunks, pages of one token, preemption: the text stays."""
    path = checkpoint("v3-drafts").path
    sampling = SamplingParams(temperature=0.9, max_new_tokens=30, stop_token_ids=(7, 8, 9))
    requests = [
        Request(str(n), tuple(some_tokens(4 + 4 * n % 29, seed=n)), sampling, 5, n, tuple(range(1 + n % 4)))
        for n in range(12)
    ]
    plain = run(Engine.load(path, engine_options(kernels=kernels, cache_tokens=8192)), requests)
    expected = {key: completion.token_ids for key, completion in plain.items()}
    preempted = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, s: (preempted.append(s), preempt(self, s)))
    for options in (
        {"cache_tokens": 8192, "page_size": 4},
        {"cache_tokens": 8192, "page_size": 1, "max_step_tokens": 7},
        {"cache_tokens": 8192, "max_batch": 3, "max_step_tokens": 5},
        {"cache_tokens": 80, "page_size": 4, "max_context": 64},
    ):
        engine = Engine.load(path, engine_options(kernels=kernels, num_speculative_tokens=2, **options))
        drafted = run(engine, requests[::-1])
        assert {key: completion.token_ids for key, completion in drafted.items()} == expected, options
        assert engine.usage.completion_tokens == sum(map(len, expected.values()))
    assert preempted, "the small cache was meant to preempt"


def test_what_stands_saves_steps() -> None:
    """The counters: tokens beyond one a step are drafts that stood."""
    engine = Engine.load(TINY_R1, engine_options(cache_tokens=4096, num_speculative_tokens=1))
    sampling = SamplingParams(temperature=0, max_new_tokens=50)
    engine.add(Request("a", (0, *some_tokens(10, vocab=256)), sampling, 0, 0, (0,)))
    steps, finished = 0, []
    while engine.has_work:
        finished += engine.step()
        steps += 1
    proposed, stood = engine.usage.drafts_proposed, engine.usage.drafts_accepted
    assert len(finished[0].token_ids) == 50 == steps + stood
    assert proposed in (steps - 1, steps - 2)  # the prompt's step has none, nor has one that can only end


@given(st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_accepted(drafts: list[int], tokens: list[int]) -> None:
    drawn = tokens[: len(drafts) + 1]
    count = accepted(drafts, drawn)
    assert 1 <= count <= len(drawn)
    assert drafts[: count - 1] == drawn[: count - 1]
    assert count == len(drawn) or drafts[count - 1] != drawn[count - 1]


@pytest.mark.parametrize(
    ("name", "count", "message"), [("qwen2", 1, "no layer that drafts"), ("v3-drafts", -1, "it must be 0 or more")]
)
def test_drafts_that_cannot_be_made(name: str, count: int, message: str, checkpoint: GetCheckpoint) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.load(checkpoint(name).path, engine_options(num_speculative_tokens=count))


def test_a_checkpoint_without_the_layer_its_config_names(checkpoint: GetCheckpoint) -> None:
    with pytest.raises(ValueError, match=r"tensor model\.layers\.3\.enorm\.weight is missing"):
        Engine.load(checkpoint("v3").path, engine_options(num_speculative_tokens=1))


def test_a_sequence_that_was_not_asked_for_is_left_alone(checkpoint: GetCheckpoint) -> None:
    """With one token to go there is nothing to propose."""
    engine = Engine.load(checkpoint("v3-drafts").path, engine_options(cache_tokens=512, num_speculative_tokens=3))
    sampling = SamplingParams(temperature=0, max_new_tokens=1)
    run(engine, [Request("a", tuple(TOKENS[:9]), sampling, 0, 0, (0, 1))])
    assert engine.usage.drafts_proposed == engine.usage.drafts_accepted == 0
    run(engine, [Request("b", tuple(TOKENS[:9]), replace(sampling, max_new_tokens=3), 0, 0, (0,))])
    assert engine.usage.drafts_proposed in (1, 2)
