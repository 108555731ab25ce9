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
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import httpx2

from distill.backends import scoring
from distill.backends.answers import check_answer, check_mode, completed
from distill.backends.asking import VLLM, Asking, error_fields, omitted
from distill.backends.backend import Completed, GivenIds, Job, Scored, Usage
from distill.backends.batch import Batches
from distill.backends.bounds import TooLarge
from distill.backends.budget import Allowance
from distill.backends.connection import KEPT, Connection, Unreachable, moderated
from distill.backends.failures import Failures, OneSample
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
SHARED = (401, 402, 403, 404)  # refusals of the key, the account or the model, which every request would get


UNKNOWN = Counts(None, None)


class RemoteBackend:
    """One model, whose name is known, of a server or of several. concurrency: requests under way at once at each.
    owner: who has the server, as it says. Errors: UserError for a key or an address that cannot be used."""

    max_context: int | None = None
    numerics: dict[str, str] = {"kernels": "server"}  # noqa: RUF012  what else decides the numbers is not known

    def __init__(self, server: Server, concurrency: int = 64, owner: str = "") -> None:
        self.model = server.model or ""
        self.identity = server.identity
        self.server, self.usage = server, Usage()
        self.chat: Callable[[], Chat] | None = None  # the teacher's tokenizer, for scores
        self.before_retry: Callable[[], None] = lambda: None  # raises what makes further requests pointless
        self._connections = [Connection(server, url, concurrency) for url in (server.url, *server.others)]
        self._asking = Asking(server, owner)
        self._in_mode = False  # whether an answer has shown that the server reads the thinking mode

    @classmethod
    def connect(cls, server: Server, concurrency: int = 64) -> "RemoteBackend":
        """Ask each address for its models, and for a token of one that it does not list.

        Of several addresses those that do not answer are left out. Errors: UserError when no server answers, it rejects
        the key, or it does not have the model.
        """
        model, owner, unreachable, reached = server.model, "", list[Unreachable](), list[str]()
        for connection in cls(server, concurrency)._connections:
            try:
                owners = connection.models()
                if model is None and len(owners) == 1:
                    model = next(iter(owners))
                if model is None or (model not in owners and not connection.answers(model)):
                    raise connection.without(model, list(owners))
            except Unreachable as error:
                unreachable.append(error)
                continue
            owner = owners.get(model, "")
            reached.append(connection.url)
        if not reached:
            raise unreachable[0]
        for silent in unreachable:
            say(f"note: {silent}; the other servers are asked")
        url, *others = reached
        return cls(replace(server, model=model, url=url, others=tuple(others)), concurrency, owner)

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
        if self._asking.owner != VLLM or self.chat is None:
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

        Errors, when all others are finished: UserError for a request that the server refuses; WorkError for one that
        failed after retries. At once: UserError for a key, an account or a model that it refuses; WorkError after
        `IN_A_ROW` failures; answers that arrive within `GRACE` seconds are yielded before that.
        """
        if self.server.batch:
            yield from self._batches(jobs, sampling, seed, allowance)
            return
        wanted = ((job.prompt, samples) for job in jobs for samples in self._asking.group(job.samples))
        running: set[asyncio.Task[_Answered]] = set()
        work = _Work(sampling, seed, allowance)
        failures, deadline = Failures(), allowance.deadline if allowance else math.inf
        with asyncio.Runner() as runner:
            loop, silence = runner.get_loop(), self.server.silence if self.server.stream else TIMEOUT
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
                    left = min(deadline, failures.deadline if failures.stopped else math.inf) - loop.time()
                    timeout = None if math.isinf(left) else max(0.0, left)
                    waiting = asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    done, running = loop.run_until_complete(waiting)
                    if not done:
                        break
                    for task in done:
                        answered = task.result()
                        if answered.completed:
                            failures.in_a_row = 0
                            yield from answered.completed
                        for error in answered.errors:
                            failures.add(error, loop.time())
            finally:
                for task in running:
                    task.cancel()
                for connection in self._connections:
                    runner.run(connection.close())
        failures.raise_first()

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

    async def _samples(self, prompt: Prompt, samples: tuple[int, ...], work: "_Work") -> "_Answered":
        """The answers of one request for several samples, and one by one those that it does not give."""
        answered = _Answered()
        try:
            missing = samples
            if len(samples) > 1:
                done = await self._request(prompt, samples, work)
                if done is None:
                    return answered
                answered.completed += done
                missing = tuple(sample for sample in samples if sample not in {each.sample for each in done})
            for sample in missing:
                try:
                    answered.completed += await self._request(prompt, (sample,), work) or ()
                except OneSample as error:
                    answered.errors.append(error)
        except (UserError, WorkError, OneSample) as error:
            answered.errors.append(error)
        return answered

    async def _request(self, prompt: Prompt, samples: tuple[int, ...], work: "_Work") -> list[Completed] | None:
        """The answers of a request, sent again until there is one. Empty where its samples are to be asked for one by
        one; None where the allowance has no room for another attempt.

        Errors: UserError and WorkError, as `OneSample` where they say nothing about other samples."""
        loop, draw = asyncio.get_running_loop(), random.Random(f"{prompt.id} {samples[0]}")
        failure: UserError | WorkError | None = None
        for attempt in range(RETRIES + 1):
            connection = min(self._connections, key=lambda each: each.rank(loop.time()))
            body = self._asking.body(prompt, samples[0], work.sampling, work.seed, len(samples))
            asked = _Asked(prompt, samples, body)
            try:
                connection.running += 1
                replies = await self._attempt(connection, asked, work)
            except _Again as again:
                failure = again.failure
                self.before_retry()
                if not work.may_repeat(asked):
                    return None
                if len(samples) > 1 and (again.alone or len(self._asking.group(samples)) > 1):
                    return []  # the second: it refuses `n`
                if attempt < RETRIES:
                    await asyncio.sleep(0 if again.at_once else pause(attempt, again.wait, draw))
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
        raise OneSample(failure)

    async def _attempt(self, connection: Connection, asked: "_Asked", work: "_Work") -> dict[int, Reply]:
        """One request: its whole answers by their sample. Errors: _Again for what may go better another time; as
        `_request`."""
        import openai

        loop, sent = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None if self.server.stream else TIMEOUT):
                replies = await self._ask(connection, asked)
        except Reported as error:
            raise self._reported(error, connection, asked, sent) from error
        except Unreadable as error:
            asked.empty = isinstance(error, Empty)
            unusable = f"its answers are empty or unreadable ({error}), as they may be under load"
            raise _Again(WorkError(f"the server failed: {unusable}; {KEPT}")) from error
        except TooLarge as error:
            raise _Again(WorkError(f"the server failed: {error}; {KEPT}"), alone=True) from error
        except TimeoutError as error:
            if self.server.stream:
                connection.failed(loop.time())
                silent = f"it sent no token for {self.server.silence:,g} seconds"
                raise _Again(WorkError(f"the server failed: {silent}; {KEPT}")) from error
            raise OneSample(WorkError(f"the server sent no answer within {TIMEOUT:,.0f} seconds; {KEPT}")) from None
        except openai.APIStatusError as error:
            failure = connection.error(error, asked.prompt)
            if error.status_code in SHARED and not moderated(error.status_code, str(error)):
                raise failure from error
            fields = error_fields({"param": error.param, "code": error.code})
            if self._asking.adapt(asked.body, error.status_code, str(error), *fields):
                raise _Again(failure, at_once=True) from error
            if isinstance(failure, UserError) and len(asked.samples) > 1:
                raise _Again(failure, alone=True) from error  # it may refuse several samples in one request
            if isinstance(failure, UserError):
                raise OneSample(failure) from error
            if error.status_code in BUSY:
                connection.pace.busy(sent, loop.time())
            connection.failed(loop.time())
            raise _Again(failure, retry_after(error.response.headers)) from error
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            connection.failed(loop.time())
            raise _Again(connection.error(error, asked.prompt)) from error
        for reply in replies.values():
            self._check(connection, reply, work.sampling)
        return replies

    def _check(self, connection: Connection, reply: Reply, sampling: SamplingParams) -> None:
        """Errors: UserError for an answer that is not what was asked for; of its mode, for the first ones only."""
        check_answer(connection.where, reply, sampling)
        if not self._in_mode:
            check_mode(connection.where, self.server, reply)
            self._in_mode = bool(reply.text)

    def _reported(
        self, error: Reported, connection: Connection, asked: "_Asked", sent: float
    ) -> "UserError | OneSample | _Again":
        """What an error that a server reports inside its answer means: the same as its status would."""
        now, code, message = asyncio.get_running_loop().time(), error.code, str(error)
        failure = connection.reported(code, message, asked.prompt)
        if code is not None and self._asking.adapt(asked.body, code, message):
            return _Again(failure, at_once=True)
        if isinstance(failure, UserError):
            if code in SHARED and not moderated(code, message):
                return failure
            return _Again(failure, alone=True) if len(asked.samples) > 1 else OneSample(failure)
        if code in BUSY:
            connection.pace.busy(sent, now)
        connection.failed(now)
        return _Again(failure)

    async def _ask(self, connection: Connection, asked: "_Asked") -> dict[int, Reply]:
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
        self, response: "AsyncAPIResponse[ChatCompletion]", asked: "_Asked"
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


@dataclass(frozen=True)
class _Work:
    """What all requests of one call share."""

    sampling: SamplingParams
    seed: int
    allowance: Allowance | None

    def may_repeat(self, asked: "_Asked") -> bool:
        """Count a failed attempt whose answer had begun; whether the allowance has room for another one."""
        if self.allowance is None or not asked.begun:
            return True
        prompt, completion = asked.usage
        if completion == 0 and not asked.empty:
            completion = None  # no count of what had come
        return self.allowance.lose(asked.prompt, prompt, completion, len(asked.samples))


@dataclass
class _Asked:
    """One attempt of a request. begun: whether something of an answer came. usage: its tokens, as far as they are
    known. empty: whether the whole answer came, without a text."""

    prompt: Prompt
    samples: tuple[int, ...]
    body: Mapping[str, object]
    begun: bool = False
    usage: Counts = UNKNOWN
    empty: bool = False


@dataclass
class _Answered:
    """What one request brought: answers, and the errors of the samples without one."""

    completed: list[Completed] = field(default_factory=list)
    errors: list[UserError | WorkError | OneSample] = field(default_factory=list)


T = TypeVar("T")


class _Again(Exception):
    """A request that failed and may be sent again. wait: seconds that the server asks for. at_once: without a pause.
    alone: several samples one by one."""

    def __init__(
        self,
        failure: UserError | WorkError,
        wait: float | None = None,
        at_once: bool = False,
        alone: bool = False,
    ) -> None:
        super().__init__(str(failure))
        self.failure, self.wait, self.at_once, self.alone = failure, wait, at_once, alone


async def _next(source: AsyncGenerator[T, None], deadline: float) -> T | None:
    """The next item; None at the end, or at the deadline (of `time.monotonic`)."""
    try:
        async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()) as clock:
            return await anext(source, None)
    except TimeoutError:
        if not clock.expired():
            raise
        return None
