"""A vLLM or SGLang server that is started for the work, as a backend, and stopped after it.

`find` looks for the engine and starts nothing: settings that cannot work are refused before a stage begins. The server
starts with the first request, when the longest prompt is known and with it the context to reserve, and runs until
`close`. A stage checks all its prompts before the first request, so it starts one server; work that needs a longer
context restarts it. A process of its own (`distill.keeper`) stops the server on every way out and writes its output to
a log.

Once the server runs, `RemoteBackend` does the work. When a request fails because the server has ended, it is not
repeated.

The identity is that of the weights on this machine, with the engine's name and arguments: another engine computes
other numbers and is another teacher. The engine's version is part of the numerics.
"""

import math
import os
import secrets
import shlex
import tempfile
import time
import urllib.request
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from distill.backends import scoring
from distill.backends.backend import Completed, GivenIds, Job, Scored, Usage
from distill.backends.budget import Allowance
from distill.backends.connection import KEPT
from distill.backends.remote import RemoteBackend
from distill.backends.serving import Flags, Installed, command, parallel_size, reasoning_parser
from distill.children import Child, free_port
from distill.console import say, waiting
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.hardware import gpu_count
from distill.keeper import ServerProcess
from distill.models import Launch, Model, Server, in_mode
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

POLL = 0.5  # seconds between two checks of a server that starts
GRACE = 20.0  # seconds that a server has to end by itself
MESSAGE_LENGTH = 200  # characters of the server's log that a message repeats
SPARE_TOKENS = 16  # of the context: servers count a prompt's tokens with their own tokenizer
CONTEXT_STEP = 4096  # tokens; the context is a multiple, so that a slightly longer prompt needs no other server


class _TimeIsUp(Exception):
    """The allowance's deadline passed while the server started."""


