"""Requests that a server refuses: those of one prompt, which are stored, and those of all, which end the work."""

import threading
from pathlib import Path

import pytest
from server_support import JSON, PARAMS, Answer, Handler, body, chat, complete, opened, server

from distill.backends import Job
from distill.backends.budget import Allowance, Spent, spent_on
from distill.backends.collect import collect
from distill.backends.failures import REFUSED_IN_A_ROW, Refused
from distill.backends.reply import Reported, read_reply
from distill.backends.stream import Stream
from distill.errors import UserError, WorkError
from distill.prompts import Prompt
from distill.recipe import Budget
from distill.traces.store import TraceStore

TOO_LONG: Answer = 400, JSON, body({"error": {"message": "This model's maximum context length is 4096 tokens."}})
RISK: Answer = 400, JSON, body({"error": {"message": "Content Exists Risk"}})
WRONG: Answer = 400, JSON, body({"error": {"message": "min_q is no field"}})
PAGE = b"<!DOCTYPE html><html><title>Blocked</title><style>p {}</style><body><p>Sorry &amp; no</p></body></html>"
FIREWALL: Answer = 403, "text/html", PAGE
ANSWER: Answer = 200, JSON, body(chat())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without long pauses."""
    monkeypatch.setattr("distill.backends.remote.RETRIES", 1)
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)


def prompt(text: str) -> Prompt:
    return Prompt.from_question(text, "4")


def question(number: int, handler: Handler) -> str:
    return str(handler.server.asked[number]["messages"][0]["content"])


def replies(refusals: dict[str, Answer]):
    """Answers every question but those that begin with one of these words."""

    def reply(number: int, handler: Handler) -> Answer:
        text = question(number, handler)
        return next((answer for word, answer in refusals.items() if text.startswith(word)), ANSWER)

    return reply


def fill(made, store: TraceStore, texts: list[str], samples: int = 1, at_once: int = 1, allowance=None) -> int:
    have = store.keys()
    wanted = [tuple(n for n in range(samples) if (prompt(text).id, n) not in have) for text in texts]
    jobs = [Job(prompt(text), left) for text, left in zip(texts, wanted, strict=True) if left]
    with opened(made, at_once) as backend, store:
        return collect(backend, store, jobs, PARAMS, 0, "t", lambda count: None, "", allowance)


def endings(store: TraceStore) -> dict[str, str | None]:
    return {trace.prompt.messages[0]["content"]: trace.finish_reason for trace in store}


@pytest.mark.parametrize("refusal", [TOO_LONG, RISK, WRONG])
def test_a_prompt_that_is_refused_is_stored_without_a_text_where_others_are_answered(
    refusal: Answer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TraceStore(tmp_path)
    with server(replies({"long": refusal})) as made:
        assert fill(made, store, ["a", "long", "b"], samples=2) == 6
        asked = len(made.asked)
        assert fill(made, store, ["a", "long", "b"], samples=2) == 0 and len(made.asked) == asked == 6
        said = capsys.readouterr().out
        assert (
            "note: the server refused 2 samples, stored without a text under the finish reason refused; the first:"
            in said
        )
        assert fill(made, store, ["a", "long", "b"], samples=3) == 3, "more samples of it are refused, too"
    assert endings(store) == {"a": "stop", "long": "refused", "b": "stop"}
    refused = [trace for trace in store if trace.finish_reason == "refused"]
    assert {(trace.text, trace.form, trace.prompt_tokens, trace.completion_tokens) for trace in refused} == {
        ("", None, 0, 0)
    }
    prompts = {prompt(text).id: prompt(text) for text in ("a", "long", "b")}
    assert spent_on(store, prompts, 64) == Spent(18, 42), "what is refused costs nothing"


def test_a_refusal_is_said_at_once_and_only_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    under_way = threading.Barrier(2)

    def reply(number: int, handler: Handler) -> Answer:
        if number < 2:
            under_way.wait(30)
        return RISK if question(number, handler).startswith("x") else ANSWER

    jobs = [Job(prompt(text), (0,)) for text in ("x 1", "a", "x 2", "b")]
    with server(reply) as made, opened(made, 2) as backend, pytest.raises(Refused, match="2 samples failed"):
        list(backend.complete(jobs, PARAMS, 0))
    assert capsys.readouterr().out.count("Content Exists Risk") <= 1


def test_nothing_is_stored_where_nothing_was_ever_answered(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    with server(replies({"": WRONG})) as made, pytest.raises(UserError, match="3 samples failed; the first: prompt"):
        fill(made, store, ["a", "b", "c"])
    assert store.is_empty()


def test_what_only_is_left_of_an_earlier_session_is_stored(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    with server(replies({})) as made:
        fill(made, store, ["a"])
    with server(replies({"": TOO_LONG})) as made:
        fill(made, store, ["a", "b"])
    assert endings(store) == {"a": "stop", "b": "refused"}


def test_a_budget_is_not_spent_on_refusals_and_what_is_left_is_asked_for(tmp_path: Path) -> None:
    """Samples that wait for room in the budget are asked for although others were refused before."""
    store, bound = TraceStore(tmp_path), 64 + 256 + 6
    allowance = Allowance(Budget(tokens=2 * bound), 64, Spent(), 0.0)
    with server(replies({"long": TOO_LONG})) as made:
        assert fill(made, store, ["a", "long 1", "long 2", "b", "c"], at_once=2, allowance=allowance) == 5
    assert allowance.used == Spent(9, 21) and allowance.under_way == []


# ---- is it the prompts, or the settings?


def test_many_refusals_end_the_work_where_another_question_is_refused_too(tmp_path: Path) -> None:
    store, texts = TraceStore(tmp_path), [f"x {n}" for n in range(400)]
    for refusal, before in ((WRONG, []), (TOO_LONG, ["a"])):
        with server(replies({"x": refusal, "Hello": refusal})) as made:
            with pytest.raises(
                UserError, match=r"the server refuses every request, the last \d+ .*; the first: prompt"
            ):
                fill(made, store, [*before, *texts], at_once=4)
            assert REFUSED_IN_A_ROW < len(made.asked) <= REFUSED_IN_A_ROW + 8
    assert endings(store) == {"a": "stop"}


def test_many_refusals_are_the_prompts_where_another_question_is_answered(tmp_path: Path) -> None:
    store, texts = TraceStore(tmp_path), [f"x {n}" for n in range(REFUSED_IN_A_ROW + 20)]
    with server(replies({"x": TOO_LONG})) as made:
        fill(made, store, ["a", *texts])
        assert len(made.asked) == len(texts) + 2
    assert len(store) == len(texts) + 1


def test_an_account_without_credit_is_not_the_prompts_refusal() -> None:
    low = 400, JSON, body({"error": {"message": "Your credit balance is too low to access the API."}})
    with server(lambda *_: low) as made, opened(made, 1) as backend:
        with pytest.raises(UserError, match="the server demands payment .*; add credit at the provider"):
            complete(backend, samples=9)
        assert len(made.asked) == 1


def test_a_server_that_is_down_is_said_before_what_it_refused() -> None:
    jobs = [Job(prompt(text), (0,)) for text in ("x", "a")]
    with (
        server(replies({"x": RISK, "a": (500, JSON, b"{}")})) as made,
        opened(made, 1) as backend,
        pytest.raises(WorkError, match="^the server failed"),
    ):
        list(backend.complete(jobs, PARAMS, 0))


# ---- status 403


def test_a_page_of_a_firewall_is_the_refusal_of_one_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of all its samples, and before the first answer, as a rerun meets it."""
    store = TraceStore(tmp_path)
    with server(replies({"x": FIREWALL})) as made:
        assert fill(made, store, ["x", "a"], samples=8) == 16
    assert endings(store) == {"x": "refused", "a": "stop"}
    assert "Blocked Sorry & no" in capsys.readouterr().out


