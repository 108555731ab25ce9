"""Choices in other numbers and places than they were asked for, and streams that only look alive."""

import time
from dataclasses import replace

import pytest
from server_support import JSON, KEY, PARAMS, Answer, Handler, body, chat, complete, server

from distill import backends
from distill.backends import Completed, Job
from distill.errors import UserError, WorkError
from distill.models import Model, Server
from distill.prompts import Prompt
from distill.recipe import LocalEngine

EVENTS = "text/event-stream"
QUESTIONS = [Prompt.from_question(f"{n} + 2?", str(n + 2)) for n in range(3)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.remote.RETRIES", 1)
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)


def place(made, **changes: object) -> Model:
    url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    return Model("m", replace(Server(url, "m", KEY, n=True), **changes))


def several(count: int, empty: tuple[int, ...] = ()) -> bytes:
    """A completion with so many choices, some of them without a text."""
    texts = ["" if i in empty else f"answer {i}" for i in range(count)]
    choices = [chat(index=i, message={"content": text})["choices"][0] for i, text in enumerate(texts)]
    return body(chat() | {"choices": choices, "usage": None})


def stream(*choices: dict[str, object]) -> bytes:
    return b"".join(b"data: " + body({"choices": [choice]}) + b"\n\n" for choice in choices) + b"data: [DONE]\n\n"


def collected(backend, samples: int = 4) -> tuple[list[tuple[int, str]], Exception | None]:
    """The samples that were yielded before an error, and the error."""
    done: list[Completed] = []
    try:
        for each in backend.complete([Job(QUESTIONS[0], tuple(range(samples)))], PARAMS, 0):
            done.append(each)
    except (UserError, WorkError) as error:
        return [(each.sample, each.text) for each in done], error
    return [(each.sample, each.text) for each in done], None


def test_samples_that_fail_alone_keep_their_siblings_and_are_counted() -> None:
    def reply(number: int, handler: Handler) -> Answer:
        asked = handler.server.asked[number]
        return (200, JSON, several(4, empty=(1, 2))) if "n" in asked else (500, JSON, b"{}")

    with server(reply) as made, backends.open(place(made), LocalEngine(), 1) as backend:
        done, error = collected(backend)
    assert done == [(0, "answer 0"), (3, "answer 3")]
    assert isinstance(error, WorkError) and str(error).startswith("2 samples failed; the first: the server failed")


def test_a_server_that_refuses_n_in_other_words_is_asked_for_single_samples() -> None:
    """vLLM, for greedy sampling."""
    refusal = 400, JSON, body({"error": {"message": "n must be 1 when using greedy sampling, got 2."}})

    def reply(number: int, handler: Handler) -> Answer:
        return refusal if "n" in handler.server.asked[number] else (200, JSON, body(chat()))

    with server(reply) as made, backends.open(place(made), LocalEngine(), 1) as backend:
        jobs = [Job(prompt, (0, 1)) for prompt in QUESTIONS]
        assert len(list(backend.complete(jobs, PARAMS, 0))) == 6
    assert sum("n" not in asked for asked in made.asked) == 6


@pytest.mark.parametrize("status", [401, 429])
def test_a_refusal_that_all_share_or_that_passes_does_not_split_a_request(status: int) -> None:
    with server(lambda *_: (status, JSON, b"{}")) as made, backends.open(place(made), LocalEngine(), 1) as backend:
        done, error = collected(backend)
    assert not done and error is not None and all("n" in asked for asked in made.asked[: 1 if status == 401 else 2])


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        (JSON, body(chat(index=1, message={"content": "4"}))),
        (EVENTS, stream({"index": 1, "delta": {"content": "4"}, "finish_reason": "stop"})),
        (EVENTS, stream({"index": 0, "delta": {}, "finish_reason": "stop"}, {"index": 1, "delta": {"content": "4"}})),
        (JSON, several(2, empty=(0,)).replace(b"answer 1", b"4")),
    ],
    ids=["index 1", "streamed index 1", "streamed, the first empty", "the first empty"],
)  # fmt: skip
def test_the_only_usable_choice_is_the_answer_wherever_it_is(content_type: str, content: bytes) -> None:
    with (
        server(lambda *_: (200, content_type, content)) as made,
        backends.open(place(made, n=False), LocalEngine(), 1) as backend,
    ):
        assert [each.text for each in complete(backend)] == ["4"] and len(made.asked) == 1


def test_comments_do_not_keep_a_silent_request_alive() -> None:
    """Also not parts without anything of an answer."""

    def reply(number: int, handler: Handler) -> Answer:
        handler.send_response(200)
        handler.send_header("Content-Type", EVENTS)
        handler.end_headers()
        for _ in range(50):
            handler.wfile.write(b": ping\n\n" + b'data: {"choices": [{"index": 0, "delta": {}}]}\n\n')
            handler.wfile.flush()
            time.sleep(0.1)
        handler.wfile.write(stream({"index": 0, "delta": {"content": "late"}, "finish_reason": "stop"}))
        handler.wfile.flush()
        raise ConnectionAbortedError

    with server(reply) as made, backends.open(place(made, silence=0.5), LocalEngine(), 1) as backend:
        done, error = collected(backend, 1)
    assert not done and isinstance(error, WorkError) and "it sent no token for 0.5 seconds" in str(error)
