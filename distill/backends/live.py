"""A model directory that answers requests as they come: the local engine behind `distill serve`.

`Backend.complete` asks for everything that is wanted and waits; a server has requests that begin and end at any time,
stream, and are given up. The engine of each device runs in a process of its own (`engine.workers`), because a step of
the engine and the work of HTTP would otherwise take turns at one interpreter. A thread for each process waits for its
messages and hands them to the event loop; everything else here runs on the loop and needs no lock.

Requests are token ids, as everywhere in the engine; `text.py` makes text of the answers.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from distill.backends.directory import with_tokens
from distill.backends.local import options_of
from distill.chat import Chat
from distill.engine.options import SamplingParams
from distill.errors import UserError
from distill.models import Model
from distill.recipe import LocalEngine

__all__ = ["Asked", "Broken", "LiveModel", "Piece", "Rejected", "Running", "with_tokens"]

if TYPE_CHECKING:
    from distill.engine import Request
    from distill.engine.workers import Engines, Worker

EndReason = Literal["stop", "length", "abort"]


class Rejected(ValueError):
    """A request that the engine can never serve. The message says why."""


class Broken(RuntimeError):
    """An engine's process ended, and nothing more can be served. The message says why."""


@dataclass(frozen=True)
class Piece:
    """New tokens of one sample. finish_reason: None while more follow; the last piece of a sample that is not streamed
    holds all of its tokens. logprobs: raw, natural log; top_logprobs: None where not requested."""

    sample: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    finish_reason: EndReason | None


@dataclass(frozen=True)
class Asked:
    """A prompt and the samples wanted of it; fields as of `engine.Request`."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    prompt_key: int
    samples: tuple[int, ...]
    streamed: bool


class Running:
    """A request under way. Errors of `pieces`: Rejected; Broken."""

    def __init__(self, worker: "Worker", request_id: str, asked: Asked) -> None:
        self._worker, self._id, self._streamed = worker, request_id, asked.streamed
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._left = self._to_come = len(asked.samples)  # to be drawn, and to be handed out
        send(worker, {"request": asdict(_request(request_id, asked))})
        worker.outstanding += self._left

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Tokens of all samples, in the order they are drawn."""
        while self._to_come:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            self._to_come -= piece.finish_reason is not None
            yield piece

    def drop(self, sample: int | None = None) -> None:
        """End one sample early, or all: what there is of it comes with the reason `abort`."""
        if self._left:
            send(self._worker, {"abort": self._id, "sample": sample})

    def close(self) -> None:
        """Give up what is not finished."""
        self.drop()
        self._finished(self._left)

    def put(self, item: Piece | Exception) -> None:
        """Take what the engine sent."""
        if isinstance(item, Exception):
            self._finished(self._left)
        elif item.finish_reason is not None:
            self._finished(1)
            item = _without_tokens(item) if self._streamed else item
        self._pieces.put_nowait(item)

    def _finished(self, samples: int) -> None:
        self._left -= samples
        self._worker.outstanding -= samples


