"""The judging side of the sandbox: start a zygote, have it run programs, say how each ended.

A program's input and request go in and its output comes out through memory files, whose size the program's limits
bound, so nothing has to be pumped and nobody can block. What a program is expected to print or return stays in this
process, which no program can see.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill.errors import WorkError
from distill.grading.sandbox import walls
from distill.grading.sandbox.peer import Ended, Peer, Remote
from distill.grading.sandbox.program import Outcome, Test
from distill.grading.sandbox.zygote import Header, Powers

KEEPERS = 2  # an answer and its tests run at the same time
MEMORY = 2 << 30  # bytes of address space of a program
PATIENCE = 10  # seconds on the clock for a second of processor time
START_SECONDS = 60.0
REPORT_SECONDS = 60.0  # past its patience, in which a keeper reports; a busy machine may be slow
EXCEPTION = re.compile(r"([A-Za-z_][\w.]*)(:|$)")
FULL = re.compile(r"\[Errno (27|28)\]")  # a file too large, no space left: the scratch directory is bounded
OWN = Path(__file__).resolve().parent


class NotAvailable(Exception):
    """The machine does not allow these walls; the text says what failed."""


@dataclass(frozen=True)
class Finished:
    """How a program ended. reason: empty for exit code 0, else short and countable ("time limit", "error: KeyError").
    seconds: of processor time. errors: the end of its standard error."""

    reason: str
    output: bytes
    errors: str
    seconds: float


@dataclass
class _Running:
    """A program that was started: the socket of its keeper, and the files that it writes."""

    keeper: socket.socket
    header: Header
    files: dict[str, int]
    ended: bool = False

    def wait(self) -> Finished:
        """Wait for its end; kills nothing. Errors: WorkError when its keeper has died, or could not confine it."""
        report = self._report()
        if "failed" in report:
            self.close()
            raise WorkError(f"the sandbox could not run a program: {report['failed']}")
        output, errors = self._read("output"), self._read("errors")[-(1 << 16) :].decode(errors="replace")
        reason = self._reason(report, errors)
        self.close()
        return Finished(reason, output, errors, float(str(report["seconds"])))

    def close(self) -> None:
        """Kill it if it still runs, and forget its files."""
        if not self.ended:
            with suppress(OSError):  # the keeper has died; the next program says so
                self.keeper.send(b"end")
                self._report()
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()

    def _report(self) -> dict[str, object]:
        """The keeper's report, of which there is one for each program."""
        self.ended = True
        self.keeper.settimeout(self.header["patience"] + REPORT_SECONDS)
        try:
            message = self.keeper.recv(4096)
        except (TimeoutError, ConnectionError):
            message = b""
        if not message:
            self.keeper.close()  # out of step, or gone
            return {"failed": "its keeper has ended"}
        report: dict[str, object] = json.loads(message)
        return report

    def _read(self, name: str) -> bytes:
        if name not in self.files:
            return b""
        size = os.fstat(self.files[name]).st_size
        return os.pread(self.files[name], min(size, walls.SCRATCH), 0)

    def _reason(self, report: dict[str, object], errors: str) -> str:
        status, seconds = int(str(report["status"])), float(str(report["seconds"]))
        if report["ended"] == "patience" or (status in _KILLS and seconds > self.header["seconds"] / 2):
            return "time limit"
        if any(os.fstat(descriptor).st_size >= walls.SCRATCH for descriptor in self.files.values()):
            return "output limit"
        if status == 0:
            return ""
        if status < 0:
            return f"crash: {signal.Signals(-status).name}"
        last = errors.strip().rpartition("\n")[2]
        raised = status == 1 and 'File "main.py"' in errors  # and not the text of a `sys.exit`
        name = match[1] if raised and (match := EXCEPTION.match(last)) else ""
        if name == "MemoryError":
            return "memory limit"
        if name == "OSError" and FULL.search(last):
            return "file limit"
        return f"error: {name}" if name else f"exit code {status}"


_KILLS = (-signal.SIGKILL, -signal.SIGXCPU)


