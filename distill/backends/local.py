"""The local engine as a backend: messages in, text out.

The engine knows token ids only. Here templates are applied, the prefilled `<think>` is put back, and prompts get
their key for the random draws: the hash in the prompt's id, so that a sample's text depends on (seed, prompt, sample)
and not on what else is in the batch.
"""

import gc
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import tee
from typing import TYPE_CHECKING

from pydantic import JsonValue

from distill.backends.backend import Completed, GivenIds, Job, Scored, Usage
from distill.backends.budget import Allowance
from distill.backends.scoring import completion_ids, refuse_other_lengths
from distill.engine.options import EngineOptions, SamplingParams, ThinkTokens
from distill.errors import UserError, WorkError
from distill.models import Model
from distill.prompts.prompt import END_THINK, THINK, Prompt
from distill.recipe import LocalEngine
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor

    from distill.chat import Chat
    from distill.engine import Completion, Engine, Engines, Request
    from distill.engine.score import Scores

GIB = 1 << 30
CLOSING = f"\n{END_THINK}\n\n"  # what closes a think block whose budget is used up


def options_of(settings: LocalEngine, max_batch: int) -> EngineOptions:
    """A recipe's `engine:` as the options of one engine."""
    return EngineOptions(
        dtype=settings.dtype,
        max_batch=max_batch,
        num_speculative_tokens=settings.num_speculative_tokens,
        memory_budget=None if settings.memory_budget is None else int(settings.memory_budget * GIB),
        kv_cache_dtype=settings.kv_cache_dtype,
    )


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


