"""Scores of given texts through a server: what is sent, what is read, and that they are those of the local engine."""

import numpy as np
import pytest
from server_support import JSON, body, server

from distill import backends
from distill.backends.scoring import completion_ids
from distill.errors import UserError, WorkError
from distill.models import Model, Server, teacher_of
from distill.prompts import Prompt
from distill.recipe import LocalEngine, TeacherServer
from distill.traces.trace import Trace

OWNED = 200, JSON, body({"object": "list", "data": [{"id": "m", "owned_by": "vllm"}]})
TEXT = "<think>\n1 + 2 = 3\n</think>\n\nThe answer is \\boxed{3}."
TRACES = [Trace(Prompt.from_question(f"What is 1 + {n}?", "3"), 0, 0, TEXT, "1", "3", "stop", "t") for n in range(3)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def at(made) -> Model:
    place = TeacherServer(url=f"http://127.0.0.1:{made.server_address[1]}/v1", model="m")
    return teacher_of("teacher", "tiny-r1", place)


def test_a_served_teacher_scores_as_the_local_one():
    """A server that answers as vLLM does, with the local engine's numbers."""
    with backends.open(teacher_of("teacher", "tiny-r1"), LocalEngine(dtype="float32")) as local:
        expected = local.score(TRACES, 3)
        by_ids = {(*t.prompt_token_ids, *t.completion_token_ids): t for t in expected}

    def reply(number, handler):
        asked = handler.server.asked[number]
        trace = by_ids[tuple(asked["prompt"])]
        positions: list[object] = [None] + [{"5": {"logprob": -9.0}}] * (len(trace.prompt_token_ids) - 1)
        for token, logprob, tops in zip(trace.completion_token_ids, trace.logprobs, trace.top_logprobs, strict=True):
            positions.append({str(t): {"logprob": p, "rank": 1} for t, p in (*tops, (token, logprob))})
        return 200, JSON, body({"choices": [{"text": "x", "prompt_logprobs": positions}]})

    with server(reply, OWNED) as made, backends.open(at(made), LocalEngine(), 2) as backend:
        assert backend.score(TRACES, 3) == expected
    assert all(asked["prompt_logprobs"] == 3 and asked["max_tokens"] == 1 for asked in made.asked)


def test_given_ids_are_among_the_alternatives():
    """A local teacher lists all of them, a server the trace's own token and its own likeliest ones."""
    with backends.open(teacher_of("teacher", "tiny-r1"), LocalEngine(dtype="float32")) as local:
        assert local.scores_given_ids
        plain = local.score(TRACES, 2)
        own = [t.completion_token_ids for t in plain]
        scored = local.score(TRACES, 2, [np.array([(token, -1, 9) for token in tokens]) for tokens in own])
        bare = local.score(TRACES, 0)
        with pytest.raises(UserError, match="ids are given for 1 tokens of trace 1, whose completion has"):
            local.score(TRACES, 2, [np.zeros((count, 2), int) for count in (len(own[0]), 1, 0)])
    for with_ids, without, nothing in zip(scored, plain, bare, strict=True):
        assert with_ids.logprobs == without.logprobs == nothing.logprobs
        assert nothing.top_logprobs == ((),) * len(without.logprobs)
        for listed, few, token, logprob in zip(
            with_ids.top_logprobs, without.top_logprobs, without.completion_token_ids, without.logprobs, strict=True
        ):
            assert set(listed) >= {*few, (token, logprob)} and dict(listed).keys() == {*dict(few), token, 9}
            assert [p for _, p in listed] == sorted((p for _, p in listed), reverse=True)

    lengths = {(*t.prompt_token_ids, *t.completion_token_ids): len(t.prompt_token_ids) for t in plain}

    def reply(number, handler):
        ids = handler.server.asked[number]["prompt"]
        assert tuple(ids) in lengths
        listed = [{"5": {"logprob": -1.0}, "6": {"logprob": -2.0}, str(i): {"logprob": -3.0}} for i in ids]
        return 200, JSON, body({"choices": [{"text": "x", "prompt_logprobs": [None, *listed[1:]]}]})

    with server(reply, OWNED) as made, backends.open(at(made), LocalEngine(), 2) as backend:
        assert not backend.scores_given_ids
        with_ids = backend.score(TRACES[:1], 1, [np.array([(token, 9) for token in own[0]])])[0]
        assert [dict(top) for top in with_ids.top_logprobs] == [{5: -1.0} | {i: -3.0} for i in own[0]]
        with pytest.raises(UserError, match="both models must have the same tokenizer"):
            backend.score(TRACES[:1], 1, [np.zeros((1, 0), int)])


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"prompt_logprobs": None},
        {"prompt_logprobs": []},
        {"prompt_logprobs": [None, {"x": {"logprob": 0.0}}]},
        {"prompt_logprobs": [{"1": {"logprob": "a"}}] * 200},
        {"prompt_logprobs": [{"1": {"logprob": -0.5}}] * 200},
    ],
)
def test_an_answer_without_scores_is_refused(choice):
    with (
        server(lambda *_: (200, JSON, body({"choices": [choice]})), OWNED) as made,
        backends.open(at(made), LocalEngine()) as backend,
        pytest.raises(UserError, match="does not score texts"),
    ):
        backend.score(TRACES[:1], 3)


@pytest.mark.parametrize(
    ("reply", "models", "error", "message"),
    [
        ((500, JSON, b"{}"), OWNED, WorkError, "the server failed"),
        ((400, JSON, b"{}"), OWNED, UserError, "refused the request"),
        (
            (400, JSON, body({"message": "Requested prompt logprobs of 3, which is greater than max allowed: 2"})),
            OWNED,
            UserError,
            r"greater than max allowed: 2.*; start vLLM with --max-logprobs 3, or lower train\.objective\.top_k$",
        ),
        ((200, JSON, b"{}"), None, UserError, r"\(vLLM does\)"),
    ],
)
def test_a_server_that_fails_refuses_or_is_another(reply, models, error, message):
    with (
        server(lambda *_: reply, models) as made,
        backends.open(at(made), LocalEngine()) as backend,
        pytest.raises(error, match=message),
    ):
        backend.score(TRACES[:1], 3)


def test_a_server_without_a_card_has_no_tokenizer():
    with (
        server(lambda *_: (200, JSON, b"{}"), OWNED) as made,
        backends.open(
            Model("m", Server(f"http://127.0.0.1:{made.server_address[1]}/v1", "m")), LocalEngine()
        ) as backend,
        pytest.raises(UserError, match="does not score texts"),
    ):
        backend.score(TRACES[:1], 3)


def test_tokens_of_another_model_are_made_anew():
    chat = teacher_of("teacher", "tiny-r1").chat
    ids = completion_ids(TRACES[0], chat)
    assert chat.restore(chat.decode(ids)) == TEXT and ids[-1] == chat.stop_token_ids[-1]
