"""Data parallelism: one engine a device, each in a process of its own, behind the interface of one.

Requests are independent and a sample's text depends on its own request alone, so engines need to know nothing of each
other: whoever has the least to do gets the next request, as token ids, and sends token ids back. An engine never runs
dry, because it is given twice as many samples as it decodes at once.

Plain processes and JSON lines, one there and one back, as in the grading pool and for the same reasons: a process that
dies is noticed by the end of its output, and one whose parent dies by the end of its input; a script without a
`__main__` guard does not start itself. What a process says on stderr is kept until it is known whether somebody has to
read it.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from distill.engine.engine import Completion
from distill.engine.families import read_spec
from distill.engine.scheduler import Request
from distill.engine.spec import ModelSpec


class EngineDied(RuntimeError):
    """A process that ran an engine ended by itself. What was finished is with the caller; the rest is to be asked
    again."""


class _Worker:
    """One process. outstanding: samples that it has been asked for and has not sent."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.outstanding = device, 0
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  read if the process dies, hence as old as it
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distill.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is the parent's, who closes the input
        )
        self._unread = b""

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.died() from None

    def receive(self) -> list[dict[str, Any]]:
        """What has come, at least one message; waits for it. EngineDied at the end of the output."""
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                raise self.died()
            self._unread += block
        *lines, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in lines]

    def died(self) -> EngineDied:
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return EngineDied(f"the engine on {self.device} died (exit code {code}{': ' + last if last else ''})")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # which ends the process, whatever it is doing
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


class Engines:
    """Several engines, one a device; the interface of `Engine` that generation needs. Close it, or leave its context.

    Attributes as Engine's: `spec`, `numerics`, `max_context`, `tokens_generated`, `prompt_tokens`, `drafts`.
    """

    def __init__(
        self, workers: Sequence[_Worker], spec: ModelSpec, numerics: str, max_context: int, batch: int
    ) -> None:
        self.spec, self.numerics, self.max_context = spec, numerics, max_context
        self._workers, self._batch = list(workers), batch
        self._totals: dict[int, tuple[int, int, int, int]] = {}  # of each worker, as it counted last
        self._number = 0

    @classmethod
    def load(cls, model_dir: Path | str, devices: Sequence[str], *, max_batch: int = 256, **options: Any) -> Engines:
        """Load a model once a device. options: as `Engine.load`'s; a memory budget is for each. ValueError as there."""
        spec = read_spec(model_dir)
        threads = max(1, torch.get_num_threads() // len(devices))
        workers = [_Worker(device, threads) for device in devices]
        try:
            options = {key: _plain(value) for key, value in options.items()} | {"max_batch": max_batch}
            for worker in workers:
                worker.send({"model_dir": str(model_dir), "options": options | {"device": worker.device}})
            answers = [worker.receive()[0] for worker in workers]
            for answer in answers:
                if "refused" in answer:
                    raise ValueError(answer["refused"])
        except BaseException:
            for worker in workers:
                worker.close()
            raise
        return cls(workers, spec, answers[0]["numerics"], answers[0]["max_context"], max_batch)

    @property
    def tokens_generated(self) -> int:
        return self._total(0)

    @property
    def prompt_tokens(self) -> int:
        return self._total(1)

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens proposed, and accepted."""
        return self._total(2), self._total(3)

    def _total(self, which: int) -> int:
        return sum(totals[which] for totals in self._totals.values())

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions of `requests`, as they finish; see Engine.generate. EngineDied if a process does."""
        source = iter(requests)
        waiting = next(source, None)
        asked: dict[int, tuple[Request, _Worker]] = {}  # by the number it was sent with
        left: dict[int, int] = {}
        with selectors.DefaultSelector() as ready:
            for worker in self._workers:
                assert worker.process.stdout is not None
                ready.register(worker.process.stdout, selectors.EVENT_READ, worker)
            try:
                while waiting or asked:
                    idlest = min(self._workers, key=lambda worker: worker.outstanding)
                    if waiting and idlest.outstanding < 2 * self._batch:
                        self._number += 1
                        asked[self._number], left[self._number] = (waiting, idlest), len(waiting.samples)
                        idlest.outstanding += len(waiting.samples)
                        idlest.send({"request": asdict(waiting) | {"id": str(self._number)}})
                        waiting = next(source, None)
                        continue
                    for key, _ in ready.select():
                        for message in key.data.receive():
                            self._totals[id(key.data)] = tuple(message["totals"])
                            number = int(message["completion"]["request_id"])
                            if number not in asked:  # of one that was aborted
                                continue
                            request, worker = asked[number]
                            worker.outstanding -= 1
                            left[number] -= 1
                            if not left[number]:
                                del asked[number], left[number]
                            yield _completion(message["completion"], request.id)
            finally:
                for number, (_, worker) in asked.items():
                    worker.outstanding -= left[number]
                    with suppress(EngineDied):
                        worker.send({"abort": str(number)})

    def close(self) -> None:
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


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _completion(message: dict[str, Any], request_id: str) -> Completion:
    tops = message["top_logprobs"]
    return Completion(
        request_id=request_id,
        sample=message["sample"],
        token_ids=tuple(message["token_ids"]),
        finish_reason=message["finish_reason"],
        logprobs=tuple(message["logprobs"]),
        top_logprobs=None if tops is None else tuple(tuple((i, p) for i, p in top) for top in tops),
    )
