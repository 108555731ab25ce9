"""What the engine promises about text: it depends on the request alone, never on company, order, chunks or memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_checks import engine_options, some_tokens
from random_models import Checkpoint
from torch import Tensor

from distill.engine import Completion, Engine, Request, SamplingParams, loading
from distill.engine.batch import Chunk
from distill.engine.kernels import cpu
from distill.engine.scheduler import Scheduler

GetCheckpoint = Callable[[str], Checkpoint]
GEMMA = ("gemma4", "gemma4-large", "gemma4-keys-as-values-shared")
SAMPLING = SamplingParams(temperature=0.9, top_p=0.95, max_new_tokens=30, stop_token_ids=(7, 8, 9))


def request(number: int, samples: int = 1, length: int | None = None, **changes: object) -> Request:
    prompt = tuple(some_tokens(length or 5 + 9 * number % 40, seed=number))
    return Request(f"r{number}", prompt, replace(SAMPLING, **changes), 11, 1000 + number, tuple(range(samples)))


def run(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Completion]:
    done = {(c.request_id, c.sample): c for c in engine.generate(requests)}
    assert len(done) == sum(len(r.samples) for r in requests)
    assert engine._pages.free_pages == engine._pages.num_pages and not any(engine._pages.refs)
    assert not engine.has_work
    return done


def texts(done: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: completion.token_ids for key, completion in done.items()}


@pytest.fixture(params=["v3-yarn", "v32", "glm-shared", "qwen2", "smollm3", "gemma4", "qwen3_5"])
def ckpt(request: pytest.FixtureRequest, checkpoint: GetCheckpoint) -> Checkpoint:
    return checkpoint(request.param)


@pytest.mark.one_in(3)
def test_a_fork_of_16_is_16_separate_runs(ckpt: Checkpoint) -> None:
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=4096))
    forked = run(engine, [request(3, samples=16)])
    assert engine.usage.prompt_tokens == len(request(3).prompt_ids), "the prompt is computed once"
    assert len(set(texts(forked).values())) == 16
    for number in range(16):
        alone = run(Engine.load(ckpt.path, engine_options(cache_tokens=1024)), [replace(request(3), samples=(number,))])
        assert texts(alone) == {("r3", number): forked["r3", number].token_ids}


@pytest.mark.one_in(3)
def test_text_does_not_depend_on_company(ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, batch size, prefill chunks, page size, and a cache so small that sequences are preempted."""
    requests = [request(number, samples=1 + number % 4) for number in range(10)]
    expected = texts(run(Engine.load(ckpt.path, engine_options(cache_tokens=8192)), requests))
    preempted = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, s: (preempted.append(s), preempt(self, s)))
    for options in (
        {"max_batch": 1},
        {"max_batch": 3, "max_step_tokens": 7},
        {"page_size": 1},
        {"page_size": 64},
        {"cache_tokens": 112, "max_context": 96},
    ):
        engine = Engine.load(ckpt.path, engine_options(**{"cache_tokens": 8192, **options}))
        assert texts(run(engine, requests[::-1])) == expected, options
    assert preempted, "the small cache was meant to preempt"


def test_greedy_ignores_seed_and_sample(ckpt: Checkpoint) -> None:
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=4096))
    greedy = texts(run(engine, [request(1, samples=3, temperature=0.0)]))
    other = texts(run(engine, [replace(request(1, temperature=0.0), seed=99)]))
    assert len(set(greedy.values())) == 1
    assert other["r1", 0] == greedy["r1", 0]


def test_seed_and_prompt_key_change_the_text(ckpt: Checkpoint) -> None:
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=4096))
    changed = [request(1), replace(request(1), seed=12), replace(request(1), prompt_key=2**64 - 1)]
    assert len({texts(run(engine, [r]))["r1", 0] for r in changed}) == 3


def test_score_agrees_with_generation(ckpt: Checkpoint) -> None:
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=4096, max_step_tokens=64))
    requests = [request(number, samples=2, logprobs=4) for number in range(6)]
    done = list(run(engine, requests).values())
    prompts = {r.id: r.prompt_ids for r in requests}
    scores = engine.score([(*prompts[c.request_id], *c.token_ids) for c in done], top_k=4)
    for completion, score in zip(done, scores, strict=True):
        count = len(completion.token_ids)
        assert len(score.logprobs) == len(prompts[completion.request_id]) + count - 1
        assert completion.logprobs == pytest.approx(score.logprobs[-count:], abs=1e-4)
        assert completion.top_logprobs is not None and score.top_logprobs is not None
        for ours, theirs in zip(completion.top_logprobs, score.top_logprobs[-count:], strict=True):
            assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-4)
            assert len(ours) == 4
    assert engine._pages.free_pages == engine._pages.num_pages


