"""What an engine returns: finished samples, the tokens of streamed ones, and counts."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

from distill.engine.alternatives import Alternatives, TopLogprobs

FinishReason = Literal["stop", "length", "abort"]  # abort: by `Engine.abort`


@dataclass(frozen=True)
class Completion:
    """One finished sample. token_ids include the stop token if that ended it. logprobs: raw natural-log probability of
    each token (temperature 1, before top k and top p); top: the likeliest at each, or None."""

    request_id: str
    sample: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    top: Alternatives | None

    @property
    def top_logprobs(self) -> tuple[TopLogprobs, ...] | None:
        """`top` as pairs of (id, log-probability)."""
        return None if self.top is None else self.top.pairs


@dataclass(frozen=True)
class Progress:
    """New tokens of a sample of a streamed request; fields as of `Completion`."""

    request_id: str
    sample: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: Alternatives | None

    @property
    def top_logprobs(self) -> tuple[TopLogprobs, ...] | None:
        """`top` as pairs of (id, log-probability)."""
        return None if self.top is None else self.top.pairs


@dataclass(frozen=True)
class EngineUsage:
    """Running totals of tokens. A prompt counts once, even where it is computed again. drafts: proposed by the draft
    layer, and accepted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0

    def __add__(self, other: EngineUsage) -> EngineUsage:
        return EngineUsage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