class LocalBackend:
    """A model directory, loaded. engine: for tests and measurements; everything else uses the protocol."""

    def __init__(self, engine: "Engine | Engines", model: Model) -> None:
        self.engine = engine
        self.model = model
        self.chat = model.chat

    @classmethod
    def load(cls, model: Model, engine: LocalEngine, max_batch: int = 128) -> "LocalBackend":
        """Load a model directory, once on each device.

        Errors: UserError, with file and remedy, when it is incomplete, damaged or unsupported, or the memory budget too
        small.
        """
        from distill.engine import Engine, Engines
        from distill.engine.device import devices_for
        from distill.engine.families import read_spec

        options, directory = options_of(engine, max_batch), model.directory
        try:  # config and tokenizer first: what they refuse is not worth loading weights for
            read_spec(directory)
            model.chat  # noqa: B018  loads the tokenizer
            devices = devices_for(None if engine.device == "auto" else engine.device, engine.data_parallel_size)
            loaded = (
                Engine.load(directory, replace(options, device=devices[0]))
                if len(devices) == 1
                else Engines.load(directory, devices, options)
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(loaded, model)

    @classmethod
    def with_options(cls, model: Model, options: EngineOptions) -> "LocalBackend":
        """Load a model directory on one device. Errors: as `load`."""
        from distill.engine import Engine

        try:
            return cls(Engine.load(model.directory, options), model)
        except ValueError as error:
            raise UserError(str(error)) from error

    def update(self, tensor: "Callable[[str], Tensor]") -> None:
        """See `TrainedBackend`."""
        from distill.engine import Engine

        assert isinstance(self.engine, Engine), "a student is sampled by one engine per process"
        try:
            self.engine.update(tensor)
        except ValueError as error:
            raise UserError(str(error)) from error

    def release(self) -> None:
        """See `TrainedBackend`."""
        from distill.engine import Engine

        assert isinstance(self.engine, Engine), "a student is sampled by one engine per process"
        self.engine.release()

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """Weights, template and mode."""
        return self.model.identity

    @property
    def numerics(self) -> Mapping[str, str]:
        """Kernels, precision and cache (`distill.engine.numerics`)."""
        return self.engine.numerics.to_json()

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion together."""
        return self.engine.max_context

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        usage = self.engine.usage
        drafts = (usage.drafts_proposed, usage.drafts_accepted) if usage.drafts_proposed else None
        return Usage(usage.prompt_tokens, usage.completion_tokens, drafts)

    def close(self) -> None:
        """Drop the engine and its memory; end its processes."""
        self.engine.close()
        del self.engine
        gc.collect()

    def check(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> None:
        """Errors: UserError, naming the longest, when prompts and their completions exceed the model's context, or when
        the tokenizer has more tokens than the weights."""
        prompts = list(prompts)
        all_ids = self.chat.prompts_ids(prompt.messages for prompt in prompts)
        sized = [(len(self._in_vocabulary(ids)), prompt) for ids, prompt in zip(all_ids, prompts, strict=True)]
        room = self.engine.max_context - sampling.max_new_tokens
        if too_long := sum(length > room for length, _ in sized):
            longest = max(sized, key=lambda item: item[0])
            which = f"{too_long:,} of {len(sized):,} prompts do not fit; the longest, "
            raise self._too_long(which, *longest, sampling)

    def complete(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int, allowance: Allowance | None = None
    ) -> Generator[Completed, None, None]:
        """Yield every wanted sample once, as it finishes. Pulls jobs little faster than they can be started.

        allowance: as of `Backend.complete`; a step that is under way at its deadline is finished.

        Errors: UserError for a prompt that is too long, and where the model computes numbers that are not finite;
        WorkError when an engine's process dies.
        """
        from distill.engine import Request

        params = with_tokens(sampling, self.chat)
        running: dict[str, tuple[Prompt, tuple[int, ...], int]] = {}  # prompt, its token ids, samples still to come

        def requests() -> Iterator[Request]:
            to_start, to_render = tee(jobs)
            rendered = self.chat.prompts_ids(job.prompt.messages for job in to_render)  # some at a time
            for job, token_ids in zip(to_start, rendered, strict=True):
                ids = self._checked(token_ids, job.prompt, sampling)
                running[job.prompt.id] = (job.prompt, ids, len(job.samples))
                yield Request(job.prompt.id, ids, params, seed, int(job.prompt.id, 16), job.samples)

        for done in self._finished(requests(), allowance.deadline if allowance else math.inf):
            prompt, ids, left = running.pop(done.request_id)
            if left > 1:
                running[done.request_id] = (prompt, ids, left - 1)
            yield Completed(
                prompt=prompt,
                sample=done.sample,
                text=self.chat.restore(self.chat.decode(done.token_ids)),
                finish_reason=done.finish_reason,
                prompt_token_ids=ids,
                completion_token_ids=done.token_ids,
                logprobs=done.logprobs,
                top=done.top,
            )

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
        from distill.engine import Engine

        assert isinstance(self.engine, Engine), "several engines sample, one scores"
        prompts = [
            *self.chat.prompts_ids_of((trace.prompt.messages for trace in traces), [trace.text for trace in traces])
        ]
        completions = [completion_ids(trace, self.chat, self.engine.spec.vocab_size) for trace in traces]
        sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
        if ids is not None:
            refuse_other_lengths(ids, completions)
        try:
            scores = self.engine.score(sequences, top_k, ids, [len(prompt) for prompt in prompts])
        except ValueError as error:
            raise UserError(str(error)) from error
        yield from zip(prompts, completions, scores, strict=True)

    def _finished(self, requests: "Iterable[Request]", deadline: float) -> "Iterator[Completion]":
        from distill.engine import EngineDied, NonFiniteLogits

        try:
            yield from self.engine.generate(requests, deadline)
        except NonFiniteLogits as error:
            raise UserError(f"{self.model.directory}: {error}") from error
        except EngineDied as error:
            raise WorkError(f"{error}; finished samples are stored, run the same command to continue") from error

    def _in_vocabulary(self, ids: list[int]) -> tuple[int, ...]:
        size = self.engine.spec.vocab_size
        if ids and max(ids) >= size:
            raise UserError(
                f"{self.chat.where}: the tokenizer gives token id {max(ids):,}, but the weights have {size:,} tokens "
                f"(vocab_size in config.json); use the tokenizer that belongs to the weights"
            )
        return tuple(ids)

    def _checked(self, token_ids: list[int], prompt: Prompt, sampling: SamplingParams) -> tuple[int, ...]:
        ids = self._in_vocabulary(token_ids)
        if len(ids) + sampling.max_new_tokens > self.engine.max_context:
            raise self._too_long("prompt ", len(ids), prompt, sampling)
        return ids

    def _too_long(self, which: str, length: int, prompt: Prompt, sampling: SamplingParams) -> UserError:
        context, start = self.engine.max_context, prompt.messages[-1]["content"][:40]
        remedy = (
            f"set generate.sampling.max_new_tokens to {context - length} or less, or"
            if length < context
            else "shorten it, or"
        )
        return UserError(
            f"{which}{prompt.id} ({start!r}…, from {prompt.source or 'memory'}), has {length} tokens and "
            f"max_new_tokens is {sampling.max_new_tokens}, together more than the model's context of {context}; "
            f"{remedy} leave the prompt out"
        )