def test_score_agrees_with_transformers(ckpt: Checkpoint) -> None:
    """Several short sequences in one step, one longer than a step, one of a single token."""
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=512, max_step_tokens=50))
    sequences = [some_tokens(n, seed=n) for n in (12, 30, 1, 130, 2, 49)]
    for tokens, score in zip(sequences, engine.score(sequences), strict=True):
        expected = ckpt.logits(tokens)[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        assert score.top_logprobs is None


def test_score_lists_the_ids_that_are_given(ckpt: Checkpoint) -> None:
    """Among the likeliest, in order, each once: of every combination what the whole distribution says."""
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=512, max_step_tokens=50))
    vocab, sequences = engine.spec.vocab_size, [some_tokens(n, seed=n) for n in (12, 1, 130, 2)]
    draw = random.Random(0)
    ids = [
        [
            [*draw.choices(range(vocab), k=draw.randrange(6)), *[tokens[t + 1]] * draw.randrange(3)]
            for t in range(len(tokens) - 1)
        ]
        for tokens in sequences
    ]
    whole = engine.score(sequences, vocab)
    for top_k in (0, 3, vocab):
        for number, score in enumerate(engine.score(sequences, top_k, ids)):
            assert score.logprobs == whole[number].logprobs
            assert score.top_logprobs is not None and len(score.top_logprobs) == len(sequences[number]) - 1
            every = whole[number].top_logprobs
            assert every is not None
            for listed, likeliest, given in zip(score.top_logprobs, every, ids[number], strict=True):
                assert dict(listed) == {i: p for rank, (i, p) in enumerate(likeliest) if rank < top_k or i in given}
                assert [p for _, p in listed] == sorted((p for _, p in listed), reverse=True)
    (plain, given) = engine.score(sequences[:1], 3)[0], engine.score(sequences[:1], 3, [[()] * 11])[0]
    assert given.top_logprobs == plain.top_logprobs
    (same,) = engine.score(sequences[:1], 0, [np.array(sequences[0][1:])[:, None]])
    assert [top[0][1] for top in same.top_logprobs or ()] == list(same.logprobs)
    (end,) = engine.score(sequences[:1], 0, [np.array(sequences[0][5:])[:, None]], after=[5])
    assert end.logprobs == pytest.approx(same.logprobs[4:], abs=1e-5)
    assert [top[0] for top in end.top_logprobs or ()] == list(zip(sequences[0][5:], end.logprobs, strict=True))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[[1]] * 3], "ids are given for 1 sequences and there are 2"),
        ([[[1]] * 3, [[1]] * 3], "sequence 1 has 2 tokens to score and ids for 3 positions; give ids for each"),
        ([[[1]] * 3, [[1], [-2]]], "sequence 1 is to be scored for token ids from -2 to 1"),
        ([[[1], [], [1 << 40]], [[], []]], "the vocabulary has 300"),
    ],
)
def test_score_refuses_ids_that_do_not_fit(ids: list[list[list[int]]], words: str, checkpoint: GetCheckpoint) -> None:
    engine = Engine.load(checkpoint("qwen2").path, engine_options(cache_tokens=512))
    with pytest.raises(ValueError, match=words):
        engine.score([[1, 2, 3, 4], [1, 2, 3]], 2, ids)
    assert engine._pages.free_pages == engine._pages.num_pages


def test_stop_tokens_and_lengths(ckpt: Checkpoint) -> None:
    done = run(Engine.load(ckpt.path, engine_options(cache_tokens=8192)), [request(n, samples=4) for n in range(12)])
    reasons = {c.finish_reason for c in done.values()}
    assert reasons == {"stop", "length"}
    for completion in done.values():
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.top_logprobs is None
        stopped = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] in SAMPLING.stop_token_ids) == stopped
        assert not set(completion.token_ids[:-1]) & set(SAMPLING.stop_token_ids)
        assert stopped or len(completion.token_ids) == SAMPLING.max_new_tokens


