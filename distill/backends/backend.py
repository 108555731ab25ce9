"""The protocol of a model that answers, and the types of its arguments and results."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import JsonValue

from distill.backends.budget import Allowance
from distill.chat import split_reasoning
from distill.engine.options import SamplingParams
from distill.prompts.prompt import Prompt
from distill.traces.trace import FinishReason, ReasoningForm, Trace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from distill.engine.alternatives import Alternatives

GivenIds = Sequence["npt.NDArray[np.int32]"]  # by trace, [completion tokens, m], −1 for none


@dataclass(frozen=True)
class Job:
    """One prompt and the sample numbers wanted of it."""

    prompt: Prompt
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Completed:
    """One finished sample.

    text: with the prefilled `<think>` put back. finish_reason: as the model or the server gives it, None where it gives
    none. Token ids are exactly what was sampled; empty where they are not known, and then completion_tokens and
    prompt_tokens are the server's counts, None where it gives none that can be used. The other counts and form: as of
    `Trace`. parts: reasoning and response, where the server returned them in two fields. omitted: as of `Trace`.
    """

    prompt: Prompt
    sample: int
    text: str
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...] = ()
    completion_token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top: "Alternatives | None" = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    form: ReasoningForm | None = None
    parts: tuple[str | None, str] | None = None
    omitted: tuple[str, ...] = ()

    @property
    def top_logprobs(self) -> tuple[tuple[tuple[int, float], ...], ...] | None:
        """`top` as of `Trace`."""
        return None if self.top is None else self.top.pairs

    @property
    def split(self) -> tuple[str | None, str]:
        """(reasoning, response): as the server keeps them apart, else split at the tags of the text."""
        return self.parts or split_reasoning(self.text)


@dataclass(frozen=True)
class Usage:
    """Tokens of one backend's work so far. drafts: proposed and accepted by the multi-token-prediction layer; None
    where the backend does not draft. starting: seconds that a server took to start, which are no part of a rate."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafts: tuple[int, int] | None = None
    starting: float = 0.0


@dataclass(frozen=True, eq=False)
class Scored:
    """A trace as a model scored it: the token ids that it read, and arrays in place of a tuple for each alternative.

    logprob_t: of the completion's tokens, float32 [t]. top_id_tk, top_logprob_tk: the alternatives at each, likeliest
    first, int32 and float32 [t, k], log-probability −∞ past the last one.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprob_t: "npt.NDArray[np.float32]"
    top_id_tk: "npt.NDArray[np.int32]"
    top_logprob_tk: "npt.NDArray[np.float32]"

    @classmethod
    def of(cls, trace: Trace) -> "Scored":
        """What a scored trace carries."""
        import numpy as np

        from distill.engine.alternatives import Alternatives

        assert trace.logprobs is not None and trace.top_logprobs is not None, "a scored trace has both"
        top, logprob_t = Alternatives.of(trace.top_logprobs), np.array(trace.logprobs, np.float32)
        return cls(trace.prompt_token_ids, trace.completion_token_ids, logprob_t, top.id_tk, top.logprob_tk)


class Backend(Protocol):
    """A model that answers: the local engine, or a server. Everything that samples goes through this protocol."""

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """Weights revision, template and mode: known before anything is loaded. Part of fingerprints, key by key."""

    @property
    def numerics(self) -> Mapping[str, str]:
        """What produces the numbers (kernels, precision, cache), by name. Part of fingerprints, key by key."""

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and completion together; None where the server does not say."""

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below this; None where the server does not say."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Errors: UserError when a prompt cannot be completed (longer than the context, …)."""

    def complete(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int, allowance: Allowance | None = None
    ) -> Generator[Completed, None, None]:
        """Yield every wanted sample once, in order of completion. Lazy in `jobs`. Closing it gives up the others.

        allowance: what may be spent; at its deadline the samples under way are given up, and there is no error.
        Errors: UserError for what the user can correct, WorkError when the engine or the server fails; every sample
        that was delivered before is yielded first.
        """

    @property
    def scores_given_ids(self) -> bool:
        """Whether `score` knows the log-probability of every id below `vocab_size`, which is known then."""

    def score(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Trace]:
        """The traces with this model's log-probabilities of their tokens and of its `top_k` likeliest at each position.

        ids[i][t]: token ids whose log-probability is wanted at completion token t of trace i, −1 for none; they are
        listed among its `top_logprobs`, which stay sorted, likeliest first. Where not `scores_given_ids`, only those of
        them are listed that are the trace's own token or among the `top_k` likeliest.
        Errors: UserError where the backend cannot score, a trace is longer than the context, or ids are given for
        another number of tokens than the completion has for this model.
        """

    def scored(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Scored]:
        """As `score`, as arrays: for many alternatives of many tokens. Errors: as `score`."""

    def close(self) -> None:
        """Release the model: memory, processes, connections. The backend is not used afterwards."""


class TrainedBackend(Backend, Protocol):
    """A model whose weights are replaced while it is loaded: a student that is being trained."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def update(self, tensor: "Callable[[str], Tensor]") -> None:
        """Replace all weights in place. tensor: returns one by its published (Hugging Face) name; it is called once a
        name, in the same order in every process.

        Errors: UserError for a model whose weights cannot be replaced, or where a number is not finite.
        """

    def release(self) -> None:
        """Give memory back that the next `update` fills anyway; until then nothing is computed."""
