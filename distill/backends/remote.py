"""A server with an OpenAI-compatible address (vLLM, SGLang, llama.cpp, an API) as a backend.

One request a sample, many at once: servers batch what arrives together. Coroutines and not threads: a thread that waits
for an answer cannot be stopped, and an interruption would last as long as the longest request. The seed of a request is
a hash of (seed, prompt, sample), so that a server that honours it repeats itself. The address is no part of the
identity: a run may move to another server of the same model.

Replies are read as bytes and checked (`reply.py`) rather than as the client library's objects, which hold whatever the
server sent. When a request fails for good, the others that are under way are waited for, briefly, before the error is
raised: their answers are paid for.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import httpx2

from distill.backends.backend import Completed, Job, Usage
from distill.backends.reply import Unreadable, read_model_names, read_reply
from distill.backends.secrets import Secrets, checked_url, shown_url
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.fingerprint import digest
from distill.models import Server
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

RETRIES = 5  # with growing pauses: when a server is busy, restarts, drops a connection or sends no answer
FIRST_PAUSE = 2.0  # seconds
TIMEOUT = 3600.0  # seconds for one sample: 32,768 tokens at 10 a second
CONNECT_TIMEOUT = 30.0  # seconds for the list of models
GRACE = 10.0  # seconds that other requests under way get after one has failed for good
REPLY_BYTES = 32 << 20  # of one reply; an answer of 32,768 tokens has about 200 kB
REFUSED = range(400, 500)  # statuses of requests that would be refused again …
AGAIN = (408, 409, 429)  # … except these
KEPT = "finished samples are stored, run the same command to continue"


class RemoteBackend:
    """One model of a server, whose name is known. concurrency: requests under way at once. Errors: UserError for a key
    or an address that cannot be used."""

    max_context: int | None = None
    numerics: dict[str, str] = {"kernels": "server"}  # noqa: RUF012  what else decides the numbers is not known

    def __init__(self, server: Server, concurrency: int = 64) -> None:
        self.url, self.model, self.concurrency = checked_url(server.url), server.model or "", concurrency
        self.identity = server.identity
        self.usage = Usage()
        self._extra = dict(server.extra_body)
        self._secrets = Secrets(server.url, server.key, server.key_variable)

    @classmethod
    def connect(cls, server: Server, concurrency: int = 64) -> "RemoteBackend":
        """Ask the server for its models.

        Errors: UserError when no server answers, it rejects the key, or it does not have the model.
        """
        backend = cls(server, concurrency)
        where, names = shown_url(server.url), backend._model_names()
        model = names[0] if server.model is None and len(names) == 1 else server.model
        if model is None or (names and model not in names):
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

        Errors: UserError when the server refuses a request or the key; WorkError, after retries, when it fails. Answers
        that arrive within `GRACE` seconds of the error are yielded before it is raised.
        """
        wanted = ((job.prompt, sample) for job in jobs for sample in job.samples)
        running: set[asyncio.Task[Completed]] = set()
        failure: BaseException | None = None
        deadline = 0.0
        with asyncio.Runner() as runner:
            loop, client = runner.get_loop(), self._client(TIMEOUT)
            try:
                while True:
                    room = 0 if failure else self.concurrency - len(running)
                    for prompt, sample in islice(wanted, room):
                        running.add(loop.create_task(self._sample(client, prompt, sample, sampling, seed)))
                    if not running:
                        break
                    timeout = max(0.0, deadline - loop.time()) if failure else None
                    waiting = asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    done, running = loop.run_until_complete(waiting)
                    if not done:
                        break
                    for task in done:
                        if (error := task.exception()) is None:
                            yield task.result()
                        elif failure is None:
                            failure, deadline = error, loop.time() + GRACE
            finally:
                for task in running:
                    task.cancel()
                runner.run(client.close())
        if failure is not None:
            raise failure

    async def _sample(
        self, client: "AsyncOpenAI", prompt: Prompt, sample: int, sampling: SamplingParams, seed: int
    ) -> Completed:
        """One answer. Errors: UserError, WorkError."""
        import openai

        pause, problem = FIRST_PAUSE, ""
        for left in reversed(range(RETRIES + 1)):
            try:
                async with asyncio.timeout(TIMEOUT):
                    body = await self._ask(client, prompt, sample, sampling, seed)
                reply = read_reply(body)
            except Unreadable as error:
                problem = str(error)
            except _TooLarge as error:
                raise WorkError(f"the server failed: {error}; {KEPT}") from error
            except TimeoutError:
                raise WorkError(f"the server sent no answer within {TIMEOUT:,.0f} seconds; {KEPT}") from None
            except openai.OpenAIError as error:
                raise self._error(error, prompt) from error
            else:
                self._count(reply.prompt_tokens, reply.completion_tokens)
                return Completed(
                    prompt, sample, reply.text, reply.finish_reason, completion_tokens=reply.completion_tokens
                )
            if left:
                await asyncio.sleep(pause)
                pause *= 2
        raise WorkError(
            f"the server failed: its answers are empty or unreadable ({problem}), as they may be under load; {KEPT}"
        )

    async def _ask(
        self, client: "AsyncOpenAI", prompt: Prompt, sample: int, sampling: SamplingParams, seed: int
    ) -> bytes:
        from openai.types.chat import ChatCompletionMessageParam

        messages: list[ChatCompletionMessageParam] = [
            {"role": m["role"], "content": m["content"]} for m in prompt.messages
        ]
        reply = await client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=messages,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=int(digest([seed, prompt.id, sample]), 16) % 2**31,
            extra_body=(({"top_k": sampling.top_k} if sampling.top_k else {}) | self._extra) or None,
        )
        body: bytes = reply.http_response.content
        return body

    def _model_names(self) -> list[str]:
        import openai

        async def ask() -> bytes:
            async with self._client(CONNECT_TIMEOUT, retries=1) as client:
                body: bytes = (await client.models.with_raw_response.list()).http_response.content
                return body

        where = shown_url(self.url)
        try:
            with asyncio.Runner() as runner:
                return read_model_names(runner.run(ask()))
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{where}: {self._rejected(error)}") from error
        except (openai.OpenAIError, httpx2.InvalidURL, OSError, Unreadable, _TooLarge) as error:
            raise UserError(
                f"{where}: no model server answers there ({self._secrets.reason(error)}); give an OpenAI-compatible "
                "address such as http://localhost:8000/v1"
            ) from error

    def _client(self, timeout: float, retries: int | None = None) -> "AsyncOpenAI":
        """The client library, whose replies are bounded, of connections that are closed with it."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._secrets.key or "none",
            max_retries=RETRIES if retries is None else retries,
            timeout=timeout,
            default_headers={"Accept-Encoding": "identity"},  # a compressed reply has no bound
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_bound]}),
        )

    def _count(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        self.usage = Usage(
            self.usage.prompt_tokens + (prompt_tokens or 0), self.usage.completion_tokens + (completion_tokens or 0)
        )

    def _error(self, error: "OpenAIError", prompt: Prompt) -> UserError | WorkError:
        import openai

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


class _TooLarge(Exception):
    """A reply that exceeds `REPLY_BYTES`, or may."""


class _Bounded(httpx2.AsyncByteStream):
    """A reply's body, which ends with an error once it exceeds `REPLY_BYTES`."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > REPLY_BYTES:
                raise _TooLarge(f"its reply has more than {REPLY_BYTES:,} bytes")
            yield part

    async def aclose(self) -> None:
        """Close the connection's stream."""
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _TooLarge("its reply is compressed, which was not accepted")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream)
