"""One address of a server: its client library, how busy it is, and its errors as ours.

The client library's own retries are off while sampling, because they hide that the server is busy (`pacing.py`).
Proxies and certificates are those of the environment (`HTTPS_PROXY`, `SSL_CERT_FILE`), as the library takes them. A
server that distill starts is on the loopback interface, where no proxy could reach it: its requests bypass them.
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2

from distill.backends.asking import LIMITS, MODERATION
from distill.backends.bounds import TooLarge, bound
from distill.backends.pacing import Pace
from distill.backends.reply import Unreadable, as_object, read_json, read_models
from distill.backends.secrets import Secrets, checked_url, shown_url
from distill.errors import UserError, WorkError
from distill.models import Server
from distill.prompts.prompt import Prompt

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI, OpenAIError

CONNECT_TIMEOUT = 30.0  # seconds for the list of models
REPLY_BYTES, TOKEN_BYTES = 1 << 20, 2048  # that a reply may have, and more for every token that was asked for
TRANSFER_TIMEOUT = 600.0  # seconds without a byte of a batch's file
MOST_FILE_BYTES = 8 << 30  # of a batch's answers
REFUSED = range(400, 500)  # statuses of requests that would be refused again …
AGAIN = (408, 409, 425, 429)  # … except these
REDIRECTS = range(300, 400)  # not followed: a key must not reach another host
DOWN_AFTER, DOWN_SECONDS = 3, 60.0  # failures in a row after which other addresses are preferred, and for how long
TOO_LONG = re.compile(r"token|context|length|too long", re.I)  # in the reason of a refused request
KEPT = "finished samples are stored, run the same command to continue"


class Unreachable(UserError):
    """Nothing that speaks the protocol answers at an address."""


class Connection:
    """An address. pace: how many requests it takes. running: requests under way. Errors: UserError for a key or an
    address that cannot be used."""

    def __init__(self, server: Server, url: str, concurrency: int) -> None:
        self.server, self.url, self.pace, self.running = server, checked_url(url), Pace(concurrency), 0
        self.secrets = Secrets(url, server.key, server.key_variable, server.headers)
        self.client: AsyncOpenAI | None = None
        self._failures, self._failed = 0, 0.0

    @property
    def where(self) -> str:
        """The address as messages show it."""
        return shown_url(self.url)

    # ---- sampling

    def open(self, timeout: float, tokens: int, alternatives: int) -> None:
        """Create the client. timeout: seconds without a byte. tokens, alternatives: that a sample may have, and for
        each of the tokens."""
        self.pace, self.running = Pace(self.pace.most), 0
        self.client = self._client(timeout, 0, REPLY_BYTES, tokens * (TOKEN_BYTES + 256 * alternatives))

    async def close(self) -> None:
        """Close the client's connections."""
        if self.client is not None:
            await self.client.close()

    def rank(self, now: float) -> tuple[bool, float]:
        """Lower is preferred: addresses that answer, and those with the most room."""
        down = self._failures >= DOWN_AFTER and now - self._failed < DOWN_SECONDS
        return down, self.running / self.pace.limit

    def answered(self) -> None:
        """Count an answer."""
        self.pace.answered()
        self._failures = 0

    def failed(self, now: float) -> None:
        """Count a failure that is not the request's."""
        self._failures, self._failed = self._failures + 1, now

    def error(self, error: "OpenAIError | httpx2.HTTPError", prompt: Prompt) -> UserError | WorkError:
        """What a failed request means to the user."""
        import openai

        if isinstance(error, openai.APIStatusError) and error.status_code in REDIRECTS:
            return WorkError(f"{_redirected(error)}; {KEPT}")
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        if status in (401, 403) and not moderated(status, str(error)):
            assert isinstance(error, openai.APIStatusError)
            return UserError(f"{self._rejected(error)}; {KEPT}")
        return self._failure(status, self.secrets.reason(error), str(error), prompt)

    def reported(self, code: int | None, message: str, prompt: Prompt) -> UserError | WorkError:
        """What an error that came inside an answer means to the user. code: a status, where it has one."""
        return self._failure(code, self.secrets.line(message), message, prompt)

    def _failure(self, status: int | None, reason: str, whole: str, prompt: Prompt) -> UserError | WorkError:
        if status is not None and is_refusal(status):
            return UserError(_refusal(status, reason, whole, f"prompt {prompt.id}: "))
        return WorkError(f"the server failed: {reason}; {KEPT}")

    def unanswered(self, count: int, status: int | None, reason: str) -> UserError | WorkError:
        """The error of samples that their batches did not answer. status, reason: of the first of them."""
        line = self.secrets.line(reason) or "the provider gives no reason"
        subject = f"{count:,} samples were not answered by their batches: "
        if status is not None and is_refusal(status):
            return UserError(subject + _refusal(status, line, reason))
        return WorkError(f"{subject}{line}; the others are stored, run the same command to ask for these again")

    @contextmanager
    def asking_batches(self) -> Iterator["AsyncOpenAI"]:
        """A client for a batch API, with retries of its own. Errors: UserError where the server refuses; WorkError."""
        import openai

        try:
            yield self._client(TRANSFER_TIMEOUT, 5, MOST_FILE_BYTES)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self.where}: {self._rejected(error)}") from error
        except openai.APIStatusError as error:
            if not is_refusal(error.status_code):
                raise WorkError(f"the server failed: {self.secrets.reason(error)}; {KEPT}") from error
            raise UserError(
                f"{self.where}: the server refused a batch ({self.secrets.reason(error)}); if it has no batch API, set "
                f"server.batch to false"
            ) from error
        except (openai.OpenAIError, httpx2.HTTPError, TooLarge) as error:
            raise WorkError(f"the server failed: {self.secrets.reason(error)}; {KEPT}") from error

    def new_client(self, timeout: float, reply_bytes: int) -> "AsyncOpenAI":
        """A client with retries of its own, for requests that are not samples. Close it, or leave its context."""
        return self._client(timeout, 5, REPLY_BYTES + reply_bytes)

    # ---- connecting

    def models(self) -> dict[str, str]:
        """Names of the models that the server lists, and who has them ("" where it does not say).

        Empty where there is no list that can be read, but the model is named: `answers` then decides. Errors: UserError
        when no server answers, or it rejects the key.
        """
        import openai

        async def ask() -> bytes:
            async with self._client(CONNECT_TIMEOUT, 1, REPLY_BYTES) as client:
                body: bytes = (await client.models.with_raw_response.list()).http_response.content
                return body

        with self._connecting():
            try:
                with asyncio.Runner() as runner:
                    return read_models(runner.run(ask()))
            except openai.APIStatusError as error:
                if self.server.model and error.status_code not in (401, 403, *REDIRECTS):
                    return {}  # not every server has the list
                raise
            except (Unreadable, TooLarge):
                if self.server.model:
                    return {}
                raise

    def answers(self, model: str) -> bool:
        """Whether the server has a model that it does not list: some load models on demand, or know them by several
        names. Errors: as `models`."""
        import openai

        async def ask() -> None:
            async with self._client(self.server.silence, 1, REPLY_BYTES) as client:
                raw = await client.chat.completions.with_raw_response.create(
                    model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1
                )
                as_object(read_json(raw.http_response.content), "the reply")  # a page of a web server is none

        with self._connecting():
            try:
                with asyncio.Runner() as runner:
                    runner.run(ask())
            except openai.APIStatusError as error:
                if error.status_code not in (400, 404, 422):
                    raise
                # It has the model if what it refuses is something else, such as a parameter of this question.
                reason = str(error).lower()
                return error.status_code != 404 and ("model" not in reason or LIMITS[1] in reason)
        return True

    def without(self, model: str | None, listed: Sequence[str]) -> UserError:
        """The error of a server that does not have the model, or has several where none is named."""
        if not listed and not urlsplit(self.url).path.rstrip("/").endswith("/v1"):
            return UserError(f"{self.where}: no model answers there; complete the address, which usually ends with /v1")
        how = "choose one with --name, or in a recipe with server.model"
        if model is None and not listed:
            return UserError(f"{self.where}: the server lists no models; {how}")
        if not listed:
            return UserError(f"{self.where}: the server has no model {model!r} and lists none; correct its name")
        problem = "several models" if model is None else f"no model {model!r}"
        return UserError(f"{self.where}: the server has {problem}; {how}: {self.secrets.hide(', '.join(listed))}")

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        """Turn what is wrong with the server into UserError."""
        import openai

        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self.where}: {self._rejected(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code in AGAIN or error.status_code >= 500:
                reason = self.secrets.reason(error)
                raise Unreachable(f"{self.where}: the server cannot answer ({reason}); try again later") from error
            if error.status_code not in REDIRECTS:
                raise Unreachable(self._no_server(error)) from error
            raise UserError(f"{self.where}: {_redirected(error)}") from error
        except (openai.OpenAIError, httpx2.InvalidURL, OSError, Unreadable, TooLarge) as error:
            raise Unreachable(self._no_server(error)) from error

    def _no_server(self, error: Exception) -> str:
        return (
            f"{self.where}: no model server answers there ({self.secrets.reason(error)}); give an "
            f"OpenAI-compatible address such as http://localhost:8000/v1"
        )

    def _client(self, timeout: float, retries: int, most: int, each: int = 0) -> "AsyncOpenAI":
        """The client library, whose replies are bounded, of connections that are closed with it. most, each: as of
        `bound`."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.secrets.key or "none",
            max_retries=retries,
            timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT),
            default_headers=dict(self.server.headers) | {"Accept-Encoding": "identity"},  # compressed: no bound
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"response": [partial(bound, most=most, each=each)]},
                follow_redirects=False,
                trust_env=not self.server.direct,
            ),
        )

    def _rejected(self, error: "OpenAIError") -> str:
        reason, variable = self.secrets.reason(error), self.secrets.variable
        return f"the server rejected the key ({reason}); set {variable} to a valid one"


def moderated(status: int, reason: str) -> bool:
    """Whether a status that else concerns every request is about this prompt: OpenRouter flags prompts with 403."""
    return status == 403 and MODERATION.search(reason) is not None


def is_refusal(status: int) -> bool:
    """Whether a request with this status would be refused again."""
    return status in REFUSED and status not in AGAIN


def _refusal(status: int, reason: str, whole: str, subject: str = "") -> str:
    """What a refused request means, and what to do. reason: on one line; whole: the text that it begins."""
    if status == 402:
        return f"the server demands payment ({reason}); add credit at the provider; {KEPT}"
    if status == 404:
        return f"the server refused the request: {reason}; correct server.model, or the path of server.url"
    if MODERATION.search(whole):
        remedy = "leave the prompt out"
    elif TOO_LONG.search(whole):
        remedy = "lower max_new_tokens, or leave the prompt out"
    else:
        remedy = "correct the sampling settings or server.extra_body, or leave the prompt out"
    return f"{subject}the server refused the request: {reason}; {remedy}"


def _redirected(error: "APIStatusError") -> str:
    place = shown_url(error.response.headers.get("location", ""))
    return f"the server redirects to {place or 'another address'}, which is not followed; if right, give it as url"
