"""A provider's batch API: all requests in one file, the answers within a day, at a lower price.

Batches are not kept in a file of the run: each carries a hash of model, sampling and seed in its `metadata`, and the
provider lists them. A run that is interrupted while it waits finds its batches again, and pays for none twice; so
does a run that is killed between creating one and the next line. A request is known by
`PROMPT-SAMPLE-MESSAGES` (`custom_id`), the last a hash: the same prompt may be asked with another suffix.

What a batch does not answer (it expired, or a request failed) is asked for in a new batch: by the next run, or at once
where a parameter was refused that can be left out. A batch's metadata name the parameters that its requests lack.

No request that creates a batch is repeated blindly, as a provider may have created one before its reply was lost, and
would charge for both: it is looked for in the list first. Not every provider reads idempotency keys.
"""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from distill.backends.asking import LIMITS, OPTIONAL, SAMPLING, Asking, error_fields, omitted
from distill.backends.backend import Job
from distill.backends.connection import Connection, is_refusal
from distill.backends.failures import Refusal, Refused
from distill.backends.pacing import pause, retry_after
from distill.backends.reply import Reply, Unreadable, as_object, read_json, read_reply
from distill.console import say
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.fingerprint import digest
from distill.prompts.prompt import Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Batch

MOST_REQUESTS, MOST_BYTES = 50_000, 100 << 20  # of one batch; OpenAI's limits are 50,000 and 200 MB
POLL = 30.0  # seconds
ENDED = ("completed", "expired", "cancelled", "failed")
TAG, LEFT_OUT = "distill", "distill_left_out"  # keys of the metadata
ATTEMPTS = 5  # to create a batch
ENDPOINT = "/v1/chat/completions"
LONGEST_LINE = 64 << 20  # bytes of one answer


def request_id(prompt: Prompt, sample: int) -> str:
    """What a request is known by among those of the same model, sampling and seed."""
    return f"{prompt.id}-{sample}-{digest([dict(message) for message in prompt.messages])[:16]}"


class Answer(NamedTuple):
    """An answer of a batch. omitted: as of `Trace`."""

    prompt: Prompt
    sample: int
    reply: Reply
    omitted: tuple[str, ...]


class _Failure(NamedTuple):
    """Why a request, or a whole batch, was not answered. status: of HTTP, None where there is none. param, code: of the
    error, where it has these fields. key: of the request, "" for a whole batch."""

    status: int | None
    reason: str
    param: str | None = None
    code: str | None = None
    key: str = ""


