"""Models that answer: the local engine (`local.py`), servers (`remote.py`) and servers that are started here
(`launching.py`), behind one protocol (`backend.py`).

A backend gets jobs (a prompt and the sample numbers still missing) and yields completions in whatever order they
finish, so that a caller can store each one as it comes and ask again for the rest after a crash.

`open` is the only way to one. No other room imports the forms, so that another one needs no change anywhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from distill.backends.backend import Backend, Completed, Job, Usage
from distill.engine.options import SamplingParams
from distill.models import Launch, Model, Server
from distill.recipe import LocalEngine

__all__ = ["Backend", "Completed", "Job", "SamplingParams", "Usage", "open"]


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