def test_one_token_prompt_and_one_new_token(ckpt: Checkpoint) -> None:
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=64))
    done = run(engine, [request(1, samples=3, length=1, max_new_tokens=1)])
    assert [len(c.token_ids) for c in done.values()] == [1, 1, 1]
    assert engine.usage.completion_tokens == 3


def test_generate_pulls_lazily_and_cleans_up(ckpt: Checkpoint) -> None:
    pulled = 0

    def endless() -> Iterator[Request]:
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            yield request(number)

    engine = Engine.load(ckpt.path, engine_options(cache_tokens=4096, max_batch=4))
    completions = engine.generate(endless())
    assert len({c.request_id for c in itertools.islice(completions, 10)}) == 10
    assert pulled < 40
    completions.close()
    assert not engine.has_work
    assert engine._pages.free_pages == engine._pages.num_pages
    assert texts(run(engine, [request(5)])) == texts(
        run(Engine.load(ckpt.path, engine_options(cache_tokens=4096)), [request(5)])
    )


def test_abort_frees_pages_and_forgets_the_id(ckpt: Checkpoint) -> None:
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=4096))
    engine.add(request(1, samples=5))
    engine.add(request(2))
    for _ in range(3):
        engine.step()
    engine.abort("r1")
    engine.abort("never heard of")
    finished = []
    while engine.has_work:
        finished += engine.step()
    assert {c.request_id for c in finished} == {"r2"}
    assert engine._pages.free_pages == engine._pages.num_pages
    engine.add(request(1))
    engine.abort("r1")
    assert engine.step() == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(request(1), prompt_ids=()), "no tokens"),
        (replace(request(1), prompt_ids=(1, 300)), "vocabulary has 300"),
        (replace(request(1), samples=()), "samples"),
        (replace(request(1), samples=(1, 1)), "samples"),
        (request(1, length=90), "prompt of 90 tokens.*generate 30.*context of 100; lower max_new_tokens to 10"),
        (request(1, length=100), "prompt of 100 tokens.*shorten the prompt or leave it out"),
        (request(1, length=60), "90 tokens of cache.*raise memory_budget or lower max_new_tokens"),
    ],
)
def test_requests_that_cannot_be_served(bad: Request, message: str, checkpoint: GetCheckpoint) -> None:
    engine = Engine.load(checkpoint("qwen2").path, engine_options(max_context=100, cache_tokens=96))
    with pytest.raises(ValueError, match=message) as caught:
        engine.add(bad)
    assert "\n" not in str(caught.value)
    assert not engine.has_work


@pytest.mark.parametrize("memory_budget", [None, 1 << 28])
def test_a_request_of_the_whole_context_fits_into_the_default_cache(
    memory_budget: int | None, checkpoint: GetCheckpoint
) -> None:
    options = engine_options(max_context=64, max_batch=1, memory_budget=memory_budget)
    engine = Engine.load(checkpoint("qwen2").path, options)
    assert engine.max_context == 64
    (done,) = run(engine, [request(1, length=34)]).values()
    assert len(done.token_ids) == 30


def test_the_context_is_what_the_default_cache_has_room_for(
    checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_DEFAULT_LONG_CONTEXT", 50)
    monkeypatch.setattr(loading, "_DEFAULT_CACHE_BYTES", 1)
    monkeypatch.setattr(loading, "host_memory", lambda: 1)
    engine = Engine.load(checkpoint("qwen2").path, engine_options(max_context=64))
    assert engine.max_context == 50
    engine.add(request(1, length=20))
    with pytest.raises(ValueError, match="more than the context of 50; lower max_new_tokens to 29"):
        engine.add(request(2, length=21))


def test_requests_are_pulled_while_others_are_queued(checkpoint: GetCheckpoint) -> None:
    engine = Engine.load(checkpoint("qwen2").path, engine_options(max_batch=1, cache_tokens=512))
    engine.add(request(1))
    assert {done.request_id for done in engine.generate([request(2)])} == {"r1", "r2"}


def test_an_id_is_queued_once(checkpoint: GetCheckpoint) -> None:
    engine = Engine.load(checkpoint("qwen2").path, engine_options(cache_tokens=512))
    engine.add(request(1))
    with pytest.raises(ValueError, match="'r1' is already queued"):
        engine.add(request(1))


def test_sequences_that_cannot_be_scored(checkpoint: GetCheckpoint) -> None:
    engine = Engine.load(checkpoint("qwen2").path, engine_options(max_context=100, cache_tokens=64))
    for bad, message in (
        ([], "sequence 1 has no tokens"),
        ([1] * 101, "101 tokens"),
        ([1] * 99, "raise memory_budget"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.score([[1, 2, 3], bad])
    assert engine._pages.free_pages == engine._pages.num_pages


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"page_size": 0},
        {"max_step_tokens": 0},
        {"cache_tokens": 3},
        {"cache_tokens": 2**31},
        {"max_context": 9999},
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, int], checkpoint: GetCheckpoint) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine.load(checkpoint("qwen2").path, engine_options(**options))