class Zygote:
    """One warm interpreter behind walls of a kind; a context manager. powers: what it can do."""

    def __init__(self, kind: str) -> None:
        """kind: `namespaces`, `bubblewrap`, `landlock` or `process`. Errors: NotAvailable."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(KEEPERS)]
        self.keepers = [ours for ours, _ in pairs]
        passed = [theirs.fileno() for _, theirs in pairs]
        self.process = subprocess.Popen(
            _command(kind, passed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            pass_fds=passed,
            # not the caller's environment, which may hold keys
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for _, theirs in pairs:
            theirs.close()
        self.keepers[0].settimeout(START_SECONDS)
        with suppress(TimeoutError, ConnectionError):
            message = json.loads(self.keepers[0].recv(4096) or b"{}")
            if "walls" in message:
                self.powers: Powers = message
                return
            if "error" in message:
                self.close()
                raise NotAvailable(message["error"])
        said = self.close().strip()
        raise NotAvailable(said.rpartition("\n")[2] or "it did not start")

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> str:
        """End it, and with it every program that still runs; returns what it wrote to standard error."""
        for keeper in self.keepers:
            keeper.close()
        self.process.kill()
        _, errors = self.process.communicate()
        return str(errors, errors="replace")

    def start(
        self,
        request: Mapping[str, object],
        seconds: float,
        stdin: bytes = b"",
        passed: dict[str, int] | None = None,
        memory: int = MEMORY,
        keeper: int = 0,
    ) -> _Running:
        """Start a program. passed: further descriptors by name, which stay the caller's to close. keeper: the number of
        the keeper, which must have no other program.

        Errors: WorkError when the zygote has died.
        """
        files = {name: os.memfd_create(name) for name in ("request", "input", "output", "errors")}
        for name, data in (("request", json.dumps(request).encode()), ("input", stdin)):
            with os.fdopen(files[name], "wb", closefd=False) as file:
                file.write(data)
            os.lseek(files[name], 0, os.SEEK_SET)
        named = {**files, **(passed or {})}
        header = Header(names=list(named), seconds=seconds, patience=PATIENCE * seconds, memory=memory)
        try:
            socket.send_fds(self.keepers[keeper], [json.dumps(header).encode()], list(named.values()))
        except OSError as error:
            for descriptor in files.values():
                os.close(descriptor)
            raise WorkError(f"the sandbox has ended: {error}") from error
        for name in ("request", "input"):
            os.close(files.pop(name))
        return _Running(self.keepers[keeper], header, files)


class Sandbox:
    """Runs programs one after the other. zygote: where."""

    def __init__(self, zygote: Zygote, memory: int = MEMORY) -> None:
        self.zygote, self.memory = zygote, memory

    def script(self, code: str, stdin: bytes, seconds: float, given: str = "") -> Finished:
        """Run a program from its standard input to its standard output. seconds: of processor time. given: imports that
        are executed before it."""
        request = {"role": "script", "code": code, "given": given}
        return self.zygote.start(request, seconds, stdin, memory=self.memory).wait()

    def tests(self, code: str, setup: str, tests: Sequence[Test], entry: str | None, seconds: float) -> Outcome:
        """Run tests against an answer. setup: code before the tests, whose imports and classes the answer has too.
        entry: the name of the function that `check` is called with. seconds: of processor time for each test; they
        share it, as they share two processes and their names."""
        seconds *= max(1, len(tests))
        ours, theirs = socket.socketpair()
        result = os.memfd_create("result")
        request = {"role": "tests", "setup": setup, "tests": list(tests), "entry": entry}
        try:
            answer = self._answer(code, setup, theirs, seconds)
            tester = self.zygote.start(
                request, seconds, passed={"channel": ours.fileno(), "result": result}, memory=self.memory, keeper=1
            )
            ours.close()
            theirs.close()
            tested = tester.wait()
            outcome = _outcome(os.pread(result, 1 << 16, 0), tested)
            if outcome["passed"] or outcome["reason"] == "ended early":
                ended = answer.wait()  # an answer whose threads never end has not passed
                if outcome["reason"] or ended.reason == "time limit":
                    reason = ended.reason or "ended early"
                    detail = ended.errors.strip()[-2000:]
                    return Outcome(passed=False, reason=reason, detail=detail, number=outcome["number"])
            answer.close()
            return outcome
        finally:
            ours.close()
            theirs.close()
            os.close(result)

    def call(
        self, code: str, setup: str, name: str, arguments: Sequence[object], seconds: float, given: str = ""
    ) -> "Returned":
        """Call a function of an answer, or a method of its class `Solution`, and bring back what it returned. given:
        imports before the answer; a function of that name among them is not the answer's."""
        ours, theirs = socket.socketpair()
        answer = self._answer(code, setup, theirs, seconds, f"{given}\nglobals().pop({name!r}, None)\n")
        theirs.close()
        ours.settimeout(PATIENCE * seconds + REPORT_SECONDS)
        peer = Peer(ours, frozenset())
        try:
            return Returned("", _called(peer, name, arguments))
        except Ended:
            ours.close()  # else an answer that is still sending waits until its patience ends
            ended = answer.wait()
            reason = peer.ended if peer.ended == "output limit" else ended.reason or "ended early"
            return Returned(reason, None, ended.errors.strip()[-2000:])
        except MemoryError:
            return Returned("memory limit", None)
        except Exception as error:  # what the answer raised
            return Returned(f"error: {type(error).__name__}", None, str(error)[:2000])
        finally:
            ours.close()
            answer.close()

    def _answer(self, code: str, setup: str, channel: socket.socket, seconds: float, given: str = "") -> _Running:
        request = {"role": "answer", "code": code, "setup": _shared(setup), "given": given}
        return self.zygote.start(request, seconds, passed={"channel": channel.fileno()}, memory=self.memory)


