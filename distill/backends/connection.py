"""One address of a server: its client library, how busy it is, and its errors as ours.

The client library's own retries are off while sampling, because they hide that the server is busy (`pacing.py`).
Proxies and certificates are those of the environment (`HTTPS_PROXY`, `SSL_CERT_FILE`), as the library takes them
(`client.py`).
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2

from distill.backends.asking import LIMITS, MODERATION
from distill.backends.bounds import TooLarge
from distill.backends.client import new_client
from distill.backends.failures import Forbidden, Rejected
from distill.backends.pacing import Pace
from distill.backends.reply import Reported, Unreadable, as_object, read_json, read_models, reported
from distill.backends.secrets import Secrets, checked_url, shown_url
from distill.backends.stream import Stream
from distill.config import did_you_mean
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
UNPAID = re.compile(  # in the reason of a refusal that has another status than 402
    r"credit balance is too low|billing[ _]hard[ _]limit|insufficient[ _](balance|quota|funds|credits?)|arrearage"
    r"|account is in good standing|overdue[ -]payment",
    re.I,
)
HTTPS_WANTED = re.compile(r"HTTP request .*HTTPS|disconnected without|illegal status line|HTTPS port", re.I)
NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|record layer|PACKET_LENGTH_TOO_LONG", re.I)
UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed", re.I)
LISTED = 20  # models of a server that a message names
KEPT = "finished samples are stored, run the same command to continue"


class Unreachable(UserError):
    """Nothing that speaks the protocol answers at an address."""


class Connection:
    """An address. pace: how many requests it takes. running: requests under way. owner: who has the server, as it says,
    "" if unknown. Errors: UserError for a key or an
    address that cannot be used."""

    def __init__(self, server: Server, url: str, concurrency: int, owner: str = "") -> None:
        self.server, self.url, self.pace, self.running = server, checked_url(url), Pace(concurrency), 0
        self.owner = owner
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
        """What a failed request means to the user.

        Returns: Rejected for what every request would get, Forbidden for status 403, UserError for a refusal of this
        request, WorkError for what may go better another time.
        """
        import openai

        if isinstance(error, openai.APIStatusError) and error.status_code in REDIRECTS:
            return WorkError(f"{_redirected(error)}; {KEPT}")
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        return self._failure(status, self._reason(error), said(error), prompt)

    def reported(self, code: int | None, message: str, prompt: Prompt) -> UserError | WorkError:
        """What an error that came inside an answer means to the user, as `error`. code: a status, where it has one."""
        return self._failure(code, self.secrets.line(message), message, prompt)

    def _failure(self, status: int | None, reason: str, whole: str, prompt: Prompt) -> UserError | WorkError:
        if status is None or not is_refusal(status):
            return WorkError(f"the server failed: {reason}; {KEPT}")
        if status in (402, 404) or _is_unpaid(whole):
            return Rejected(_refusal(status, reason, whole))
        rejected = f"{self._rejected(reason)}; {KEPT}"
        if status == 401:
            return Rejected(rejected)
        if status == 403 and not MODERATION.search(whole):
            return Forbidden(
                rejected,
                f"prompt {prompt.id}: the server refused the request with status 403 ({reason}); if it refuses others "
                f"too, set {self.secrets.variable} to a valid key",
            )
        return UserError(_refusal(status, reason, whole, f"prompt {prompt.id}: "))

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
            raise UserError(f"{self.where}: {self._rejected(self._reason(error))}") from error
        except openai.APIStatusError as error:
            if not is_refusal(error.status_code):
                raise WorkError(f"the server failed: {self._reason(error)}; {KEPT}") from error
            raise UserError(
                f"{self.where}: the server refused a batch ({self._reason(error)}); if it has no batch API, set "
                f"server.batch to false"
            ) from error
        except (openai.OpenAIError, httpx2.HTTPError, TooLarge) as error:
            raise WorkError(f"the server failed: {self._reason(error)}; {KEPT}") from error

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
                unusable = error.status_code in (401, 403, *REDIRECTS) or self._wants_https(error)
                if self.server.model and not unusable:
                    return {}  # not every server has the list
                raise
            except (Unreadable, TooLarge):
                if self.server.model:
                    return {}
                raise

    def refusal_of(self, model: str) -> str | None:
        """What the server says of a model that it does not list, None where it answers with it: some load models on
        demand, or know them by several names. It is asked as for samples. Errors: as `models`."""
        import openai

        body: dict[str, object] = {"stream": True} if self.server.stream else {}
        body |= self.server.extra_body

        async def ask() -> None:
            async with self._client(self.server.silence, 1, REPLY_BYTES) as client:
                raw = await client.chat.completions.with_raw_response.create(
                    model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1, extra_body=body
                )
                content: bytes = raw.http_response.content
                if raw.headers.get("content-type", "").startswith("text/event-stream"):
                    Stream().feed(content)
                else:
                    reply = as_object(read_json(content), "the reply")  # a page of a web server is none
                    if error := reported(reply):
                        raise error

        with self._connecting():
            try:
                with asyncio.Runner() as runner:
                    runner.run(ask())
            except openai.APIStatusError as error:
                if error.status_code not in (400, 404, 422) or self._wants_https(error):
                    raise
                if error.status_code == 404 or _blames_model(error):
                    return self._reason(error)
            except Reported as error:
                return self._reason(error) if _blames_model(error) else None
        return None

    def without(self, model: str | None, listed: Sequence[str], reason: str | None = None) -> UserError:
        """The error of a server that does not have the model, or has several where none is named. reason: what it says
        of the model."""
        said = f" ({reason})" if reason else ""
        if not listed and not urlsplit(self.url).path.rstrip("/").endswith("/v1"):
            return UserError(
                f"{self.where}: no model answers there{said}; complete the address, which usually ends with /v1"
            )
        how = "choose one with --name, or in a recipe with server.model"
        if model is None and not listed:
            return UserError(f"{self.where}: the server lists no models; {how}")
        if not listed:
            return UserError(
                f"{self.where}: the server has no model {model!r} and lists none{said}; correct its name, or what the "
                f"server says"
            )
        problem, near = "several models", ""
        if model is not None:
            problem, near = f"no model {model!r}{said}", did_you_mean(model, listed)
        more = f" and {len(listed) - LISTED:,} more" if len(listed) > LISTED else ""
        names = self.secrets.hide(", ".join(listed[:LISTED]))
        return UserError(f"{self.where}: the server has {problem}{near or ';'} {how}: {names}{more}")

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        """Turn what is wrong with the server into UserError."""
        import openai

        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self.where}: {self._rejected(self._reason(error))}") from error
        except openai.APIStatusError as error:
            reason = self._reason(error)
            if is_refusal(error.status_code) and (error.status_code == 402 or _is_unpaid(said(error))):
                raise UserError(f"{self.where}: {_refusal(402, reason, reason)}") from error
            if error.status_code in AGAIN or error.status_code >= 500:
                raise Unreachable(f"{self.where}: the server cannot answer ({reason}); try again later") from error
            if error.status_code not in REDIRECTS:
                raise Unreachable(self._no_server(error)) from error
            raise UserError(f"{self.where}: {_redirected(error)}") from error
        except (openai.OpenAIError, httpx2.InvalidURL, OSError, Unreadable, TooLarge) as error:
            raise Unreachable(self._no_server(error)) from error

    def _reason(self, error: Exception) -> str:
        """What an error says, on one line, without secrets; never empty."""
        return self.secrets.line(said(error)) or type(error).__name__

    def _wants_https(self, error: Exception) -> bool:
        """Whether an error looks like that of a TLS port that was asked without TLS."""
        return urlsplit(self.url).scheme == "http" and HTTPS_WANTED.search(self._reason(error)) is not None

    def _no_server(self, error: Exception) -> str:
        reason = self._reason(error)
        if UNTRUSTED.search(reason):
            return (
                f"{self.where}: the certificate of the server is not trusted ({reason}); set SSL_CERT_FILE to a file "
                f"with the certificate of its authority"
            )
        if NO_TLS.search(reason):
            return f"{self.where}: the server does not speak TLS there ({reason}); give the address with http://"
        remedy = "give an OpenAI-compatible address such as http://localhost:8000/v1"
        if self._wants_https(error):
            remedy = "if it speaks TLS, give the address with https://"
        return f"{self.where}: no model server answers there ({reason}); {remedy}"

    def _client(self, timeout: float, retries: int, most: int, each: int = 0) -> "AsyncOpenAI":
        """The client library, whose replies are bounded, of connections that are closed with it. most, each: as of
        `bound`."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.secrets.key or "none",
            max_retries=retries,
            timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT, pool=None),
            default_headers=dict(self.server.headers) | {"Accept-Encoding": "identity"},  # compressed: no bound
            http_client=new_client(self.where, self.url, self.server.direct, most, each),
        )

    def _rejected(self, reason: str) -> str:
        return f"the server rejected the key ({reason}); set {self.secrets.variable} to a valid one"


