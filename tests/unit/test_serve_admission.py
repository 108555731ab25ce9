"""Whose turn it is: bounded, fair, and nothing is lost when clients give up."""

import asyncio
from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from distill import serve
from distill.serve.admission import Admission, Full
from distill.serve.app import Limits, Service, is_loopback


def test_clients_take_turns_however_much_one_of_them_asks():
    async def run() -> list[str]:
        admission, order = Admission(1, 100, 100), list[str]()

        async def ask(client: str) -> None:
            async with admission.admitted(client, 1):
                order.append(client)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(client) for client in ["a"] * 5 + ["b"] * 2 + ["c"]))
        assert (admission.running, admission.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "a", "b", "c", "a", "b", "a", "a"]  # the first at once, while nobody else waits


def test_the_queue_and_each_client_are_bounded():
    async def run() -> None:
        admission = Admission(1, 2, 2)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(admission.admitted("a", 1))
            waiting = [asyncio.ensure_future(stack.enter_async_context(admission.admitted(c, 1))) for c in "ab"]
            await asyncio.sleep(0)
            for client, own in (("a", True), ("c", False)):
                with pytest.raises(Full) as full:
                    await stack.enter_async_context(admission.admitted(client, 1))
                assert full.value.own == own
            for task in waiting:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        assert (admission.running, admission.waiting, admission._clients, +admission._held) == (0, 0, {}, {})

    asyncio.run(run())


def test_a_request_of_more_samples_than_fit_runs_alone():
    async def run() -> None:
        admission = Admission(4, 10, 10)
        async with admission.admitted("a", 9):
            assert admission.running == 9

    asyncio.run(run())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=30), st.integers(1, 6))
def test_every_request_gets_its_turn_or_is_given_up_and_the_capacity_holds(requests, capacity):
    async def run() -> None:
        admission, served = Admission(capacity, 1000, 1000), []

        async def ask(number: int, client: str, samples: int) -> None:
            async with admission.admitted(client, samples):
                assert admission.running <= max(capacity, samples)
                served.append(number)
                await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(ask(i, client, samples)) for i, (client, samples, _) in enumerate(requests)]
        await asyncio.sleep(0)
        for task, (_, _, given_up) in zip(tasks, requests, strict=True):
            if given_up:
                task.cancel()
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        stayed = {i for i, (_, _, given_up) in enumerate(requests) if not given_up}
        assert stayed <= set(served) and len(set(served)) == len(served)
        assert (admission.running, admission.waiting, admission._clients, +admission._held) == (0, 0, {}, {})

    asyncio.run(asyncio.wait_for(run(), 30))


def test_only_addresses_of_this_machine_are_loopback():
    hosts = ("127.0.0.1", "127.0.0.2", "::1", "10.0.0.1", "127.0.0.1.evil.example", "")
    assert [is_loopback(host) for host in hosts] == [True, True, True, False, False, False]


def test_requests_that_are_refused_read_no_tokens():
    """Neither whole nor streamed ones; those that are answered do."""

    async def whole(work):
        return {}, []

    async def events(work):
        yield b"", None

    work = SimpleNamespace(samples=1, prompt_tokens=7)
    answers = SimpleNamespace(live=SimpleNamespace(capacity=1), whole=whole, events=events)
    service = Service(answers, None, Limits(per_client=1), True)

    async def run() -> None:
        async with service.admission.admitted("a", 1):  # all that this client may have
            for answer in (service._whole(work, "a"), anext(service._events(work, "a"))):
                with pytest.raises(Full):
                    await answer
        assert prompt_tokens() == 0
        await service._whole(work, "a")
        assert prompt_tokens() == 7
        async for _ in service._events(work, "a"):
            pass
        assert prompt_tokens() == 14

    def prompt_tokens() -> float:
        (line,) = (
            x for x in service.metrics.text().decode().splitlines() if x.startswith("distill_prompt_tokens_total ")
        )
        return float(line.split()[1])

    asyncio.run(run())


@pytest.mark.parametrize("grace", [0.0, 30.0, 1e300, float("inf")])
def test_a_server_starts_with_any_grace(grace, monkeypatch):
    """uvicorn takes whole seconds only."""
    configured = []

    class Stopped(Exception):
        pass

    def config(app, **settings):
        configured.append(settings["timeout_graceful_shutdown"])
        raise Stopped

    monkeypatch.setattr(serve.uvicorn, "Config", config)
    live = SimpleNamespace(start=lambda: None, capacity=1, chat=None, model=SimpleNamespace(thinking=None))
    monkeypatch.setattr(serve, "Answers", lambda live, name: SimpleNamespace(live=live))
    address = serve.Address(grace=grace)
    with pytest.raises(Stopped):
        asyncio.run(serve._serve(live, "m", address, Limits(), None))
    assert isinstance(configured[0], int) and configured[0] >= min(grace, 1e9)


@pytest.mark.parametrize(("host", "status"), [("127.0.0.2:8000", 200), ("[::1]:8000", 200), ("evil.example", 403)])
def test_a_server_without_a_key_answers_at_every_address_of_loopback(host, status):
    live = SimpleNamespace(capacity=1, max_context=8)
    service = Service(SimpleNamespace(live=live, name="m"), None, Limits(), serve.Address("127.0.0.2").is_loopback)
    client = TestClient(service.app(), base_url="http://127.0.0.2:8000")
    assert client.get("/metrics", headers={"host": host}).status_code == status
