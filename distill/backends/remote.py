"""A server with an OpenAI-compatible address (vLLM, SGLang, llama.cpp, an API) as a backend.

One request a sample, many at once: servers batch what arrives together. Coroutines and not threads: a thread that waits
for an answer cannot be stopped, and an interruption would last as long as the longest request. The seed of a request is
a hash of (seed, prompt, sample), so that a server that honours it repeats itself. The address is no part of the
identity: a run may move to another server of the same model.

Replies are read as bytes and checked (`reply.py`) rather than as the client library's objects, which hold whatever the
server sent. A sample that fails for good does not end the others: they go on, and the error is raised at the end. Only
a failure that all of them share (a rejected key, several failures in a row) stops the work. Many refusals in a row may
be the settings' or the prompts': the server is asked something short with the same settings, which tells. A file each:
`asking` (what a request says), `connection` (one address), `attempts` (what a request has brought), `pacing` (how
fast), `failures` (which of them end the work).
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from dataclasses import replace
from itertools import islice, repeat
from typing import TYPE_CHECKING, TypeVar

import httpx2

from distill.backends import scoring
from distill.backends.answers import check_answer, check_mode, completed
from distill.backends.asking import VLLM, Asking, error_fields, omitted
from distill.backends.attempts import Again, Answered, Asked, Work
from distill.backends.backend import Completed, GivenIds, Job, Scored, Usage
from distill.backends.batch import Batches
from distill.backends.bounds import TooLarge
from distill.backends.budget import Allowance
from distill.backends.client import allow_connections
from distill.backends.connection import KEPT, Connection, Unreachable, said
from distill.backends.failures import REFUSED_IN_A_ROW, Failures, OneSample, ParameterRefused, Rejected
from distill.backends.pacing import pause, retry_after
from distill.backends.reply import Counts, Empty, Reply, Reported, Unreadable, read_replies
from distill.backends.stream import Stream
from distill.chat import Chat
from distill.console import say
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.models import Server
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from openai import AsyncAPIResponse
    from openai.types.chat import ChatCompletion

RETRIES = 8  # with growing pauses: when a server is busy, restarts, drops a connection or sends no answer
TIMEOUT = 3600.0  # seconds for a sample that is not streamed: 32,768 tokens at 10 a second
GRACE = 5.0  # seconds for a stream to close, and to count its tokens, after the end of its answers
BUSY = (429, 503, 529)
SHORT = Prompt(({"role": "user", "content": "Hello"},), "chat")  # is it refused, the settings are
T = TypeVar("T")


class RemoteBackend:
    """One model, whose name is known, of a server or of several. concurrency: requests under way at once at each.
    owners: who has each of the servers, as it says, "" where it does not. Errors: UserError for a key or an address
    that cannot be used."""

    max_context: int | None = None
    numerics: dict[str, str] = {"kernels": "server"}  # noqa: RUF012  what else decides the numbers is not known

    def __init__(self, server: Server, concurrency: int = 64, owners: Sequence[str] = ()) -> None:
        self.model = server.model or ""
        self.identity = server.identity
        self.server, self.usage = server, Usage()
        self.chat: Callable[[], Chat] | None = None  # the teacher's tokenizer, for scores
        self.before_retry: Callable[[], None] = lambda: None  # raises what makes further requests pointless
        urls = (server.url, *server.others)
        owners = owners or ("",) * len(urls)
        self._connections = [Connection(server, *each) for each in zip(urls, repeat(concurrency), owners)]
        self._asking = Asking(server, *owners)
        self._said_refusal = self._said_end = False
        self._in_mode = False  # whether an answer has shown that the server reads the thinking mode

    @classmethod
    def connect(cls, server: Server, concurrency: int = 64) -> "RemoteBackend":
        """Ask each address for its models, and for a token of one that it does not list.

        Of several addresses those that do not answer are left out. Errors: UserError when no server answers, it rejects
        the key, or it does not have the model.
        """
        model, unreachable, reached = server.model, list[Unreachable](), dict[str, str]()
        for connection in cls(server, concurrency)._connections:
            try:
                owners = connection.models()
                if model is None and len(owners) == 1:
                    model = next(iter(owners))
                said = None if model is None or model in owners else connection.refusal_of(model)
                if model is None or said is not None:
                    raise connection.without(model, list(owners), said)
            except Unreachable as error:
                unreachable.append(error)
                continue
            reached[connection.url] = owners.get(model, "")
        if not reached:
            raise unreachable[0]
        for silent in unreachable:
            say(f"note: {silent}; the other servers are asked")
        url, *others = reached
        return cls(replace(server, model=model, url=url, others=tuple(others)), concurrency, list(reached.values()))

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """The server knows its context, and refuses what does not fit. Errors: UserError for a thinking budget that it
        does not take."""
        self._asking.check(sampling)

    @property
    def vocab_size(self) -> None:
        """None: chat servers do not say."""

    @property
    def scores_given_ids(self) -> bool:
        """False: servers list the likeliest tokens and the trace's own."""
        return False

    def score(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Trace]:
        """As `Backend.score`, where the server is vLLM and the teacher's tokenizer is known.

        Errors: UserError, also for every other server; WorkError.
        """
        if self._asking.owners[0] != VLLM or self.chat is None:
            raise UserError(
                f"{self.model} is behind a server that does not score texts (vLLM does); "
                f"{scoring.remedy(traces, top_k)}"
            )
        return scoring.score(self._connections[0], self.model, self.chat(), traces, top_k, ids)

    def scored(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Scored]:
        """See `Backend`."""
        return [Scored.of(trace) for trace in self.score(traces, top_k, ids)]

    def close(self) -> None:
        """Nothing: `complete` closes its connections."""

    def complete(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int, allowance: Allowance | None = None
    ) -> Generator[Completed, None, None]:
        """Yield every wanted sample once, as it finishes. allowance: as of `Backend.complete`.

        Errors, when all others are finished: Refused for requests that the server refuses; WorkError for one that
        failed after retries. Without further requests, when those under way are finished: UserError for a key, an
        account, a model or settings that it refuses; after `GRACE` seconds: UserError, WorkError for `IN_A_ROW`
        failures.
        """
        if self.server.batch:
            yield from self._batches(jobs, sampling, seed, allowance)
            return
        wanted = ((job.prompt, samples) for job in jobs for samples in self._asking.group(job.samples))
        running: set[asyncio.Task[Answered]] = set()
        work = Work(sampling, seed, allowance)
        failures = Failures(self._asking.has_answered)
        deadline = allowance.deadline if allowance else math.inf
        with asyncio.Runner() as runner:
            loop, silence = runner.get_loop(), self.server.silence if self.server.stream else TIMEOUT
            allow_connections(sum(connection.pace.most for connection in self._connections))
            for connection in self._connections:
                connection.open(silence, sampling.max_new_tokens, sampling.logprobs or 0)
            try:
                while True:
                    limit = sum(connection.pace.limit for connection in self._connections)
                    room = 0 if failures.stopped else limit - len(running)
                    for prompt, samples in islice(wanted, max(0, room)):
                        running.add(loop.create_task(self._samples(prompt, samples, work)))
                    if not running:
                        break
                    left = min(deadline, failures.deadline) - loop.time()
                    timeout = None if math.isinf(left) else max(0.0, left)
                    waiting = asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    done, running = loop.run_until_complete(waiting)
                    if not done:
                        break
                    for task in done:
                        answered = task.result()
                        if answered.completed:
                            failures.answer()
                            yield from answered.completed
                        for error in answered.errors:
                            failures.add(error, loop.time())
                            self._say_first(error, len(running))
                    if failures.refused_in_a_row >= REFUSED_IN_A_ROW and not failures.stopped:
                        loop.run_until_complete(self._ask_another(failures, work))
                    if failures.stopped:
                        work.ended.set()
            finally:
                for task in running:
                    task.cancel()
                for connection in self._connections:
                    runner.run(connection.close())
        failures.raise_first()

    def _say_first(self, error: Exception, running: int) -> None:
        """Say at once what the server refuses first, and what ends the work while requests are under way."""
        if isinstance(error, Rejected) and running and not self._said_end:
            say(f"note: {error}; the {running:,} requests under way are waited for")
            self._said_end = True
        elif isinstance(error, OneSample) and isinstance(error.error, UserError) and running and not self._said_refusal:
            say(f"note: {error}")
            self._said_refusal = True

    async def _ask_another(self, failures: Failures, work: Work) -> None:
        """Ask a short question with the settings of the samples: where it is answered, refusals are those of their
        prompts; else the work is stopped."""
        try:
            answers = await self._request(SHORT, (0,), Work(work.sampling, work.seed, None))
        except (UserError, WorkError, OneSample):
            answers = None
        if answers:
            failures.refused_in_a_row = 0
        else:
            failures.refuse()

    def _batches(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int, allowance: Allowance | None
    ) -> Generator[Completed, None, None]:
        """`complete` through the batch API of the first address."""
        connection, deadline = self._connections[0], allowance.deadline if allowance else math.inf
        with asyncio.Runner() as runner, connection.asking_batches() as client:
            source = Batches(client, connection, self._asking, self.identity).complete(jobs, sampling, seed)
            try:
                while (answer := runner.run(_next(source, deadline))) is not None:
                    self._count(Counts(answer.reply.prompt_tokens, answer.reply.completion_tokens))
                    self._check(connection, answer.reply, sampling)
                    yield completed(*answer)
            finally:
                runner.run(source.aclose())
                runner.run(client.close())

    async def _samples(self, prompt: Prompt, samples: tuple[int, ...], work: Work) -> Answered:
        """The answers of one request for several samples, and one by one those that it does not give."""
        answered = Answered()
        try:
            missing = samples
            if len(samples) > 1:
                done = await self._request(prompt, samples, work)
                if done is None:
                    return answered
                answered.completed += done
                missing = tuple(sample for sample in samples if sample not in {each.sample for each in done})
            for sample in missing:
                if len(samples) > 1 and work.ended.is_set():
                    break
                try:
                    answered.completed += await self._request(prompt, (sample,), work) or ()
                except OneSample as error:
                    answered.errors.append(error)
        except (UserError, WorkError, OneSample) as error:
            answered.errors.append(error)
        return answered

    async def _request(self, prompt: Prompt, samples: tuple[int, ...], work: Work) -> list[Completed] | None:
        """The answers of a request, sent again until there is one. Empty where its samples are to be asked for one by
        one; None where the allowance has no room for another attempt.

        Errors: UserError and WorkError, as `OneSample` where they say nothing about other samples."""
        loop, draw = asyncio.get_running_loop(), random.Random(f"{prompt.id} {samples[0]}")
        failure: UserError | WorkError | None = None
        for attempt in range(RETRIES + 1):
            connection = min(self._connections, key=lambda each: each.rank(loop.time()))
            body = self._asking.body(prompt, samples[0], work.sampling, work.seed, len(samples), connection.owner)
            asked = Asked(prompt, samples, body)
            try:
                connection.running += 1
                replies = await self._attempt(connection, asked, work)
            except Again as again:
                failure = again.failure
                self.before_retry()
                if not work.may_repeat(asked):
                    return None
                if len(samples) > 1 and (again.alone or len(self._asking.group(samples)) > 1):
                    return []  # the second: it refuses `n`
                if attempt < RETRIES:
                    await work.pause(0 if again.at_once else pause(attempt, again.wait, draw))
                if work.ended.is_set():
                    break
            except (UserError, WorkError, OneSample):
                work.may_repeat(asked)
                raise
            else:
                connection.answered()
                self._asking.answered()
                lacking = omitted(body, work.sampling)
                return [completed(prompt, sample, reply, lacking) for sample, reply in replies.items()]
            finally:
                connection.running -= 1
        assert failure is not None
        raise OneSample(failure, prompt, samples)

    async def _attempt(self, connection: Connection, asked: Asked, work: Work) -> dict[int, Reply]:
        """One request: its whole answers by their sample. Errors: Again for what may go better another time; as
        `_request`."""
        import openai

        loop, sent = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None if self.server.stream else TIMEOUT):
                replies = await self._ask(connection, asked)
        except Reported as error:
            failure = connection.reported(error.code, str(error), asked.prompt)
            raise self._refused_or_again(failure, error.code, str(error), connection, asked, sent) from error
        except Unreadable as error:
            asked.empty = isinstance(error, Empty)
            unusable = f"its answers are empty or unreadable ({error}), as they may be under load"
            raise Again(WorkError(f"the server failed: {unusable}; {KEPT}")) from error
        except TooLarge as error:
            raise Again(WorkError(f"the server failed: {error}; {KEPT}"), alone=True) from error
        except TimeoutError as error:
            if self.server.stream:
                connection.failed(loop.time())
                silent = f"it sent no token for {self.server.silence:,g} seconds"
                raise Again(WorkError(f"the server failed: {silent}; {KEPT}")) from error
            raise asked.failed(WorkError(f"the server sent no answer within {TIMEOUT:,.0f} seconds; {KEPT}")) from None
        except openai.APIStatusError as error:
            failure = connection.error(error, asked.prompt)
            fields = error_fields({"param": error.param, "code": error.code})
            wait = retry_after(error.response.headers)
            status, message = error.status_code, said(error)
            raise self._refused_or_again(failure, status, message, connection, asked, sent, fields, wait) from error
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            connection.failed(loop.time())
            raise Again(connection.error(error, asked.prompt)) from error
        for reply in replies.values():
            self._check(connection, reply, work.sampling)
        return replies

    def _check(self, connection: Connection, reply: Reply, sampling: SamplingParams) -> None:
        """Errors: UserError for an answer that is not what was asked for; of its mode, for the first ones only."""
        check_answer(connection.where, reply, sampling)
        if not self._in_mode:
            check_mode(connection.where, self.server, reply)
            self._in_mode = bool(reply.text)

    def _refused_or_again(
        self,
        failure: UserError | WorkError,
        status: int | None,
        message: str,
        connection: Connection,
        asked: Asked,
        sent: float,
        fields: tuple[str | None, str | None] = (None, None),
        wait: float | None = None,
    ) -> Rejected | OneSample | Again:
        """What a failure with a status, of the reply or reported inside an answer, means for a request. fields: `param`
        and `code` of the error. wait: seconds that the server asks for."""
        if isinstance(failure, Rejected):
            return failure
        if status is not None and self._asking.adapt(asked.body, status, message, *fields):
            return Again(failure, at_once=True)
        if isinstance(failure, UserError) and self._asking.blames_sampling(asked.body, message, *fields):
            failure = ParameterRefused(str(failure))
        if isinstance(failure, UserError):  # it may refuse several samples in one request
            return Again(failure, alone=True) if len(asked.samples) > 1 else asked.failed(failure)
        now = asyncio.get_running_loop().time()
        if status in BUSY:
            connection.pace.busy(sent, now)
        connection.failed(now)
        return Again(failure, wait)

    async def _ask(self, connection: Connection, asked: Asked) -> dict[int, Reply]:
        """The whole answers of a request by their sample, at least one. Errors: Unreadable; those of the library."""
        assert connection.client is not None, "open the connection first"
        request = connection.client.chat.completions.with_streaming_response.create(
            model=self.model, messages=[], extra_body=asked.body
        )
        async with request as response:
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                replies = await self._streamed(response, asked)
            else:
                content = b""
                async for part in response.iter_bytes():
                    content += part
                    asked.begun = asked.begun or bool(content.strip())
                replies, asked.usage = read_replies(content)
        whole = {index: reply for index, reply in replies.items() if isinstance(reply, Reply)}
        if not whole:
            raise next(reply for reply in replies.values() if isinstance(reply, Unreadable))
        self._count(asked.usage)
        if len(asked.samples) == 1:  # whatever index a server gives to its only usable choice
            return {asked.samples[0]: next(iter(whole.values()))}
        return {asked.samples[index]: reply for index, reply in whole.items() if index < len(asked.samples)}

    async def _streamed(
        self, response: "AsyncAPIResponse[ChatCompletion]", asked: Asked
    ) -> dict[int, Reply | Unreadable]:
        """The choices of a stream. Errors: Unreadable; TimeoutError after a silence: comments keep only the connection
        alive."""
        import openai

        stream, loop, at_end = Stream(len(asked.samples)), asyncio.get_running_loop(), False
        try:
            async with asyncio.timeout(self.server.silence) as clock:
                async for part in response.iter_bytes():
                    before = stream.deltas
                    try:
                        stream.feed(part)
                    finally:
                        asked.begun, asked.usage = stream.deltas > 0, stream.usage
                    if at_end:
                        continue
                    if at_end := stream.ended or stream.finished:
                        clock.reschedule(loop.time() + GRACE)  # in time: the connection can be used again
                    elif stream.deltas > before:
                        clock.reschedule(loop.time() + self.server.silence)
        except (TimeoutError, openai.OpenAIError, httpx2.HTTPError):
            if not at_end:
                raise
            stream.interrupt()
        replies, asked.usage = stream.replies(), stream.usage
        return replies

    def _count(self, usage: Counts) -> None:
        self.usage = Usage(
            self.usage.prompt_tokens + (usage.prompt_tokens or 0),
            self.usage.completion_tokens + (usage.completion_tokens or 0),
        )


async def _next(source: AsyncGenerator[T, None], deadline: float) -> T | None:
    """The next item; None at the end, or at the deadline (of `time.monotonic`)."""
    try:
        async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()) as clock:
            return await anext(source, None)
    except TimeoutError:
        if not clock.expired():
            raise
        return None