class LiveModel:
    """Engines of one model. Create it with `load`; `start` and everything after it belong on an event loop.

    model: where it is, with its `chat`. broken: set once an engine's process has ended. why: the reason.
    """

    def __init__(self, engines: "Engines", model: Model) -> None:
        self.model, self.broken = model, asyncio.Event()
        self._engines = engines
        self._running: dict[str, Running] = {}
        self._number = 0
        self.why = ""
        self._closing = False

    @classmethod
    def load(cls, model: Model, engine: LocalEngine, max_batch: int) -> "LiveModel":
        """Load a model directory, once on each device. Errors: UserError, as `LocalBackend.load`."""
        from distill.engine.device import devices_for
        from distill.engine.families import read_spec
        from distill.engine.workers import EngineDied, Engines

        try:
            read_spec(model.directory)
            model.chat  # noqa: B018  what the tokenizer refuses is not worth loading weights for
            devices = devices_for(None if engine.device == "auto" else engine.device, engine.data_parallel_size)
            return cls(Engines.load(model.directory, devices, options_of(engine, max_batch)), model)
        except (ValueError, EngineDied) as error:
            raise UserError(str(error)) from error

    @property
    def chat(self) -> Chat:
        """The tokenizer and the template."""
        return self.model.chat

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion together."""
        return self._engines.max_context

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._engines.spec.vocab_size

    @property
    def capacity(self) -> int:
        """Samples that all engines decode at once."""
        return self._engines.max_batch * len(self._engines.workers)

    def start(self) -> None:
        """Begin to receive the engines' messages, on the running loop."""
        loop = asyncio.get_running_loop()
        for worker in self._engines.workers:
            threading.Thread(target=self._receive, args=(worker, loop), daemon=True).start()

    def close(self) -> None:
        """End the processes."""
        self._closing = True
        self._engines.close()

    @contextmanager
    def ask(self, asked: Asked) -> Iterator[Running]:
        """A request, which is given up when the context ends. Errors: Broken."""
        if self.broken.is_set():
            raise Broken(self.why)
        self._number += 1
        request_id = str(self._number)
        worker = min(self._engines.workers, key=lambda each: each.outstanding)
        running = self._running[request_id] = Running(worker, request_id, asked)
        try:
            yield running
        finally:
            del self._running[request_id]
            running.close()

    def drop_all(self) -> None:
        """End every sample that runs or waits."""
        for running in self._running.values():
            running.drop()

    # ---- messages

    def _receive(self, worker: "Worker", loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: hand messages to the loop until the process ends."""
        from distill.engine.workers import EngineDied

        try:
            while True:
                messages = worker.receive()
                loop.call_soon_threadsafe(self._deliver, worker, messages)
        except (EngineDied, OSError, ValueError) as error:  # its output ended, or was closed
            with suppress(RuntimeError):  # the loop is closed too
                loop.call_soon_threadsafe(self._break, str(error))

    def _deliver(self, worker: "Worker", messages: Sequence[Mapping[str, object]]) -> None:
        from distill.engine import NonFiniteLogits
        from distill.engine import messages as form

        for message in messages:
            if "rejected" in message:
                self._put(str(message["rejected"]), Rejected(str(message["error"])))
            elif "not_finite" in message:
                self._break(str(NonFiniteLogits(form.sample(message["not_finite"]))))
            elif "progress" in message:
                for new in map(form.progress, form.rows(message["progress"])):
                    self._put(new.request_id, Piece(new.sample, new.token_ids, new.logprobs, new.top_logprobs, None))
            else:
                for done in map(form.completion, form.rows(message["completions"])):
                    piece = Piece(done.sample, done.token_ids, done.logprobs, done.top_logprobs, done.finish_reason)
                    self._put(done.request_id, piece)

    def _put(self, request_id: str, item: Piece | Exception) -> None:
        if (running := self._running.get(request_id)) is not None:  # else it was given up
            running.put(item)

    def _break(self, why: str) -> None:
        if self._closing or self.broken.is_set():
            return
        self.why = why
        self.broken.set()
        for running in self._running.values():
            running.put(Broken(why))


def send(worker: "Worker", message: Mapping[str, object]) -> None:
    """Send a message to an engine. That its process has ended is reported by the thread that reads from it."""
    from distill.engine.workers import EngineDied

    with suppress(EngineDied):
        worker.send(message)


def _request(request_id: str, asked: Asked) -> "Request":
    from distill.engine import Request

    values = (asked.prompt_ids, asked.sampling, asked.seed, asked.prompt_key, asked.samples, asked.streamed)
    return Request(request_id, *values)


def _without_tokens(piece: Piece) -> Piece:
    """The end of a streamed sample, whose tokens have come before."""
    tops = None if piece.top_logprobs is None else ()
    return replace(piece, token_ids=(), logprobs=(), top_logprobs=tops)
