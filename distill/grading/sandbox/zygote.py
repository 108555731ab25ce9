"""A warm interpreter that never runs a program itself: it forks a clean child for each.

Started by `distill.grading.sandbox.runner` with a socket. The zygote builds the walls (`walls.build`), imports what
programs usually import, says what it could do, and then does one thing: receive descriptors, fork. It never reads a
request, so its memory, of which every program has a copy, holds nothing of any task. Per program:

    zygote ──fork──▶ keeper ──fork──▶ program
                     process 1 of a pid namespace; a /tmp of its own; waits, kills, reports
                                      limits, user nobody, no capability, Landlock or mounts, seccomp; then the request

When the keeper ends, the kernel ends everything in its pid namespace. When the control socket is closed, also by the
death of its owner, the keeper ends.
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
PROGRAM = 2  # process id of a program in a pid namespace of its own
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

    names: list[str]  # of control, request, input, output, errors, channel, result; those that are there
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
    """Where a zygote runs. readable: for Landlock, where the root is the machine's. own: its pid namespace."""

    powers: Powers
    readable: list[str]
    own: int | None


def main(kind: str, descriptor: int) -> None:
    """Serve until the socket closes. kind: `namespaces`, `bubblewrap`, `landlock` or `process`."""
    server = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        place = _prepare(kind)
    except OSError as error:
        server.send(json.dumps({"error": str(error)}).encode())
        return
    server.send(json.dumps(place.powers).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are reaped by the kernel
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, 4096, 8)
        if not message:
            return
        if _fork_keeper(place) == 0:
            server.close()
            _keep(place, json.loads(message), descriptors)
        for each in descriptors:
            os.close(each)


def _prepare(kind: str) -> Place:
    """Build the walls, import, and find out what is possible inside. Errors: OSError."""
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
    own = kernel.own_pid_namespace() if kind in ("namespaces", "bubblewrap") else None
    if own is not None and not _succeeds(lambda: kernel.unshare(kernel.NEWPID | kernel.NEWNS)):
        own = None
    version = kernel.landlock_version() if kind != "process" else 0
    filtered = _succeeds(lambda: kernel.seccomp(kernel.seccomp_filter(os.getpid())))
    if filtered and own is not None:
        kernel.seccomp_filter(PROGRAM)  # made once, for all
    uid = walls.NOBODY if os.geteuid() == 0 and _succeeds(_become_nobody) else os.geteuid()
    return Place(
        {"walls": kind, "uid": uid, "namespaces": own is not None, "landlock": version, "seccomp": filtered},
        readable,
        own,
    )


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


def _fork_keeper(place: Place) -> int:
    if place.own is not None:
        kernel.setns(place.own, kernel.NEWPID)  # back from the last program's, which has ended or will
        kernel.unshare(kernel.NEWPID)
    return os.fork()


# ---- the keeper


def _keep(place: Place, header: Header, descriptors: list[int]) -> NoReturn:
    """Run one program, wait for it or for the order to kill it, report on the control socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    named = dict(zip(header["names"], descriptors, strict=True))
    control = socket.socket(fileno=named.pop("control"))
    scratch = None
    report: dict[str, object]
    try:
        if place.own is not None:
            kernel.unshare(kernel.NEWNS)
            kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, SCRATCH)
            directory = "/tmp"
        else:
            directory = scratch = tempfile.mkdtemp(prefix="distill-")
            if place.powers["uid"] != os.geteuid():
                os.chown(scratch, place.powers["uid"], -1)
        child = os.fork()
        if child == 0:
            control.close()
            _become_program(place, header, named, directory)
        for each in named.values():
            os.close(each)
        report = _wait(child, control, header["patience"])
    except OSError as error:
        report = {"failed": str(error)}
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    with suppress(OSError):
        control.send(json.dumps(report).encode())
    os._exit(0)


def _wait(child: int, control: socket.socket, patience: float) -> dict[str, object]:
    descriptor = os.pidfd_open(child) if hasattr(os, "pidfd_open") else None
    deadline = time.monotonic() + patience
    ended = None
    poll = select.poll()
    poll.register(control, select.POLLIN)
    if descriptor is not None:
        poll.register(descriptor, select.POLLIN)
    while True:
        left = max(0.0, deadline - time.monotonic())
        ready = poll.poll(1000 * (left if descriptor is not None else min(left, 0.005)))
        finished, status, usage = os.wait4(child, os.WNOHANG)
        if finished:
            break
        if any(number == control.fileno() for number, _ in ready):
            ended = "killed"
        elif deadline <= time.monotonic():
            ended = "patience"
        if ended:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # where there is no pid namespace: what it may have left behind
    seconds = usage.ru_utime + usage.ru_stime
    return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "ended": ended}


# ---- the program's process


def _become_program(place: Place, header: Header, named: dict[str, int], scratch: str) -> NoReturn:
    """Confine this process, then run what the request says. Never returns."""
    code = 1
    try:
        os.setsid()
        with os.fdopen(named.pop("request"), "rb") as file:
            request = json.load(file)
        _arrange(named)
        os.chdir(scratch)
        os.environ.clear()
        os.environ.update(HOME=scratch, TMPDIR=scratch, PATH="/usr/bin:/bin", LANG="C.UTF-8", TZ="UTC")
        tempfile.tempdir = scratch
        _limit(header, THREADS if place.own is not None else CROWD)
        # An interpreter in root's home is no secret, and Landlock shows nothing else: nobody may read it.
        kept = kernel.READ_ANYWHERE if place.powers["walls"] == "landlock" and os.geteuid() == 0 else 0
        if place.powers["uid"] != os.geteuid():
            if kept:
                kernel.keep_capabilities()
            _become_nobody()
        if sys.platform == "linux":
            kernel.drop_capabilities(kept)
            kernel.die_with_parent(signal.SIGKILL)
        if place.powers["landlock"] and place.own is None:  # else mounts of its own hold it
            kernel.landlock(place.readable or ["/"], [scratch])
        if place.powers["seccomp"]:
            kernel.seccomp(kernel.seccomp_filter(os.getpid()))
    except BaseException as error:
        os.write(2, f"sandbox: {type(error).__name__}: {error}\n".encode())
        os._exit(program.NOT_STARTED)
    try:
        code = program.run(request)
    finally:
        os._exit(code)


def _arrange(named: dict[str, int]) -> None:
    """Give the descriptors the numbers that `program` expects, and close all others."""
    high = {name: _moved(descriptor, 100) for name, descriptor in named.items()}
    for name, number in DESCRIPTORS.items():
        if name in high:
            os.dup2(high[name], number)
    last = max(DESCRIPTORS[name] for name in high)
    for number in range(3, last):
        if number not in [DESCRIPTORS[name] for name in high]:
            with suppress(OSError):
                os.close(number)
    os.closerange(last + 1, 1024)


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
