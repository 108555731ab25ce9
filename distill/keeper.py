"""A watchdog process for a server: the server and its workers never outlive the command that started them.

    distill ──standard input── keeper ──pipe── server ── workers

`python -m distill.keeper` reads one line of JSON (`ServerProcess`), starts the command, appends its output to a log,
and kills the whole process tree when its own input ends. The kernel closes that input however the parent dies,
`kill -9` included, which no handler in the parent can achieve. The server has a session of its own, so Ctrl-C in the
terminal reaches only the parent. On Linux the keeper adopts orphans (`PR_SET_CHILD_SUBREAPER`), so workers in process
groups of their own are killed too, and the server dies with the keeper if the keeper itself is killed
(`PR_SET_PDEATHSIG`).

The API key arrives through standard input. The server reads it from its environment or, if it has no variable for the
key, from a file that only this user can read and that is removed at the end. The key is never an argument, because
every user of the machine can list those, and it is masked in the log.

Rejected: passing the log file to the server directly (servers print their settings, the key among them), and
PR_SET_PDEATHSIG alone (it reaches one process, not its workers).

Standard library only: it starts in a tenth of a second and needs little memory beside the server.
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

POLL = 0.1  # seconds between two checks of whether the server has ended
CANNOT_RUN = 126  # exit code, as that of a shell
SUBREAPER, PDEATHSIG = 36, 1  # options of Linux's prctl


class ServerProcess(TypedDict):
    """The server to run.

    log: file that its output is appended to. key_variable: environment variable that the server reads its key from;
    None for a key in a configuration file, passed as `--config`. python_path: PYTHONPATH of the user, which another
    Python may need. grace: seconds between SIGTERM and SIGKILL.
    """

    command: list[str]
    log: str
    key: str
    key_variable: str | None
    python_path: str | None
    grace: float


def main() -> int:
    """Run the server described by the first line of standard input; returns its exit code, 128 + n for signal n."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent died first
    settings: ServerProcess = json.loads(line)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    _prctl(SUBREAPER, 1)
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if settings["python_path"]:
        environment["PYTHONPATH"] = settings["python_path"]
    with _with_key(settings, environment) as command, Path(settings["log"]).open("ab") as log:
        try:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: _prctl(PDEATHSIG, signal.SIGKILL),
            )
        except OSError as error:  # as a shell reports it: not a program, or an interpreter that is missing
            log.write(f"{command[0]}: {error.strerror}\n".encode())
            return CANNOT_RUN
        output = _Output(server, log, settings["key"].encode())
        output.copy_until(lambda: bool(received) or server.poll() is not None, stop_with_input=True)
        _stop(server, output, settings["grace"])
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


@contextmanager
def _with_key(settings: ServerProcess, environment: dict[str, str]) -> Iterator[Sequence[str]]:
    """Yield the command of a server that finds its key in `environment` or in a private file."""
    if settings["key_variable"] is not None:
        environment[settings["key_variable"]] = settings["key"]
        yield settings["command"]
        return
    with tempfile.TemporaryDirectory(prefix="distill-server-") as directory:  # mode 700
        file = Path(directory) / "server.yaml"
        file.write_text(f'api-key: "{settings["key"]}"\n', encoding="utf-8")  # quoted: digits would be a number
        yield [*settings["command"], "--config", str(file)]


class _Output:
    """The server's output, copied to the log line by line with the key masked."""

    def __init__(self, server: "subprocess.Popen[bytes]", log: BinaryIO, key: bytes) -> None:
        assert server.stdout is not None
        self._pipe, self._log, self._key = server.stdout.fileno(), log, key
        self._incomplete = b""  # the line that has no end yet
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def copy_until(
        self, condition: Callable[[], bool], seconds: float | None = None, stop_with_input: bool = False
    ) -> None:
        """Copy until the condition holds, `seconds` have passed, or, with `stop_with_input`, standard input ends."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not condition() and (deadline is None or time.monotonic() < deadline):
            ready = {key.fd for key, _ in self._selector.select(POLL)}
            if self._pipe in ready:
                self._copy()
            if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 1 << 12):
                self._selector.unregister(sys.stdin.fileno())
                if stop_with_input:
                    return

    def finish(self) -> None:
        """Copy the remaining output, after every process that could write more has ended."""
        os.set_blocking(self._pipe, False)
        with suppress(BlockingIOError):
            while self._open:
                self._copy()
        self._write(self._incomplete)

    def _copy(self) -> None:
        block = os.read(self._pipe, 1 << 16)
        if not block:
            self._open = False
            self._selector.unregister(self._pipe)
            return
        text = (self._incomplete + block).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._incomplete = text.split(b"\n")
        self._write(b"".join(line + b"\n" for line in lines))

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # a full disk must not stop the server
            self._log.write(data.replace(self._key, b"***"))
            self._log.flush()


def _stop(server: "subprocess.Popen[bytes]", output: _Output, grace: float) -> None:
    """Ask the server to end, then kill it and every process that it started."""
    if server.poll() is None:
        _signal_group(server.pid, signal.SIGTERM)
        output.copy_until(lambda: server.poll() is not None, seconds=grace)
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
    """The processes whose parent is this one: as orphans are adopted, finally every descendant. Empty without /proc."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                children.append(int(entry.parent.name))
    return children


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
