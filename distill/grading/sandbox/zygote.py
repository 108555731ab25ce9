"""A warm interpreter that never runs a program itself: it forks a clean child for each.

Started by `distill.grading.sandbox.runner` with a socket for each keeper. It builds the walls (`walls.build`), imports
what programs usually import, reports what it can do, and forks its keepers. A keeper runs one program at a time:

    zygote ──fork──▶ keeper, for good ──fork──▶ program
                     process 1 of a pid           a /tmp of its own; limits, user nobody, no capability,
                     namespace                    Landlock or mounts, seccomp; then the request

A keeper receives descriptors, forks, waits, kills what is left in its pid namespace, and reports. It never reads a
request, so its memory, of which every program has a copy, holds nothing of any task, and it runs no line of any
program. A message while a program runs ends that program; a closed socket, also by the death of its owner, ends the
keeper as well.

Rejected: a keeper for each program, as process 1 of a namespace of its own. It costs a second fork with its page faults
and a namespace to tear down, a third of the time of a short program. A program that is process 1 itself would do
without keepers, but the kernel discards the signals that such a process sends to itself, so it would survive its own
`SIGKILL`.
"""

import fcntl
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, NoReturn, TypedDict

from distill.grading.sandbox import kernel, program, walls
from distill.grading.sandbox.program import DESCRIPTORS

FILES, THREADS = 64, 64
CROWD = 4096  # threads where the kernel counts all of the user's, for want of a user namespace
WARM = (  # modules, in lines
    "abc argparse array ast asyncio base64 binascii bisect calendar cmath collections contextlib copy csv dataclasses",
    "datetime decimal difflib enum fractions functools hashlib heapq inspect io itertools json keyword linecache math",
    "operator pprint queue random re secrets statistics string struct sys textwrap threading time traceback types",
    "typing unittest unittest.mock urllib.parse uuid warnings zlib numpy",
)
SCRATCH = f"size={walls.SCRATCH},nr_inodes=4096,mode=1777"  # of the /tmp of a program


class Header(TypedDict):
    """What comes with the descriptors: their names, and the limits."""

    names: list[str]  # of request, input, output, errors, channel, result; those that are there
    seconds: float  # of processor time
    patience: float  # seconds on the clock
    memory: int  # bytes of address space


class Powers(TypedDict):
    """What a zygote can do, as it says when it is ready. uid: of programs. namespaces: whether each program has its own
    process ids and mounts."""

    walls: str
    uid: int
    namespaces: bool
    landlock: int
    seccomp: bool


class Place(NamedTuple):
    """Where programs run. readable: for Landlock, where the root is the machine's. faults: a pipe by which a program's
    process says why it could not be confined; it is closed before the program's first line."""

    powers: Powers
    readable: list[str]
    faults: tuple[int, int]


def main(kind: str, descriptors: list[int]) -> None:
    """Fork a keeper for each socket and wait until they end. kind: of walls, see `levels`."""
    servers = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        powers, readable = _prepare(kind)
    except OSError as error:
        servers[0].send(json.dumps({"error": str(error)}).encode())
        return
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", LANG="C.UTF-8", TZ="UTC")
    _live_in("/tmp")
    home = kernel.own_pid_namespace() if powers["namespaces"] else None
    gc.collect()
    gc.freeze()
    for server in servers:
        if home is not None:
            kernel.setns(home, kernel.NEWPID)  # back from the last keeper's
            kernel.unshare(kernel.NEWPID)
        if os.fork() == 0:
            for other in servers:
                if other is not server:
                    other.close()
            _keep(Place(powers, readable, _fault_pipe()), server)
    servers[0].send(json.dumps(powers).encode())
    for server in servers:
        server.close()
    os.wait()


def _fault_pipe() -> tuple[int, int]:
    pipe = os.pipe()
    os.set_blocking(pipe[0], False)
    return pipe


def _prepare(kind: str) -> tuple[Powers, list[str]]:
    """Build the walls, import, and find out what is possible inside: the powers, and what Landlock lets be read.

    Errors: OSError.
    """
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):  # the starting process may have set its own
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    readable: list[str] = []
    if kind == "namespaces":
        walls.build()
    if kind in ("namespaces", "bubblewrap"):
        sys.path.append(walls.INSIDE)
    else:
        readable = walls.readable_paths([*walls.visible(), *walls.packages()])
        sys.path += [os.path.dirname(path) for path in walls.packages()]
    for name in " ".join(WARM).split():
        with suppress(ImportError):  # numpy may be missing, or be a build for another machine
            __import__(name)
    if readable:
        sys.path[:] = [path for path in sys.path if path.startswith(tuple(readable))]
    apart = kind in ("namespaces", "bubblewrap") and _succeeds(lambda: kernel.unshare(kernel.NEWPID | kernel.NEWNS))
    version = kernel.landlock_version() if kind != "process" else 0
    filtered = _succeeds(lambda: kernel.seccomp(kernel.seccomp_filter(os.getpid())))
    if filtered:
        kernel.seccomp_filter(0)  # makes the template, for all
    uid = walls.NOBODY if os.geteuid() == 0 and _succeeds(_become_nobody) else os.geteuid()
    return {"walls": kind, "uid": uid, "namespaces": apart, "landlock": version, "seccomp": filtered}, readable


