"""Python modules in processes of their own: started, spoken to, given up on, and never left behind.

What every user of child processes needs, in one place: a fresh interpreter runs `python -m MODULE`, speaks one JSON
object a line over its standard input and output, and writes anything else to standard error, which is kept and read
only if the process fails. A child ends with its parent: the end of its input tells it that nobody listens any more, and
the kernel closes that input however the parent dies.

Rejected: `multiprocessing` (a killed worker loses its task silently; fork deadlocks beside torch's threads; spawn and
forkserver import the caller's main module again, so a script without a `__main__` guard starts itself), and threads (an
endless computation inside one C call cannot be interrupted).

Standard library only, so that light processes may use it. POSIX only, as are the limits that children set themselves.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PACKAGE_PARENT = str(Path(__file__).resolve().parents[1])  # so that a child finds `distill` in a bare clone too
DYING_SECONDS = 2.0  # between the end of a process's output and its own end


class Child:
    """One process. Attributes: `process`; `stdin` and `stdout`, unbuffered files (`stdout` is None unless it speaks).

    environment: variables in addition to this process's. detached: in a session of its own, so that a Ctrl-C in the
    terminal reaches the parent only, which decides what becomes of its children. speaks: whether its standard output
    carries messages; else it goes where this process's goes, and its errors too.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        detached: bool = False,
        speaks: bool = True,
    ) -> None:
        path = os.pathsep.join(filter(None, (PACKAGE_PARENT, os.environ.get("PYTHONPATH"))))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the child: read if it fails
        self._unread = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if speaks else None,
            stderr=self._errors if speaks else None,
            env=os.environ | {"PYTHONPATH": path} | dict(environment or {}),
            start_new_session=detached,
        )
        assert self.process.stdin is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def send(self, message: object) -> None:
        """Send a JSON value. A child that has died does not receive it; the end of its output says so to the reader."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        with suppress(BrokenPipeError):
            while data:
                data = data[self.stdin.write(data) :]

    def receive(self) -> list[object] | None:
        """Wait for output; returns the messages that are complete now (maybe none), None at the end of the output."""
        assert self.stdout is not None, "this child does not speak"
        block = os.read(self.stdout.fileno(), 1 << 16)
        if not block:
            return None
        *lines, self._unread = (self._unread + block).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self, dying: bool = False) -> int:
        """Kill the process, which holds nothing worth saving, and close its files; returns its exit code.

        dying: its output has ended, so it is about to end itself: wait a moment for its own exit code.
        """
        if dying:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(DYING_SECONDS)
        self.process.kill()
        code = self.process.wait()
        for file in (self.stdin, self.stdout, self._errors):
            if file is not None:
                file.close()
        return code

    def last_words(self) -> str:
        """The last line of its standard error so far, before `end`; "no message" where there is none."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