@dataclass(frozen=True)
class Returned:
    """What a function returned: plain data, or a `Remote` for an object of the answer's own. reason: why it did not."""

    reason: str
    value: object
    detail: str = ""


def _called(peer: Peer, name: str, arguments: Sequence[object]) -> object:
    names = Remote(peer, 0, "names")
    match names[name]:
        case ["value", value]:
            return peer.ask("call", value, *arguments)
    match names["Solution"]:
        case ["value", value]:
            return peer.ask("call", peer.ask("get", peer.ask("call", value), name), *arguments)
    raise NameError(f"name {name!r} is not defined")


def _outcome(data: bytes, tested: Finished) -> Outcome:
    """What the tests wrote; where they wrote nothing, how their process ended."""
    if data:
        outcome: Outcome = json.loads(data)
        return outcome
    return Outcome(passed=False, reason=tested.reason or "no result", detail=tested.errors.strip()[-2000:], number=0)


def _shared(setup: str) -> str:
    """The part of a setup that an answer has as well: imports and classes."""
    import ast

    tree = ast.parse(setup)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef)]
    return ast.unparse(tree)


def _command(kind: str, descriptors: list[int]) -> list[str]:
    """The command of a zygote: an isolated interpreter without site packages, and this package alone of `distill`."""
    inside = kind == "bubblewrap"
    parents = [Path(walls.INSIDE, *OWN.parts[-3:-1]), Path(walls.INSIDE, OWN.parts[-3])] if inside else OWN.parents
    code = (
        "import sys, types\n"
        f"for name, path in (('distill', {str(parents[1])!r}), ('distill.grading', {str(parents[0])!r})):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        f"sys.path += {[str(Path(path).parent) for path in walls.packages()] if not inside else []!r}\n"
        "from distill.grading.sandbox.zygote import main\n"
        f"main({kind!r}, {descriptors})\n"
    )
    python = ["-I", "-S", "-X", "utf8", "-B", "-c", code]
    if inside:
        bubblewrap = walls.bubblewrap()
        if bubblewrap is None:
            raise NotAvailable("bubblewrap (bwrap) is not installed")
        return [bubblewrap, *walls.command(OWN), *python]
    return [sys.executable, *python]
