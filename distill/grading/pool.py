"""Worker processes that can be killed, because the comparison of an answer may never end.

`9^{9^{9^{9}}}` keeps sympy busy indefinitely, inside one C call that no signal handler interrupts. So a timeout kills
the worker process, and a new one is started. A worker that dies (crash, memory limit) loses only its current item. Both
are results of the item, not failures of the pool. A worker that is killed from outside (SIGKILL, by an operator or by
the kernel when memory is short) says nothing about its item, which is sent to another worker.

The timeout is in processor time and enforced by the kernel (RLIMIT_CPU, set by the worker itself). So the load of the
machine does not change a verdict, and no endless comparison outlives this process if it is killed. A worker that uses
no processor time is killed (SIGKILL) after PATIENCE times the timeout on the clock.

Rejected: `multiprocessing` (see `distill.children`) and SIGALRM (main thread only, and not inside C calls).
"""

import selectors
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

from distill.children import Child
from distill.errors import WorkError
from distill.grading.graders import GRADERS

if TYPE_CHECKING:
    from distill.grading.sandbox.levels import Level

K = TypeVar("K", bound=Hashable)
Question = dict[str, str | bool]  # its keys are described in `distill.grading.worker`

PATIENCE = 20  # seconds on the clock per second of processor time, before a worker is killed
MEMORY = 2 << 30  # bytes of address space of a worker; an idle worker uses 0.06 GiB
ATTEMPTS = 3  # at an item whose worker is killed from outside
START_SECONDS = 300.0  # until a worker is ready; the first start may read from a cold disk


@dataclass(frozen=True)
class Lost:
    """The result of an item whose worker was killed or died. reason: "timeout" or "worker died"."""

    reason: str
    exit_code: int


class Worker(Generic[K]):
    """A process with at most one item. deadline: on the monotonic clock; None while the worker is idle."""

    def __init__(self, timeout: float, memory: int, level: "Level") -> None:
        self.timeout = timeout
        # a fixed hash seed: some generators of problems iterate over sets (`distill.prompts.gym`)
        self.child = Child("distill.grading.worker", [str(memory), str(timeout), level], {"PYTHONHASHSEED": "0"})
        self.ready = False
        self.deadline: float | None = time.monotonic() + START_SECONDS
        self.key: K | None = None
        self.item: Question = {}  # the question of `key`

    def send(self, key: K, item: Question) -> None:
        """Send an item to the worker. key: returned with its answer."""
        assert self.ready and self.deadline is None, "the worker is starting or busy"
        limits = GRADERS[str(item["task"])].limits(str(item["gold"])) * (2 if item.get("other") else 1)
        self.key, self.item, self.deadline = key, item, time.monotonic() + PATIENCE * self.timeout * limits
        self.child.send(item)

    def read(self) -> list[object] | None:
        """Return the answer in a list, an empty list while the answer is incomplete, None when the worker has died."""
        answers = self.child.receive()
        if answers:
            self.deadline = None
        return answers


class WorkerPool(Generic[K]):
    """Up to `workers` processes, started on demand. A context manager, which ends all of them on exit.

    timeout: seconds of processor time for one item, rounded up. memory: bytes of address space of a worker. level:
    minimum isolation for the programs of answers.
    """

    def __init__(self, workers: int, timeout: float, memory: int = MEMORY, level: "Level" = "full") -> None:
        assert workers >= 1 and timeout > 0
        self.size, self.timeout, self.memory, self.level = workers, timeout, memory, level
        self.workers: list[Worker[K]] = []
        self.queue: deque[tuple[K, Question]] = deque()
        self.killed: Counter[K] = Counter()  # item → number of its workers that were killed from outside
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> "WorkerPool[K]":
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in list(self.workers):
            self._remove(worker)
        self.selector.close()

    def map(self, items: Iterable[tuple[K, Question]]) -> Iterator[tuple[K, object]]:
        """Yield (key, answer or `Lost`) in order of completion. At most `workers` items are read ahead.

        Errors: WorkError when a worker does not start, or its machine cannot grade a task.
        """
        source = iter(items)
        queue = self.queue = deque(islice(source, self.size))
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
        finally:  # if the consumer stops early, its remaining answers must not appear in the next call
            self.killed.clear()
            for worker in [worker for worker in self.workers if worker.key is not None]:
                self._remove(worker)

    def _results(self) -> Iterator[tuple[K, object]]:
        """Wait for the next answer or deadline. An answer that has arrived counts, even when it is read late."""
        deadline = min(worker.deadline for worker in self.workers if worker.deadline is not None)
        for event, _ in self.selector.select(max(0.0, deadline - time.monotonic())):
            worker: Worker[K] = event.data
            answers = worker.read()
            if answers is None:
                yield from self._lost(worker, dying=True)
            elif answers and not worker.ready:
                worker.ready = True
            elif answers:
                key, worker.key = worker.key, None
                assert key is not None, "an answer without a question"
                if isinstance(answers[0], dict):
                    raise WorkError(str(answers[0]["error"]))
                yield key, answers[0]
        now = time.monotonic()
        for worker in [w for w in self.workers if w.deadline is not None and w.deadline <= now]:
            yield from self._lost(worker, dying=False)

    def _lost(self, worker: Worker[K], dying: bool) -> Iterator[tuple[K, Lost]]:
        if not worker.ready:
            raise WorkError(f"a grading process did not start ({sys.executable}): {worker.child.last_words()}")
        code = self._remove(worker, dying)
        if worker.key is None:
            return
        if dying and code == -signal.SIGKILL and self.killed[worker.key] < ATTEMPTS - 1:
            self.killed[worker.key] += 1
            self.queue.appendleft((worker.key, worker.item))
        else:
            timeout = code == -signal.SIGXCPU or not dying
            yield worker.key, Lost("timeout" if timeout else "worker died", code)

    def _start(self) -> None:
        worker: Worker[K] = Worker(self.timeout, self.memory, self.level)
        self.workers.append(worker)
        self.selector.register(_output(worker), selectors.EVENT_READ, worker)

    def _remove(self, worker: Worker[K], dying: bool = False) -> int:
        self.workers.remove(worker)
        self.selector.unregister(_output(worker))
        return worker.child.end(dying)


def _output(worker: "Worker[K]") -> int:
    assert worker.child.stdout is not None
    return worker.child.stdout.fileno()
