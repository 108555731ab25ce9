"""Chat templates are programs of strangers: they are rendered in a process that the kernel bounds.

Jinja's sandbox keeps a template away from the machine, but not from its time and memory: `{{ 'a' * 10**10 }}`, three
nested loops or a list that holds itself twice, forty times over, stop a training run. One child process a process
renders for all of its chats; it may use TEMPLATE_SECONDS of processor time for a conversation (not of the clock: a
busy machine changes nothing) and TEMPLATE_MEMORY of memory. It costs 0.1 s to start and some 20 µs a conversation.

Rejected: counting steps inside Jinja (loops can be counted, but every filter, operator and method of a string that can
grow would have to be found and guarded), and trusting a template after a trial (its cost may depend on the messages).
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.chat.frames import receive, send
from distill.limits import RENDERED_CHARACTERS, TEMPLATE_BYTES, TEMPLATE_MEMORY, TEMPLATE_SECONDS
from distill.prompts.prompt import Message

Chats = Sequence[tuple[Sequence[Message], bool]]  # messages, and whether the prompt for an answer follows them
Value = str | bool | Sequence[str]


class TemplateError(ValueError):
    """A template cannot be compiled or rendered. number: of the conversation in which it failed."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


class Renderer:
    """The child process, started when it is first needed, and again after a template has cost it its life.

    Safe to use from several threads; a forked process starts a child of its own.
    """

    def __init__(
        self,
        seconds: float = TEMPLATE_SECONDS,
        memory: int = TEMPLATE_MEMORY,
        characters: int = RENDERED_CHARACTERS,
    ) -> None:
        self.limits = (seconds, memory, characters)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Value], chats: Chats) -> list[str]:
        """The text of each conversation. Errors: TemplateError in one line."""
        conversations = [[[dict(message) for message in messages], prompt] for messages, prompt in chats]
        return self._ask({"template": template, "variables": dict(variables), "chats": conversations})

    def literals(self, template: str) -> list[str]:
        """The texts that a template can write by itself. Errors: TemplateError."""
        return self._ask({"template": template})

    def close(self) -> None:
        """End the child process, if there is one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()

    def _ask(self, request: dict[str, object]) -> list[str]:
        template = str(request["template"])
        if len(template) > TEMPLATE_BYTES:
            raise TemplateError(f"it has {len(template):,} characters; at most {TEMPLATE_BYTES:,} are read")
        with self._lock:
            reply = self._exchange(request)
        if "texts" not in reply:
            number = reply["number"]
            assert isinstance(number, int)
            raise TemplateError(str(reply["error"]), number)
        texts = reply["texts"]
        assert isinstance(texts, list)
        return texts

    def _exchange(self, request: dict[str, object]) -> dict[str, object]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            try:
                send(process.stdin, request)
                reply = receive(process.stdout)
            except BrokenPipeError:
                reply = None
            if reply is not None:
                return reply
            code = process.wait()
        except BaseException:  # interrupted in the middle: the pending reply has no reader
            self.close()
            raise
        self.close()
        raise TemplateError(self._death(code))

    def _death(self, code: int) -> str:
        seconds, memory, _ = self.limits
        if code == -signal.SIGPROF:
            return f"it takes more than {seconds:g} s of processor time for one conversation"
        return f"its process ended with code {code}; it may use {memory / 2**30:g} GiB of memory"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner = os.getpid()
            package_parent = str(Path(__file__).resolve().parents[2])  # so that it finds `distill` in a bare clone too
            path = os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "distill.chat.worker", *map(str, self.limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # an interruption from the terminal is for this process, which ends the child
            )
        return self._process


RENDERER = Renderer()
atexit.register(RENDERER.close)
