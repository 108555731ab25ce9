"""Worker processes that can be killed, because comparing an answer may never end.

`9^{9^{9^{9}}}` keeps sympy busy past the end of the universe, inside one C call that no signal handler interrupts. So:
a time-out kills the process and a new one is started; a worker that dies (a crash, the memory limit) costs its one item
and nothing else. Both are results of the item, not failures of the pool. A worker that somebody else kills (SIGKILL:
an operator, the kernel short of memory) says nothing about its item, which is asked again.

The time-out is one of processor time, to which the worker asks the kernel to hold it (RLIMIT_CPU): a busy machine does
not change a verdict, and should this process be killed itself, no endless comparison outlives it. A worker that uses no
processor time either is killed (SIGKILL) when PATIENCE times as much time has passed on the clock.

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
Question = dict[str, str | bool]  # as `distill.grading.worker` describes it

PATIENCE = 20  # seconds on the clock that a worker may take for a second of processor time
MEMORY = 2 << 30  # bytes of address space of a worker; idle, it takes 0.06 GiB
ATTEMPTS = 3  # of an item whose worker was killed from outside
START_SECONDS = 300.0  # a worker that is not ready by then never will be; a first start may read a cold disk


@dataclass(frozen=True)
class Lost:
    """The result of an item that cost its worker: `reason` is "timeout" or "worker died"."""

    reason: str
    exit_code: int


class Worker(Generic[K]):
    """One process with at most one item. `deadline` is on the monotonic clock and None while it is idle."""

    def __init__(self, timeout: float, memory: int, level: "Level") -> None:
        self.timeout = timeout
        # a fixed hash seed: some generators of problems iterate over sets (`distill.prompts.gym`)
        self.child = Child("distill.grading.worker", [str(memory), str(timeout), level], {"PYTHONHASHSEED": "0"})
        self.ready = False
        self.deadline: float | None = time.monotonic() + START_SECONDS
        self.key: K | None = None
        self.item: Question = {}  # whose answer will carry `key`

    def send(self, key: K, item: Question) -> None:
        """Give it an item, whose answer will carry `key`."""
        assert self.ready and self.deadline is None, "one item at a time, and only after it said it is ready"
        limits = GRADERS[str(item["task"])].limits(str(item["gold"]))
        self.key, self.item, self.deadline = key, item, time.monotonic() + PATIENCE * self.timeout * limits
        self.child.send(item)

    def read(self) -> list[object] | None:
        """Its answer in a list, an empty list while that is incomplete, None when it has died."""
        answers = self.child.receive()
        if answers:
            self.deadline = None
        return answers


class WorkerPool(Generic[K]):
    """Up to `workers` processes, started when there is work for them; a context manager that leaves none behind.

    timeout: seconds of processor time for one item, rounded up. memory: bytes of address space of a worker. level:
    isolation that the programs of answers need at least.
    """

    def __init__(self, workers: int, timeout: float, memory: int = MEMORY, level: "Level" = "full") -> None:
        assert workers >= 1 and timeout > 0
        self.size, self.timeout, self.memory, self.level = workers, timeout, memory, level
        self.workers: list[Worker[K]] = []
        self.queue: deque[tuple[K, Question]] = deque()
        self.killed: Counter[K] = Counter()  # how many workers were killed at an item, from outside
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> "WorkerPool[K]":
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in list(self.workers):
            self._remove(worker)
        self.selector.close()

    def map(self, items: Iterable[tuple[K, Question]]) -> Iterator[tuple[K, object]]:
        """Yield (key, answer or `Lost`) in order of completion; `items` is read a few ahead, not more.

        Raises WorkError when a worker does not start, or its machine cannot grade a task.
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
        finally:  # a consumer that stops in the middle does not get the rest the next time
            self.killed.clear()
            for worker in [worker for worker in self.workers if worker.key is not None]:
                self._remove(worker)

    def _results(self) -> Iterator[tuple[K, object]]:
        """Wait for the next answer or deadline. An answer that is there counts, even if it is read late."""
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
