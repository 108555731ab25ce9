"""Data parallelism: one engine a device, each in a process of its own, behind the interface of one engine.

Requests are independent and a sample's text depends on its own request alone, so engines need to know nothing of each
other: the one with the fewest outstanding samples gets the next request, as token ids, and sends token ids back. An
engine never runs dry, because it is given twice as many samples as it decodes at once.

Plain processes and JSON lines, one there and one back, as in the grading pool and for the same reasons: a process that
dies is noticed by the end of its output, and one whose parent dies by the end of its input; a script without a
`__main__` guard does not start itself. A process's stderr is kept, and read only when the process dies.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from distill.engine import messages
from distill.engine.families import read_spec
from distill.engine.messages import Loaded
from distill.engine.options import EngineOptions
from distill.engine.results import Completion, EngineUsage
from distill.engine.sampler import NonFiniteLogits
from distill.engine.scheduler import Request
from distill.engine.spec import ModelSpec

Message = Mapping[str, object]


class EngineDied(RuntimeError):
    """An engine's process ended unexpectedly. Completions already yielded are valid; the others can be drawn again."""


class Worker:
    """One process. outstanding: samples that were requested and have not come back. usage: as it counted last."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.outstanding, self.usage = device, 0, EngineUsage()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  read if the process dies, hence as old as it
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distill.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C goes to the parent, which closes the input
        )
        self._unread = b""

    def send(self, message: Message) -> None:
        """Write one line. Errors: EngineDied."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.died() from None

    def receive(self) -> list[Message]:
        """The messages that have arrived, at least one; waits for it. Errors: EngineDied at the end of the output."""
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                raise self.died()
            self._unread += block
        *lines, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in lines]

    def died(self) -> EngineDied:
        """The error for a process that ended unexpectedly, with the last line of its stderr."""
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return EngineDied(f"the engine on {self.device} died (exit code {code}{': ' + last if last else ''})")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # which ends the process, whatever it is doing
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


class Engines:
    """Several engines, one a device; the interface of `Engine` that generation needs. Close it, or leave its context.

    Attributes: spec, numerics, max_context and usage, as `Engine`. max_batch: samples that one engine decodes at once.
    """

    def __init__(self, workers: Sequence[Worker], spec: ModelSpec, loaded: Loaded, max_batch: int) -> None:
        self.spec, self.numerics, self.max_context = spec, loaded.numerics, loaded.max_context
        self.max_batch = max_batch
        self._workers = list(workers)
        self._number = 0

    @classmethod
    def load(cls, model_dir: Path | str, devices: Sequence[str], options: EngineOptions) -> Engines:
        """Load a model once a device. options: `device` is replaced by each; a memory budget is for each.

        Errors: ValueError, as `Engine.load`; EngineDied.
        """
        spec = read_spec(model_dir)
        threads = max(1, torch.get_num_threads() // len(devices))
        workers = [Worker(device, threads) for device in devices]
        try:
            for worker in workers:
                own = replace(options, device=worker.device)
                worker.send({"model_dir": str(model_dir), "options": asdict(own)})
            loaded = [messages.loaded(_checked(worker.receive()[0])["loaded"]) for worker in workers]
        except BaseException:
            for worker in workers:
                worker.close()
            raise
        return cls(workers, spec, loaded[0], options.max_batch)

    @property
    def workers(self) -> Sequence[Worker]:
        """The processes, for a caller that exchanges their messages itself."""
        return tuple(self._workers)

    @property
    def usage(self) -> EngineUsage:
        """Tokens of all engines so far."""
        return sum((worker.usage for worker in self._workers), EngineUsage())

    def generate(self, requests: Iterable[Request], deadline: float = math.inf) -> Iterator[Completion]:
        """Completions of `requests`, as they finish; see `Engine.generate`. Errors: EngineDied; NonFiniteLogits."""
        source = iter(requests)
        waiting = next(source, None)
        sent: dict[int, tuple[Request, Worker]] = {}  # by the number it was sent with
        left: dict[int, int] = {}
        with selectors.DefaultSelector() as ready:
            for worker in self._workers:
                assert worker.process.stdout is not None
                ready.register(worker.process.stdout, selectors.EVENT_READ, worker)
            try:
                while (waiting or sent) and (left_s := deadline - time.monotonic()) > 0:
                    idlest = min(self._workers, key=lambda worker: worker.outstanding)
                    if waiting and idlest.outstanding < 2 * self.max_batch:
                        self._number += 1
                        sent[self._number], left[self._number] = (waiting, idlest), len(waiting.samples)
                        idlest.outstanding += len(waiting.samples)
                        idlest.send({"request": asdict(waiting) | {"id": str(self._number)}})
                        waiting = next(source, None)
                        continue
                    for key, _ in ready.select(None if math.isinf(left_s) else left_s):
                        for message in map(_checked, key.data.receive()):
                            if "rejected" in message:
                                raise ValueError(message["error"])
                            key.data.usage = messages.from_json(EngineUsage, message["usage"])
                            for completion in map(messages.completion, messages.rows(message["completions"])):
                                number = int(completion.request_id)
                                if number not in sent:  # of a request that was aborted
                                    continue
                                request, worker = sent[number]
                                worker.outstanding -= 1
                                left[number] -= 1
                                if not left[number]:
                                    del sent[number], left[number]
                                yield replace(completion, request_id=request.id)
            finally:
                for number, (_, worker) in sent.items():
                    worker.outstanding -= left[number]
                    with suppress(EngineDied):
                        worker.send({"abort": str(number)})

    def update(self, tensor: Callable[[str], Tensor]) -> NoReturn:
        """Refused: ValueError. Tensors would have to be sent to every process."""
        raise ValueError(
            "weights are updated in the process that holds them, and several engines are processes of their own; load "
            "one engine (data_parallel_size: 1)"
        )

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: object) -> Literal[False]:
        self.close()
        return False

    def __del__(self) -> None:
        self.close()


def _checked(message: Message) -> Message:
    """The message. Errors: ValueError where the engine refused the model; NonFiniteLogits where it met these."""
    if "refused" in message:
        raise ValueError(message["refused"])
    if "not_finite" in message:
        position = message["not_finite"]
        assert isinstance(position, int | None)
        raise NonFiniteLogits(position)
    return message
