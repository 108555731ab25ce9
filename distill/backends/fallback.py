"""A model directory that the engine does not compute: sampled and scored with transformers, which knows more families.

It is slower: sequences are decoded in padded batches, each of which runs until its longest sample is finished, and
every family is computed op by op. It is not another quality of samples: tokens are drawn by the engine's own sampler
from the raw logits, so that log-probabilities, sampling parameters, stop tokens and thinking budgets mean the same, and
a token's random number is that of (seed, prompt, sample, position), whatever else is in the batch. The library's
products may depend on the batch, so a sample repeats up to near-ties. What computed is in the numerics, and so in the
settings of scores.

Prompts of a batch are padded on the left, and the padding is masked. Some recurrent families (RecurrentGemma, xLSTM) do
not mask it in their recurrence, and RWKV mixes up the sequences of a batch; which families do depends on the version of
transformers. Each loaded model is therefore asked once for the logits of a prompt alone and in a batch: where padding
changes them, only prompts of equal length share a batch, and where a second prompt does, none do.

The batches are `generate` with a logits processor that draws. Rejected: `generate_batch`, the continuous batching of
transformers (5.23). It draws every request from one generator, so that a sample would depend on the requests beside it
and a resume would draw others; its logits processors do not know which request a row belongs to; and it refuses
families with recurrent layers, which are most of those that come here. Rejected, too: a loop over `forward`, which
would end samples one by one, but each family prepares its inputs and its cache in its own way, which `generate` knows.

A student in training is sampled as it is (`sharing`): there is no second copy of its weights, and nothing to update.
"""

import gc
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice, tee
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from distill import model_files
from distill.backends.backend import Completed, GivenIds, Job, Usage
from distill.backends.budget import Allowance
from distill.backends.directory import DirectoryBackend, with_tokens
from distill.engine.alternatives import Alternatives
from distill.engine.device import devices_for
from distill.engine.kernels import Ops, column_for, ops_for
from distill.engine.options import SamplingParams
from distill.engine.sampler import Draw, NonFiniteLogits, sample, stream_key
from distill.engine.score import Head, Scores, padded, scores_of
from distill.errors import UserError
from distill.models import Model
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine
from distill.traces.trace import FinishReason

MOST_SEQUENCES = 32  # of a batch: its samples are stored together, so that a kill costs no more than these
PAD = 0  # id of padding, which the attention mask hides
# token ids of prompts: one that is computed alone and beside each of the others, of its length and longer
PROBE, EQUAL, LONGER = (1, 2, 3), (3, 1, 2), (3, 2, 1, 2, 3, 1)
# difference of logits that rounding explains: its root mean square as a share of the logits'
ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LIMITS = ("max_position_embeddings", "n_positions")  # of a context, in the configs of families that have one


@dataclass
class _Sequence:
    """A sample under way. ids: of the prompt. key: of its random numbers."""

    prompt: Prompt
    sample: int
    ids: tuple[int, ...]
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Alternatives] = field(default_factory=list)
    finish_reason: FinishReason = None


