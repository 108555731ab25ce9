"""Whose turn it is: a bounded queue that is fair to clients.

The engine takes requests in the order they come, so one client with a thousand of them would make every other wait for
all. Here each client has a queue of its own and the next request is taken from the next client in turn. The engine is
given up to twice as many samples as it decodes at once: it always has one more to start, and the rest wait here.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


class Full(Exception):
    """No more requests are taken. own: because of the client's own ones, and not of everybody's."""

    def __init__(self, own: bool) -> None:
        super().__init__("too many requests of this client" if own else "too many requests")
        self.own = own


@dataclass(eq=False)
class _Waiting:
    samples: int
    admitted: "asyncio.Future[None]"


class Admission:
    """Admits requests. capacity: samples that run at once, more only of a single request that has more. queue: requests
    that may wait. per_client: requests of one client that may wait and run.

    running: samples. waiting: requests.
    """

    def __init__(self, capacity: int, queue: int, per_client: int) -> None:
        self.capacity, self.queue, self.per_client = capacity, queue, per_client
        self.running = self.waiting = 0
        self._clients: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # those with waiting requests, next turn first
        self._held: Counter[str] = Counter()

    @asynccontextmanager
    async def admitted(self, client: str, samples: int) -> AsyncIterator[None]:
        """A turn for a request of so many samples, which ends with the context. Errors: Full, at once."""
        if self._held[client] >= self.per_client:
            raise Full(own=True)
        if self.waiting >= self.queue:
            raise Full(own=False)
        self._held[client] += 1
        try:
            await self._turn(client, samples)
            try:
                yield
            finally:
                self.running -= samples
                self._admit()
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

    async def _turn(self, client: str, samples: int) -> None:
        request = _Waiting(samples, asyncio.get_running_loop().create_future())
        self._clients.setdefault(client, deque()).append(request)
        self.waiting += 1
        self._admit()
        try:
            await request.admitted
        except asyncio.CancelledError:
            if request.admitted.done() and not request.admitted.cancelled():  # admitted at the same moment
                self.running -= samples
                self._admit()
            else:
                self._forget(client, request)
            raise

    def _admit(self) -> None:
        while self._clients:
            client, requests = next(iter(self._clients.items()))
            if self.running and self.running + requests[0].samples > self.capacity:
                return
            request = requests.popleft()
            self._clients.move_to_end(client)
            if not requests:
                del self._clients[client]
            self.waiting -= 1
            if not request.admitted.cancelled():
                self.running += request.samples
                request.admitted.set_result(None)

    def _forget(self, client: str, request: _Waiting) -> None:
        requests = self._clients.get(client, deque())
        if request in requests:  # else its turn came after it was given up
            requests.remove(request)
            self.waiting -= 1
            if not requests:
                del self._clients[client]
        self._admit()