def test_a_key_that_expires_ends_the_work_after_five_prompts() -> None:
    jobs = [Job(prompt(text), (0,)) for text in ("a", *(f"x {n}" for n in range(20)))]
    with server(replies({"x": FIREWALL})) as made, opened(made, 1) as backend:
        with pytest.raises(UserError, match="5 samples failed; the first: prompt .* 403 .*Blocked.*if it ref") as error:
            list(backend.complete(jobs, PARAMS, 0))
        assert len(made.asked) == 6 and not isinstance(error.value, Refused)


# ---- what is under way when the work ends


def questions(count: int, samples: int = 1) -> list[Job]:
    return [Job(Prompt.from_question(f"{n} + 2?", "4"), tuple(range(samples))) for n in range(count)]


def test_others_under_way_are_waited_for_briefly_where_several_fail_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.failures.GRACE", 0.2)
    never = threading.Event()

    def reply(number: int, handler: Handler) -> Answer:
        if number:
            return 403, JSON, b"{}"
        never.wait(60)
        return 200, JSON, body(chat())

    with server(reply) as made:
        try:
            with opened(made, max_batch=2) as backend, pytest.raises(UserError, match="rejected the key"):
                list(backend.complete(questions(9), PARAMS, 0))
            assert len(made.asked) == 6
        finally:
            never.set()


