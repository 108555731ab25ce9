"""Worker processes that can be killed, because the mathematics of an answer can run for ever.

`9^{9^{9^{9}}}` keeps sympy busy past the end of the universe, inside one C call that no signal handler interrupts. So:
a time-out kills the process and a new one is started; a worker that dies by itself (a crash, the memory limit) costs
its one item and nothing else. Both are results of the item, not failures of the pool.

The time-out is one of processor time, which the worker asks the kernel to hold it to (RLIMIT_CPU): a busy machine does
not change a verdict, and should this process be killed itself, no endless comparison outlives it. A worker that uses no
processor time either is killed (SIGKILL) when PATIENCE times as much time has passed on the clock.

Rejected: `multiprocessing.Pool` (a killed worker loses its task without a word), SIGALRM (main thread only, and not
inside C calls), fork (deadlocks beside torch's threads), spawn and forkserver (they import the caller's main module
again, so a script without a `__main__` guard starts itself). What is left is plain: `subprocess`, one JSON line there,
one back.

POSIX only, as are the memory and CPU limits a worker sets on itself.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import WorkError

K = TypeVar("K")

PATIENCE = 20  # seconds on the clock that a worker may take for a second of processor time
MEMORY = 2 << 30  # bytes of address space of a worker; idle, it takes 0.06 GiB
DYING_SECONDS = 2.0  # between the end of a process's output and its own end
START_SECONDS = 300.0  # who is not ready by then never will be; a first start may read a cold disk


@dataclass(frozen=True)
class Lost:
    """The result of an item that cost its worker: `reason` is "timeout" or "worker died"."""

    reason: str
    exit_code: int


class Worker:
    """One process with at most one item. `deadline` is on the monotonic clock and None while it is idle."""

    def __init__(self, timeout: float, memory: int) -> None:
        self.timeout = timeout
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  its stderr, as long as it lives: read if it cannot start
        package_parent = str(Path(__file__).resolve().parents[2])  # so that it finds `distill` in a bare clone too
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "distill.grading.worker", str(memory), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])},
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.deadline: float | None = time.monotonic() + START_SECONDS
        self.key: Any = None
        self.received = b""

    def send(self, key: Any, item: Any) -> None:
        assert self.ready and self.deadline is None, "one item at a time, and only after it said it is ready"
        self.key, self.deadline = key, time.monotonic() + PATIENCE * self.timeout
        with suppress(BrokenPipeError):  # it died while idle: the end of its output says so to whoever reads
            self.stdin.write(json.dumps(item).encode() + b"\n")
            self.stdin.flush()

    def read(self) -> tuple[bool, Any]:
        """(whether the process lives, its answer if that is complete)."""
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        self.received += chunk
        if not self.received.endswith(b"\n"):
            return bool(chunk), None
        answer, self.received, self.deadline = json.loads(self.received), b"", None
        return True, answer

    def end(self, dying: bool = False) -> int:
        """End the process, which holds nothing worth saving; gives its exit code, the true one of a dying process."""
        if dying:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(DYING_SECONDS)
        self.process.kill()
        code = self.process.wait()
        self.stdout.close()
        with suppress(BrokenPipeError):  # closing flushes an item that it never read
            self.stdin.close()
        return code

    def last_words(self) -> str:
        self.errors.seek(0)
        return (self.errors.read().decode(errors="replace").strip() or "it said nothing").splitlines()[-1]


class WorkerPool:
    """Up to `workers` processes, started when there is work for them; a context manager that leaves none behind.

    timeout: seconds of processor time for one item, rounded up. memory: bytes of address space of a worker.
    """

    def __init__(self, workers: int, timeout: float, memory: int = MEMORY) -> None:
        assert workers >= 1 and timeout > 0
        self.size, self.timeout, self.memory = workers, timeout, memory
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in list(self.workers):
            self._remove(worker)
        self.selector.close()

    def map(self, items: Iterable[tuple[K, Any]]) -> Iterator[tuple[K, Any]]:
        """Yield (key, answer or `Lost`) in order of completion; `items` is read a few ahead, not more.

        Raises WorkError when a worker does not start.
        """
        source = iter(items)
        queue = deque(islice(source, self.size))
        try:
            while queue or any(worker.key is not None for worker in self.workers):
                for worker in self.workers:
                    if queue and worker.deadline is None:
                        worker.send(*queue.popleft())
                        queue.extend(islice(source, 1))
                busy = sum(worker.key is not None for worker in self.workers)
                while len(self.workers) < min(self.size, busy + len(queue)):
                    self._start()
                yield from self._results()
        finally:  # whoever stops listening in the middle does not get the rest the next time
            for worker in [worker for worker in self.workers if worker.key is not None]:
                self._remove(worker)

    def _results(self) -> Iterator[tuple[Any, Any]]:
        """Wait for the next answer or deadline. An answer that is there counts, even if it is read late."""
        deadline = min(worker.deadline for worker in self.workers if worker.deadline is not None)
        for event, _ in self.selector.select(max(0.0, deadline - time.monotonic())):
            worker: Worker = event.data
            alive, answer = worker.read()
            if not alive:
                yield from self._lost(worker, dying=True)
            elif answer is not None and not worker.ready:
                worker.ready = True
            elif answer is not None:
                key, worker.key = worker.key, None
                yield key, answer
        now = time.monotonic()
        for worker in [w for w in self.workers if w.deadline is not None and w.deadline <= now]:
            yield from self._lost(worker, dying=False)

    def _lost(self, worker: Worker, dying: bool) -> Iterator[tuple[Any, Lost]]:
        if not worker.ready:
            raise WorkError(f"a grading process did not start ({sys.executable}): {worker.last_words()}")
        code = self._remove(worker, dying)
        if worker.key is not None:
            timeout = code == -signal.SIGXCPU or not dying
            yield worker.key, Lost("timeout" if timeout else "worker died", code)

    def _start(self) -> None:
        worker = Worker(self.timeout, self.memory)
        self.workers.append(worker)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker: Worker, dying: bool = False) -> int:
        self.workers.remove(worker)
        self.selector.unregister(worker.stdout)
        code = worker.end(dying)
        worker.errors.close()
        return code
