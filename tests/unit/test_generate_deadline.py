"""A budget of time ends the wait, whatever a server does; what was finished before is stored."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from server_support import JSON, PARAMS, Answer, Handler, body, chat, opened, server

from distill import backends
from distill.backends import Job
from distill.backends.budget import Allowance, Spent
from distill.backends.collect import collect
from distill.models import Model
from distill.prompts import Prompt
from distill.recipe import Budget, LocalEngine
from distill.traces.store import TraceStore

SOON = 3.0  # seconds
HANGS = 15.0  # seconds after which a hanging server answers all the same, so that a failing test ends
TINY_R1 = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"


def ending_soon(cost: float | None = None) -> Allowance:
    """An allowance of an hour of which all but `SOON` seconds are used. cost: as money at that price an hour."""
    budget = Budget(hours=1.0) if cost is None else Budget(cost=cost)
    return Allowance(budget, PARAMS.max_new_tokens, Spent(), 3600 - SOON, hourly=cost)


@pytest.mark.parametrize("cost", [None, 3.0])
def test_a_server_that_hangs_is_not_waited_for(tmp_path: Path, cost: float | None) -> None:
    never = threading.Event()

    def reply(number: int, handler: Handler) -> Answer:
        if number >= 4:
            never.wait(HANGS)
        return 200, JSON, body(chat())

    store = TraceStore(tmp_path / "traces")
    with server(reply) as made, opened(made, 8) as backend:
        with store:
            job = Job(Prompt.from_question("2 + 2?", "4"), tuple(range(8)))
            allowance = ending_soon(cost)
            assert collect(backend, store, [job], PARAMS, 0, "t", lambda n: None, allowance=allowance) == 4
        never.set()
    assert len(TraceStore(tmp_path / "traces")) == 4 and allowance.over


def test_a_server_that_is_always_busy_is_not_asked_for_ever(tmp_path: Path) -> None:
    busy = (503, f"{JSON}\r\nRetry-After: {HANGS:.0f}", b"{}")
    with server(lambda *_: busy) as made, opened(made, 2) as backend, TraceStore(tmp_path / "traces") as store:
        job = Job(Prompt.from_question("2 + 2?", "4"), (0, 1))
        assert collect(backend, store, [job], PARAMS, 0, "t", lambda n: None, allowance=ending_soon()) == 0
    assert len(made.asked) == 2


def test_the_local_engine_begins_no_step_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second: what needs more steps than the hour has left is given up."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    jobs = [Job(Prompt.from_question(f"What is {n} + 1?", None), (0,)) for n in range(4)]
    with backends.open(Model("tiny", TINY_R1), LocalEngine(device="cpu"), 2) as backend:
        lengths = [len(done.completion_token_ids) for done in backend.complete(jobs, PARAMS, 0)]
        assert len(lengths) == 4 and min(lengths) > 30 and max(lengths) < 50
        allowance = Allowance(Budget(hours=1.0), PARAMS.max_new_tokens, Spent(), 3600 - 60, clock=lambda: 0.0)
        with monkeypatch.context() as patch:
            patch.setattr("distill.engine.engine.time", SimpleNamespace(monotonic=clock))
            assert len(list(backend.complete(jobs, PARAMS, 0, allowance))) == 2  # two at a time
        assert [len(done.completion_token_ids) for done in backend.complete(jobs, PARAMS, 0)] == lengths
