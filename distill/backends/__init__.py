"""What completes prompts. Two forms: the local engine (`local.py`) and a remote server (`remote.py`).

A backend gets jobs (a prompt and the sample numbers still missing) and yields completions in whatever order they
finish, so that a caller can store each one as it comes and ask again for the rest after a crash.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from distill.prompts.prompt import Prompt
from distill.traces.trace import FinishReason


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


class Backend(Protocol):
    """Completes prompts. `identity` names weights revision and numerics: it goes into fingerprints."""

    identity: dict[str, Any]

    def check(self, prompts: Iterable[Prompt], sampling: Sampling) -> None:
        """Raise `UserError` when one of them cannot be completed (longer than the context, …)."""

    def complete(self, jobs: Iterable[Job], sampling: Sampling, seed: int) -> Iterator[Completed]:
        """Yield every wanted sample once, in order of completion. Lazy in `jobs`."""
