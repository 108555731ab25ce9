"""What completes prompts. Two forms: the local engine (`local.py`) and a remote server (`remote.py`).

A backend gets jobs (a prompt and the sample numbers still missing) and yields completions in whatever order they
finish, so that a caller can store each one as it comes and ask again for the rest after a crash.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from distill.models import Model, Server
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine
from distill.traces.trace import FinishReason, Trace


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off; logprobs = k alternatives a token."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 32768
    logprobs: int | None = None


@dataclass(frozen=True)
class Job:
    """One prompt and the sample numbers wanted of it."""

    prompt: Prompt
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Completed:
    """One finished sample. `text` has the prefilled `<think>` put back; token ids are exactly what was sampled."""

    prompt: Prompt
    sample: int
    text: str
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    completion_tokens: int | None = None  # as counted by a server that gives no ids


@dataclass(frozen=True)
class Usage:
    """Tokens of one backend's work so far. drafts: proposed and accepted by the multi-token-prediction layer; None
    where the backend does not draft."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafts: tuple[int, int] | None = None


class Backend(Protocol):
    """A model that answers: the local engine, or a server. Everything that samples goes through this protocol.

    identity: weights revision, template and mode, known before anything is loaded; numerics: what produces the numbers
    (instruction set, precision, cache), known once the model is loaded. Both go into fingerprints, key by key.
    max_context: tokens of prompt and completion together, None where the server does not say.
    """

    @property
    def identity(self) -> Mapping[str, JsonValue]: ...

    @property
    def numerics(self) -> Mapping[str, str]: ...

    @property
    def max_context(self) -> int | None: ...

    @property
    def usage(self) -> Usage: ...

    def check(self, prompts: Iterable[Prompt], sampling: Sampling) -> None:
        """Raise `UserError` when one of them cannot be completed (longer than the context, …)."""

    def complete(self, jobs: Iterable[Job], sampling: Sampling, seed: int) -> Iterator[Completed]:
        """Yield every wanted sample once, in order of completion. Lazy in `jobs`."""

    def score(self, traces: Sequence[Trace], top_k: int) -> list[Trace]:
        """The traces with this model's log-probabilities of their tokens and of its `top_k` likeliest at each.
        UserError where the backend cannot score, or a trace is longer than the context."""

    def close(self) -> None:
        """Release the model: memory, processes, connections. The backend is not used afterwards."""


@contextmanager
def open(model: Model, engine: LocalEngine, max_batch: int = 128) -> Iterator[Backend]:
    """The only door to a model that answers: load a directory into the local engine, or connect to a server.

    engine: how the local engine computes. max_batch: sequences decoded at once; for a server, requests under way. The
    model is released when the context ends. Errors: UserError when the directory is incomplete, damaged or unsupported,
    the memory budget too small, or the server does not answer.
    """
    backend: Backend
    if isinstance(model.place, Server):
        from distill.backends.remote import RemoteBackend

        backend = RemoteBackend.connect(model.place.url, model.place.model, max_batch, model.place.key)
    else:
        from distill.backends.local import LocalBackend

        backend = LocalBackend.load(model, engine, max_batch)
    try:
        yield backend
    finally:
        backend.close()