@dataclass(frozen=True)
class Batches:
    """The batches of one model. client: the library, with the key. connection: its address. asking: makes the bodies of
    requests. identity: what decides the answers beside sampling and seed."""

    client: "AsyncOpenAI"
    connection: Connection
    asking: Asking
    identity: Mapping[str, object]

    async def complete(self, jobs: Iterable[Job], sampling: SamplingParams, seed: int) -> AsyncGenerator[Answer, None]:
        """The answer of every wanted sample, as batches end; not lazy in `jobs`. Requests that are refused for a
        parameter that can be left out are sent again without it.

        Errors: UserError and WorkError for samples that no batch has answered, Refused where each of them was refused
        for what it is; those of the client library.
        """
        wanted = {request_id(job.prompt, sample): (job.prompt, sample) for job in jobs for sample in job.samples}
        tag = digest([dict(self.identity), asdict(sampling), seed])
        batches, covered = await self._known(tag, wanted.keys())
        new, first = [key for key in wanted if key not in covered], None
        while True:
            batches += await self._created(new, wanted, sampling, seed, tag)
            failures: list[tuple[Batch, _Failure]] = []
            while batches:
                ended = [batch for batch in batches if batch.status in ENDED]
                for batch in ended:
                    async for key, reply in self._answers(batch):
                        if key in wanted:
                            self.asking.answered()
                            yield Answer(*wanted.pop(key), reply, _omitted(batch, sampling))
                    failures += [(batch, failure) async for failure in self._failures(batch)]
                if batches := [batch for batch in batches if batch not in ended]:
                    batches = await self._later(batches)
            if not wanted:
                return
            first = first or next((failure for _, failure in failures), None)
            adapted = [self._adapt(batch, failure) for batch, failure in failures]
            if not any(adapted):
                break
            new = list(wanted)
        error = self.connection.unanswered(len(wanted), *(first or _Failure(None, ""))[:2])
        refusals = self._refusals(wanted, [failure for _, failure in failures])
        raise Refused(str(error), refusals) if len(refusals) == len(wanted) else error

    def _refusals(self, wanted: Mapping[str, tuple[Prompt, int]], failures: Iterable[_Failure]) -> list[Refusal]:
        """The requests that were refused for what they are."""
        refusals = dict[str, Refusal]()
        for failure in failures:
            if failure.key in wanted:
                prompt, sample = wanted[failure.key]
                error = self.connection.reported(failure.status, failure.reason, prompt)
                blamed = self.asking.blames_sampling(SAMPLING, failure.reason, failure.param, failure.code)
                if type(error) is UserError and not blamed:
                    refusals[failure.key] = Refusal(prompt, sample, str(error))
        return list(refusals.values())

    async def _known(self, tag: str, keys: Iterable[str]) -> "tuple[list[Batch], set[str]]":
        """Batches of earlier sessions that answer wanted samples, or will, and the samples that they cover.

        Those of an ended batch that it did not answer are not covered: they are asked for again, without the parameters
        that it was refused for.
        """
        wanted, batches, covered = set(keys), [], set[str]()
        async for batch in self.client.batches.list(limit=100):
            if (batch.metadata or {}).get(TAG) != tag:
                continue
            if batch.status in ENDED:
                answered = {key async for key, _ in self._answers(batch)}
                if not answered:
                    async for failure in self._failures(batch):
                        self._adapt(batch, failure)
            else:
                answered = {key async for key, _ in self._lines(batch.input_file_id)}
            if answered & (wanted - covered):
                batches.append(batch)
                covered |= answered
        return batches, covered & wanted

    async def _created(
        self,
        keys: Sequence[str],
        wanted: Mapping[str, tuple[Prompt, int]],
        sampling: SamplingParams,
        seed: int,
        tag: str,
    ) -> "list[Batch]":
        """New batches of these requests."""
        batches: list[Batch] = []
        while keys:
            content, count = self._content(keys, wanted, sampling, seed)
            batches.append(await self._create(content, tag))
            say(
                f"batch {batches[-1].id}: {count:,} requests; interrupting is safe, the same command waits for it again"
            )
            keys = keys[count:]
        return batches

    async def _later(self, batches: "Sequence[Batch]") -> "list[Batch]":
        """The batches as they are after a while."""
        try:
            await asyncio.sleep(POLL)
            return [await self.client.batches.retrieve(batch.id) for batch in batches]
        except asyncio.CancelledError:  # at the deadline of a budget, or by the user
            for batch in batches:
                say(f"batch {batch.id} goes on at the provider; the same command collects its answers")
            raise

    def _content(
        self, keys: Sequence[str], wanted: Mapping[str, tuple[Prompt, int]], sampling: SamplingParams, seed: int
    ) -> tuple[bytes, int]:
        """The file of a batch with as many of the requests as it may have, and their number."""
        lines, size = list[bytes](), 0
        for key in islice(keys, MOST_REQUESTS):
            body = {
                name: value
                for name, value in self.asking.body(*wanted[key], sampling, seed).items()
                if "stream" not in name
            }
            line = json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"
            if lines and size + len(line) > MOST_BYTES:
                break
            lines.append(line)
            size += len(line)
        return b"".join(lines), len(lines)

    async def _create(self, content: bytes, tag: str) -> "Batch":
        """Upload a file and create its batch. The library does not repeat the request, which may have created one: the
        provider's list says whether it has."""
        import openai

        file = await self.client.files.create(file=("requests.jsonl", content), purpose="batch")
        once, draw = self.client.with_options(max_retries=0), random.Random(file.id)
        metadata = {TAG: tag}
        if self.asking.left_out:
            metadata[LEFT_OUT] = " ".join(self.asking.left_out)
        for attempt in range(ATTEMPTS):
            try:
                return await once.batches.create(
                    input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata=metadata
                )
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                refused = isinstance(error, openai.APIStatusError) and is_refusal(error.status_code)
                if refused or attempt == ATTEMPTS - 1:
                    raise
                headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
                await asyncio.sleep(pause(attempt, retry_after(headers), draw))
            async for batch in self.client.batches.list(limit=100):
                if batch.input_file_id == file.id:
                    return batch
        raise AssertionError("the last attempt returns or raises")

    async def _answers(self, batch: "Batch") -> AsyncGenerator[tuple[str, Reply], None]:
        """(custom_id, answer) of the requests that were answered; those that failed are left out."""
        async for key, line in self._lines(batch.output_file_id):
            if isinstance(answer := _answer(line), Reply):
                yield key, answer

    async def _failures(self, batch: "Batch") -> AsyncGenerator[_Failure, None]:
        """Why requests of an ended batch were not answered, the reasons of the batch itself first."""
        errors = batch.to_dict().get("errors")
        for error in errors.get("data") or () if isinstance(errors, dict) else ():
            if isinstance(error, dict):  # what a request of the file lacks, so it counts as refused
                param, code = error_fields(error)
                yield _Failure(400 if param else None, f"batch {batch.id} failed: {_message(error)}", param, code)
        for file in (batch.output_file_id, batch.error_file_id):
            async for key, line in self._lines(file):
                if isinstance(answer := _answer(line), _Failure):
                    yield answer._replace(key=key)
        if batch.status != "completed":
            yield _Failure(None, f"batch {batch.id}: {batch.status}")

    def _adapt(self, batch: "Batch", failure: _Failure) -> bool:
        """Leave out what a failure refuses; whether its request is worth sending again."""
        sent = {*OPTIONAL, LIMITS[0]} - set((batch.metadata or {}).get(LEFT_OUT, "").split())
        return failure.status is not None and self.asking.adapt(
            sent, failure.status, failure.reason, failure.param, failure.code
        )

    async def _lines(self, file: str | None) -> AsyncGenerator[tuple[str, dict[str, object]], None]:
        """(custom_id, line) of a file of the provider; damaged lines are left out, as if they were not answered."""
        if not file:
            return
        async with self.client.files.with_streaming_response.content(file) as response:
            rest = b""
            async for part in response.iter_bytes():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    for row in _row(line):
                        yield row
                if len(rest) > LONGEST_LINE:
                    raise WorkError(f"file {file} of the server has a line of more than {LONGEST_LINE:,} bytes")
            for row in _row(rest):
                yield row


