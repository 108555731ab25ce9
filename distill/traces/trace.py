"""The Trace: one sampled answer of a teacher, and the Verdict a filter gave on it.

The raw text is kept as sampled; `reasoning` and `response` are views of it made once, when the trace is stored. Token
ids are kept where the backend gives them, so that nothing downstream has to guess how the text was tokenised.

A trace may come from a server or from a foreign file, so its fields are checked when it is made: a value that the
store cannot hold is refused with the field's name, before it is on the disk. Numbers inside the long lists of tokens
are checked once, when the trace is stored (`Trace.check_tokens`), because reading makes a trace many times.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from distill.prompts.prompt import END_THINK, THINK, Message, Prompt

FinishReason = str | None  # "stop", "length", "content_filter", or what else a server says; None: it does not say

ReasoningForm = Literal["reasoning_content", "reasoning", "think", "end_think", "none", "cut_off", "no_content"]

TOKENS, WORDS = "teacher tokens", "words"  # units of length

FINISHED = {  # other names of the two reasons that all know
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "max_output_tokens": "length",
}
REFUSED = "refused"  # finish reason of a prompt that the server refused: there is no answer, and none was paid for

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def is_count(tokens: int | None, text: str) -> bool:
    """Whether this is the number of tokens of a text; None is none, and neither is 0 beside a text."""
    return bool(tokens) or (tokens == 0 and not text)


class Length(NamedTuple):
    """How long a completion is, and in which unit: `TOKENS`, or `WORDS` where the number of tokens is not known."""

    value: int
    unit: str


@dataclass(frozen=True)
class Trace:
    """One sample of one prompt.

    text: the completion as sampled, with the opening `<think>` put back where the template had prefilled it.
    reasoning: the text inside `<think>…</think>`, None when there is no closed block.
    response: the text after `</think>`, or the whole text without one; empty when the reasoning never ends.
    finish_reason: why sampling ended, as the backend says it.
    teacher: fingerprint (hex) of weights revision, numerics and sampling settings.
    logprobs: raw log-probability (natural log, temperature 1) of each completion token, where known.
    top_logprobs: per completion token the k most likely (token id, log-probability) pairs, where asked for.
    completion_tokens: the number of completion tokens; None where neither ids nor a server's count are known.
    prompt_tokens, cached_tokens, reasoning_tokens: as the server counts them; cached tokens are among those of the
    prompt, reasoning tokens among those of the completion. None where they are not known.
    form: how the reasoning came: in a field of its own (`reasoning_content` or `reasoning`), in the text with both tags
    (`think`) or with the closing one alone (`end_think`), or `none`; `cut_off`: it has no end, `no_content`: nothing
    follows it. None for published traces.
    omitted: sampling parameters that the server refused, so that its own values applied.

    Errors: ValueError naming the field when a value has another type or range than the store can hold.
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
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    form: ReasoningForm | None = None
    omitted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.completion_token_ids:
            object.__setattr__(self, "completion_tokens", len(self.completion_token_ids))
        if self.prompt_token_ids:
            object.__setattr__(self, "prompt_tokens", len(self.prompt_token_ids))
        _check_integer("sample", self.sample, 0, INT32_MAX)
        _check_integer("seed", self.seed, -INT64_MAX - 1, INT64_MAX)
        for name in ("completion_tokens", "prompt_tokens", "cached_tokens", "reasoning_tokens"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, INT32_MAX)
        for name in ("text", "response", "teacher"):
            _check_text(name, getattr(self, name))
        for name in ("reasoning", "finish_reason", "form"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))

    @property
    def tokens(self) -> int:
        """The number of completion tokens, 0 where it is not known."""
        return self.completion_tokens or 0

    @property
    def counted(self) -> bool:
        """Whether the number of completion tokens is known."""
        return is_count(self.completion_tokens, self.text)

    @property
    def length(self) -> Length:
        """The completion's length in tokens, or in words where its tokens were not counted."""
        return Length(self.tokens, TOKENS) if self.counted else Length(len(self.text.split()), WORDS)

    @property
    def answer(self) -> str:
        """The text in which a grader looks for the answer: the response.

        Empty for a text that was cut off before any reasoning was closed: some servers leave out the opening tag, and
        then the whole text may be reasoning, whose boxes are no answers.
        """
        return "" if self.finish_reason == "length" and END_THINK not in self.text else self.response

    @property
    def listed(self) -> int:
        """How many likely tokens are listed at a position, 0 without any; a server may leave some positions out."""
        return 0 if self.logprobs is None else max(map(len, self.top_logprobs or ()), default=0)

    @property
    def key(self) -> tuple[str, int]:
        """(prompt id, sample number): unique within one ledger, whose settings are fixed by its run."""
        return (self.prompt.id, self.sample)

    @property
    def digest(self) -> str:
        """32 hex digits over prompt id, sample number and text."""
        return trace_digest(self.prompt.id, self.sample, self.text)

    @property
    def messages(self) -> list[Message]:
        """The training view: the prompt's messages and the assistant's whole text, reasoning included."""
        return [*self.prompt.messages, {"role": "assistant", "content": self.text}]

    def check_tokens(self) -> None:
        """Raise ValueError, naming the field, for a token id that is no int32 or a log-probability that is no number.

        Not part of making a trace: a store makes its traces on every reading, and checks what it once wrote otherwise.
        """
        tops = [pair for top in self.top_logprobs or () for pair in top]
        _check_ids("prompt_token_ids", self.prompt_token_ids)
        _check_ids("completion_token_ids", self.completion_token_ids)
        _check_ids("top_logprobs", [token for token, _ in tops])
        _check_numbers("logprobs", self.logprobs or ())
        _check_numbers("top_logprobs", [logprob for _, logprob in tops])

    def to_dict(self) -> dict[str, Any]:
        """The trace as a JSON object, for the ledger."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}  # asdict would copy every token one by one
        row["prompt"] = self.prompt.to_dict()
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Trace":
        """The trace that `to_dict` described."""
        values = dict(row)
        values["prompt"] = Prompt.from_dict(row["prompt"])
        for name in ("prompt_token_ids", "completion_token_ids", "omitted"):
            values[name] = tuple(row.get(name) or ())
        if row.get("logprobs") is not None:
            values["logprobs"] = tuple(row["logprobs"])
        if row.get("top_logprobs") is not None:
            values["top_logprobs"] = tuple(tuple((int(t), float(p)) for t, p in top) for top in row["top_logprobs"])
        return cls(**values)


def usual_reason(reason: str) -> str:
    """A finish reason in small letters, by its usual name: servers and data sets have several for an end token."""
    name = reason.strip().lower()
    return FINISHED.get(name, name)


def form_of(text: str, finish_reason: FinishReason) -> ReasoningForm:
    """The form of a reasoning that came inside the text."""
    head, closed, response = text.partition(END_THINK)
    if not closed:
        return "cut_off" if THINK in text else "none"
    if not response.strip():
        return "cut_off" if finish_reason == "length" else "no_content"
    return "think" if THINK in head else "end_think"


class ContentHash:
    """A hash over the digests of traces, whatever their order. Holds 16 bytes of each."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, digest: str) -> None:
        """Add the digest of a trace: 32 hex digits."""
        self._digests += bytes.fromhex(digest)

    def value(self) -> str:
        """16 hex digits over all digests that were added."""
        import numpy as np  # on first use: traces are read without it

        ordered = np.sort(np.frombuffer(bytes(self._digests), dtype=[("high", ">u8"), ("low", ">u8")]))
        return hashlib.sha256(ordered.tobytes().hex().encode()).hexdigest()[:16]


