"""A process that keeps another one: a server with its workers, which never outlive the command that started them.

    distill ──standard input── keeper ──pipe── server ── workers

`python -m distill.keeper` reads one line of JSON (`Kept`), starts the command, appends its output to a log, and ends
the whole tree when its own input ends. The kernel closes that input however the parent dies, `kill -9` included, which
no handler in the parent could achieve. The server has a session of its own, so that Ctrl-C in the terminal reaches only
the parent. On Linux the keeper adopts orphans (`PR_SET_CHILD_SUBREAPER`): workers in process groups of their own are
ended too, and so is the server where the keeper itself is killed (`PR_SET_PDEATHSIG`).

The API key comes through standard input, and reaches the server in its environment or, where the server has no variable
for it, in a file that only this user can read and that is removed at the end. The log never has it.

Rejected: handing the log file to the server directly (servers print their arguments, the key among them), and
PR_SET_PDEATHSIG alone (it reaches one process, not its workers).

Standard library only: it starts in a tenth of a second, and holds little memory beside the server.
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypedDict

STOP_SECONDS = 20.0  # between SIGTERM and SIGKILL
POLL = 0.1  # seconds between two looks at the server
SUBREAPER, PDEATHSIG = 36, 1  # of Linux's prctl


class Kept(TypedDict):
    """What to run. key_variable: the environment variable that the server reads its key from; None writes it to the
    configuration file behind `--config`. python_path: PYTHONPATH as the user set it, for another Python."""

    command: list[str]
    log: str
    key: str
    key_variable: str | None
    python_path: str | None


def main() -> int:
    """Keep the server that the first line of standard input describes; returns its exit code, 128 + n for signal n."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent died first
    kept: Kept = json.loads(line)
    asked_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked_to_stop.append(number))
    _prctl(SUBREAPER, 1)
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if kept["python_path"]:
        environment["PYTHONPATH"] = kept["python_path"]
    with _key_at_hand(kept, environment) as command, Path(kept["log"]).open("ab") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _prctl(PDEATHSIG, signal.SIGKILL),
        )
        output = _Output(server, log, kept["key"].encode())
        output.until(lambda: bool(asked_to_stop) or server.poll() is not None, ends_with_input=True)
        _end(server, output)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


@contextmanager
def _key_at_hand(kept: Kept, environment: dict[str, str]) -> Iterator[Sequence[str]]:
    """The command, once the server will find its key."""
    if kept["key_variable"] is not None:
        environment[kept["key_variable"]] = kept["key"]
        yield kept["command"]
        return
    with tempfile.TemporaryDirectory(prefix="distill-server-") as directory:  # mode 700
        file = Path(directory) / "server.yaml"
        file.write_text(f"api-key: {kept['key']}\n", encoding="utf-8")
        yield [*kept["command"], "--config", str(file)]


class _Output:
    """The server's output, copied to the log by whole lines, without the key."""

    def __init__(self, server: "subprocess.Popen[bytes]", log: BinaryIO, key: bytes) -> None:
        assert server.stdout is not None
        self._pipe, self._log, self._key = server.stdout.fileno(), log, key
        self._rest = b""
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def until(self, ended: Callable[[], bool], seconds: float | None = None, ends_with_input: bool = False) -> None:
        """Copy until `ended()`, for at most some seconds, or until standard input ends."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not ended() and (deadline is None or time.monotonic() < deadline):
            ready = {key.fd for key, _ in self._selector.select(POLL)}
            if self._pipe in ready:
                self._copy()
            if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 1 << 12):
                self._selector.unregister(sys.stdin.fileno())
                if ends_with_input:
                    return

    def finish(self) -> None:
        """Copy what is left: the processes that could write more have ended."""
        os.set_blocking(self._pipe, False)
        with suppress(BlockingIOError):
            while self._open:
                self._copy()
        self._write(self._rest)

    def _copy(self) -> None:
        block = os.read(self._pipe, 1 << 16)
        if not block:
            self._open = False
            self._selector.unregister(self._pipe)
            return
        *lines, self._rest = (self._rest + block).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._write(b"".join(line + b"\n" for line in lines))

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # a full disk must not end the server
            self._log.write(data.replace(self._key, b"***"))
            self._log.flush()


def _end(server: "subprocess.Popen[bytes]", output: _Output) -> None:
    """Ask the server to end, then kill it and every process that it left."""
    if server.poll() is None:
        _signal_group(server.pid, signal.SIGTERM)
        output.until(lambda: server.poll() is not None, seconds=STOP_SECONDS)
    _signal_group(server.pid, signal.SIGKILL)
    server.wait()
    while children := _children():
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)
    output.finish()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _children() -> list[int]:
    """Processes whose parent is this one; with orphans adopted, in the end every descendant. Empty where there is no
    /proc."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            state = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(state[1]) == os.getpid():
                children.append(int(entry.parent.name))
    return children


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
