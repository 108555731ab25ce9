"""Steps that are launched before the tokens of the one before are known: nothing that comes out tells of it.

With the reference's kernels, where a graph is run again instead of replayed; test_gpu_engine.py has the GPU's.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_checks import some_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import CONFIGS, build

from distill.engine import Completion, Engine, EngineOptions, Request, SamplingParams
from distill.engine.loading import prepare

STOPS = tuple(range(0, 500, 13))  # so many that nobody knows when a sample ends


def ahead_and_not(path: Path, **options: Any) -> tuple[Engine, Engine]:
    defaults = {"max_step_tokens": 64, "page_size": 4, "max_context": 60, "kernels": "reference"}
    model, numerics, sizes = prepare(path, EngineOptions(**defaults | options))
    ahead, plain = (Engine(model, numerics, replace(sizes, graphs=graphs)) for graphs in (True, False))
    return ahead, plain


def request(number: int, samples: int = 1, **sampling: Any) -> Request:
    params = SamplingParams(temperature=0.8, **{"stop_token_ids": STOPS, "max_new_tokens": 12} | sampling)
    return Request(
        str(number), tuple(some_tokens(3 + number % 9, seed=number)), params, 0, number, tuple(range(samples))
    )


def served(engine: Engine, requests: list[tuple[int, Request]], given_up: dict[int, str]) -> dict[Any, Completion]:
    """requests: with the step that they come in at. given_up: step → request."""
    waiting, done, step = sorted(requests, key=lambda one: one[0]), [], 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        if step in given_up:
            engine.abort(given_up[step])
        done += engine.step()
        step += 1
    assert engine._pages.free_pages == engine._pages.num_pages and not any(engine._pages.refs)
    return {(one.request_id, one.sample): one for one in done}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ahead"), CONFIGS["v3"]).path


def same(ours: dict[Any, Completion], theirs: dict[Any, Completion]) -> None:
    for key in ours.keys() & theirs.keys():
        assert (ours[key].token_ids, ours[key].finish_reason) == (theirs[key].token_ids, theirs[key].finish_reason)
        assert ours[key].logprobs == pytest.approx(theirs[key].logprobs, abs=1e-4)
        assert (ours[key].top_logprobs is None) == (theirs[key].top_logprobs is None)


def test_most_steps_are_launched_ahead(path: Path) -> None:
    engine, plain = ahead_and_not(path, max_batch=4)
    assert engine._ahead is not None
    launch, sources = engine._ahead._graphs.launch, []

    def watched(chunks: Any, draws: Any, source: Any) -> Any:
        sources.append(list(source))
        return launch(chunks, draws, source)

    engine._ahead._graphs.launch = watched  # type: ignore[method-assign]
    asked = [(0, request(i, 2, max_new_tokens=20 + i, stop_token_ids=())) for i in range(2)]
    ours, theirs = (served(one, asked, {}) for one in (engine, plain))
    assert ours.keys() == theirs.keys()
    same(ours, theirs)
    known = [all(row < 0 for row in of_step) for of_step in sources]
    assert known.count(False) > 15 and known.count(True) <= 3, "the first, and the first after some have finished"
    assert (
        engine.usage.completion_tokens
        == plain.usage.completion_tokens
        == sum(len(one.token_ids) for one in ours.values())
    )


def test_alternatives_are_of_their_own_step(path: Path) -> None:
    engine, plain = ahead_and_not(path, max_batch=4)
    asked = [(0, request(1, 2)), (3, request(2, 2, logprobs=3))]
    ours, theirs = (served(one, asked, {}) for one in (engine, plain))
    same(ours, theirs)
    for key in (("2", 0), ("2", 1)):
        for top, expected in zip(ours[key].top_logprobs or (), theirs[key].top_logprobs or (), strict=True):
            assert dict(top) == pytest.approx(dict(expected), abs=1e-4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from([None, 40, 60]), st.integers(2, 5))
def test_whatever_comes_and_goes(path: Path, seed: int, cache_tokens: int | None, max_batch: int) -> None:
    """Requests arrive and are given up at any step; with few pages, samples are preempted."""
    rng = random.Random(seed)
    asked = [(rng.randint(0, 12), request(i, rng.randint(1, 3))) for i in range(rng.randint(1, 5))]
    given_up = {rng.randint(1, 15): str(rng.randrange(len(asked)))} if rng.random() < 0.4 else {}
    ours, theirs = (
        served(one, asked, given_up) for one in ahead_and_not(path, max_batch=max_batch, cache_tokens=cache_tokens)
    )
    same(ours, theirs)
    kept = {key for key in ours.keys() | theirs.keys() if key[0] not in given_up.values()}
    assert kept <= ours.keys() & theirs.keys(), "only what was given up may be there in one alone"
