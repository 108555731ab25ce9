"""A server with an OpenAI-compatible address (vLLM, SGLang, llama.cpp, an API) as a backend.

One request a sample, many at once: servers batch what arrives together. Coroutines and not threads: a thread that waits
for an answer cannot be stopped, and an interruption would last as long as the longest request. The seed of a request is
a hash of (seed, prompt, sample), so that a server that honours it repeats itself. The address is no part of the
identity: a run may move to another server of the same model.

Replies are read as bytes and checked (`reply.py`) rather than as the client library's objects, which hold whatever the
server sent. A sample that fails for good does not end the others: they go on, and the error is raised at the end. Only
a failure that all of them share (a rejected key, several failures in a row) stops the work; the requests under way are
then waited for, briefly, as their answers are paid for. A file each: `asking` (what a request says), `connection`
(one address), `pacing` (how fast), `failures` (which of them end the work).
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import httpx2

from distill.backends.asking import Asking
from distill.backends.backend import Completed, Job, Usage
from distill.backends.bounds import TooLarge
from distill.backends.connection import KEPT, Connection
from distill.backends.failures import Failures, OneSample
from distill.backends.pacing import pause, retry_after
from distill.backends.reply import Reply, Unreadable, read_reply
from distill.backends.stream import Stream
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.models import Server
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

RETRIES = 8  # with growing pauses: when a server is busy, restarts, drops a connection or sends no answer
TIMEOUT = 3600.0  # seconds for a sample that is not streamed: 32,768 tokens at 10 a second
BUSY = (429, 503, 529)
SHARED = (401, 402, 403, 404)  # refusals of the key, the account or the model, which every request would get


class RemoteBackend:
    """One model, whose name is known, of a server or of several. concurrency: requests under way at once at each.
    owner: who has the server, as it says. Errors: UserError for a key or an address that cannot be used."""

    max_context: int | None = None
    numerics: dict[str, str] = {"kernels": "server"}  # noqa: RUF012  what else decides the numbers is not known

    def __init__(self, server: Server, concurrency: int = 64, owner: str = "") -> None:
        self.model = server.model or ""
        self.identity = server.identity
        self.server, self.usage = server, Usage()
        self.before_retry: Callable[[], None] = lambda: None  # raises what makes further requests pointless
        self._connections = [Connection(server, url, concurrency) for url in (server.url, *server.others)]
        self._asking = Asking(self.model, owner, server.stream, server.extra_body)

    @classmethod
    def connect(cls, server: Server, concurrency: int = 64) -> "RemoteBackend":
        """Ask each address for its models, and for a token of one that it does not list.

        Errors: UserError when no server answers, it rejects the key, or it does not have the model.
        """
        model, owner = server.model, ""
        for connection in cls(server, concurrency)._connections:
            owners = connection.models()
            if model is None and len(owners) == 1:
                model = next(iter(owners))
            if model is None or (model not in owners and not connection.answers(model)):
                problem = "several models" if model is None else f"no model {model!r}"
                choices = connection.secrets.hide(", ".join(owners) or "none")
                raise UserError(
                    f"{connection.where}: the server has {problem}; choose one with --name, or in a recipe with "
                    f"server.model: {choices}"
                )
            owner = owners.get(model, "")
        return cls(replace(server, model=model), concurrency, owner)

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Nothing: the server knows its context, and refuses what does not fit."""

    def score(self, traces: Sequence[Trace], top_k: int) -> list[Trace]:
        """Errors: UserError, always: chat servers do not score texts."""
        raise UserError(
            f"{self.model} is behind a server, which does not score texts; use a local teacher, or traces that were "
            f"sampled with generate.logprobs"
        )

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
        failures = Failures()
        with asyncio.Runner() as runner:
            loop, timeout = runner.get_loop(), self.server.silence if self.server.stream else TIMEOUT
            for connection in self._connections:
                connection.open(timeout, sampling.max_new_tokens, sampling.logprobs or 0)
            try:
                while True:
                    limit = sum(connection.pace.limit for connection in self._connections)
                    room = 0 if failures.stopped else limit - len(running)
                    for prompt, sample in islice(wanted, max(0, room)):
                        running.add(loop.create_task(self._sample(prompt, sample, sampling, seed)))
                    if not running:
                        break
                    left = max(0.0, failures.deadline - loop.time()) if failures.stopped else None
                    waiting = asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
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
                for connection in self._connections:
                    runner.run(connection.close())
        failures.raise_first()

    async def _sample(self, prompt: Prompt, sample: int, sampling: SamplingParams, seed: int) -> Completed:
        """One answer. Errors: UserError and WorkError, as `OneSample` where they say nothing about other samples."""
        loop, draw = asyncio.get_running_loop(), random.Random(f"{prompt.id} {sample}")
        failure: UserError | WorkError | None = None
        for attempt in range(RETRIES + 1):
            connection = min(self._connections, key=lambda each: each.rank(loop.time()))
            try:
                connection.running += 1
                reply = await self._attempt(connection, prompt, sample, sampling, seed)
            except _Again as again:
                failure = again.failure
                self.before_retry()
                if attempt < RETRIES:
                    await asyncio.sleep(0 if again.at_once else pause(attempt, again.wait, draw))
            else:
                connection.answered()
                self._count(reply)
                return _completed(prompt, sample, reply)
            finally:
                connection.running -= 1
        assert failure is not None
        raise OneSample(failure)

    async def _attempt(
        self, connection: Connection, prompt: Prompt, sample: int, sampling: SamplingParams, seed: int
    ) -> Reply:
        """One request. Errors: _Again for what may go better another time; as `_sample`."""
        import openai

        loop, limit = asyncio.get_running_loop(), self._asking.limit
        sent = loop.time()
        try:
            async with asyncio.timeout(None if self.server.stream else TIMEOUT):
                reply = await self._ask(connection, prompt, sample, sampling, seed)
        except Unreadable as error:
            unusable = f"its answers are empty or unreadable ({error}), as they may be under load"
            raise _Again(WorkError(f"the server failed: {unusable}; {KEPT}")) from error
        except TooLarge as error:
            raise _Again(WorkError(f"the server failed: {error}; {KEPT}")) from error
        except TimeoutError:
            raise OneSample(WorkError(f"the server sent no answer within {TIMEOUT:,.0f} seconds; {KEPT}")) from None
        except openai.APIStatusError as error:
            failure = connection.error(error, prompt)
            if error.status_code in SHARED:
                raise failure from error
            if self._asking.adapt(limit, error.status_code, str(error)):
                raise _Again(failure, at_once=True) from error
            if isinstance(failure, UserError):
                raise OneSample(failure) from error
            if error.status_code in BUSY:
                connection.pace.busy(sent, loop.time())
            connection.failed(loop.time())
            raise _Again(failure, retry_after(error.response.headers)) from error
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            connection.failed(loop.time())
            raise _Again(connection.error(error, prompt)) from error
        if sampling.logprobs is not None and reply.top_logprobs is None:
            raise UserError(
                f"{connection.where}: the server gives no log-probabilities with token ids; set generate.logprobs to "
                f"null, or use a server that does (vLLM, distill serve); {KEPT}"
            )
        return reply

    async def _ask(
        self, connection: Connection, prompt: Prompt, sample: int, sampling: SamplingParams, seed: int
    ) -> Reply:
        assert connection.client is not None, "open the connection first"
        body = self._asking.body(prompt, sample, sampling, seed)
        request = connection.client.chat.completions.with_streaming_response.create(
            model=self.model, messages=[], extra_body=body
        )
        async with request as response:
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                stream = Stream()
                async for part in response.iter_bytes():
                    stream.feed(part)
                return stream.reply()
            return read_reply(b"".join([part async for part in response.iter_bytes()]))

    def _count(self, reply: Reply) -> None:
        self.usage = Usage(
            self.usage.prompt_tokens + (reply.prompt_tokens or 0),
            self.usage.completion_tokens + (reply.completion_tokens or 0),
        )


class _Again(Exception):
    """A request that failed and may be sent again. wait: seconds that the server asks for. at_once: without a pause."""

    def __init__(self, failure: UserError | WorkError, wait: float | None = None, at_once: bool = False) -> None:
        super().__init__(str(failure))
        self.failure, self.wait, self.at_once = failure, wait, at_once


def _completed(prompt: Prompt, sample: int, reply: Reply) -> Completed:
    return Completed(
        prompt,
        sample,
        reply.text,
        reply.finish_reason,
        prompt_token_ids=reply.prompt_token_ids,
        completion_token_ids=reply.completion_token_ids,
        logprobs=reply.logprobs,
        top_logprobs=reply.top_logprobs,
        completion_tokens=reply.completion_tokens,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        reasoning_tokens=reply.reasoning_tokens,
        form=reply.form,
    )
