"""A provider's batch API: all requests in one file, the answers within a day, at a lower price.

Batches are not kept in a file of the run: each carries a hash of model, sampling and seed in its `metadata`, and the
provider lists them. A run that is interrupted while it waits finds its batches again, and pays for none twice; so
does a run that is killed between creating one and the next line. A request is known by
`PROMPT-SAMPLE-MESSAGES` (`custom_id`), the last a hash: the same prompt may be asked with another suffix.

What a batch does not answer (it expired, or a request failed) is asked for in a new batch by the next run.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

from distill.backends.backend import Job
from distill.backends.reply import Reply, Unreadable, as_object, read_json, read_reply
from distill.console import say
from distill.engine.options import SamplingParams
from distill.errors import WorkError
from distill.fingerprint import digest
from distill.prompts.prompt import Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Batch

MOST_REQUESTS, MOST_BYTES = 50_000, 100 << 20  # of one batch; OpenAI's limits are 50,000 and 200 MB
POLL = 30.0  # seconds
ENDED = ("completed", "expired", "cancelled", "failed")
TAG = "distill"  # key of the metadata
ENDPOINT = "/v1/chat/completions"
LONGEST_LINE = 64 << 20  # bytes of one answer


def request_id(prompt: Prompt, sample: int) -> str:
    """What a request is known by among those of the same model, sampling and seed."""
    return f"{prompt.id}-{sample}-{digest([dict(message) for message in prompt.messages])[:16]}"


@dataclass(frozen=True)
class Batches:
    """The batches of one model. client: the library, with the key. body: makes a request's body. identity: what decides
    the answers beside sampling and seed."""

    client: "AsyncOpenAI"
    body: Callable[[Prompt, int, SamplingParams, int], Mapping[str, object]]
    identity: Mapping[str, object]

    async def complete(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int
    ) -> AsyncGenerator[tuple[Prompt, int, Reply], None]:
        """(prompt, sample, answer) of every wanted sample, as batches end; not lazy in `jobs`.

        Errors: WorkError for samples that no batch has answered; those of the client library.
        """
        wanted = {request_id(job.prompt, sample): (job.prompt, sample) for job in jobs for sample in job.samples}
        tag = digest([dict(self.identity), asdict(sampling), seed])
        batches, covered = await self._known(tag, wanted.keys())
        new = [key for key in wanted if key not in covered]
        while new:
            content, count = self._content(new, wanted, sampling, seed)
            batches.append(await self._create(content, tag))
            say(
                f"batch {batches[-1].id}: {count:,} requests; interrupting is safe, the same command waits for it again"
            )
            new = new[count:]
        while batches:
            running = []
            for batch in batches:
                if batch.status not in ENDED:
                    running.append(batch)
                    continue
                async for key, reply in self._answers(batch):
                    if key in wanted:
                        yield *wanted.pop(key), reply
            if batches := running:
                try:
                    await asyncio.sleep(POLL)
                    batches = [await self.client.batches.retrieve(batch.id) for batch in batches]
                except asyncio.CancelledError:  # at the deadline of a budget, or by the user
                    for batch in batches:
                        say(f"batch {batch.id} goes on at the provider; the same command collects its answers")
                    raise
        if wanted:
            raise WorkError(
                f"{len(wanted):,} samples were not answered by their batches; the others are stored, run the same "
                f"command to ask for these again"
            )

    async def _known(self, tag: str, keys: Iterable[str]) -> "tuple[list[Batch], set[str]]":
        """Batches of earlier sessions that answer wanted samples, or will, and the samples that they cover.

        Those of an ended batch that it did not answer are not covered: they are asked for again.
        """
        wanted, batches, covered = set(keys), [], set[str]()
        async for batch in self.client.batches.list(limit=100):
            if (batch.metadata or {}).get(TAG) != tag:
                continue
            if batch.status in ENDED:
                answered = {key async for key, _ in self._answers(batch)}
            else:
                answered = {key async for key, _ in self._lines(batch.input_file_id)}
            if answered & (wanted - covered):
                batches.append(batch)
                covered |= answered
        return batches, covered & wanted

    def _content(
        self, keys: list[str], wanted: Mapping[str, tuple[Prompt, int]], sampling: SamplingParams, seed: int
    ) -> tuple[bytes, int]:
        """The file of a batch with as many of the requests as it may have, and their number."""
        lines, size = list[bytes](), 0
        for key in islice(keys, MOST_REQUESTS):
            body = {
                name: value for name, value in self.body(*wanted[key], sampling, seed).items() if "stream" not in name
            }
            line = json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"
            if lines and size + len(line) > MOST_BYTES:
                break
            lines.append(line)
            size += len(line)
        return b"".join(lines), len(lines)

    async def _create(self, content: bytes, tag: str) -> "Batch":
        file = await self.client.files.create(file=("requests.jsonl", content), purpose="batch")
        return await self.client.batches.create(
            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={TAG: tag}
        )

    async def _answers(self, batch: "Batch") -> AsyncGenerator[tuple[str, Reply], None]:
        """(custom_id, answer) of the requests that were answered; those that failed are left out."""
        async for key, line in self._lines(batch.output_file_id):
            try:
                response = as_object(line.get("response"), "a response")
                if response.get("status_code") == 200:
                    yield key, read_reply(json.dumps(as_object(response.get("body"), "a body")).encode())
            except Unreadable:
                continue

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