class _Drawing(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed
    """Draws the next token of each sequence that is not finished; `generate` then takes the only one that is left."""

    def __init__(self, sequences: Sequence[_Sequence], params: SamplingParams, ops: Ops) -> None:
        self.sequences, self.params, self.ops = sequences, params, ops

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Errors: NonFiniteLogits."""
        live = [row for row, sequence in enumerate(self.sequences) if sequence.finish_reason is None]
        draws = [self._draw(row, self.sequences[row]) for row in live]
        chosen = [PAD] * len(self.sequences)
        for row, drawn in zip(live, sample(self.ops, scores.float(), draws) if draws else (), strict=True):
            sequence, chosen[row] = self.sequences[row], drawn.token
            sequence.tokens.append(drawn.token)
            sequence.logprobs.append(drawn.logprob)
            if drawn.top is not None:
                sequence.tops.append(drawn.top)
            if drawn.token in self.params.stop_token_ids:
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) == self.params.max_new_tokens:
                sequence.finish_reason = "length"
        alone = torch.full_like(scores, -torch.inf)
        return alone.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)

    def _draw(self, row: int, sequence: _Sequence) -> Draw:
        position = len(sequence.ids) + len(sequence.tokens)
        return Draw(row, sequence.key, position, self.params, self.params.forced(sequence.tokens))


class _Finished(StoppingCriteria):  # type: ignore[misc]  # transformers is not followed
    """Which sequences are finished; all of them once the deadline has passed."""

    def __init__(self, sequences: Sequence[_Sequence], deadline: float) -> None:
        self.sequences, self.deadline = sequences, deadline

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        late = time.monotonic() >= self.deadline
        finished = [late or sequence.finish_reason is not None for sequence in self.sequences]
        return torch.tensor(finished, device=input_ids.device)


class TransformersBackend(DirectoryBackend):
    """A causal language model of transformers. Create it with `load` or `sharing`.

    autocast: dtype of the forward pass where the weights are float32. owned: whether the module is this backend's, else
    a trainer's, which finds it as it was.
    """

    def __init__(
        self, model: Model, module: PreTrainedModel, max_batch: int, autocast: torch.dtype | None, owned: bool
    ) -> None:
        super().__init__(model)
        self.module, self.owned = module, owned
        self._autocast = autocast
        self._batch = min(max_batch, MOST_SEQUENCES)
        self._attention = module.get_correct_attn_implementation(None)
        self._ops = ops_for(column_for(module.device.type))
        self._parameters = signature(module)
        self._prompt_tokens = self._completion_tokens = 0

    @classmethod
    def load(cls, model: Model, engine: LocalEngine, max_batch: int) -> "TransformersBackend":
        """Load a model directory. Of `engine` the device and the dtype count.

        Errors: UserError for files that are missing or that transformers cannot load.
        """
        model.chat  # noqa: B018  what the tokenizer refuses is not worth loading weights for
        try:
            device = devices_for(None if engine.device == "auto" else engine.device, engine.data_parallel_size)[0]
        except ValueError as error:
            raise UserError(str(error)) from error
        dtype = torch.float32 if engine.dtype == "float32" else torch.bfloat16
        module = loaded(model.directory, dtype=dtype)
        return cls(model, module.to(device).eval(), max_batch, None, owned=True)

    @classmethod
    def sharing(
        cls, model: Model, module: PreTrainedModel, max_batch: int, autocast: torch.dtype | None
    ) -> "TransformersBackend":
        """A student as its trainer holds it."""
        return cls(model, module, max_batch, autocast, owned=False)

    def update(self, tensor: Callable[[str], Tensor]) -> None:
        """See `TrainedBackend`. The weights are the trainer's own."""
        assert not self.owned, "a model of its own is not trained"

    def release(self) -> None:
        """See `TrainedBackend`. The weights stay the trainer's."""

    @property
    def numerics(self) -> Mapping[str, str]:
        """transformers, its version, its attention and the dtypes."""
        dtype = str(self._autocast or self.module.dtype).removeprefix("torch.")
        return {
            "kernels": "transformers",
            "transformers": transformers.__version__,
            "attention": self._attention,
            "matrix_products": "library",
            "weights": str(self.module.dtype).removeprefix("torch."),
            "activations": dtype,
            "cache": dtype,
        }

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and completion together; None for a family without a limit."""
        config = self.module.config
        return next((size for name in LIMITS if isinstance(size := getattr(config, name, None), int)), None)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        size = self.module.config.vocab_size
        assert isinstance(size, int)
        return size

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, self._completion_tokens)

    def close(self) -> None:
        """Drop the model and its memory."""
        del self.module
        gc.collect()

    def complete(
        self, jobs: Iterable[Job], sampling: SamplingParams, seed: int, allowance: Allowance | None = None
    ) -> Generator[Completed, None, None]:
        """Yield every wanted sample once, a batch at a time. Pulls the jobs of one batch at a time.

        allowance: as of `Backend.complete`; a step that is under way at its deadline is finished.

        Errors: UserError for a prompt that is too long, and where the model computes numbers that are not finite.
        """
        params = with_tokens(sampling, self.chat)
        deadline = allowance.deadline if allowance else math.inf
        batches = self._batches(self._sequences(jobs, sampling, seed))
        while time.monotonic() < deadline and (batch := next(batches, None)):
            try:
                self._generate(batch, params, deadline)
            except NonFiniteLogits as error:
                raise UserError(f"{self.model.directory}: {error}") from error
            for each in batch:
                if each.finish_reason is None:  # the deadline has passed
                    continue
                top = Alternatives.joined(each.tops) if params.logprobs else None
                made = (tuple(each.tokens), each.finish_reason, tuple(each.logprobs), top)
                yield self._completed(each.prompt, each.sample, each.ids, *made)

    def _sequences(self, jobs: Iterable[Job], sampling: SamplingParams, seed: int) -> Iterator[_Sequence]:
        to_start, to_render = tee(jobs)
        rendered = self.chat.prompts_ids(job.prompt.messages for job in to_render)
        for job, token_ids in zip(to_start, rendered, strict=True):
            ids = self._checked(token_ids, job.prompt, sampling)
            self._prompt_tokens += len(ids)
            for number in job.samples:
                yield _Sequence(job.prompt, number, ids, stream_key(seed, int(job.prompt.id, 16), number))

    def _batches(self, sequences: Iterator[_Sequence]) -> Iterator[list[_Sequence]]:
        """The sequences that are decoded together."""

        def length(sequence: _Sequence) -> int:
            return len(sequence.ids)

        while batch := list(islice(sequences, self._batch)):
            if len(batch) > 1 and not self._batches_alike:
                yield from ([each] for each in batch)
            elif len(set(map(length, batch))) > 1 and not self._pads_alike:
                yield from (list(group) for _, group in groupby(sorted(batch, key=length), length))
            else:
                yield batch

    @cached_property
    def _batches_alike(self) -> bool:
        """Whether a prompt has the same logits in a batch of prompts of its length as alone."""
        return self._alike(EQUAL)

    @cached_property
    def _pads_alike(self) -> bool:
        """Whether a prompt has the same logits padded as alone."""
        return self._alike(LONGER)

    def _alike(self, other: Sequence[int]) -> bool:
        """Whether the logits of PROBE and of the token after it are the same beside another prompt, up to rounding."""
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=2,
            pad_token_id=PAD,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        alone_sv, beside_sv = (
            torch.stack(self._decode(prompts, generation_config=settings).logits)[:, 0].float()
            for prompts in ([PROBE], [PROBE, other])
        )
        spread = (alone_sv - alone_sv.mean(-1, keepdim=True)).norm()
        tolerance = ROUNDING[self._autocast or self.module.dtype]
        return bool((alone_sv - beside_sv).norm() <= tolerance * spread)

    def _generate(self, batch: Sequence[_Sequence], params: SamplingParams, deadline: float) -> None:
        """Draw the tokens of a batch. Errors: NonFiniteLogits."""
        self._decode(
            [each.ids for each in batch],
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=params.max_new_tokens, pad_token_id=PAD, use_cache=True
            ),
            logits_processor=LogitsProcessorList([_Drawing(batch, params, self._ops)]),
            stopping_criteria=StoppingCriteriaList([_Finished(batch, deadline)]),
        )
        self._completion_tokens += sum(len(each.tokens) for each in batch)

    def _decode(self, prompts: Sequence[Sequence[int]], **arguments: Any) -> Any:
        """What `generate` returns of prompts, which are padded on the left."""
        width = max(map(len, prompts))
        ids_bw = torch.tensor([[PAD] * (width - len(ids)) + list(ids) for ids in prompts])
        mask_bw = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        device = self.module.device
        with self._sampling():
            return self.module.generate(ids_bw.to(device), attention_mask=mask_bw.to(device), **arguments)

    @torch.no_grad()
    def _token_scores(
        self, sequences: Sequence[Sequence[int]], top_k: int, ids: GivenIds | None, after: Sequence[int]
    ) -> list[Scores]:
        context = self.max_context
        for number, tokens in enumerate(sequences):
            if context is not None and len(tokens) > context:
                raise ValueError(
                    f"sequence {number} has {len(tokens)} tokens, more than the context of {context}; shorten it"
                )
        counts = [len(tokens) - first for tokens, first in zip(sequences, after, strict=True)]
        given = padded(ids, counts, self.vocab_size)
        head, scores = Head(Tensor.float, self.vocab_size, self._ops), list[Scores]()
        with self._sampling():
            for tokens, count, given_tm in zip(sequences, counts, given, strict=True):
                logits_tv = self._logits(tokens, count + 1)
                scores += scores_of([logits_tv[:-1]], [tokens[len(tokens) - count :]], top_k, [given_tm], head)
        return scores

    def _logits(self, tokens: Sequence[int], last: int) -> Tensor:
        """The logits at the last positions of one sequence, [last, v]."""
        ids_1t = torch.tensor([list(tokens)], device=self.module.device)
        kept = {"logits_to_keep": last} if "logits_to_keep" in self._parameters else {}
        logits_tv: Tensor = self.module(input_ids=ids_1t, use_cache=False, **kept).logits[0, -last:]
        return logits_tv

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """The module as it samples: no dropout, attention with a mask, no settings of the directory's
        `generation_config.json`, which would change the logits. A trainer's module is put back as it was."""
        module = self.module
        training, defaults, attention = module.training, module.generation_config, module.config._attn_implementation
        module.eval()
        module.generation_config = GenerationConfig()
        if attention != self._attention:
            module.set_attn_implementation(self._attention)
        try:
            with torch.autocast(module.device.type, dtype=self._autocast, enabled=self._autocast is not None):
                yield
        finally:
            module.train(training)
            module.generation_config = defaults
            if attention != self._attention:
                module.set_attn_implementation(attention)


def signature(module: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments of a model's forward pass."""
    import inspect

    return frozenset(inspect.signature(module.forward).parameters)


def loaded(directory: Path, **arguments: object) -> PreTrainedModel:
    """The model of a directory, with further arguments of `from_pretrained`; every weight comes from the files.

    Errors: UserError.
    """
    if problem := model_files.first_problem(directory):
        raise UserError(problem)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it warns about is checked here
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True, **arguments
        )
    except Exception as error:  # whatever a wrong value or a damaged file leads to inside transformers
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{directory} cannot be loaded with transformers: {reason}") from error
    lacking = sorted([*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])])
    if lacking:
        listed = ", ".join(lacking[:2]) + (f" and {len(lacking) - 2} more" if len(lacking) > 2 else "")
        raise UserError(
            f"{directory}: weights that config.json expects are missing or have another shape: {listed}; download them "
            f"again"
        )
    whole: PreTrainedModel = model
    return whole


def why(model: Model) -> str:
    """One line that says why a model is sampled here, for the terminal."""
    family = model_files.read_object(model.directory / "config.json").get("model_type")
    return f"the engine does not compute models of type {family!r}: sampled with transformers, which is slower"