@pytest.mark.one_in(11)
@pytest.mark.parametrize("name", ["v3-yarn", "v3-no-q-lora", "v32", "glm-shared", "llama-gqa", "smollm3", *GEMMA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kernels_give_the_same_bits_in_any_company(
    name: str, dtype: torch.dtype, checkpoint: GetCheckpoint
) -> None:
    """Alone, among 63 others, in chunks, forked, and recomputed after preemption: every log-probability is equal."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    path = checkpoint(name).path
    sampling = SamplingParams(temperature=1.0, max_new_tokens=24)

    def request(number: int, samples: tuple[int, ...] = (0,)) -> Request:
        prompt = tuple(some_tokens(3 + 5 * (number % 9), seed=number))
        return Request(str(number), prompt, sampling, seed=5, prompt_key=number, samples=samples)

    def run(requests: list[Request], **options: int) -> dict[tuple[str, int], Completion]:
        engine = Engine.load(path, engine_options(dtype=dtype, kernels="cpu", **options))
        done = {(c.request_id, c.sample): c for c in engine.generate(requests)}
        assert engine._pages.free_pages == engine._pages.num_pages
        return done

    together = run([request(number) for number in range(64)], cache_tokens=8192)
    in_chunks = run([request(number) for number in range(64)], cache_tokens=8192, max_step_tokens=7, max_batch=16)
    preempted = run([request(number) for number in range(64)], cache_tokens=160, page_size=8)
    forked = run([request(8, tuple(range(16)))], cache_tokens=8192)
    assert together == in_chunks == preempted
    for number in (0, 8, 40):
        assert run([request(number)], cache_tokens=8192).items() <= together.items()
    assert forked["8", 0] == together["8", 0]


@pytest.mark.parametrize(
    "name", ["v3-yarn", "v2-lite", "v32", "glm", "glm-shared", "llama-gqa", "qwen3", "smollm3", *GEMMA]
)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@torch.inference_mode()
def test_rows_that_nobody_asked_for(name: str, kernels: str, checkpoint: GetCheckpoint) -> None:
    """The last layer leaves them out; the others, and what is read from the cache later, are as if it had not."""
    if kernels == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    engine = Engine.load(checkpoint(name).path, engine_options(kernels=kernels, cache_tokens=1024))
    tokens = [some_tokens(60, seed=seed) for seed in range(4)]
    pages = [engine._pages.allocate(engine._pages.pages_for(60)) for _ in tokens]

    def chunk(number: int, start: int, end: int) -> Chunk:
        return Chunk(tokens[number][start:end], start, pages[number])

    def run(leave_out: bool) -> list[Tensor]:
        ends = [[False], [False, True, True], [False]] if leave_out else [None] * 3
        return [
            engine._forward([], [chunk(0, 0, 40)], ends[0]),  # nothing is asked for at all
            engine._forward([chunk(0, 40, 41)], [chunk(1, 0, 30), chunk(2, 0, 50), chunk(3, 0, 1)], ends[1]),
            engine._forward([chunk(0, 41, 42), chunk(2, 50, 51)], [chunk(1, 30, 60)], ends[2]),
        ]

    (_, second, third), (nothing, some, last) = run(False), run(True)
    assert nothing.shape == (0, second.shape[1])
    tolerance = 0 if kernels == "cpu" else 1e-5
    torch.testing.assert_close(some, second[[0, 80, 81]], rtol=0, atol=tolerance * second.abs().max().item())
    torch.testing.assert_close(last, third[:2], rtol=0, atol=tolerance * third.abs().max().item())
