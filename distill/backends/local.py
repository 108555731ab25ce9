"""The local engine as a backend: messages in, text out.

The engine knows token ids only. Here templates are applied, the prefilled `<think>` is put back, and prompts get
their key for the random draws: the hash in the prompt's id, so that a sample's text depends on (seed, prompt, sample)
and not on what else is in the batch.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from distill.backends import Completed, Job, Sampling, Usage
from distill.errors import UserError, WorkError
from distill.models import Model
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.engine import Completion, Engine, Engines, Request


class LocalBackend:
    """A model directory, loaded."""

    def __init__(self, engine: "Engine | Engines", model: Model) -> None:
        self.engine = engine
        self.model = model
        self.chat = model.chat

    @classmethod
    def load(cls, model: Model, settings: LocalEngine, max_batch: int = 128) -> "LocalBackend":
        """Load a model directory. UserError, with file and fix, when it is incomplete, damaged or unsupported, or the
        memory budget too small."""
        import torch

        from distill.engine import Engine, Engines, ModelSpec
        from distill.engine.device import devices_for

        directory, budget = model.directory, settings.memory_budget
        try:  # config and tokenizer first: what they refuse is not worth loading weights for
            ModelSpec.from_dir(directory)
            model.chat  # noqa: B018  loads the tokenizer
            device = None if settings.device == "auto" else settings.device
            devices = devices_for(device, settings.data_parallel_size)
            options: dict[str, Any] = {
                "dtype": getattr(torch, settings.dtype),
                "max_batch": max_batch,
                "memory_budget": None if budget is None else int(budget * 2**30),
                "num_speculative_tokens": settings.num_speculative_tokens,
                "kv_cache_dtype": settings.kv_cache_dtype,
            }
            engine = (
                Engine.load(directory, device=devices[0], **options)
                if len(devices) == 1
                else Engines.load(directory, devices, **options)
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(engine, model)

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """Weights, template and mode."""
        return self.model.identity

    @property
    def numerics(self) -> Mapping[str, str]:
        """What produces the numbers."""
        return {"engine": self.engine.numerics}

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion together."""
        return self.engine.max_context

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.engine.prompt_tokens, self.engine.tokens_generated, self.engine.drafts)

    def close(self) -> None:
        """Drop the engine."""
        del self.engine
        gc.collect()

    def check(self, prompts: Iterable[Prompt], sampling: Sampling) -> None:
        """UserError when a prompt and its completion do not fit into the model's context; it names the longest."""
        sized = [(len(self.chat.prompt_ids(prompt.messages)), prompt) for prompt in prompts]
        room = self.engine.max_context - sampling.max_new_tokens
        if too_long := sum(length > room for length, _ in sized):
            longest = max(sized, key=lambda one: one[0])
            which = f"{too_long:,} of {len(sized):,} prompts do not fit; the longest, "
            raise self._too_long(which, *longest, sampling)

    def complete(self, jobs: Iterable[Job], sampling: Sampling, seed: int) -> Iterator[Completed]:
        """Yield every wanted sample once, as it finishes. Pulls jobs only as fast as they can be started."""
        from distill.engine import Request, SamplingParams

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=self.chat.stop_token_ids,
            logprobs=sampling.logprobs,
        )
        running: dict[str, tuple[Prompt, tuple[int, ...], int]] = {}  # prompt, its token ids, samples still to come

        def requests() -> Iterator[Request]:
            for job in jobs:
                ids = self._checked_ids(job.prompt, sampling)
                running[job.prompt.id] = (job.prompt, ids, len(job.samples))
                yield Request(job.prompt.id, ids, params, seed, int(job.prompt.id, 16), job.samples)

        for done in self._finished(requests()):
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
                top_logprobs=done.top_logprobs,
            )

    def score(self, traces: Sequence[Trace], top_k: int) -> list[Trace]:
        """The traces with this model's log-probabilities of their tokens, and of its `top_k` likeliest at each.

        Tokens that this model sampled are taken as they are; a text of somebody else's is tokenised and ends with this
        model's end token. UserError where one is longer than the context.
        """
        from distill.engine import Engine

        assert isinstance(self.engine, Engine), "several engines sample, one scores"
        prompts = [self.chat.prompt_ids(trace.prompt.messages) for trace in traces]
        completions = [self._completion_ids(trace) for trace in traces]
        try:
            scores = self.engine.score([p + c for p, c in zip(prompts, completions, strict=True)], top_k)
        except ValueError as error:
            raise UserError(str(error)) from error
        found = []
        for trace, prompt, completion, score in zip(traces, prompts, completions, scores, strict=True):
            assert score.top_logprobs is not None
            found.append(
                replace(
                    trace,
                    prompt_token_ids=tuple(prompt),
                    completion_token_ids=tuple(completion),
                    logprobs=score.logprobs[len(prompt) - 1 :],
                    top_logprobs=score.top_logprobs[len(prompt) - 1 :],
                )
            )
        return found

    def _completion_ids(self, trace: Trace) -> list[int]:
        ids = list(trace.completion_token_ids)
        if ids and max(ids) < self.engine.spec.vocab_size and self.chat.restore(self.chat.decode(ids)) == trace.text:
            return ids
        text = trace.text.removeprefix(self.chat.prefill)
        return [*self.chat.text_ids(text), self.chat.stop_token_ids[-1]]

    def _finished(self, requests: "Iterable[Request]") -> "Iterator[Completion]":
        from distill.engine import EngineDied
        from distill.engine.sampler import NonFiniteLogits

        try:
            yield from self.engine.generate(requests)
        except NonFiniteLogits as error:
            raise UserError(f"{self.model.place}: {error}") from error
        except EngineDied as error:
            raise WorkError(f"{error}; what was finished is kept, run the same command to go on") from error

    def _checked_ids(self, prompt: Prompt, sampling: Sampling) -> tuple[int, ...]:
        ids = tuple(self.chat.prompt_ids(prompt.messages))
        if len(ids) + sampling.max_new_tokens > self.engine.max_context:
            raise self._too_long("prompt ", len(ids), prompt, sampling)
        return ids

    def _too_long(self, which: str, length: int, prompt: Prompt, sampling: Sampling) -> UserError:
        context, start = self.engine.max_context, prompt.messages[-1]["content"][:40]
        fix = f"set max_new_tokens to {context - length} or less, or" if length < context else "shorten it, or"
        return UserError(
            f"{which}{prompt.id} ({start!r}…, from {prompt.source or 'memory'}), has {length} tokens and "
            f"max_new_tokens is {sampling.max_new_tokens}, together more than the model's context of {context}; "
            f"{fix} leave it out"
        )


def device_type(asked: str) -> str:
    """ "cpu" or "cuda" for a recipe's device, which may leave the choice open: part of what decides the numbers. torch
    is not asked where no GPU's driver is in sight."""
    if asked != "auto":
        return asked
    if not any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg")):
        return "cpu"
    from distill.engine.device import choose_device

    return choose_device(None).type