def content_hash(digests: Iterable[str]) -> str:
    """The value of a `ContentHash` of these digests."""
    whole = ContentHash()
    for digest in digests:
        whole.add(digest)
    return whole.value()


def trace_digest(prompt: str, sample: int, text: str) -> str:
    """32 hex digits over what makes a trace: its prompt's id, its sample number and its text."""
    return hashlib.sha256(f"{prompt}\0{sample}\0{text}".encode(errors="surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Verdict:
    """What one filter decided about one trace: keep or drop, a short countable reason, and the evidence for it.

    evidence: JSON values by name; None for what is not known.
    """

    filter: str
    keep: bool
    reason: str
    evidence: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The verdict as a JSON object."""
        return {"filter": self.filter, "keep": self.keep, "reason": self.reason, "evidence": self.evidence}


def dropped_by(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The verdict that a dropped trace is counted under: the first that drops it, but before all that the server
    refused its prompt, which is why the others find no text. None for a kept trace."""
    dropping = [verdict for verdict in verdicts if not verdict.keep]
    return next((verdict for verdict in dropping if verdict.reason == REFUSED), dropping[0] if dropping else None)


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {_shown(value)} is not an integer from {least} to {most}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {_shown(value)} is not text")


def _check_ids(name: str, ids: Sequence[int]) -> None:
    if not set(map(type, ids)) <= {int} or (ids and not 0 <= min(ids) <= max(ids) <= INT32_MAX):
        raise ValueError(f"{name}: a token id is not an integer from 0 to {INT32_MAX}")


def _check_numbers(name: str, values: Sequence[float]) -> None:
    if not set(map(type, values)) <= {int, float}:
        raise ValueError(f"{name}: a log-probability is not a number")


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "an integer of more than 40 digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
