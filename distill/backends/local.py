"""The local engine as a backend: messages in, text out.

The engine knows token ids only. Here templates are applied, the prefilled `<think>` is put back, and prompts get
their key for the random draws: the hash in the prompt's id, so that a sample's text depends on (seed, prompt, sample)
and not on what else is in the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.backends import Completed, Job, Sampling
from distill.chat import Chat
from distill.errors import UserError, WorkError
from distill.fingerprint import digest, weights_hash
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.engine import Completion, Engine, Engines, Request


class LocalBackend:
    """A model directory, loaded. `identity` is known without loading (`identify`), for stages that are finished."""

    def __init__(self, engine: "Engine | Engines", chat: Chat, identity: dict[str, Any]) -> None:
        self.engine = engine
        self.chat = chat
        self.identity = identity

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        chat_template: str | None = None,
        thinking: bool | None = None,
        max_batch: int = 128,
        dtype: str = "float32",
        memory_budget: float | None = None,
        num_speculative_tokens: int = 0,
        device: str = "auto",
        kv_cache_dtype: str = "auto",
        data_parallel_size: int | None = None,
    ) -> "LocalBackend":
        """Load a model directory. thinking: the template's mode (`distill.chat`). memory_budget: in GiB, of each
        device. data_parallel_size: engines side by side, each with the whole model (None: one on each GPU, or one).
        UserError, with file and fix, when the directory is incomplete, damaged or unsupported, or the budget too
        small."""
        import torch

        from distill.engine import Engine, Engines, ModelSpec
        from distill.engine.device import devices_for

        try:  # config and tokenizer first: what they refuse is not worth loading weights for
            ModelSpec.from_dir(model_dir)
            chat = Chat.load(model_dir, chat_template, thinking)
            devices = devices_for(None if device == "auto" else device, data_parallel_size)
            options: dict[str, Any] = {
                "dtype": getattr(torch, dtype),
                "max_batch": max_batch,
                "memory_budget": None if memory_budget is None else int(memory_budget * 2**30),
                "num_speculative_tokens": num_speculative_tokens,
                "kv_cache_dtype": kv_cache_dtype,
            }
            engine = (
                Engine.load(model_dir, device=devices[0], **options)
                if len(devices) == 1
                else Engines.load(model_dir, devices, **options)
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(engine, chat, identify(model_dir, chat_template, thinking) | {"numerics": engine.numerics})

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
            raise UserError(str(error)) from error
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


def identify(model_dir: Path, chat_template: str | None = None, thinking: bool | None = None) -> dict[str, Any]:
    """What the fingerprint of a stage says of a model: its weights, the template when it is not its own, and the
    template's mode where one was chosen."""
    from distill.chat import read_template

    template = digest(read_template(chat_template)) if chat_template else "own"
    mode = {} if thinking is None else {"thinking": thinking}
    return {"weights": weights_hash(model_dir), "chat_template": template} | mode
