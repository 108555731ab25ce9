"""The Trace: one sampled answer of a teacher, and the Verdict a filter gave on it.

The raw text is kept as sampled; `reasoning` and `response` are views of it made once, when the trace is stored. Token
ids are kept where the backend gives them, so that nothing downstream has to guess how the text was tokenised.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from distill.prompts.prompt import Message, Prompt

FinishReason = str | None  # "stop", "length", "content_filter", or what else a server says; None: it does not say


@dataclass(frozen=True)
class Trace:
    """One sample of one prompt.

    text: the completion as sampled, with the opening `<think>` put back where the template had prefilled it.
    reasoning: what stands inside `<think>…</think>`, None when there is no closed block.
    response: what follows `</think>`, or the whole text without one.
    teacher: fingerprint (hex) of weights revision, numerics and sampling settings.
    logprobs: raw log-probability (natural log, temperature 1) of each completion token, where known.
    top_logprobs: per completion token the k most likely (token id, log-probability) pairs, where asked for.
    completion_tokens: their number, where it was counted by a server that gives no ids.
    """

    prompt: Prompt
    sample: int
    seed: int
    text: str
    reasoning: str | None
    response: str
    finish_reason: FinishReason
    teacher: str
    prompt_token_ids: tuple[int, ...] = ()
    completion_token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    completion_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """How long the completion is; 0 where nobody counted."""
        return len(self.completion_token_ids) or self.completion_tokens or 0

    @property
    def key(self) -> tuple[str, int]:
        """(prompt id, sample number): unique within one ledger, whose settings are fixed by its run."""
        return (self.prompt.id, self.sample)

    @property
    def messages(self) -> list[Message]:
        """The training view: the prompt's messages and the assistant's whole text, reasoning included."""
        return [*self.prompt.messages, {"role": "assistant", "content": self.text}]

    def to_dict(self) -> dict[str, Any]:
        row = {f.name: getattr(self, f.name) for f in fields(self)}  # asdict would copy every token one by one
        row["prompt"] = self.prompt.to_dict()
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Trace":
        values = dict(row)
        values["prompt"] = Prompt.from_dict(row["prompt"])
        for name in ("prompt_token_ids", "completion_token_ids"):
            values[name] = tuple(row.get(name) or ())
        if row.get("logprobs") is not None:
            values["logprobs"] = tuple(row["logprobs"])
        if row.get("top_logprobs") is not None:
            values["top_logprobs"] = tuple(tuple((int(t), float(p)) for t, p in top) for top in row["top_logprobs"])
        return cls(**values)


def content_hash(traces: Iterable[Trace]) -> str:
    """16 hex digits over (prompt id, sample, text) of the traces, whatever their order."""
    digests = sorted(
        hashlib.sha256(f"{trace.prompt.id}\0{trace.sample}\0{trace.text}".encode(errors="surrogatepass")).digest()
        for trace in traces
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """What one filter said of one trace: keep or drop, a short machine-readable reason, and the evidence for it."""

    filter: str
    keep: bool
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