def said(error: Exception) -> str:
    """What an error says, of a reply with a status also where its message is in none of the usual fields."""
    import openai

    text = str(error.__cause__ or error)
    if not isinstance(error, openai.APIStatusError) or error.body is None or text != f"Error code: {error.status_code}":
        return text
    reason = reported(error.body) if isinstance(error.body, dict) else error.body
    return f"{text} - {reason}" if reason else text


def _blames_model(error: Exception) -> bool:
    """Whether a refusal is about the model: a server has it if it refuses something else, such as a parameter of the
    question."""
    reason = said(error).lower()
    return "model" in reason and LIMITS[1] not in reason


def is_refusal(status: int) -> bool:
    """Whether a request with this status would be refused again."""
    return status in REFUSED and status not in AGAIN


def _is_unpaid(reason: str) -> bool:
    """Whether a refusal is about the account's credit, whatever its status."""
    return UNPAID.search(reason) is not None and MODERATION.search(reason) is None


def _refusal(status: int, reason: str, whole: str, subject: str = "") -> str:
    """What a refused request means, and what to do. reason: on one line; whole: the text that it begins."""
    if status == 402 or _is_unpaid(whole):
        return f"the server demands payment ({reason}); add credit at the provider; {KEPT}"
    if status == 404:
        return f"the server refused the request: {reason}; correct server.model, or the path of server.url"
    if MODERATION.search(whole):
        remedy = "remove the prompt from its source"
    elif TOO_LONG.search(whole):
        remedy = "lower max_new_tokens, or remove the prompt from its source"
    else:
        remedy = "correct the sampling settings or server.extra_body, or remove the prompt from its source"
    return f"{subject}the server refused the request: {reason}; {remedy}"


def _redirected(error: "APIStatusError") -> str:
    place = shown_url(error.response.headers.get("location", ""))
    return f"the server redirects to {place or 'another address'}, which is not followed; if right, give it as url"
