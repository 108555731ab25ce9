"""What the backends of a model directory share, whichever engine computes: messages in, text out.

An engine knows token ids only. Here templates are applied, the prefilled `<think>` is put back, prompts that do not fit
are refused, and scores of tokens become scores of traces.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import JsonValue

from distill.backends.backend import Completed, GivenIds, Scored
from distill.backends.scoring import completion_ids, refuse_other_lengths
from distill.engine.options import SamplingParams, ThinkTokens
from distill.errors import UserError
from distill.models import Model
from distill.prompts.prompt import END_THINK, THINK, Prompt
from distill.traces.trace import FinishReason, Trace

if TYPE_CHECKING:
    from distill.chat import Chat
    from distill.engine.alternatives import Alternatives
    from distill.engine.score import Scores

CLOSING = f"\n{END_THINK}\n\n"  # what closes a think block whose budget is used up


def with_tokens(sampling: SamplingParams, chat: "Chat") -> SamplingParams:
    """The parameters with the tokens that a model ends its turn and its thinking with.

    Errors: UserError for a thinking budget where `</think>` is not a token of its own.
    """
    think = None
    if sampling.thinking_budget is not None:
        end, begin = chat.text_ids(END_THINK), chat.text_ids(THINK)
        if len(end) != 1:
            raise UserError(
                f"thinking_budget needs a model with a token {END_THINK}, which the tokenizer of {chat.where} has not; "
                f"remove it"
            )
        closing = chat.text_ids(CLOSING)
        think = ThinkTokens(bool(chat.prefill), begin[0] if len(begin) == 1 else None, end[0], tuple(closing))
    return replace(sampling, stop_token_ids=chat.stop_token_ids, think_tokens=think)


class DirectoryBackend(ABC):
    """A loaded model directory. A subclass computes: `max_context`, `vocab_size`, `_token_scores` and the rest of the
    protocol."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.chat = model.chat

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """Weights, template and mode."""
        return self.model.identity

    @property
    @abstractmethod
    def max_context(self) -> int | None:
        """Tokens of prompt and completion together; None for a model without a limit."""

    @property
    def more_context(self) -> str:
        """How to get a longer context than `max_context`; empty where the model has no longer one."""
        return ""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @abstractmethod
    def _token_scores(
        self, sequences: Sequence[Sequence[int]], top_k: int, ids: GivenIds | None, after: Sequence[int]
    ) -> "Iterable[Scores]":
        """The scores of each sequence past its first `after` tokens. Errors: ValueError."""

    # ---- prompts

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Errors: UserError, naming the longest, when prompts and their completions exceed the model's context, or when
        the tokenizer has more tokens than the weights."""
        prompts = list(prompts)
        all_ids = self.chat.prompts_ids(prompt.messages for prompt in prompts)
        sized = [(len(self._in_vocabulary(ids)), prompt) for ids, prompt in zip(all_ids, prompts, strict=True)]
        too_long = sum(not self._fits(length, sampling) for length, _ in sized)
        if too_long:
            longest = max(sized, key=lambda item: item[0])
            which = f"{too_long:,} of {len(sized):,} prompts do not fit; the longest, "
            raise self._too_long(which, *longest, sampling)

    def _checked(self, token_ids: list[int], prompt: Prompt, sampling: SamplingParams) -> tuple[int, ...]:
        """The ids of a prompt that fits. Errors: UserError."""
        ids = self._in_vocabulary(token_ids)
        if not self._fits(len(ids), sampling):
            raise self._too_long("prompt ", len(ids), prompt, sampling)
        return ids

    def _in_vocabulary(self, ids: list[int]) -> tuple[int, ...]:
        if ids and max(ids) >= self.vocab_size:
            raise UserError(
                f"{self.chat.where}: the tokenizer gives token id {max(ids):,}, but the weights have "
                f"{self.vocab_size:,} tokens (vocab_size in config.json); use the tokenizer that belongs to the weights"
            )
        return tuple(ids)

    def _fits(self, length: int, sampling: SamplingParams) -> bool:
        context = self.max_context
        return context is None or length + sampling.max_new_tokens <= context

    def _too_long(self, which: str, length: int, prompt: Prompt, sampling: SamplingParams) -> UserError:
        context, start = self.max_context, prompt.messages[-1]["content"][:40]
        assert context is not None, "without a context every prompt fits"
        remedy = f"lower max_new_tokens to {context - length} or less, or" if length < context else "shorten it, or"
        return UserError(
            f"{which}{prompt.id} ({start!r}…, from {prompt.source or 'memory'}), has {length} tokens and "
            f"max_new_tokens is {sampling.max_new_tokens}, together more than the model's context of {context}"
            f"{self.more_context}; {remedy} leave the prompt out"
        )

    # ---- answers

    def _completed(
        self,
        prompt: Prompt,
        sample: int,
        ids: tuple[int, ...],
        completion: tuple[int, ...],
        finish_reason: FinishReason,
        logprobs: tuple[float, ...],
        top: "Alternatives | None",
    ) -> Completed:
        """A finished sample. ids: of the prompt."""
        return Completed(
            prompt=prompt,
            sample=sample,
            text=self.chat.restore(self.chat.decode(completion)),
            finish_reason=finish_reason,
            prompt_token_ids=ids,
            completion_token_ids=completion,
            logprobs=logprobs,
            top=top,
        )

    # ---- scores

    @property
    def scores_given_ids(self) -> bool:
        """See `Backend`."""
        return True

    def score(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Trace]:
        """As `Backend.score`.

        Tokens that this model sampled are taken as they are; another model's text is tokenised and ends with this
        model's end token.
        """
        scored = []
        for trace, (prompt, completion, score) in zip(traces, self._scores(traces, top_k, ids), strict=True):
            scored.append(
                replace(
                    trace,
                    prompt_token_ids=tuple(prompt),
                    completion_token_ids=tuple(completion),
                    logprobs=score.logprobs,
                    top_logprobs=score.top_logprobs or ((),) * len(completion),
                )
            )
        return scored

    def scored(self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None = None) -> list[Scored]:
        """As `score`, as arrays."""
        scored = []
        for prompt, completion, score in self._scores(traces, top_k, ids):
            assert score.top_id_tk is not None and score.top_logprob_tk is not None, "alternatives are asked for"
            scored.append(
                Scored(tuple(prompt), tuple(completion), score.logprob_t, score.top_id_tk, score.top_logprob_tk)
            )
        return scored

    def _scores(
        self, traces: Sequence[Trace], top_k: int, ids: GivenIds | None
    ) -> "Iterator[tuple[list[int], list[int], Scores]]":
        """The ids of prompt and completion of each trace, and the scores of the completion."""
        prompts = [
            *self.chat.prompts_ids_of((trace.prompt.messages for trace in traces), [trace.text for trace in traces])
        ]
        completions = [completion_ids(trace, self.chat, self.vocab_size) for trace in traces]
        sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
        if ids is not None:
            refuse_other_lengths(ids, completions)
        try:
            scores = list(self._token_scores(sequences, top_k, ids, [len(prompt) for prompt in prompts]))
        except ValueError as error:
            raise UserError(str(error)) from error
        yield from zip(prompts, completions, scores, strict=True)
