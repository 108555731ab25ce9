"""One engine in a process of its own, for workers.py: `python -m distill.engine.worker`, JSON lines in and out.

The messages are those of messages.py. The process ends at once with the end of its input: its parent is gone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import BinaryIO

import torch

from distill.engine import messages
from distill.engine.engine import Engine
from distill.engine.options import EngineOptions
from distill.engine.results import Completion
from distill.engine.sampler import NonFiniteLogits

Message = Mapping[str, object]


def main() -> None:
    """Load the model that the first line names, then serve requests until the input ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    load = json.loads(sys.stdin.buffer.readline())
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        engine = Engine.load(load["model_dir"], messages.from_json(EngineOptions, load["options"]))
    except ValueError as error:
        _send(out, {"refused": str(error)})
        return
    _send(out, {"loaded": asdict(messages.Loaded(engine.numerics, engine.max_context))})
    incoming: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(incoming,), daemon=True).start()
    try:
        _serve(engine, incoming, out)
    except NonFiniteLogits as error:
        _send(out, {"not_finite": error.position})


def _serve(engine: Engine, incoming: queue.SimpleQueue[Message], out: BinaryIO) -> None:
    """Never returns. Errors: NonFiniteLogits."""
    while True:
        while not (incoming.empty() and engine.has_work):  # waits when there is nothing to do
            message = incoming.get()
            if "abort" in message:
                completions = engine.abort(str(message["abort"]), messages.sample(message.get("sample")))
                _report(engine, completions, out)
                continue
            request = messages.request(message["request"])
            try:
                engine.add(request)
            except ValueError as error:
                _send(out, {"rejected": request.id, "error": str(error)})
        _report(engine, engine.step(), out)


def _report(engine: Engine, completions: Sequence[Completion], out: BinaryIO) -> None:
    """Send new tokens of streamed requests, then completions."""
    if progress := engine.progress():
        _send(out, {"progress": [messages.to_json(each) for each in progress]})
    if completions:
        _send(out, {"completions": [messages.to_json(each) for each in completions], "usage": asdict(engine.usage)})


def _read(incoming: queue.SimpleQueue[Message]) -> None:
    for line in sys.stdin.buffer:
        incoming.put(json.loads(line))
    os._exit(0)


def _send(out: BinaryIO, message: Message) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
