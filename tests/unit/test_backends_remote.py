"""A server as a backend: what it may send, and what becomes of it."""

import threading
from pathlib import Path
from urllib.parse import quote

import pytest
from server_support import JSON, KEY, PARAMS, Answer, Handler, body, chat, complete, opened, server

from distill import backends
from distill.backends import Completed, Job
from distill.backends.collect import collect, trace_of
from distill.backends.reply import Unreadable, read_models, read_reply
from distill.backends.secrets import Secrets, shown_url
from distill.errors import UserError, WorkError
from distill.filters.base import Candidate
from distill.filters.finish import Finish
from distill.models import Model, Server
from distill.prompts import Prompt
from distill.recipe import LocalEngine
from distill.traces.store import TraceStore


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without long pauses."""
    monkeypatch.setattr("distill.backends.remote.RETRIES", 1)
    monkeypatch.setattr("distill.backends.pacing.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def one(reply: object) -> Completed:
    with server(lambda *_: (200, JSON, body(reply))) as made, opened(made) as backend:
        return complete(backend)[0]


# ---- what is stored


def test_an_answer_and_its_usage() -> None:
    with server(lambda *_: (200, JSON, body(chat()))) as made, opened(made) as backend:
        (done,) = complete(backend)
        assert backend.usage == backends.Usage(3, 7) and backend.numerics == {"kernels": "server"}
        assert backend.identity == {"model": "m"} and backend.max_context is None
    assert done.text == "<think>\ntwice two\n</think>\n\nSo it is \\boxed{4}."
    assert (done.finish_reason, done.completion_tokens) == ("stop", 7)
    (asked,) = made.asked
    assert (asked["max_tokens"], asked["temperature"]) == (64, 0.6) and 0 <= asked["seed"] < 2**31


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "tool_calls", None])
def test_a_finish_reason_is_kept_as_it_is(reason: str | None) -> None:
    assert one(chat(finish_reason=reason)).finish_reason == reason


@pytest.mark.parametrize(
    ("reason", "usual"),
    [("eos", "stop"), ("eos_token", "stop"), ("EOS", "stop"), ("STOP", "stop"), ("max_tokens", "length")],
)
def test_an_end_token_and_the_token_limit_have_one_name_each(reason: str, usual: str) -> None:
    done = one(chat(finish_reason=reason))
    assert done.finish_reason == usual
    trace = trace_of(done, done.prompt, 0, "t")
    assert Finish().judge(Candidate(trace)).reason == ("ok" if usual == "stop" else "truncated")


@pytest.mark.parametrize("count", ["seven", 10**30, -1, True, 1.5, [], {}, None, 2**31])
def test_a_count_that_cannot_be_right_is_unknown(count: object) -> None:
    done = one(chat() | {"usage": {"completion_tokens": count, "prompt_tokens": count}})
    assert done.completion_tokens is None and done.text.endswith("\\boxed{4}.")


@pytest.mark.parametrize("usage", ["none", 5, [], None])
def test_usage_of_another_type(usage: object) -> None:
    assert one(chat() | {"usage": usage}).completion_tokens is None


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "So it is "}, {"type": "text", "text": "\\boxed{4}."}]
    assert one(chat(message={"content": parts})).text == "So it is \\boxed{4}."


def test_half_a_surrogate_pair_is_replaced() -> None:
    """UTF-8 cannot store it."""
    body = b'{"choices": [{"finish_reason": "stop", "message": {"content": "a\\ud83db"}}]}'
    assert read_reply(body).text == "a\ufffdb"


def test_reasoning_that_is_cut_off_is_no_answer(tmp_path: Path) -> None:
    """Also where the server has no reasoning parser: then nothing says that the text is reasoning."""
    texts = iter([{"content": "Maybe \\boxed{4}? Let me"}, {"content": None, "reasoning_content": "Maybe \\boxed{4}?"}])
    with (
        server(lambda *_: (200, JSON, body(chat(finish_reason="length", message=next(texts))))) as made,
        opened(made) as backend,
        TraceStore(tmp_path / "traces") as store,
    ):
        job = Job(Prompt.from_question("2 + 2?", "4"), (0, 1))
        collect(backend, store, [job], PARAMS, 0, "t", lambda count: None)
    assert [(trace.finish_reason, trace.answer) for trace in TraceStore(tmp_path / "traces")] == [("length", "")] * 2


# ---- what is asked again, and then a failure

UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n",
    "half": b'{"choices": [{"mess',
    "HTML": b"<html>gateway</html>",
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "a long number": b'{"choices": ' + b"9" * 5000 + b"}",
    "no choices": body({"object": "chat.completion"}),
    "choices null": body({"choices": None}),
    "choices a text": body({"choices": "abc"}),
    "choices an object": body({"choices": {"0": {}}}),
    "choices empty": body({"choices": []}),
    "choice a number": body({"choices": [5]}),
    "message null": body(chat(message=None)),
    "message a text": body(chat(message="4")),
    "content a number": body(chat(message={"content": 4})),
    "content an object": body(chat(message={"content": {"text": "4"}})),
    "content with an image": body(chat(message={"content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
    "part a number": body(chat(message={"content": [4]})),
    "part without text": body(chat(message={"content": [{"type": "text", "text": 4}]})),
    "reasoning a list": body(chat(message={"content": "4", "reasoning_content": [1]})),
    "reasoning a number": body(chat(message={"content": "4", "reasoning": 4})),
    "finish_reason a number": body(chat(finish_reason=3)),
    "finish_reason a list": body(chat(finish_reason=["stop"])),
    "finish_reason long": body(chat(finish_reason="stop" * 99)),
    "finish_reason with a newline": body(chat(finish_reason="st\nop")),
    "gave up": body(chat(finish_reason="insufficient_system_resource")),
    "empty": body(chat(message={"content": ""}) | {"usage": {"completion_tokens": 0}}),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_holds_no_answer_is_unreadable(name: str) -> None:
    with pytest.raises(Unreadable):
        read_reply(UNREADABLE[name])


@pytest.mark.parametrize("name", ["nothing", "HTML", "choices a text", "content a number"])
def test_it_is_asked_again_and_then_a_failure_of_one_line(name: str) -> None:
    def reply(number: int, handler: Handler) -> Answer:
        return (200, "text/html" if name == "HTML" else JSON, UNREADABLE[name])

    with server(reply) as made, opened(made) as backend, pytest.raises(WorkError, match="empty or unreadable") as error:
        complete(backend)
    assert len(made.asked) == 2 and "\n" not in str(error.value)
    then = lambda number, handler: reply(number, handler) if number == 0 else (200, JSON, body(chat()))  # noqa: E731
    with server(then) as made, opened(made) as backend:
        assert complete(backend)[0].text.endswith("\\boxed{4}.")


def test_a_reply_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.connection.REPLY_BYTES", 36_000)
    monkeypatch.setattr("distill.backends.connection.TOKEN_BYTES", 1000)
    large = body(chat(message={"content": "x" * 200_000}))
    with (
        server(lambda *_: (200, JSON, large)) as made,
        opened(made) as backend,
        pytest.raises(WorkError, match="more than 100,000 bytes"),
    ):
        complete(backend)
    with (
        server(lambda *_: (500, JSON, large)) as made,
        opened(made) as backend,
        pytest.raises(WorkError, match="the server failed"),
    ):
        complete(backend)


def test_a_compressed_reply_is_refused() -> None:
    """It has no bound: a kilobyte may hold a megabyte."""

    def reply(number: int, handler: Handler) -> Answer:
        assert handler.headers["Accept-Encoding"] == "identity"
        return 200, JSON + "\r\nContent-Encoding: gzip", b""

    with server(reply) as made, opened(made) as backend, pytest.raises(WorkError, match="its reply is compressed"):
        complete(backend)


# ---- what the user must correct


def test_what_was_delivered_is_yielded_before_the_error() -> None:
    """Of sixteen requests at once the sixth is refused: the fifteen others are kept."""
    wait = threading.Barrier(16)

    def reply(number: int, handler: Handler) -> Answer:
        wait.wait(30)
        return (401, JSON, body({"error": {"message": "no"}})) if number == 5 else (200, JSON, body(chat()))

    kept = []
    with (
        server(reply) as made,
        opened(made, max_batch=16) as backend,
        pytest.raises(UserError, match="rejected the key .* set OPENAI_API_KEY to a valid one"),
    ):
        for done in backend.complete([Job(Prompt.from_question("q", "1"), tuple(range(16)))], PARAMS, 0):
            kept.append(done.sample)
    assert len(kept) == 15


def test_no_request_is_sent_after_a_refusal() -> None:
    with server(lambda *_: (401, JSON, b"{}")) as made, opened(made, max_batch=2) as backend, pytest.raises(UserError):
        complete(backend, samples=50)
    assert len(made.asked) <= 2


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (400, "max_tokens is too large: 64", "max_tokens is too large: 64; lower max_new_tokens"),
        (400, "roles must alternate", "roles must alternate; correct the sampling settings or server.extra_body"),
        (
            400,
            "the prompt exceeds the context of 4096",
            "context of 4096; lower max_new_tokens, or remove the prompt from its source",
        ),
        (400, "content policy: a token of violence", "a token of violence; remove the prompt from its source$"),
        (
            402,
            "insufficient balance",
            "insufficient balance\\); add credit at the provider; finished samples are stored",
        ),
        (404, "no such model", "no such model; correct server.model, or the path of server.url$"),
        (422, "temperature", "the server refused the request"),
    ],
)
def test_refused_requests_are_the_users(status: int, message: str, expected: str) -> None:
    answer = status, JSON, body({"error": {"message": message}})
    with server(lambda *_: answer) as made, opened(made) as backend, pytest.raises(UserError, match=expected):
        complete(backend)
    assert len(made.asked) == 1


def test_an_error_whose_parameter_is_no_text_is_read_as_one_without() -> None:
    error = {"message": "temperature is not supported", "param": ["body", "temperature"], "code": {"a": 1}}

    def reply(number: int, handler: Handler) -> Answer:
        refused = "temperature" in handler.server.asked[number]
        return (400, JSON, body({"error": error})) if refused else (200, JSON, body(chat()))

    with server(reply) as made, opened(made) as backend:
        assert complete(backend)[0].omitted == ("temperature",)


def test_a_model_that_knows_the_token_limit_by_its_other_name() -> None:
    refusal = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."

    def reply(number: int, handler: Handler) -> Answer:
        if "max_tokens" in handler.server.asked[number]:
            return 400, JSON, body({"error": {"message": refusal}})
        return 200, JSON, body(chat())

    with server(reply) as made, opened(made, max_batch=8) as backend:
        assert len(complete(backend, samples=40)) == 40 and len(made.asked) <= 48, "it is learnt once"
    assert sum(asked.get("max_completion_tokens") == 64 for asked in made.asked) == 40


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    def reply(number: int, handler: Handler) -> Answer:
        return (status, JSON, b"{}") if number == 0 else (200, JSON, body(chat()))

    with server(reply) as made, opened(made) as backend:
        assert len(complete(backend)) == 1 and len(made.asked) == 2


# ---- the key


@pytest.mark.one_in(3)
@pytest.mark.parametrize("status", [400, 401, 403, 500])
@pytest.mark.parametrize(
    "form", [KEY, f"Bearer {KEY}", quote(KEY, safe=""), quote(KEY, safe="").lower(), "sk-a+b/C&amp;d=0123456789"]
)
def test_a_key_that_a_server_echoes_is_hidden(status: int, form: str) -> None:
    answer = status, JSON, body({"error": {"message": f"wrong key: {form}!"}})
    for models in (None, answer):
        with (
            pytest.raises((UserError, WorkError)) as error,
            server(lambda *_: answer, models) as made,
            opened(made) as backend,
        ):
            complete(backend)
        assert "0123456789" not in str(error.value) and "***" in str(error.value), error.value


@pytest.mark.parametrize(
    ("value", "echo"),
    [
        ("Bearer tok-abcdefgh123", "Bearer tok-abcdefgh123"),
        ("Bearer tok-abcdefgh123", "the token tok-abcdefgh123 is unknown"),
        ("Basic bWU6cGFzcy1hYmNkZWZnaDEyMw==", "bWU6cGFzcy1hYmNkZWZnaDEyMw== is wrong"),
        ("Basic bWU6cGFzcy1hYmNkZWZnaDEyMw==", "user me with password pass-abcdefgh123"),
    ],
)
def test_a_secret_of_a_header_is_hidden_without_its_scheme(value: str, echo: str) -> None:
    secrets = Secrets("http://x", None, headers={"Authorization": value, "X-Title": "research of mine"})
    shown, harmless = secrets.hide(echo), "the bearer of my research"
    assert "abcdefgh123" not in shown and "bWU6" not in shown and "***" in shown
    assert secrets.hide(harmless) == harmless


def test_credentials_in_an_address_are_hidden() -> None:
    assert shown_url("https://me:secret@host:1/v1?key=secret") == "https://host:1/v1"
    assert Secrets("https://me:secret@host/v1", None).hide("no secret here") == "no *** here"
    with (
        pytest.raises(UserError) as error,
        backends.open(Model("m", Server("http://me:secret@127.0.0.1:9/v1")), LocalEngine()),
    ):
        pass
    assert "secret" not in str(error.value)


def test_a_short_key_is_a_placeholder() -> None:
    assert Secrets("http://x", "none").hide("none of them") == "none of them"


@pytest.mark.parametrize("key", ["sk-\u00e9t\u00e9 is it", "sk 12", "sk\n12"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY holds spaces or characters outside ASCII") as error:
        Secrets("http://x", key)
    assert key not in str(error.value)
    assert Secrets("http://x", "sk-12\n").key == "sk-12"


# ---- the list of models


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"[5]", body({"data": None}), body({"data": 5}), body({"data": [5]}), body({"data": [{"id": 5}]}),
     body({"data": [{}]}), body({"object": "list"}), b"[" * 100_000],
)  # fmt: skip
def test_a_list_of_models_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises(Unreadable):
        read_models(data)
    models = 200, JSON, data
    refused = pytest.raises(UserError, match="no model server answers there")
    with server(lambda *_: models, models) as made, refused as error, opened(made):
        pass
    assert "\n" not in str(error.value)
    with server(lambda *_: (200, JSON, body(chat())), models) as made, opened(made, name="named") as backend:
        assert complete(backend)[0].text.endswith("\\boxed{4}.")


def test_a_bare_array_of_models_is_a_list() -> None:
    """Together AI sends one: an empty array lists nothing, and is no longer one that cannot be read."""
    assert read_models(body([{"id": "m", "owned_by": "x"}, {"id": "o"}])) == {"m": "x", "o": ""}
    assert read_models(b"[]") == {}
    answer = 200, JSON, body(chat())
    with server(lambda *_: answer, (200, JSON, body([{"id": "m"}]))) as made, opened(made) as backend:
        assert backend.identity == {"model": "m"} and complete(backend)
    nameless = pytest.raises(UserError, match=r"lists no models; choose one with --name, or in a recipe with server")
    with server(lambda *_: answer, (200, JSON, b"[]")) as made, nameless, opened(made):
        pass


def test_a_list_of_models_that_is_too_long_does_not_hide_a_named_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.backends.connection.REPLY_BYTES", 1000)
    long = 200, JSON, body({"data": [{"id": f"model {n}"} for n in range(200)]})
    with server(lambda *_: (200, JSON, body(chat())), long) as made, opened(made, name="m") as backend:
        assert complete(backend)
    page = 200, "text/html", b"<html>"
    with (
        server(lambda *_: page, page) as made,
        pytest.raises(UserError, match="no model server"),
        opened(made, name="m"),
    ):
        pass


def test_the_model_is_chosen_by_name() -> None:
    two = (200, JSON, body({"data": [{"id": "a"}, {"id": "b"}]}))

    def reply(number: int, handler: Handler) -> Answer:
        known = handler.server.asked[number]["model"] in ("b", "alias")
        return (200, JSON, body(chat())) if known else (404, JSON, b"{}")

    with server(reply, two) as made:
        with pytest.raises(UserError, match=r"several models; choose one with --name, or .*: a, b"), opened(made):
            pass
        with (
            pytest.raises(UserError, match=r"no model 'c' \(.*404\); choose one .*: a, b"),
            opened(made, name="c"),
        ):
            pass
        for name in ("b", "alias"):
            with opened(made, name=name) as backend:
                assert backend.identity == {"model": name}
    for listing in ((404, JSON, b""), (500, JSON, b"{}")):
        with server(reply, listing) as made, opened(made, name="b") as backend:
            assert complete(backend)[0].text.endswith("\\boxed{4}.")
        with (
            server(reply, listing) as made,
            pytest.raises(UserError, match=r"no model 'c' and lists none \(.*404\); correct its name"),
            opened(made, name="c"),
        ):
            pass


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/v1", "nowhere://x", "http://", "http://h:x"])
def test_an_address_that_is_none(url: str) -> None:
    with (
        pytest.raises(UserError, match="should be an OpenAI-compatible address"),
        backends.open(Model("m", Server(url)), LocalEngine()),
    ):
        pass
