"""Errors that servers report in unusual places: inside an answer, after its end, or with the status of another."""

from __future__ import annotations

import json
import threading

import pytest
from server_support import JSON, PARAMS, Answer, Handler, body, chat, complete, opened, server

from distill.backends import Job, SamplingParams
from distill.backends.answers import check_answer
from distill.backends.batch import _answer
from distill.backends.budget import Allowance, Spent
from distill.backends.reply import Empty, Reply, Reported, Unreadable, read_reply, reply_of
from distill.backends.stream import Stream
from distill.errors import UserError, WorkError
from distill.prompts import Prompt
from distill.recipe import Budget

EVENTS = "text/event-stream"
TOO_LONG = "The input (9000 tokens) is longer than the model's context length (8192 tokens)."
FLAGGED = "Your chosen model requires moderation and your input was flagged"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without long pauses."""
    monkeypatch.setattr("distill.backends.remote.RETRIES", 1)
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)


def events(*parts: object) -> bytes:
    return b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts)


def piece(text: str, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, **more}]}


def test_a_flagged_prompt_is_one_prompts_refusal_and_not_the_keys() -> None:
    flagged: Answer = 403, JSON, body({"error": {"message": FLAGGED}})
    with server(lambda number, _: flagged) as made, opened(made) as backend:
        with pytest.raises(UserError, match=r"prompt \w+: the server refused the request: .*; remove the prompt from"):
            complete(backend)
        assert len(made.asked) == 1
    rejected: Answer = 403, JSON, body({"error": {"message": "no such key"}})
    with (
        server(lambda number, _: rejected) as made,
        opened(made) as backend,
        pytest.raises(UserError, match="rejected the key"),
    ):
        complete(backend)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_refusal_inside_an_answer_is_not_repeated_and_says_why(streamed: bool) -> None:
    error = {"error": {"message": TOO_LONG, "type": "BadRequestError", "code": 400}}
    answer: Answer = (200, EVENTS, events(error)) if streamed else (200, JSON, body(error))
    with server(lambda number, _: answer) as made, opened(made) as backend:
        with pytest.raises(UserError, match=r"longer than the model's context .*; lower max_new_tokens, or remove"):
            complete(backend)
        assert len(made.asked) == 1


def test_a_failure_inside_an_answer_is_repeated_and_says_why() -> None:
    error = {"error": {"message": "the GPU fell off the bus", "code": 500}}
    with server(lambda number, _: (200, EVENTS, events(piece("4"), error))) as made, opened(made) as backend:
        with pytest.raises(WorkError, match="the server failed: the GPU fell off the bus"):
            complete(backend)
        assert len(made.asked) == 2


@pytest.mark.parametrize("reason", ["error", "network_error"])
def test_an_answer_that_the_provider_broke_off_is_none(reason: str) -> None:
    with pytest.raises(Unreadable, match="gave up"):
        read_reply(body(chat(finish_reason=reason)))
    with pytest.raises(Reported, match="upstream") as raised:
        read_reply(body(chat(finish_reason=reason, error={"code": 502, "message": "upstream timed out"})))
    assert raised.value.code == 502


def test_a_stream_may_end_badly_after_it_has_said_that_it_is_at_its_end() -> None:
    whole = events(piece("\\boxed{4}"), piece("", finish_reason="stop")) + b"data: [DONE]\n\n"

    def reply(number: int, handler: Handler) -> Answer:
        handler.send_response(200)
        handler.send_header("Content-Type", EVENTS)
        handler.send_header("Content-Length", str(len(whole) + 9))  # the rest never comes
        handler.end_headers()
        handler.wfile.write(whole)
        raise ConnectionAbortedError

    with server(reply) as made, opened(made) as backend:
        (done,) = complete(backend)
        assert done.text == "\\boxed{4}" and len(made.asked) == 1


@pytest.mark.parametrize("end", ["breaks in a line", "stays open"])
def test_an_answer_is_whole_when_it_has_its_finish_reason(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.remote.GRACE", 0.2)
    over = threading.Event()

    def reply(number: int, handler: Handler) -> Answer:
        whole = events(piece("\\boxed{4}"), piece("", finish_reason="stop")) + b'data: {"usa'
        handler.send_response(200)
        handler.send_header("Content-Type", EVENTS)
        handler.send_header("Content-Length", str(len(whole) + 9))
        handler.end_headers()
        handler.wfile.write(whole)
        handler.wfile.flush()
        if end == "stays open":
            over.wait(30)
        raise ConnectionAbortedError

    with server(reply) as made:
        try:
            with opened(made) as backend:
                (done,) = complete(backend)
        finally:
            over.set()
    assert (done.text, done.finish_reason) == ("\\boxed{4}", "stop") and len(made.asked) == 1


def test_a_stream_is_at_its_end_when_each_choice_is() -> None:
    stream = Stream(2)
    stream.feed(events(piece("a", finish_reason="stop")))
    assert not stream.finished
    stream.feed(events({"choices": [{"index": 1, "delta": {"content": "b"}, "finish_reason": "length"}]}))
    assert stream.finished


WITHHELD: dict[str, dict[str, object]] = {
    "null": {"message": {"content": None}, "finish_reason": "content_filter"},
    "no message": {"message": None, "finish_reason": "content_filter"},
    "refusal": {"message": {"content": None, "refusal": "I cannot help with that."}},
    "both": {"message": {"content": None, "refusal": "No."}, "finish_reason": "content_filter"},
}


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3, "completion_tokens": 0}])
@pytest.mark.parametrize("name", WITHHELD)
def test_a_withheld_answer_is_an_answer_without_a_text(name: str, usage: object) -> None:
    answer = chat(**WITHHELD[name]) | {"usage": usage}
    with server(lambda number, _: (200, JSON, body(answer))) as made, opened(made) as backend:
        (done,) = complete(backend)
        assert len(made.asked) == 1
    reason = "refusal" if name == "refusal" else "content_filter"
    assert (done.text, done.finish_reason, done.completion_tokens) == ("", reason, 0 if usage else None)
    batch = {"response": {"status_code": 200, "body": answer}}
    assert isinstance(read := _answer(batch), Reply) and (read.text, read.finish_reason) == ("", reason)


def test_a_withheld_answer_of_a_stream_is_one_too() -> None:
    stream = Stream()
    stream.feed(events(*({"choices": [{"delta": {"refusal": text}}]} for text in ("I ", "cannot."))))
    stream.feed(events(piece("", finish_reason="stop")))
    assert (stream.reply().text, stream.reply().finish_reason) == ("", "refusal")
    stream = Stream()
    stream.feed(events({"choices": [{"index": 0, "delta": {}, "finish_reason": "content_filter"}]}))
    assert (stream.reply().text, stream.reply().finish_reason) == ("", "content_filter")


@pytest.mark.parametrize("refusal", [None, "", False, ["no"]])
def test_an_empty_answer_that_is_not_withheld_is_none(refusal: object) -> None:
    with pytest.raises(Empty, match="it is empty"):
        read_reply(body(chat(message={"content": None, "refusal": refusal}) | {"usage": None}))


def test_a_withheld_answer_needs_no_probabilities() -> None:
    reply = reply_of({}, "content_filter", None)
    check_answer("x", reply, SamplingParams(max_new_tokens=8, logprobs=2))


def test_an_empty_answer_costs_its_prompt_and_another_one_without_a_count_its_bound() -> None:
    """An answer that was given up had a text, whatever its count says."""
    for choice, spent in (
        ({"message": {"content": ""}}, Spent(3, 0)),
        ({"message": {"content": "4"}, "finish_reason": "abort"}, Spent(3, 64)),
    ):
        lost: list[Spent] = []
        allowance = Allowance(Budget(tokens=10_000), 64, Spent(), 0.0, on_loss=lost.append)
        answers = iter([chat(**choice) | {"usage": {"prompt_tokens": 3, "completion_tokens": 0}}])
        with server(lambda *_: (200, JSON, body(next(answers, chat())))) as made, opened(made) as backend:  # noqa: B023
            jobs = [Job(Prompt.from_question("2 + 2?", "4"), (0,))]
            assert len(list(backend.complete(jobs, PARAMS, 0, allowance))) == 1
        assert lost == [spent]


def test_an_empty_finish_reason_is_none() -> None:
    stream = Stream()
    stream.feed(events(piece("x", finish_reason="")))
    with pytest.raises(Unreadable, match="cut off"):
        stream.reply()
    stream = Stream()
    stream.feed(events(piece("x", finish_reason="stop"), piece("", finish_reason="")))
    assert stream.reply().finish_reason == "stop"


THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "4"}]


def test_reasoning_in_a_part_of_its_own_is_reasoning() -> None:
    whole = read_reply(body(chat(message={"role": "assistant", "content": THINKING})))
    stream = Stream()
    stream.feed(events(piece(""), {"choices": [{"index": 0, "delta": {"content": THINKING[:1]}}]}))
    stream.feed(events(piece("4", finish_reason="stop")))
    for reply in (whole, stream.reply()):
        assert (reply.text, reply.parts) == ("<think>\nhm\n</think>\n\n4", ("hm", "4"))
    plain = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}]
    assert read_reply(body(chat(message={"role": "assistant", "content": plain}))).text == whole.text
    with pytest.raises(Unreadable, match="no text"):
        read_reply(body(chat(message={"role": "assistant", "content": [{"type": "audio"}]})))


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (503, "Loading model", "the server cannot answer .*Loading model.*; try again later"),
        (404, "no such model", "has no model 'other'"),
        (400, "unknown model", "has no model 'other'"),
    ],
)
def test_a_server_that_is_loading_is_not_one_without_the_model(status: int, reason: str, message: str) -> None:
    answer: Answer = status, JSON, body({"error": {"message": reason}})
    with server(lambda number, _: answer, answer) as made, pytest.raises(UserError, match=message):
        opened(made, name="other").__enter__()


def test_a_server_that_refuses_a_parameter_of_the_question_has_the_model() -> None:
    def reply(number: int, handler: Handler) -> Answer:
        refused = {"error": {"message": "'max_tokens' is not supported with this model: use 'max_completion_tokens'"}}
        return (400, JSON, body(refused)) if "max_tokens" in made.asked[number] else (200, JSON, body(chat()))

    with server(reply, (404, JSON, b"{}")) as made, opened(made, name="other") as backend:
        assert complete(backend)[0].text.endswith("\\boxed{4}.")