def _succeeds(action: Callable[[], object]) -> bool:
    """Whether a child can do it."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    with suppress(OSError):
        action()
        os._exit(0)
    os._exit(1)


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(walls.NOBODY, walls.NOBODY, walls.NOBODY)
    os.setresuid(walls.NOBODY, walls.NOBODY, walls.NOBODY)


# ---- the keeper


def _keep(place: Place, server: socket.socket) -> NoReturn:
    """Run programs one after the other until the socket closes."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, 4096, 8)
        if not message:
            os._exit(0)
        if not descriptors:
            continue  # an order to end a program, which had ended in the meantime
        report = _run(place, server, json.loads(message), descriptors)
        try:
            server.send(json.dumps(report).encode())
        except OSError:  # the judging side is gone
            os._exit(0)


def _run(place: Place, server: socket.socket, header: Header, descriptors: list[int]) -> dict[str, object]:
    """Run one program, wait for it or for the order to kill it; returns the report."""
    named = dict(zip(header["names"], descriptors, strict=True))
    scratch = None
    try:
        if not place.powers["namespaces"]:
            scratch = tempfile.mkdtemp(prefix="distill-", dir="/tmp")
            if place.powers["uid"] != os.geteuid():
                os.chown(scratch, place.powers["uid"], -1)
        child = os.fork()
        if child == 0:
            server.close()
            os.close(place.faults[0])
            _become_program(place, header, named, scratch or "/tmp")
        report = _wait(child, server, header["patience"])
        if place.powers["namespaces"]:
            _end_all()
        with suppress(BlockingIOError):
            report["failed"] = os.read(place.faults[0], 1000).decode()
        return report
    except OSError as error:
        return {"failed": str(error)}
    finally:
        for each in descriptors:
            os.close(each)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _end_all() -> None:
    """End every process of this pid namespace but its first, which is the caller."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _wait(child: int, server: socket.socket, patience: float) -> dict[str, object]:
    descriptor = os.pidfd_open(child) if hasattr(os, "pidfd_open") else None
    deadline = time.monotonic() + patience
    ended = None
    poll = select.poll()
    poll.register(server, select.POLLIN)
    if descriptor is not None:
        poll.register(descriptor, select.POLLIN)
    while True:
        left = max(0.0, deadline - time.monotonic())
        ready = poll.poll(1000 * (left if descriptor is not None else min(left, 0.005)))
        finished, status, usage = os.wait4(child, os.WNOHANG)
        if finished:
            break
        if any(number == server.fileno() for number, _ in ready):
            ended = "killed"
        elif deadline <= time.monotonic():
            ended = "patience"
        if ended:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
    if descriptor is not None:
        os.close(descriptor)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # where there is no pid namespace: what it may have left behind
    seconds = usage.ru_utime + usage.ru_stime
    return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "ended": ended}


# ---- the program's process


def _become_program(place: Place, header: Header, named: dict[str, int], scratch: str) -> NoReturn:
    """Confine this process, then run what the request says. Never returns."""
    code, faults = 1, _moved(place.faults[1], 200)
    try:
        os.setsid()
        if place.powers["namespaces"]:
            kernel.unshare(kernel.NEWNS)
            kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, SCRATCH)
        with os.fdopen(named.pop("request"), "rb") as file:
            request = json.load(file)
        _arrange(named, faults)
        os.chdir(scratch)
        if scratch != tempfile.tempdir:
            _live_in(scratch)
        _limit(header, THREADS if place.powers["namespaces"] else CROWD)
        # An interpreter in root's home is no secret, and Landlock shows nothing else: nobody may read it.
        kept = kernel.READ_ANYWHERE if place.powers["walls"] == "landlock" and os.geteuid() == 0 else 0
        if place.powers["uid"] != os.geteuid():
            if kept:
                kernel.keep_capabilities()
            _become_nobody()
        if sys.platform == "linux":
            kernel.drop_capabilities(kept)
            kernel.die_with_parent(signal.SIGKILL)
        if place.powers["landlock"] and not place.powers["namespaces"]:  # else mounts of its own hold it
            kernel.landlock(place.readable or ["/"], [scratch])
        if place.powers["seccomp"]:
            kernel.seccomp(kernel.seccomp_filter(os.getpid()))
        os.close(faults)
    except BaseException as error:
        os.write(faults, f"{type(error).__name__}: {error}".encode()[:1000])
        os._exit(1)
    try:
        code = program.run(request)
    finally:
        os._exit(code)


def _live_in(scratch: str) -> None:
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    tempfile.tempdir = scratch


def _arrange(named: dict[str, int], kept: int) -> None:
    """Give the descriptors the numbers that `program` expects, and close all others but one, above these."""
    high = {name: _moved(descriptor, 100) for name, descriptor in named.items()}
    for name, number in DESCRIPTORS.items():
        if name in high:
            os.dup2(high[name], number)
    last = max(DESCRIPTORS[name] for name in high)
    for number in range(3, last):
        if number not in [DESCRIPTORS[name] for name in high]:
            with suppress(OSError):
                os.close(number)
    os.closerange(last + 1, kept)
    os.closerange(kept + 1, 1024)


def _moved(descriptor: int, least: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, least)


def _limit(header: Header, threads: int) -> None:
    seconds = max(1, -(-header["seconds"] // 1))
    limits = [
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_AS, header["memory"]),
        (resource.RLIMIT_FSIZE, walls.SCRATCH),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_CORE, 0),
    ]
    for limit, value in limits:
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))  # soft and hard alike: reaching it kills, and no handler prolongs it
