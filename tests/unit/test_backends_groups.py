"""Choices in other numbers and places than they were asked for, and streams that only look alive."""

import time
from dataclasses import replace

import pytest
from server_support import JSON, KEY, PARAMS, Answer, Handler, body, chat, complete, server

from distill import backends
from distill.backends import Completed, Job
from distill.backends.budget import Allowance, Spent, bound_of
from distill.errors import UserError, WorkError
from distill.models import Model, Server
from distill.prompts import Prompt
from distill.recipe import Budget, LocalEngine

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


def test_the_bound_on_a_reply_is_that_of_all_samples_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is longer is not asked for again as it was, but sample by sample."""
    monkeypatch.setattr("distill.backends.connection.REPLY_BYTES", 4000)
    monkeypatch.setattr("distill.backends.connection.TOKEN_BYTES", 1)  # of 64 tokens each
    choices, size = 4, 4100

    def reply(number: int, handler: Handler) -> Answer:
        n = handler.server.asked[number].get("n", 1)
        return 200, JSON, several(n).ljust(size) if n > 1 else body(chat(message={"content": "alone"}))

    with server(reply) as made, backends.open(place(made), LocalEngine(), 1) as backend:
        assert collected(backend, choices) == ([(i, f"answer {i}") for i in range(choices)], None)
        assert len(made.asked) == 1, "4,256 bytes are allowed"
        size = 4300
        assert collected(backend, choices) == ([(i, "alone") for i in range(choices)], None)
        assert [asked.get("n", 1) for asked in made.asked[1:]] == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("most", [None, 2000])
def test_a_lost_request_for_several_samples_costs_all_of_them(most: int | None) -> None:
    """Where there is no room for another attempt, none is made, not one by one either."""
    bound, lost = bound_of(QUESTIONS[0], PARAMS.max_new_tokens), []
    room = most or 4 * bound.tokens
    allowance = Allowance(Budget(tokens=room), PARAMS.max_new_tokens, Spent(), 0.0, on_loss=lost.append)
    assert all(allowance.admit(QUESTIONS[0], sample) for sample in range(4))
    answers = iter([(200, JSON, several(4)[:-9])])  # cut off
    with (
        server(lambda *_: next(answers, (200, JSON, several(4)))) as made,
        backends.open(place(made), LocalEngine(), 1) as backend,
    ):
        done = list(backend.complete([Job(QUESTIONS[0], (0, 1, 2, 3))], PARAMS, 0, allowance))
    assert lost == [Spent(bound.prompt, 4 * PARAMS.max_new_tokens)]
    assert (len(made.asked), len(done)) == ((2, 4) if most else (1, 0))


def test_a_refusal_of_several_samples_inside_an_answer_splits_the_request_too() -> None:
    refusal = 200, JSON, body({"error": {"message": "n must be 1", "code": 400}})

    def reply(number: int, handler: Handler) -> Answer:
        return refusal if "n" in handler.server.asked[number] else (200, JSON, body(chat()))

    with server(reply) as made, backends.open(place(made), LocalEngine(), 1) as backend:
        done, error = collected(backend, 2)
    assert len(done) == 2 and error is None


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
