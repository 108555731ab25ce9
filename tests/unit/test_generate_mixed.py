"""Samples of one store are drawn with the same parameters, whatever servers refuse, and when."""

from pathlib import Path

import pytest
from server_support import JSON, PARAMS, Answer, Handler, body, chat, complete, opened, server

from distill.backends import Job
from distill.backends.collect import collect
from distill.errors import UserError
from distill.prompts import Prompt
from distill.traces.store import TraceStore

REFUSAL = {"message": "Unsupported value: only the default (1) is supported.", "param": "temperature"}
REFUSED = 400, JSON, body({"error": REFUSAL | {"code": "unsupported_value"}})
ANSWER = 200, JSON, body(chat())


def accepts(number: int, handler: Handler) -> Answer:
    return ANSWER


def refuses(number: int, handler: Handler) -> Answer:
    return REFUSED if "temperature" in handler.server.asked[number] else ANSWER


def sample(reply, directory: Path, samples: range, at_once: int = 4) -> TraceStore:
    store = TraceStore(directory)
    with server(reply) as made, opened(made, at_once) as backend, store:
        job = Job(Prompt.from_question("2 + 2?", "4"), tuple(samples))
        collect(backend, store, [job], PARAMS, 0, "t", lambda count: None)
    return store


def test_requests_that_are_under_way_when_the_first_is_refused_are_sent_again(tmp_path: Path) -> None:
    store = sample(refuses, tmp_path, range(40), at_once=16)
    assert {trace.omitted for trace in store} == {("temperature",)} and len(store) == 40
    store.compact()
    assert {trace.omitted for trace in TraceStore(tmp_path)} == {("temperature",)} == {store.omitted()}


def test_a_refusal_after_an_answer_is_that_of_its_request() -> None:
    """Perhaps it is the prompt's: the others go on as they were asked before."""

    def reply(number: int, handler: Handler) -> Answer:
        return REFUSED if number == 3 else ANSWER

    with server(reply) as made, opened(made, 1) as backend:
        done = []
        with pytest.raises(UserError, match="the server refused the request"):
            for each in backend.complete([Job(Prompt.from_question("q", "1"), tuple(range(8)))], PARAMS, 0):
                done.append(each)
    assert len(done) == 7 and all("temperature" in asked for asked in made.asked)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (accepts, refuses, "the server refuses temperature, which the other samples were drawn with; ask the server"),
        (refuses, accepts, "the server takes temperature, which a server refused when the other samples were drawn"),
    ],
)
def test_another_session_does_not_mix_them(first, then, message: str, compact: bool, tmp_path: Path) -> None:
    store = sample(first, tmp_path, range(2))
    if compact:
        store.compact()
    with pytest.raises(UserError, match=message) as error:
        sample(then, tmp_path, range(2, 4))
    assert "\n" not in str(error.value) and len(TraceStore(tmp_path)) == 2
    assert len(sample(first, tmp_path, range(2, 4))) == 4


def test_a_parameter_that_is_not_sent_is_not_missing() -> None:
    with server(accepts) as made, opened(made) as backend:
        assert complete(backend)[0].omitted == ()
    assert "top_k" not in made.asked[0]
