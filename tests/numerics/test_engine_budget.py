"""A thinking budget: the block is closed once, where it is open, and everything else is drawn as ever."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.engine import Engine, EngineOptions, Request, SamplingParams
from distill.engine.options import ThinkTokens

TINY = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"
BEGIN, END = 558, 559
CLOSING = (198, 559, 198, 198)
PROMPT = (
    554,
    556,
    516,
    268,
    220,
    335,
    261,
    365,
    259,
    336,
    30,
    557,
    558,
    198,
)  # a sum, block open


def params(budget, opened=True, **more):
    think = ThinkTokens(opened, BEGIN, END, CLOSING)
    values = {"temperature": 0.6, "max_new_tokens": 120, "stop_token_ids": (555,), "logprobs": 3} | more
    return SamplingParams(**values, thinking_budget=budget, think_tokens=think)


def run(sampling, options=EngineOptions(cache_tokens=8192), samples=(0, 1, 2), others=0):  # noqa: B008  it is frozen
    engine = Engine.load(TINY, options)
    requests = [Request("a", PROMPT, sampling, 0, 7, samples)]
    requests += [Request(f"o{i}", PROMPT, SamplingParams(max_new_tokens=30), 0, 100 + i, (0,)) for i in range(others)]
    made = [done for done in engine.generate(requests) if done.request_id == "a"]
    return engine, {done.sample: done for done in made}


def test_the_block_is_closed_at_the_budget_and_the_tokens_before_are_the_same():
    _, whole = run(params(None))
    for budget in (1, 5, 20):
        _, cut = run(params(budget))
        for sample, done in cut.items():
            assert whole[sample].token_ids.index(END) > budget + 1
            assert done.token_ids[:budget] == whole[sample].token_ids[:budget]
            assert done.token_ids[budget : budget + 4] == CLOSING
            assert done.finish_reason == "stop" and len(done.token_ids) > budget + 5


def test_a_block_that_is_closed_in_time_stays_as_it_is():
    _, whole = run(params(None))
    end = max(done.token_ids.index(END) for done in whole.values())
    assert run(params(end + 1))[1] == whole
    assert run(params(5, opened=False))[1] == whole  # no block is open
    assert run(params(500))[1] == whole


def test_probabilities_of_the_closing_are_the_models_own():
    engine, cut = run(params(6))
    for done in cut.values():
        (scores,) = engine.score([[*PROMPT, *done.token_ids]], 3)
        assert done.logprobs == pytest.approx(scores.logprobs[len(PROMPT) - 1 :], abs=2e-3)
        assert min(done.logprobs[6:10]) < -1  # the model would have gone on


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(cache_tokens=8192, num_speculative_tokens=2),
        EngineOptions(cache_tokens=8192, max_batch=2),
        EngineOptions(cache_tokens=112, page_size=8, max_batch=8),  # some are preempted
    ],
    ids=["drafts", "small batch", "few pages"],
)
@pytest.mark.parametrize("budget", [3, 11])
def test_drafts_batches_and_preemption_change_nothing(options, budget):
    sampling = params(budget, max_new_tokens=60)
    _, alone = run(sampling)
    _, other = run(sampling, options, others=4)
    assert {n: d.token_ids for n, d in other.items()} == {n: d.token_ids for n, d in alone.items()}


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 6), st.booleans())
def test_forced_tokens_follow_one_another_after_the_budget(tokens, budget, opened):
    """5 closes, 4 opens, (7, 5, 8) is the closing. What is forced, appended, is all of the closing and no more."""
    sampling = SamplingParams(thinking_budget=budget, think_tokens=ThinkTokens(opened, 4, 5, (7, 5, 8)))
    head = tokens[:budget]
    is_open = 5 not in head and (opened or 4 in head)
    if len(head) < budget:
        assert sampling.forced(head) is None
        return
    made = list(head)
    while (token := sampling.forced(made)) is not None:
        made.append(token)
    assert made == ([*head, 7, 5, 8] if is_open else head)
