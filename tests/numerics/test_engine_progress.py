"""Tokens as they are drawn, and samples that are given up."""

from pathlib import Path

import pytest

from distill.engine import Engine, EngineOptions, Request, SamplingParams

TINY = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=12, logprobs=2)


def request(name, samples=(0, 1), streamed=True, params=PARAMS):
    return Request(name, (5, 6, 7), params, 0, 1, samples, streamed)


@pytest.mark.parametrize("drafts", [0, 2])
def test_progress_is_the_completion_in_parts(drafts):
    engine = Engine.load(TINY, EngineOptions(num_speculative_tokens=drafts, cache_tokens=4096))
    engine.add(request("a"))
    engine.add(request("b", streamed=False))
    parts, completions = {}, []
    while engine.has_work:
        completions += engine.step()
        for new in engine.progress():
            assert new.request_id == "a" and len(new.token_ids) == len(new.logprobs) == len(new.top_logprobs)
            parts.setdefault(new.sample, []).append(new)
    assert len(completions) == 4
    for done in (done for done in completions if done.request_id == "a"):
        made = parts[done.sample]
        for field in ("token_ids", "logprobs", "top_logprobs"):
            assert tuple(x for new in made for x in getattr(new, field)) == getattr(done, field)
    assert engine.progress() == []


def test_an_aborted_sample_is_returned_as_far_as_it_came_and_its_siblings_go_on():
    engine = Engine.load(TINY, EngineOptions(cache_tokens=4096))
    free = engine._pages.free_pages
    whole = {done.sample: done for done in engine.generate([request("whole", (0, 1, 2))])}
    engine.add(request("a", (0, 1, 2)))
    for _ in range(4):
        engine.step()
    (gone,) = engine.abort("a", 1)
    assert gone.finish_reason == "abort" and gone.sample == 1
    assert gone.token_ids == whole[1].token_ids[:4] and len(gone.logprobs) == len(gone.top_logprobs) == 4
    assert engine.abort("a", 1) == [] == engine.abort("unknown")
    rest = [done for done in iter(lambda: engine.step() if engine.has_work else None, None) for done in done]
    assert {done.sample: done.token_ids for done in rest} == {n: whole[n].token_ids for n in (0, 2)}
    assert engine._pages.free_pages == free and not engine.has_work


def test_a_request_that_has_not_begun_is_returned_empty():
    engine = Engine.load(TINY, EngineOptions(cache_tokens=4096))
    engine.add(request("a", (3, 4)))
    assert [(d.sample, d.token_ids, d.finish_reason) for d in engine.abort("a")] == [(3, (), "abort"), (4, (), "abort")]
    assert not engine.has_work
    engine.add(request("a", (3,)))  # the id is free again
    while engine.has_work:
        engine.step()
