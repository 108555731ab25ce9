"""Budgets: nothing goes past them, whatever finishes when, and a rerun goes on where the money ended."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from eval_support import distill, right, server, url
from hypothesis import given
from hypothesis import strategies as st
from server_support import JSON, PARAMS, body, chat, opened
from server_support import server as listening_server

from distill.backends import Job
from distill.backends.budget import Allowance, Spent, bound_of, spent_on
from distill.backends.collect import collect
from distill.grading.judge import JudgeModel
from distill.models import judge_of
from distill.prompts import Prompt
from distill.recipe import Budget, Judge, LocalEngine, Price
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

BOUND_OF_ONE = bound_of(Prompt.from_question("2 + 2?", "4"), PARAMS.max_new_tokens).tokens
PRICE = Price(input=1.0, output=10.0, cached_input=0.1, date="2026-01-01", source="a test")


def trace(prompt: Prompt, sample: int, tokens: int, prompt_tokens: int = 10, cached: int = 0) -> Trace:
    return Trace(
        prompt, sample, 0, "x", None, "x", "stop", "ab",
        completion_tokens=tokens, prompt_tokens=prompt_tokens, cached_tokens=cached,
    )  # fmt: skip


@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.booleans(), st.integers(1, 50), st.integers(0, 300)), max_size=60),
)
def test_tokens_never_exceed_the_budget_whatever_finishes_when(most, steps):
    """Each step begins a sample or ends the oldest one, with some tokens up to its limit."""
    allowance = Allowance(Budget(tokens=most), 50, Spent(100, 20), 0.0)
    running, number = [], 0
    for begins, tokens, prompt_tokens in steps:
        if begins:
            prompt = Prompt.from_question(f"{number}?", None)
            number += 1
            if allowance.admit(prompt, 0):
                running.append(prompt)
        elif running:
            allowance.settle(trace(running.pop(0), 0, tokens, min(prompt_tokens, 250)))
        assert allowance.used.tokens <= max(most, 120)
    under_way = sum(bound_of(prompt, 50).tokens for prompt in running)
    assert not running or allowance.used.tokens + under_way <= most


def test_money_is_that_of_the_price_cached_tokens_at_their_own():
    allowance = Allowance(Budget(cost=1.0), 1000, Spent(), 0.0, PRICE)
    prompt = Prompt.from_question("q", None)
    assert allowance.admit(prompt, 0)
    allowance.settle(trace(prompt, 0, 50_000, 200_000, cached=100_000))
    assert allowance.report() == "0.61 of 1 USD"  # 100,000 × 1 + 100,000 × 0.1 + 50,000 × 10, per million
    used = Allowance(Budget(cost=1.0), 1000, Spent(0, 99_000), 0.0, PRICE)
    assert not used.admit(prompt, 0)  # 0.99 + 0.01 and a prompt


def test_cached_tokens_of_one_sample_are_no_cheaper_prompts_of_another():
    allowance, prompt = Allowance(Budget(cost=1.0), 1000, Spent(), 0.0, PRICE), Prompt.from_question("q", None)
    for sample, (prompt_tokens, cached) in enumerate(((1000, 900_000), (200_000, 0))):
        assert allowance.admit(prompt, sample)
        allowance.settle(trace(prompt, sample, 1, prompt_tokens, cached))
    assert allowance.report() == "0.20 of 1 USD"
    assert allowance.used == Spent(201_000, 2, 1000)


def test_a_failed_attempt_is_counted_and_repeated_only_where_that_fits():
    prompt = Prompt.from_question("q", None)
    bound = bound_of(prompt, 50)
    for most, counts, fits in (
        (2 * bound.tokens, (None, None), True),
        (2 * bound.tokens - 1, (None, None), False),
        (bound.tokens + 10, (3, 7), True),
        (bound.tokens + 9, (3, 7), False),
    ):
        allowance = Allowance(Budget(tokens=most), 50, Spent(), 0.0)
        assert allowance.admit(prompt, 0) and allowance.lose(prompt, *counts) is fits
        assert allowance.used.tokens == (10 if counts[0] else bound.tokens)


def test_an_attempt_for_several_samples_is_counted_for_all_of_them():
    prompt = Prompt.from_question("q", None)
    one, lost = bound_of(prompt, 50), []
    allowance = Allowance(Budget(tokens=10_000), 50, Spent(), 0.0, on_loss=lost.append)
    assert allowance.lose(prompt, samples=4) and allowance.lose(prompt, 3, 70, samples=4)
    assert lost == [Spent(one.prompt, 4 * one.completion), Spent(3, 70)]


@pytest.mark.parametrize(("text", "tokens", "spent"), [("", 0, 0), ("x", 0, 50), ("", None, 50), ("x", 7, 7)])
def test_a_count_of_0_is_one_where_there_is_no_text(tmp_path, text, tokens, spent):
    """Else it is no count, and the bound is taken: a text has tokens."""
    prompt, allowance = Prompt.from_question("q", None), Allowance(Budget(tokens=10_000), 50, Spent(), 0.0)
    done = replace(trace(prompt, 0, tokens), text=text, finish_reason="content_filter")
    assert allowance.admit(prompt, 0)
    allowance.settle(done)
    with TraceStore(tmp_path / "traces") as store:
        store.append([done])
        assert allowance.used == spent_on(store, {prompt.id: prompt}, 50) == Spent(10, spent)


def test_a_failed_attempt_without_a_token_costs_its_prompt():
    prompt, allowance = Prompt.from_question("q", None), Allowance(Budget(tokens=10_000), 50, Spent(), 0.0)
    assert allowance.lose(prompt, 10, 0) and allowance.used == Spent(10, 0)


def test_time_is_that_of_all_sessions_and_the_longest_sample_has_to_fit():
    now = [0.0]
    allowance = Allowance(Budget(hours=1.0), 10, Spent(), 1800.0, clock=lambda: now[0])
    prompt = Prompt.from_question("q", None)
    assert allowance.admit(prompt, 0)
    now[0] = 900
    allowance.settle(trace(prompt, 0, 5))
    assert not allowance.over and allowance.admit(prompt, 1) is False  # 2,700 s + 900 s
    now[0] = 1800
    assert allowance.over and allowance.report() == "1.00 of 1 hours"


def test_money_of_a_teacher_that_is_here_is_time():
    now = [0.0]
    allowance = Allowance(Budget(cost=4.0), 10, Spent(), 3600.0, hourly=2.0, clock=lambda: now[0])
    assert not allowance.over
    now[0] = 3600
    assert allowance.over and allowance.report() == "4.00 of 4"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(script, budget, server=None, **generate):
        content = {
            "name": "served",
            "teacher": "deepseek-r1",
            "student": "tiny-qwen",
            "server": {"url": url(script), "model": "scripted", "concurrency": 3} | (server or {}),
            "prompts": [{"kind": "file", "path": "sums.jsonl"}],
            "generate": {"samples": 2, "sampling": {"max_new_tokens": 64}, "budget": budget} | generate,
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
        (tmp_path / "served.yaml").write_text(yaml.safe_dump(content))
        return "served.yaml"

    return write


def stored() -> int:
    return len(TraceStore(Path("runs/served/traces")))


BOUND = len("What is 0 + 0?") + 256 + 64  # tokens that one sample may use; each uses 1 and 7


def test_a_run_stops_before_its_budget_and_a_raised_one_goes_on(recipe, monkeypatch, capsys):
    with server(right) as script:
        assert distill(monkeypatch, "run", recipe(script, {"tokens": BOUND + 5 * 8 - 1})) == 1
        error = capsys.readouterr().err
        assert stored() == 5 == len(script.asked) and error.count("\n") == 1
        assert "the budget is used up (40 of 373 tokens): 11 of 16 samples are left" in error
        for _ in range(2):  # nothing is asked any more
            assert distill(monkeypatch, "generate", "served.yaml") == 1 and len(script.asked) == 5
            assert "11 of 16 samples are left" in capsys.readouterr().err
        assert distill(monkeypatch, "generate", recipe(script, {"tokens": BOUND + 9 * 8})) == 1
        assert stored() == 10 == len(script.asked)
        assert distill(monkeypatch, "generate", recipe(script, {"tokens": 10_000})) == 0
        assert stored() == 16 == len(script.asked)
        assert "budget: 128 of 10,000 tokens" in capsys.readouterr().out


def test_money_at_the_price_of_the_server(recipe, monkeypatch, capsys):
    price = {"input": 1, "output": 10, "date": "2026-01-01", "source": "a test"}
    with server(right) as script:
        name = recipe(script, {"cost": (BOUND - 64 + 640 + 3 * 71) / 1e6}, {"price": price})
        assert distill(monkeypatch, "generate", name) == 1 and stored() == 4
        assert re.search(r"used up \(0\.00 of 0\.00\d+ USD\)", capsys.readouterr().err)


def test_a_count_that_the_server_does_not_give_is_taken_as_its_bound(recipe, monkeypatch, capsys):
    with server(lambda question, seed: ("4", "stop")) as script:
        monkeypatch.setattr("distill.backends.reply._count", lambda value: None)
        assert distill(monkeypatch, "generate", recipe(script, {"tokens": 3 * BOUND})) == 1
        assert stored() == 3
        assert distill(monkeypatch, "generate", "served.yaml") == 1 and stored() == 3
    assert f"({3 * BOUND:,} of {3 * BOUND:,} tokens)" in capsys.readouterr().err


HALF = b'data: {"choices": [{"index": 0, "delta": {"content": "twice"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
ERROR = b'data: {"error": {"message": "overloaded"}}\n\n'


@pytest.mark.parametrize(
    ("failed", "room", "made", "used"),
    [
        ((200, "text/event-stream", HALF + ERROR), 2 * BOUND_OF_ONE, 1, BOUND_OF_ONE + 10),
        ((200, "text/event-stream", HALF + ERROR), 2 * BOUND_OF_ONE - 1, 0, BOUND_OF_ONE),
        ((200, "text/event-stream", HALF + USAGE + ERROR), 2 * BOUND_OF_ONE - 1, 1, 20),
        ((200, "text/event-stream", b": ping\n\n" + ERROR), BOUND_OF_ONE, 1, 10),
        ((200, JSON, b'{"choices": [{"mess'), 2 * BOUND_OF_ONE - 1, 0, BOUND_OF_ONE),
        ((500, JSON, b"{}"), BOUND_OF_ONE, 1, 10),
    ],
)
def test_attempts_that_had_begun_to_answer_are_counted(failed, room, made, used, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    allowance = Allowance(Budget(tokens=room), PARAMS.max_new_tokens, Spent(), 0.0)

    def reply(number, handler):
        return failed if number == 0 else (200, JSON, body(chat()))

    with listening_server(reply) as at, opened(at, 1) as backend, TraceStore(tmp_path / "traces") as store:
        job = Job(Prompt.from_question("2 + 2?", "4"), (0,))
        assert collect(backend, store, [job], PARAMS, 0, "t", lambda n: None, allowance=allowance) == made
    assert len(at.asked) == 1 + made and allowance.used.tokens == used


def test_failed_attempts_are_counted_by_the_next_command(recipe, monkeypatch, capsys):
    """The first answer breaks off, and what it may have used leaves no room for another one, in any command."""

    def reply(number, handler):
        return (200, "text/event-stream", HALF + ERROR) if number == 0 else (200, JSON, body(chat()))

    with listening_server(reply) as made:
        name = recipe(made, {"tokens": BOUND + 10}, {"model": "m", "concurrency": 1})
        for _ in range(2):
            assert distill(monkeypatch, "generate", name) == 1 and stored() == 0 and len(made.asked) == 1
            assert f"({BOUND} of {BOUND + 10} tokens): 16 of 16 samples are left" in capsys.readouterr().err
        recipe(made, {"tokens": 10_000}, {"model": "m", "concurrency": 1})
        assert distill(monkeypatch, "generate", name) == 0 and stored() == 16
    assert f"budget: {BOUND + 160} of 10,000 tokens" in capsys.readouterr().out
    assert distill(monkeypatch, "generate", name, "--fresh", "generate", "--set", "generate.budget.tokens=9") == 2
    assert "one sample may use" in capsys.readouterr().err, "the failed attempts of moved traces are not counted"


def test_a_failed_request_of_a_judge_is_counted_by_later_sessions(tmp_path):
    """It broke off in the middle of its answer, so it may have used its bound; its row in the ledger has no id."""
    message = {"role": "assistant", "content": "Judgement: Yes"}

    def reply(number, handler):
        return (200, "text/event-stream", HALF + ERROR) if number == 0 else (200, JSON, body(chat(message=message)))

    item = (0, Prompt.from_question("Capital of France?", "Paris", "judge"), "It is Paris.")
    with listening_server(reply) as made:
        address = {"url": url(made), "model": "m", "concurrency": 1}
        settings = Judge.model_validate({"server": address, "budget": {"tokens": 100_000}})
        sessions = []
        for _ in range(2):
            with JudgeModel(settings, judge_of(settings), LocalEngine(), tmp_path) as judge:
                assert [grade.verdict for _, grade in judge.grade([item])] == ["correct"]
                sessions.append(judge.used)
        assert sessions[0] == sessions[1] and sessions[0].completion == 4096 + 7 and len(made.asked) == 2
    assert sorted(row["id"] is None for row in Ledger(tmp_path / "judge.jsonl").rows()) == [False, True]


def test_a_budget_below_one_sample_says_so(recipe, monkeypatch, capsys):
    price = {"input": 1, "output": 1_000_000, "date": "2026-01-01", "source": "a test"}
    with server(right) as script:
        assert distill(monkeypatch, "generate", recipe(script, {"tokens": 300})) == 2
        error = capsys.readouterr().err
        assert f"one sample may use {BOUND:,} tokens, more than generate.budget.tokens (300); raise it" in error
        assert distill(monkeypatch, "generate", recipe(script, {"cost": 2}, {"price": price})) == 2
        assert "one sample may cost 64, more than generate.budget.cost (2); raise it" in capsys.readouterr().err
        assert not script.asked and not Path("runs").exists()


def test_the_local_engine_has_budgets_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--set", "prompts.0.limit=30", "--set", "generate.budget={tokens: 3000}"]
    assert distill(monkeypatch, "generate", "tiny", *few) == 1
    count = len(TraceStore(Path("runs/tiny/traces")))
    used = sum(t.tokens + (t.prompt_tokens or 0) for t in TraceStore(Path("runs/tiny/traces")))
    assert 10 < count < 30 and 2000 < used <= 3000 and f"{used:,} of 3,000 tokens" in capsys.readouterr().err
    assert distill(monkeypatch, "generate", "tiny", *few[:2]) == 0
    assert len(TraceStore(Path("runs/tiny/traces"))) == 30


@pytest.mark.parametrize(
    ("budget", "server_keys", "message"),
    [
        ({}, {}, "one of `cost`, `tokens` and `hours` is needed"),
        ({"tokens": 0}, {}, "generate.budget.tokens"),
        ({"tokens": 5}, {"n": True}, "server.n hides"),
        ({"dollars": 5}, {}, "generate.budget.dollars"),
    ],
)
def test_wrong_budgets_are_one_line(recipe, budget, server_keys, message, monkeypatch, capsys):
    with server(right) as script:
        assert distill(monkeypatch, "generate", recipe(script, budget, server_keys)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not script.asked and not Path("runs").exists()


def test_a_budget_of_money_needs_a_price(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distill(monkeypatch, "generate", "tiny", "--set", "generate.budget={cost: 1}") == 2
    assert "generate.budget.cost needs a price: set price_per_hour" in capsys.readouterr().err
