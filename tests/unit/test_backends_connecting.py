"""How a server is found: proxies and certificates of the environment, the model's name, and many connections."""

import threading
from pathlib import Path

import httpx2
import openai
import pytest
from server_support import JSON, PARAMS, Answer, Handler, body, chat, complete, opened, server

from distill import backends
from distill.backends import Job
from distill.backends.connection import Connection
from distill.backends.remote import RemoteBackend
from distill.errors import UserError
from distill.models import Model, Server
from distill.prompts import Prompt
from distill.recipe import LocalEngine

ANSWER: Answer = 200, JSON, body(chat())
EVENTS = "text/event-stream"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and certificates of the machine, and retries without long pauses."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def connected(url: str, name: str | None = None) -> RemoteBackend:
    return RemoteBackend.connect(Server(url, name), 4)


# ---- the environment


@pytest.mark.parametrize(
    ("variable", "proxy", "words"),
    [
        ("ALL_PROXY", "socks5://me:s3cret@127.0.0.1:9", "a proxy of type socks5, .*; unset it, .*install the package"),
        ("https_proxy", "socks4://127.0.0.1:9", "a proxy of type socks4, which cannot be used here; unset it"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    variable: str, proxy: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    with pytest.raises(UserError, match=f"http://teacher.invalid/v1: .* {variable} names {words}") as error:
        connected("http://teacher.invalid/v1", "m")
    assert "\n" not in str(error.value) and "s3cret" not in str(error.value)
    with server(lambda *_: ANSWER) as made, opened(made) as backend:
        assert complete(backend), "a server on this machine needs no proxy"


@pytest.mark.parametrize("content", [None, "hi\n"])
def test_certificates_that_cannot_be_read_are_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(UserError, match=rf"SSL_CERT_FILE is {path}, where no certificates can be read \(.+\); correct"):
        connected("https://teacher.invalid/v1", "m")


@pytest.mark.parametrize(
    ("url", "reason", "words"),
    [
        ("https://h/v1", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "set SSL_CERT_FILE to a file"),
        ("http://h/v1", "Server disconnected without sending a response.", "give the address with https://"),
        ("http://h/v1", "All connection attempts failed", "give an OpenAI-compatible address"),
    ],
)
def test_what_is_wrong_with_tls_is_said(url: str, reason: str, words: str) -> None:
    failed = openai.APIConnectionError(request=httpx2.Request("GET", url))
    with pytest.raises(UserError, match=words), Connection(Server(url, "m"), url, 1)._connecting():
        raise failed from httpx2.ConnectError(reason)


def test_a_plain_server_that_is_asked_with_tls() -> None:
    with server(lambda *_: ANSWER) as made, pytest.raises(UserError, match="not speak TLS .* with http://"):
        connected(f"https://127.0.0.1:{made.server_address[1]}/v1", "m")


def test_a_tls_port_that_is_asked_without_tls_is_not_one_with_the_model() -> None:
    plain = 400, "text/plain", b"Client sent an HTTP request to an HTTPS server.\n"
    with server(lambda *_: plain, plain) as made, pytest.raises(UserError, match="give the address with https://"):
        opened(made, name="m").__enter__()


def test_no_connection_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library's own limit holds for no address: all requests are under way at once."""
    monkeypatch.setattr("openai._base_client.DEFAULT_CONNECTION_LIMITS", httpx2.Limits(max_connections=2))
    together = threading.Barrier(6)

    def reply(number: int, handler: Handler) -> Answer:
        together.wait(60)
        return ANSWER

    with server(reply) as made, opened(made, 6) as backend:
        assert len(complete(backend, 6)) == 6
        (connection,) = backend._connections  # type: ignore[attr-defined]  # a remote one
        connection.open(600.0, 64, 0)
        assert connection.client.timeout.pool is None


# ---- the model's name


def test_a_model_is_asked_for_as_samples_are() -> None:
    """Some models can only be streamed, or need fields of the recipe."""

    def reply(number: int, handler: Handler) -> Answer:
        asked = handler.server.asked[number]
        if not asked.get("stream") or asked.get("enable_thinking") is not True:
            return 400, JSON, body({"error": {"message": "This model only supports stream mode"}})
        chunk = {"choices": [{"index": 0, "delta": {"content": "4"}, "finish_reason": "stop"}]}
        return 200, EVENTS, b"data: " + body(chunk) + b"\n\ndata: [DONE]\n\n"

    with server(reply, (404, JSON, b"{}")) as made:
        place = Server(f"http://127.0.0.1:{made.server_address[1]}/v1", "m", extra_body={"enable_thinking": True})
        with backends.open(Model("m", place), LocalEngine(), 1) as backend:
            assert complete(backend)[0].text == "4"


@pytest.mark.parametrize("listing", [(404, JSON, b"{}"), (200, JSON, body({"data": [{"id": "a"}]}))])
def test_what_the_server_says_of_the_model_is_said(listing: Answer) -> None:
    refusal = 400, JSON, body({"error": {"message": "this model only supports stream mode"}})
    with (
        server(lambda *_: refusal, listing) as made,
        pytest.raises(UserError, match=r"no model 'm'.*\(Error code: 400 - this model only supports stream mode\); "),
    ):
        opened(made, name="m").__enter__()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_is_refused_inside_an_answer_is_not_there(streamed: bool) -> None:
    for message, has in (("unknown model m", False), ("n must be 2", True)):
        error = body({"base_resp": {"status_code": 2013, "status_msg": message}})
        refusal: Answer = (200, EVENTS, b"data: " + error + b"\n\n") if streamed else (200, JSON, error)
        with server(lambda *_: refusal, (404, JSON, b"{}")) as made:  # noqa: B023
            if has:
                with opened(made, name="m") as backend:
                    assert backend.identity == {"model": "m"}
            else:
                with pytest.raises(UserError, match=r"no model 'm' and lists none \(unknown model m\)"):
                    opened(made, name="m").__enter__()


def test_a_server_that_demands_payment_has_the_model() -> None:
    unpaid = 402, JSON, body({"error": {"message": "Insufficient Balance"}})
    with (
        server(lambda *_: unpaid, (404, JSON, b"{}")) as made,
        pytest.raises(UserError, match=r"the server demands payment \(.*Balance\); add credit at the provider"),
    ):
        opened(made, name="m").__enter__()


def test_of_many_models_the_nearest_and_some_are_named() -> None:
    models = [f"vendor/model-of-theirs-{n}" for n in range(400)] + ["deepseek/deepseek-r1"]
    listing = 200, JSON, body({"data": [{"id": name} for name in models]})
    with (
        server(lambda *_: (404, JSON, b"{}"), listing) as made,
        pytest.raises(UserError, match="did you mean deepseek/deepseek-r1.* and 381 more$") as error,
    ):
        opened(made, name="deepseek/deepseek-r").__enter__()
    assert len(str(error.value)) < 1000 and str(error.value).count("model-of-theirs") == 20


# ---- several addresses


def test_each_address_gets_the_fields_of_its_own_server() -> None:
    def owned(owner: str) -> Answer:
        return 200, JSON, body({"data": [{"id": "m", "owned_by": owner}]})

    with server(lambda *_: ANSWER, owned("vllm")) as first, server(lambda *_: ANSWER, owned("sglang")) as second:
        urls = [f"http://127.0.0.1:{made.server_address[1]}/v1" for made in (first, second)]
        with backends.open(Model("m", Server(urls[0], "m", others=(urls[1],))), LocalEngine(), 2) as backend:
            jobs = [Job(Prompt.from_question("2 + 2?", "4"), tuple(range(12)))]
            assert len(list(backend.complete(jobs, PARAMS, 0))) == 12
    assert first.asked and all("return_token_ids" in asked for asked in first.asked)
    assert second.asked and not any("return_token_ids" in asked for asked in second.asked)
