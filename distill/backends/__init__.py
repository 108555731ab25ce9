"""Models that answer: the local engine (`local.py`), servers (`remote.py`) and servers that are started here
(`launching.py`), behind one protocol (`backend.py`).

A backend gets jobs (a prompt and the sample numbers still missing) and yields completions in whatever order they
finish, so that a caller can store each one as it comes and ask again for the rest after a crash.

`open` is the only way to one. No other room imports the forms, so that another one needs no change anywhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from distill.backends.backend import Backend, Completed, Job, TrainedBackend, Usage
from distill.engine.options import EngineOptions, SamplingParams
from distill.models import Launch, Model, Server
from distill.recipe import LocalEngine

__all__ = ["Backend", "Completed", "Job", "SamplingParams", "TrainedBackend", "Usage", "open", "open_trained"]


@contextmanager
def open(model: Model, engine: LocalEngine, max_batch: int = 128) -> Iterator[Backend]:
    """Load a model directory into the local engine, connect to a server, or find the command that starts one.

    engine: how the local engine computes. max_batch: sequences decoded at once; for a server, requests under way. The
    model is released when the context ends. Errors: UserError when the directory is incomplete, damaged or unsupported,
    the memory budget too small, or the server does not answer.
    """
    backend: Backend
    if isinstance(model.place, Server):
        from distill.backends.remote import RemoteBackend

        remote = RemoteBackend.connect(model.place, model.place.concurrency or max_batch)
        remote.chat = (lambda: model.chat) if model.card else None
        backend = remote
    elif isinstance(model.place, Launch):
        from distill.backends.launching import LaunchedBackend

        backend = LaunchedBackend.find(model, model.place, max_batch)
    else:
        from distill.backends.local import LocalBackend

        backend = LocalBackend.load(model, engine, max_batch)
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def open_trained(
    model: Model, device: str, float32: bool, max_batch: int, max_context: int
) -> Iterator[TrainedBackend]:
    """Load a model directory into the local engine, for weights that are replaced while it lives.

    device: one, such as `cuda:1`. float32: the dtype, else bfloat16. max_batch: sequences decoded at once. max_context:
    tokens of prompt and completion. Errors: UserError, as `open`.
    """
    from distill.backends.local import LocalBackend

    dtype: Literal["float32", "bfloat16"] = "float32" if float32 else "bfloat16"
    options = EngineOptions(device=device, dtype=dtype, max_batch=max_batch, max_context=max_context)
    backend = LocalBackend.with_options(model, options)
    try:
        yield backend
    finally:
        backend.close()
