"""One engine in a process of its own, for workers.py: `python -m distill.engine.worker`, JSON lines in and out.

First comes what to load, and the answer is what was loaded, or why it was refused. Then come requests, and completions
go back as they finish. The process ends with its input, at once: nobody is left who would read its output.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import Any, BinaryIO

import torch

from distill.engine.engine import Engine
from distill.engine.sampler import SamplingParams
from distill.engine.scheduler import Request


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    load = json.loads(sys.stdin.buffer.readline())
    options = load["options"]
    options["dtype"] = getattr(torch, options.get("dtype", "float32"))
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        engine = Engine.load(load["model_dir"], **options)
    except ValueError as error:
        _send(out, {"refused": str(error)})
        return
    _send(out, {"numerics": engine.numerics, "max_context": engine.max_context})
    incoming: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(incoming,), daemon=True).start()
    while True:
        while not (incoming.empty() and engine.has_work):  # waits when there is nothing to do
            _accept(engine, incoming.get())
        for done in engine.step():
            totals = engine.tokens_generated, engine.prompt_tokens, *engine.drafts
            _send(out, {"completion": asdict(done), "totals": totals})


def _read(incoming: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        incoming.put(json.loads(line))
    os._exit(0)


def _accept(engine: Engine, message: dict[str, Any]) -> None:
    if "abort" in message:
        engine.abort(message["abort"])
        return
    fields = message["request"]
    sampling = fields["sampling"]
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    engine.add(
        Request(
            **fields
            | {
                "sampling": SamplingParams(**sampling),
                "prompt_ids": tuple(fields["prompt_ids"]),
                "samples": tuple(fields["samples"]),
            }
        )
    )


def _send(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
