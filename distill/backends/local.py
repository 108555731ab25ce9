"""The local engine as a backend: messages in, text out.

Prompts get their key for the random draws here: the hash in the prompt's id, so that a sample's text depends on (seed,
prompt, sample) and not on what else is in the batch. What does not depend on the engine is in `directory.py`.
"""

import gc
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import tee
from typing import TYPE_CHECKING

from distill.backends.backend import Completed, GivenIds, Job, Usage
from distill.backends.budget import Allowance
from distill.backends.directory import DirectoryBackend, with_tokens
from distill.engine.options import EngineOptions, SamplingParams
from distill.errors import UserError, WorkError
from distill.models import Model
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine

if TYPE_CHECKING:
    from torch import Tensor

    from distill.engine import Completion, Engine, Engines, Request
    from distill.engine.score import Scores

GIB = 1 << 30


def options_of(settings: LocalEngine, max_batch: int) -> EngineOptions:
    """A recipe's `engine:` as the options of one engine."""
    return EngineOptions(
        dtype=settings.dtype,
        max_batch=max_batch,
        num_speculative_tokens=settings.num_speculative_tokens,
        memory_budget=None if settings.memory_budget is None else int(settings.memory_budget * GIB),
        kv_cache_dtype=settings.kv_cache_dtype,
    )


class LocalBackend(DirectoryBackend):
    """A model directory, loaded. engine: for tests and measurements; everything else uses the protocol."""

    def __init__(self, engine: "Engine | Engines", model: Model) -> None:
        super().__init__(model)
        self.engine = engine

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
    def numerics(self) -> Mapping[str, str]:
        """Kernels, precision and cache (`distill.engine.numerics`)."""
        return self.engine.numerics.to_json()

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion together."""
        return self.engine.max_context

    @property
    def more_context(self) -> str:
        """See `DirectoryBackend`."""
        if self.max_context == (longest := self.engine.spec.max_context):
            return ""
        return f" (the cache has room for no more; with a larger engine.memory_budget it is up to {longest})"

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.engine.spec.vocab_size

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
            made = (done.token_ids, done.finish_reason, done.logprobs, done.top)
            yield self._completed(prompt, done.sample, ids, *made)

    def _token_scores(
        self, sequences: Sequence[Sequence[int]], top_k: int, ids: GivenIds | None, after: Sequence[int]
    ) -> "Iterable[Scores]":
        from distill.engine import Engine

        assert isinstance(self.engine, Engine), "several engines sample, one scores"
        return self.engine.score(sequences, top_k, ids, after)

    def _finished(self, requests: "Iterable[Request]", deadline: float) -> "Iterator[Completion]":
        from distill.engine import EngineDied, NonFiniteLogits

        try:
            yield from self.engine.generate(requests, deadline)
        except NonFiniteLogits as error:
            raise UserError(f"{self.model.directory}: {error}") from error
        except EngineDied as error:
            raise WorkError(f"{error}; finished samples are stored, run the same command to continue") from error