class LaunchedBackend:
    """A model directory behind a server that runs while the backend is open. concurrency: requests under way at
    once."""

    def __init__(self, model: Model, place: Launch, installed: Installed, concurrency: int) -> None:
        self.model, self.place, self.installed, self.concurrency = model, place, installed, concurrency
        version = installed.version
        self.numerics: Mapping[str, str] = {"kernels": f"{place.settings.launch} {version or ''}".strip()}
        self.log = place.log or _temporary_log()
        self._needed = 0  # tokens of the longest prompt and its completion
        self._budget = False  # whether requests have a thinking budget
        self._context = 0  # tokens that the running server accepts
        self._stopped_usage = Usage()  # of servers that were stopped
        self._starting = 0.0  # seconds until the servers answered
        self._child: Child | None = None
        self._remote: RemoteBackend | None = None

    @classmethod
    def find(cls, model: Model, place: Launch, max_batch: int) -> "LaunchedBackend":
        """Find the engine without starting it. Errors: UserError when it is not installed, or the tokenizer or the chat
        template cannot be used."""
        model.chat  # noqa: B018  loads the tokenizer
        return cls(model, place, Installed.find(place.settings), place.settings.concurrency or max_batch)

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """Weights, template, mode, engine and its arguments."""
        return self.model.identity

    @property
    def max_context(self) -> int:
        """The card's context; the server reserves as much of it as the work needs."""
        return self.place.context

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        current, stopped = self._remote.usage if self._remote else Usage(), self._stopped_usage
        return Usage(
            stopped.prompt_tokens + current.prompt_tokens,
            stopped.completion_tokens + current.completion_tokens,
            starting=self._starting,
        )

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Reserve the context for the prompts. Errors: UserError when a prompt and its completion exceed the card's."""
        prompts = list(prompts)
        lengths = [len(ids) for ids in self.model.chat.prompts_ids(prompt.messages for prompt in prompts)]
        if not lengths:
            return
        longest = max(lengths)
        if (needed := longest + sampling.max_new_tokens) > self.place.context:
            prompt = prompts[lengths.index(longest)]
            raise UserError(
                f"prompt {prompt.id} ({prompt.messages[-1]['content'][:40]!r}…) has {longest} tokens and "
                f"max_new_tokens is {sampling.max_new_tokens}, together more than the context of {self.place.context} "
                f"on the teacher's card; lower max_new_tokens, or leave the prompt out"
            )
        self._needed = max(self._needed, needed)
        self._budget = self._budget or sampling.thinking_budget is not None

    @property
    def vocab_size(self) -> None:
        """None: chat servers do not say."""

    @property
    def scores_given_ids(self) -> bool:
        """See `Backend`."""
        return False

    def score(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Trace]:
        """Errors: UserError, always: chat servers do not score texts."""
        raise UserError(f"server.launch: the server cannot score texts; {scoring.remedy(traces, top_k)}")

    def scored(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Scored]:
        """See `score`."""
        return [Scored.of(trace) for trace in self.score(traces, top_k, ids)]

    def complete(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int, allowance: Allowance | None = None
    ) -> Generator[Completed, None, None]:
        """Start the server unless it runs, and yield every wanted sample once.

        allowance: as of `Backend.complete`; a server that still starts at its deadline is stopped.
        Errors: WorkError when the server does not start, or ends early; as `RemoteBackend.complete`.
        """
        if self._remote is None or self._context < self._needed or self._exit_code() is not None:
            if not self._needed:
                jobs = list(jobs)
                self.check((job.prompt for job in jobs), sampling)
            self.close()
            begun = time.monotonic()
            try:
                self._remote = self._start(allowance.deadline if allowance else math.inf)
            except _TimeIsUp:
                self.close()
                return
            self._starting += time.monotonic() - begun
        self._remote.check((), sampling)
        yield from self._remote.complete(jobs, sampling, seed, allowance)

    def close(self) -> None:
        """Stop the server and wait until all its processes have ended."""
        self._stopped_usage, self._remote = self.usage, None
        if self._child is not None:
            child, self._child = self._child, None
            child.stdin.close()
            child.process.wait()  # the keeper kills a server that does not end within GRACE
            child.end()

    # ---- the server

    def _start(self, give_up: float) -> RemoteBackend:
        settings, engine, model = self.place.settings, self.installed.engine, self.model
        port, key = free_port(), secrets.token_hex(24)
        self._context = min(self.place.context, _multiple(self._needed + SPARE_TOKENS, CONTEXT_STEP))
        template = model.chat.tokenizer.chat_template
        parser = reasoning_parser(engine, template if isinstance(template, str) else "", model.thinking)
        flags = Flags(model.name, port, self._context, self._parallel(), parser, self._budget)
        arguments = command(self.installed, settings, self.place.directory, flags)
        self._open_log(arguments)
        self._child = Child("distill.keeper", detached=True)
        self._child.send(
            ServerProcess(
                command=arguments,
                log=str(self.log),
                key=key,
                key_variable=engine.key_variable,
                python_path=os.environ.get("PYTHONPATH"),
                grace=GRACE,
            )
        )
        address = f"http://127.0.0.1:{port}"
        self._wait(address + engine.health, key, give_up)
        body = in_mode(settings.extra_body, model.thinking)
        server = Server(f"{address}/v1", model.name, key, silence=settings.silence, extra_body=body, direct=True)
        try:
            remote = RemoteBackend.connect(server, self.concurrency)
        except UserError:
            self._check_alive()
            raise
        remote.before_retry = self._check_alive
        return remote

    def _parallel(self) -> int:
        if self.place.settings.tensor_parallel_size:
            return self.place.settings.tensor_parallel_size
        count = gpu_count()
        size = parallel_size(self.place.directory, count)
        if size < count:
            say(f"note: the server uses {size} of {count} GPUs: their number has to divide the model's attention heads")
        return size

    def _open_log(self, arguments: Sequence[str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(arguments)}\n")
            self._log_start = log.tell()

    def _wait(self, address: str, key: str, give_up: float) -> None:
        """Wait until the server is healthy. Errors: WorkError when it ends first, or after `start_timeout`; _TimeIsUp
        at `give_up`, a time of `time.monotonic`."""
        seconds, engine = self.place.settings.start_timeout, self.place.settings.launch
        say(f"starting {engine} (log: {self.log})")
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"})
        deadline = time.monotonic() + seconds
        with waiting(f"starting {engine}") as show:
            while not _healthy(request):
                if (code := self._exit_code()) is not None:
                    raise WorkError(f"{engine} ended with exit code {code} while it started{self._last_words()}")
                if time.monotonic() >= give_up:
                    raise _TimeIsUp
                if time.monotonic() > deadline:
                    raise WorkError(
                        f"{engine} did not answer within {seconds:,.0f} seconds (server.start_timeout)"
                        f"{self._last_words()}"
                    )
                show(self._last_line())
                time.sleep(POLL)

    def _check_alive(self) -> None:
        """Errors: WorkError when the server has ended."""
        if (code := self._exit_code()) is not None:
            engine = self.place.settings.launch
            raise WorkError(f"{engine} ended early with exit code {code}{self._last_words()}; {KEPT}")

    def _exit_code(self) -> int | None:
        return self._child.process.poll() if self._child else None

    def _last_line(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _last_words(self) -> str:
        line = self._last_line()[-MESSAGE_LENGTH:]
        return f" ({line}); see its log, {self.log}" if line else f"; see its log, {self.log}"


def _healthy(request: urllib.request.Request) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this loopback interface
    try:
        with opener.open(request, timeout=30) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):  # refused, reset, an error status: not yet
        return False


def _multiple(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def _temporary_log() -> Path:
    return Path(tempfile.mkdtemp(prefix="distill-server-")) / "server.log"