def _row(line: bytes) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        row = as_object(read_json(line), "a line")
    except Unreadable:
        return
    if isinstance(key := row.get("custom_id"), str):
        yield key, row


def _answer(line: Mapping[str, object]) -> Reply | _Failure:
    """The answer in a line of a batch's file, or why there is none."""
    try:
        if not (response := line.get("response")):
            error = as_object(line.get("error"), "its error")
            return _Failure(None, _message(error), *error_fields(error))
        response = as_object(response, "a response")
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            return read_reply(json.dumps(as_object(body, "a body")).encode())
        refusal = body.get("error") if isinstance(body, dict) else None
        fields = error_fields(refusal) if isinstance(refusal, dict) else (None, None)
        reason = _message(refusal) if isinstance(refusal, dict) else json.dumps(body)
        return _Failure(status if isinstance(status, int) else None, f"status {status}: {reason}", *fields)
    except Unreadable as unreadable:
        return _Failure(None, f"an answer is unreadable: {unreadable}")


def _message(error: Mapping[str, object]) -> str:
    """The text of an error object."""
    message = error.get("message")
    return message if isinstance(message, str) and message else json.dumps(error)


def _omitted(batch: "Batch", sampling: SamplingParams) -> tuple[str, ...]:
    """`Trace.omitted` of the answers of a batch."""
    return omitted(set(SAMPLING) - set((batch.metadata or {}).get(LEFT_OUT, "").split()), sampling)
