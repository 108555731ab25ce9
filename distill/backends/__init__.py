"""Models that answer: the local engine (`local.py`), transformers for families that the engine does not compute
(`fallback.py`), servers (`remote.py`) and servers that are started here (`launching.py`), behind one protocol
(`backend.py`).

A backend gets jobs (a prompt and the sample numbers still missing) and yields completions in whatever order they
finish, so that a caller can store each one as it comes and ask again for the rest after a crash.

`open` is the only way to one. No other room imports the forms, so that another one needs no change anywhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from distill import model_families
from distill.backends.backend import Backend, Completed, Job, TrainedBackend, Usage
from distill.console import say
from distill.engine.options import EngineOptions, SamplingParams
from distill.models import Launch, Model, Server
from distill.recipe import LocalEngine

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Backend", "Completed", "Job", "SamplingParams", "TrainedBackend", "Usage", "open", "open_trained"]


@contextmanager
def open(model: Model, engine: LocalEngine, max_batch: int = 128) -> Iterator[Backend]:
    """Load a model directory into the local engine, or with transformers where the engine does not compute its family;
    connect to a server, or find the command that starts one.

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
    elif model_families.falls_back(model.directory):
        from distill.backends.fallback import TransformersBackend, why

        backend = TransformersBackend.load(model, engine, max_batch)
        say(f"{model.name}: {why(model)}")
    else:
        from distill.backends.local import LocalBackend

        backend = LocalBackend.load(model, engine, max_batch)
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def open_trained(
    model: Model,
    trained: "PreTrainedModel",
    device: str,
    compute: "torch.dtype",
    max_batch: int,
    max_context: int,
    say_so: bool = True,
) -> Iterator[TrainedBackend]:
    """The student that is trained, as a model that samples: its directory in the local engine, whose weights are
    replaced while it lives; or `trained`, the trainer's own module, where the engine does not compute its family.

    device: one, such as `cuda:1`. compute: dtype of the forward pass. max_batch: sequences decoded at once.
    max_context: tokens of prompt and completion. say_so: whether this process prints which of the two it is. Errors:
    UserError, as `open`.
    """
    import torch

    backend: TrainedBackend
    if model_families.falls_back(model.directory):
        from distill.backends.fallback import TransformersBackend, why

        autocast = None if trained.dtype == compute else compute
        backend = TransformersBackend.sharing(model, trained, max_batch, autocast)
        if say_so:
            say(f"rollouts: {why(model)}")
    else:
        from distill.backends.local import LocalBackend

        dtype: Literal["float32", "bfloat16"] = "float32" if compute == torch.float32 else "bfloat16"
        options = EngineOptions(device=device, dtype=dtype, max_batch=max_batch, max_context=max_context)
        backend = LocalBackend.with_options(model, options)
    try:
        yield backend
    finally:
        backend.close()
