"""A vLLM or SGLang server that is started for the work, as a backend, and stopped after it.

`find` looks the engine up and starts nothing: settings that cannot work are refused before a stage begins. The server
starts with the first request, when the longest prompt is known and with it the context to reserve, and is kept until
`close`; work that needs a longer context restarts it. It is kept by a process of its own (`distill.keeper`), which ends
it on every way out, and its output is appended to a log.

Everything after the start is `RemoteBackend`'s. A server that dies while it answers is recognized when a request fails,
so that the requests are not repeated against nothing.

The identity is that of the weights on this machine, with the engine's name and arguments: another engine computes
other numbers and is another teacher. The engine's version is part of the numerics.
"""

import os
import secrets
import tempfile
import time
import urllib.request
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from distill.backends.backend import Completed, Job, Usage
from distill.backends.connection import KEPT
from distill.backends.remote import RemoteBackend
from distill.backends.serving import Installed, command, parallel_size, reasoning_parser
from distill.children import Child, free_port
from distill.console import say, waiting
from distill.engine.options import SamplingParams
from distill.errors import UserError, WorkError
from distill.hardware import gpus
from distill.keeper import Kept
from distill.models import Launch, Model, Server, in_mode
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

LOOK = 0.5  # seconds between two looks at a server that starts
MESSAGE_LENGTH = 200  # characters of the server's log that a message repeats
SPARE_TOKENS = 16  # of the context: servers count a prompt's tokens with their own tokenizer


class LaunchedBackend:
    """A model directory behind a server that runs as long as the backend is used. concurrency: requests under way."""

    def __init__(self, model: Model, place: Launch, installed: Installed, concurrency: int) -> None:
        self.model, self.place, self.installed, self.concurrency = model, place, installed, concurrency
        version = installed.version
        self.numerics: Mapping[str, str] = {"kernels": f"{place.settings.launch} {version or ''}".strip()}
        self.log = place.log or _temporary_log()
        self._needed = 0  # tokens of the longest prompt and its completion
        self._context = 0  # tokens that the running server accepts
        self._before = Usage()  # of servers that were stopped
        self._child: Child | None = None
        self._remote: RemoteBackend | None = None

    @classmethod
    def find(cls, model: Model, place: Launch, max_batch: int) -> "LaunchedBackend":
        """Find the engine, and start nothing. Errors: UserError when it is not installed, or the tokenizer or the chat
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
        now = self._remote.usage if self._remote else Usage()
        return Usage(
            self._before.prompt_tokens + now.prompt_tokens, self._before.completion_tokens + now.completion_tokens
        )

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Errors: UserError when a prompt and its completion exceed the card's context."""
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

    def score(self, traces: Sequence[Trace], top_k: int) -> list[Trace]:
        """Errors: UserError, always: chat servers do not score texts."""
        raise UserError("`server.launch` does not score texts; remove `server` to use the local engine")

    def complete(self, jobs: Iterable[Job], sampling: SamplingParams, seed: int) -> Generator[Completed, None, None]:
        """Start the server if it does not run, and yield every wanted sample once.

        Errors: WorkError when the server does not start, or ends; as `RemoteBackend.complete`.
        """
        if self._remote is None or self._context < self._needed or self._exit_code() is not None:
            if not self._needed:
                jobs = list(jobs)
                self.check((job.prompt for job in jobs), sampling)
            self.close()
            self._remote = self._start()
        yield from self._remote.complete(jobs, sampling, seed)

    def close(self) -> None:
        """Stop the server and wait until none of its processes is left."""
        self._before, self._remote = self.usage, None
        if self._child is not None:
            child, self._child = self._child, None
            child.stdin.close()
            child.process.wait()  # the keeper kills what does not end in time
            child.end()

    # ---- the server

    def _start(self) -> RemoteBackend:
        settings, engine = self.place.settings, self.installed.engine
        port, key = free_port(), secrets.token_hex(24)
        self._context = min(self.place.context, self._needed + SPARE_TOKENS)
        template = self.model.chat.tokenizer.chat_template
        start = command(
            self.installed,
            settings,
            self.place.directory,
            self.model.name,
            port,
            self._context,
            self._parallel(),
            reasoning_parser(engine, template if isinstance(template, str) else "", self.model.thinking),
        )
        self._open_log(start)
        kept = Kept(
            command=start,
            log=str(self.log),
            key=key,
            key_variable=engine.key_variable,
            python_path=os.environ.get("PYTHONPATH"),
        )
        self._child = Child("distill.keeper", detached=True)
        self._child.send(kept)
        self._wait(f"http://127.0.0.1:{port}{engine.health}")
        body = in_mode(settings.extra_body, self.model.thinking)
        server = Server(f"http://127.0.0.1:{port}/v1", self.model.name, key, silence=settings.silence, extra_body=body)
        remote = RemoteBackend.connect(server, self.concurrency)
        remote.before_retry = self._refuse_dead
        return remote

    def _parallel(self) -> int:
        if self.place.settings.tensor_parallel_size:
            return self.place.settings.tensor_parallel_size
        count = len(gpus())
        size = parallel_size(self.place.directory, count)
        if size < count:
            say(f"note: {size} of {count} GPUs are used, as their number has to divide the model's attention heads")
        return size

    def _open_log(self, start: Sequence[str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(start)}\n")
            self._log_start = log.tell()

    def _wait(self, address: str) -> None:
        """Wait for the server's health. Errors: WorkError when it ends first, or the time is up."""
        seconds, engine = self.place.settings.start_timeout, self.place.settings.launch
        say(f"starting {engine} (log: {self.log})")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + seconds
        with waiting(f"starting {engine}") as show:
            while not _healthy(opener, address):
                if (code := self._exit_code()) is not None:
                    raise WorkError(f"{engine} ended with exit code {code} before it answered{self._last_words()}")
                if time.monotonic() > deadline:
                    raise WorkError(
                        f"{engine} did not answer within {seconds:,.0f} seconds (server.start_timeout)"
                        f"{self._last_words()}"
                    )
                show(self._last_line())
                time.sleep(LOOK)

    def _refuse_dead(self) -> None:
        if (code := self._exit_code()) is not None:
            engine = self.place.settings.launch
            raise WorkError(f"{engine} ended with exit code {code} in the middle{self._last_words()}; {KEPT}")

    def _exit_code(self) -> int | None:
        return self._child.process.poll() if self._child else None

    def _last_line(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _last_words(self) -> str:
        line = self._last_line()[-MESSAGE_LENGTH:]
        return f" ({line}); its log: {self.log}" if line else f"; its log: {self.log}"


def _healthy(opener: urllib.request.OpenerDirector, address: str) -> bool:
    try:
        with opener.open(address, timeout=30) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):  # refused, reset, an error status: not yet
        return False


def _temporary_log() -> Path:
    return Path(tempfile.mkdtemp(prefix="distill-server-")) / "server.log"
