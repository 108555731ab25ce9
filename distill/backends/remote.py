"""A server with an OpenAI-compatible address (vLLM, SGLang, llama.cpp, an API) as a backend.

One request a sample, many at once: servers batch what arrives together. Coroutines and not threads: a thread that waits
for an answer cannot be stopped, and an interruption would last as long as the longest request. The seed of a request is
a hash of (seed, prompt, sample), so that a server that honours it repeats itself. The address is no part of the
identity: a run may move to another server of the same model.

Replies are read as bytes and checked (`reply.py`) rather than as the client library's objects, which hold whatever the
server sent. A sample that fails for good does not end the others: they go on, and the error is raised at the end. Only
a failure that all of them share (a rejected key, several failures in a row) stops the work; the requests under way are
then waited for, briefly, as their answers are paid for. The client library's own retries are off, because they hide
that the server is busy (`pacing.py`).
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import httpx2

from distill.backends.backend import Completed, Job, Usage
from distill.backends.pacing import Pace, pause, retry_after
from distill.backends.reply import Reply, Unreadable, read_model_names, read_reply
from distill.backends.secrets import Secrets, checked_url, shown_url
from distill.backends.stream import Stream
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.fingerprint import digest
from distill.models import Server
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI, OpenAIError

RETRIES = 8  # with growing pauses: when a server is busy, restarts, drops a connection or sends no answer
IN_A_ROW = 5  # samples that fail for good, with no answer between them: the server is down
TIMEOUT = 3600.0  # seconds for a sample that is not streamed: 32,768 tokens at 10 a second
CONNECT_TIMEOUT = 30.0  # seconds for the list of models
GRACE = 10.0  # seconds that other requests under way get after one has failed for good
REPLY_BYTES, TOKEN_BYTES = 1 << 20, 2048  # that a reply may have, and more for every token that was asked for
REFUSED = range(400, 500)  # statuses of requests that would be refused again …
AGAIN = (408, 409, 425, 429)  # … except these
BUSY = (429, 503, 529)
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the token limit; some models refuse the first
REDIRECTS = range(300, 400)  # not followed: a key must not reach another host
SHARED = (401, 402, 403, 404)  # refusals of the key, the account or the model, which every request would get
KEPT = "finished samples are stored, run the same command to continue"


class RemoteBackend:
    """One model of a server, whose name is known. concurrency: requests under way at once. Errors: UserError for a key
    or an address that cannot be used."""

    max_context: int | None = None
    numerics: dict[str, str] = {"kernels": "server"}  # noqa: RUF012  what else decides the numbers is not known

    def __init__(self, server: Server, concurrency: int = 64) -> None:
        self.url, self.model, self.concurrency = checked_url(server.url), server.model or "", concurrency
        self.identity = server.identity
        self.server, self.usage = server, Usage()
        self._extra = dict(server.extra_body)
        self._limit = LIMITS[0]
        self._secrets = Secrets(server.url, server.key, server.key_variable)

    @classmethod
    def connect(cls, server: Server, concurrency: int = 64) -> "RemoteBackend":
        """Ask the server for its models, and for a token of one that it does not list: some load models on demand, or
        know them by several names.

        Errors: UserError when no server answers, it rejects the key, or it does not have the model.
        """
        backend = cls(server, concurrency)
        where, names = shown_url(server.url), backend._model_names()
        model = names[0] if server.model is None and len(names) == 1 else server.model
        if model is None or (model not in names and not backend._answers()):
            problem = "several models" if model is None else f"no model {model!r}"
            choices = ", ".join(names) or "none"
            raise UserError(
                f"{where}: the server has {problem}; choose one with --name, or in a recipe with "
                f"server.model: {backend._hide(choices)}"
            )
        return cls(replace(server, model=model), concurrency)

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Nothing: the server knows its context, and refuses what does not fit."""

    def score(self, traces: Sequence[Trace], top_k: int) -> list[Trace]:
        """Errors: UserError, always: chat servers do not score texts."""
        raise UserError(f"{self.model} is behind a server, which does not score texts; use a local teacher")

    def close(self) -> None:
        """Nothing: `complete` closes its connections."""

    def complete(self, jobs: Iterable[Job], sampling: SamplingParams, seed: int) -> Iterator[Completed]:
        """Yield every wanted sample once, as it finishes.

        Errors, when all others are finished: UserError for a request that the server refuses; WorkError for one that
        failed after retries. At once: UserError for a key, an account or a model that it refuses; WorkError after
        `IN_A_ROW` failures; answers that arrive within `GRACE` seconds are yielded before that.
        """
        wanted = ((job.prompt, sample) for job in jobs for sample in job.samples)
        running: set[asyncio.Task[Completed]] = set()
        pace, failures = Pace(self.concurrency), _Failures()
        with asyncio.Runner() as runner:
            silence = self.server.silence if self.server.stream else TIMEOUT
            loop, client = runner.get_loop(), self._client(silence, 0, sampling.max_new_tokens)
            try:
                while True:
                    room = 0 if failures.stopped else pace.limit - len(running)
                    for prompt, sample in islice(wanted, max(0, room)):
                        running.add(loop.create_task(self._sample(client, prompt, sample, sampling, seed, pace)))
                    if not running:
                        break
                    timeout = max(0.0, failures.deadline - loop.time()) if failures.stopped else None
                    waiting = asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    done, running = loop.run_until_complete(waiting)
                    if not done:
                        break
                    for task in done:
                        if (error := task.exception()) is not None:
                            failures.add(error, loop.time())
                        else:
                            failures.in_a_row = 0
                            yield task.result()
            finally:
                for task in running:
                    task.cancel()
                runner.run(client.close())
        failures.raise_first()

    async def _sample(
        self, client: "AsyncOpenAI", prompt: Prompt, sample: int, sampling: SamplingParams, seed: int, pace: Pace
    ) -> Completed:
        """One answer. Errors: UserError and WorkError, as `_OneSample` where they say nothing about other samples."""
        import openai

        loop, draw = asyncio.get_running_loop(), random.Random(f"{prompt.id} {sample}")
        failure: UserError | WorkError | None = None
        for attempt in range(RETRIES + 1):
            sent, wait, limit = loop.time(), None, self._limit
            try:
                async with asyncio.timeout(None if self.server.stream else TIMEOUT):
                    reply = await self._ask(client, prompt, sample, sampling, seed)
            except Unreadable as error:
                failure = WorkError(
                    f"the server failed: its answers are empty or unreadable ({error}), as they may be under load; "
                    f"{KEPT}"
                )
            except _TooLarge as error:
                failure = WorkError(f"the server failed: {error}; {KEPT}")
            except TimeoutError:
                late = WorkError(f"the server sent no answer within {TIMEOUT:,.0f} seconds; {KEPT}")
                raise _OneSample(late) from None
            except openai.APIStatusError as error:
                failure = self._error(error, prompt)
                if error.status_code in SHARED:
                    raise failure from error
                if limit == LIMITS[0] and LIMITS[1] in str(error):
                    self._limit = LIMITS[1]
                    continue
                if isinstance(failure, UserError):
                    raise _OneSample(failure) from error
                wait = retry_after(error.response.headers)
                if error.status_code in BUSY:
                    pace.busy(sent, loop.time())
            except (openai.OpenAIError, httpx2.HTTPError) as error:
                failure = self._error(error, prompt)
            else:
                pace.answered()
                self._count(reply.prompt_tokens, reply.completion_tokens)
                return Completed(
                    prompt, sample, reply.text, reply.finish_reason, completion_tokens=reply.completion_tokens
                )
            if attempt < RETRIES:
                await asyncio.sleep(pause(attempt, wait, draw))
        assert failure is not None
        raise _OneSample(failure)

    async def _ask(
        self, client: "AsyncOpenAI", prompt: Prompt, sample: int, sampling: SamplingParams, seed: int
    ) -> Reply:
        from openai.types.chat import ChatCompletionMessageParam

        messages: list[ChatCompletionMessageParam] = [
            {"role": m["role"], "content": m["content"]} for m in prompt.messages
        ]
        extra: dict[str, object] = {self._limit: sampling.max_new_tokens}
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        extra |= self._extra
        if self.server.stream:
            extra = {"stream": True, "stream_options": {"include_usage": True}} | extra
        request = client.chat.completions.with_streaming_response.create(
            model=self.model,
            messages=messages,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=int(digest([seed, prompt.id, sample]), 16) % 2**31,
            extra_body=extra,
        )
        async with request as response:
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                stream = Stream()
                async for part in response.iter_bytes():
                    stream.feed(part)
                return stream.reply()
            return read_reply(b"".join([part async for part in response.iter_bytes()]))

    def _model_names(self) -> list[str]:
        import openai

        async def ask() -> bytes:
            async with self._client(CONNECT_TIMEOUT, retries=1) as client:
                body: bytes = (await client.models.with_raw_response.list()).http_response.content
                return body

        with self._connecting():
            try:
                with asyncio.Runner() as runner:
                    return read_model_names(runner.run(ask()))
            except openai.APIStatusError as error:
                if self.model and error.status_code not in (401, 403, *REDIRECTS):
                    return []  # not every server has the list
                raise

    def _answers(self) -> bool:
        """Whether the server has the model, although it does not list it."""
        import openai

        async def ask() -> None:
            async with self._client(self.server.silence, retries=1) as client:
                await client.chat.completions.with_raw_response.create(
                    model=self.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1
                )

        with self._connecting():
            try:
                with asyncio.Runner() as runner:
                    runner.run(ask())
            except openai.APIStatusError as error:
                if error.status_code in (401, 403, *REDIRECTS):
                    raise
                return False
        return True

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        """Turn what is wrong with the server into UserError."""
        import openai

        where = shown_url(self.url)
        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{where}: {self._rejected(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code not in REDIRECTS:
                raise UserError(self._no_server(error)) from error
            raise UserError(f"{where}: {_redirected(error)}") from error
        except (openai.OpenAIError, httpx2.InvalidURL, OSError, Unreadable, _TooLarge) as error:
            raise UserError(self._no_server(error)) from error

    def _no_server(self, error: Exception) -> str:
        return (
            f"{shown_url(self.url)}: no model server answers there ({self._secrets.reason(error)}); give an "
            f"OpenAI-compatible address such as http://localhost:8000/v1"
        )

    def _client(self, timeout: float, retries: int, tokens: int = 0) -> "AsyncOpenAI":
        """The client library, whose replies are bounded, of connections that are closed with it.

        timeout: seconds without a byte, from the request to the end of the reply. tokens: that a reply may have.
        """
        import openai

        bound = partial(_bound, most=REPLY_BYTES + tokens * TOKEN_BYTES)
        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._secrets.key or "none",
            max_retries=retries,
            timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT),
            default_headers={"Accept-Encoding": "identity"},  # a compressed reply has no bound
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [bound]}, follow_redirects=False),
        )

    def _count(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        self.usage = Usage(
            self.usage.prompt_tokens + (prompt_tokens or 0), self.usage.completion_tokens + (completion_tokens or 0)
        )

    def _error(self, error: "OpenAIError | httpx2.HTTPError", prompt: Prompt) -> UserError | WorkError:
        import openai

        if isinstance(error, openai.APIStatusError) and error.status_code in REDIRECTS:
            return WorkError(f"{_redirected(error)}; {KEPT}")
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return UserError(f"{self._rejected(error)}; {KEPT}")
        reason = self._secrets.reason(error)
        if isinstance(error, openai.APIStatusError) and error.status_code in REFUSED and error.status_code not in AGAIN:
            too_many = "max_tokens" in reason or "max_completion_tokens" in reason
            advice = "lower max_new_tokens" if too_many else "if it is too long, lower max_new_tokens"
            return UserError(f"prompt {prompt.id}: the server refused the request: {reason}; {advice}")
        return WorkError(f"the server failed: {reason}; {KEPT}")

    def _rejected(self, error: "OpenAIError") -> str:
        reason, variable = self._secrets.reason(error), self._secrets.variable
        return f"the server rejected the key ({reason}); set {variable} to a valid one"

    def _hide(self, text: str) -> str:
        return self._secrets.hide(text)


def _redirected(error: "APIStatusError") -> str:
    place = shown_url(error.response.headers.get("location", ""))
    return f"the server redirects to {place or 'another address'}, which is not followed; if right, give it as url"


class _OneSample(Exception):
    """A failure that says nothing about other samples. error: what the caller gets to see."""

    def __init__(self, error: UserError | WorkError) -> None:
        super().__init__(str(error))
        self.error = error


class _Failures:
    """The failures of one call. deadline: when requests under way are given up, once the work is stopped."""

    def __init__(self) -> None:
        self.deadline = 0.0
        self.in_a_row = 0
        self.stopped = False
        self._errors: list[BaseException] = []

    def add(self, error: BaseException, now: float) -> None:
        """Count a failure, and stop the work where all samples share it, or the server seems to be down.

        A refused request does not count as such: a rerun meets the same refusals first, and would never get past them.
        """
        self._errors.append(error)
        self.in_a_row += not (isinstance(error, _OneSample) and isinstance(error.error, UserError))
        if not self.stopped and (not isinstance(error, _OneSample) or self.in_a_row >= IN_A_ROW):
            self.stopped, self.deadline = True, now + GRACE

    def raise_first(self) -> None:
        """Raise the failure that stopped the work, else the first one with the number of all; none without any."""
        shared = next((error for error in self._errors if not isinstance(error, _OneSample)), None)
        if shared is not None:
            raise shared
        failures = [error.error for error in self._errors if isinstance(error, _OneSample)]
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise type(failures[0])(f"{len(failures):,} samples failed; the first: {failures[0]}")


class _TooLarge(Exception):
    """A reply that is longer than its bound, or may be."""


class _Bounded(httpx2.AsyncByteStream):
    """A reply's body, which ends with an error once it has more bytes than `most`."""

    def __init__(self, stream: httpx2.AsyncByteStream, most: int) -> None:
        self._stream, self._most = stream, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > self._most:
                raise _TooLarge(f"its reply has more than {self._most:,} bytes")
            yield part

    async def aclose(self) -> None:
        """Close the connection's stream."""
        await self._stream.aclose()


async def _bound(response: httpx2.Response, most: int) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _TooLarge("its reply is compressed, which was not accepted")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream, most)