@pytest.mark.parametrize(("status", "words"), [(402, "demands payment"), (401, "rejected the key")])
def test_answers_under_way_are_waited_for_when_the_account_is_refused(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are paid for. What fails then is not asked for again, and a pause ends."""
    monkeypatch.setattr("distill.backends.failures.GRACE", 0.0)
    under_way, refused, kept, said = threading.Barrier(3), threading.Event(), [], []
    monkeypatch.setattr("distill.backends.remote.say", lambda line: said.append(line) or refused.set())

    def reply(number: int, handler: Handler) -> Answer:
        under_way.wait(30)
        if number == 0:
            return status, JSON, b"{}"
        if number == 1:
            return 503, f"{JSON}\r\nRetry-After: 3000", b"{}"
        refused.wait(30)
        return 200, JSON, body(chat())

    with (
        server(reply) as made,
        opened(made, max_batch=3) as backend,
        pytest.raises(UserError, match=words),
    ):
        for done in backend.complete(questions(9), PARAMS, 0):
            kept.append(done)
    assert len(kept) == 1 and len(made.asked) == 3
    assert "requests under way are waited for" in said[0]


# ---- errors in other forms, with status 200


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        ({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, "insufficient balance", 1008),
        ({"code": 400, "message": "bad role", "data": None}, "bad role", 400),
        ({"detail": "no such route"}, "no such route", None),
        ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, "too long", 400),
        ({"error": {"message": " ", "detail": "why", "code": "400"}}, "why", None),
    ],
)
def test_an_error_in_another_form_is_reported(error: dict[str, object], message: str, code: int | None) -> None:
    for choices in ({}, {"choices": None}, {"choices": []}):
        with pytest.raises(Reported, match=message) as raised:
            read_reply(body(error | choices))
        assert raised.value.code == code
        with pytest.raises(Reported, match=message):
            Stream().feed(b"data: " + body(error | choices) + b"\n\n")


def test_a_code_of_success_beside_an_answer_is_no_error() -> None:
    fine = {"code": 0, "message": "Success", "base_resp": {"status_code": 0, "status_msg": "ok"}}
    assert read_reply(body(chat() | fine)).finish_reason == "stop"
    stream = Stream()
    stream.feed(b"data: " + body({"choices": [], "usage": {"completion_tokens": 3}} | fine) + b"\n\n")
    assert stream.usage.completion_tokens == 3


def test_an_error_in_another_form_is_refused_once() -> None:
    with server(lambda *_: (200, JSON, body({"code": 400, "message": "bad role"}))) as made, opened(made) as backend:
        with pytest.raises(UserError, match="the server refused the request: bad role"):
            complete(backend)
        assert len(made.asked) == 1
