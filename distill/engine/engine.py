"""The engine: add requests, step, collect completions.

A step is: the scheduler picks the work, the batch is laid out, the model runs once, one token is drawn for every
sequence whose last token was computed, finished samples leave. Everything is offline batch work: the caller cares for
tokens per second over thousands of requests, not for the latency of one, so there is no priority. A server that streams
asks for the `progress` of its requests after each step.

Token ids in, token ids out. Templates, stop strings and detokenising are the caller's.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.engine.ahead import UNKNOWN, Ahead
from distill.engine.batch import Batch, Chunk, Wanted, build_batch, decode_batch
from distill.engine.cache import PageAllocator, PagedCache
from distill.engine.graphs import DecodeGraphs
from distill.engine.loading import Sizes, prepare
from distill.engine.model import Model
from distill.engine.mtp import Drafter, accepted
from distill.engine.numerics import Numerics
from distill.engine.options import EngineOptions
from distill.engine.results import Completion, EngineUsage, FinishReason, Progress
from distill.engine.sampler import Draw, Drawn, sample, sample_rows, stream_key
from distill.engine.scheduler import Request, Scheduler, SequenceState
from distill.engine.score import GivenIds, Scores, score
from distill.engine.update import HALF_WAY, RELEASED, refuse_update, release_weights, update_weights
from distill.engine.work import Work


class Engine:
    """A loaded model and its queue. Not thread-safe.

    Attributes: spec. numerics: what produces the numbers, part of a trace's fingerprint. max_context: tokens of prompt
    and completion together. usage: running totals.
    """

    def __init__(self, model: Model, numerics: Numerics, sizes: Sizes) -> None:
        weight = model.weights.embed_vc
        self.spec, self.numerics, self.max_context = model.spec, numerics, sizes.max_context
        self._prompt_tokens = self._completion_tokens = 0
        self._model, self._device, self._page_size = model, weight.device, sizes.page_size
        self._pages = PageAllocator(-(-sizes.cache_tokens // sizes.page_size), sizes.page_size)
        layers, pages = model.spec.num_layers + (sizes.drafts > 0), self._pages.num_pages
        # One page more than is handed out, for rows of a graph that belong to no sequence.
        form = sizes.page_size, sizes.cache_dtype, weight.device, sizes.slots
        self._cache = PagedCache(model.spec, model.ops, layers, pages + sizes.graphs, *form)
        self._slots = PageAllocator(sizes.slots, 1) if sizes.slots else None
        longest = min(sizes.max_context, pages * sizes.page_size)
        self._ahead = (
            Ahead(DecodeGraphs(model, self._cache, sizes.page_size, pages, longest, sizes.max_batch))
            if sizes.graphs and not sizes.drafts
            else None
        )
        self._scheduler = Scheduler(self._pages, sizes.max_batch, sizes.max_step_tokens, sizes.drafts, self._slots)
        self._drafter = Drafter(model, self._cache, self._batch) if sizes.drafts else None
        self._unfinished: dict[str, int] = {}  # request id → samples still to come
        self._progress: list[Progress] = []
        self._unusable = ""  # why the weights cannot be used, where they cannot

    @classmethod
    def load(cls, model_dir: Path | str, options: EngineOptions = EngineOptions()) -> Engine:  # noqa: B008  it is frozen
        """Load a published model directory (config.json and safetensors).

        Errors: ValueError, one line naming the file or the option and the remedy, for a directory that is incomplete,
        damaged or unsupported, and for options that the model or the machine does not allow.
        """
        return cls(*prepare(model_dir, options))

    def add(self, request: Request) -> None:
        """Queue a request. Errors: ValueError, with lengths and remedy, for a request that can never be served."""
        self._check_usable()
        prompt, new = len(request.prompt_ids), request.sampling.max_new_tokens
        what = f"request {request.id!r}"
        if request.id in self._unfinished:
            raise ValueError(f"{what} is already queued; give each request its own id")
        if not request.samples or len(set(request.samples)) < len(request.samples) or min(request.samples) < 0:
            raise ValueError(f"{what} asks for samples {request.samples}; name each sample number (0, 1, …) once")
        self._check_tokens(request.prompt_ids, what)
        if prompt + new > self.max_context:
            fix = (
                f"lower max_new_tokens to {self.max_context - prompt} or shorten the prompt"
                if prompt < self.max_context
                else "shorten the prompt or leave it out"
            )
            raise ValueError(
                f"{what} has a prompt of {prompt} tokens and may generate {new}, more than the context of "
                f"{self.max_context}; {fix}"
            )
        # The last token is never cached; one page more, because a prompt's partial page may be held by a sibling.
        if self._pages.pages_for(prompt + new - 1) + 1 > self._pages.num_pages:
            raise ValueError(
                f"{what} may need {prompt + new} tokens of cache, there are {self._pages.num_pages * self._page_size}; "
                f"raise memory_budget or lower max_new_tokens"
            )
        self._unfinished[request.id] = len(request.samples)
        self._scheduler.add(request)

    @property
    def usage(self) -> EngineUsage:
        """Tokens so far."""
        proposed, accepted = (self._drafter.proposed, self._drafter.accepted) if self._drafter else (0, 0)
        return EngineUsage(self._prompt_tokens, self._completion_tokens, proposed, accepted)

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return self._scheduler.has_work

    def close(self) -> None:
        """Nothing: memory is released with the object. Several engines (`Engines`) end their processes here."""

    def abort(self, request_id: str, sample: int | None = None) -> list[Completion]:
        """Drop a request, or one sample of it whose first token is drawn, and free its pages. Returns what there is of
        each dropped sample, with the reason `abort`; completions already returned stay valid. Unknown ids are ignored.
        """
        dropped: list[Completion] = []
        for sequence in list(self._scheduler.of_request(request_id)):
            if sequence.sample is None and sample is None:  # its prompt is not computed yet
                top = sequence.alternatives(slice(0))
                dropped += [Completion(request_id, n, (), "abort", (), top) for n in sequence.request.samples]
                self._scheduler.remove(sequence)
                del self._unfinished[request_id]
            elif sequence.sample is not None and sample in (None, sequence.sample):
                while sequence.tokens[-1] == UNKNOWN:
                    sequence.tokens.pop()
                dropped.append(self._complete(sequence, "abort"))
        return dropped

    def progress(self) -> list[Progress]:
        """Tokens of streamed requests that were drawn since the last call, in the order they were drawn."""
        progress, self._progress = self._progress, []
        return progress

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Run the model once over whatever can run, and return the samples that finished."""
        with self._model.ops.session():
            return self._step()

    def _step(self) -> list[Completion]:
        completions: list[Completion] = []
        if self._ahead and self._ahead.must_take_in(self._scheduler):
            completions += self._taken_in(self._ahead.take_in())
        plan = self._scheduler.schedule()
        if not (plan.decode or plan.prefill):
            return completions
        self._cache.copy_pages(plan.copies)
        self._cache.copy_slots(plan.slot_copies)
        if not (plan.prefill or self._drafter or self._ahead or self.spec.indexer) and all(
            sequence.request.sampling.thinking_budget is None for sequence in plan.decode
        ):
            return self._decode(plan.decode)
        drafts: list[list[int]] = [[] for _ in plan.decode]
        if self._drafter:
            drafts = self._drafter.draft(plan.decode, [self._scheduler.drafts_for(s) for s in plan.decode])
        # A prompt's tokens are computed in chunks, generated ones as rows that decode, however many are missing: the
        # two forms of attention round differently, and a recomputed sequence must come out as it did before.
        decode: list[Chunk] = []
        prefill: list[Chunk] = []
        ends: list[bool] = []  # whether the last token of a chunk is one that another is drawn after
        work: list[Work] = []
        prefilled = 0
        for sequence, ids in [
            *((s, [s.tokens[-1], *d]) for s, d in zip(plan.decode, drafts, strict=True)),
            *((s, s.tokens[s.computed : s.computed + count]) for s, count in plan.prefill),
        ]:
            begin, prompt = sequence.computed, len(sequence.request.prompt_ids)
            split = min(max(prompt - begin, 0), len(ids))
            decoded = slice(len(decode), len(decode) + len(ids) - split)
            if split:
                prefill.append(Chunk(ids[:split], begin, sequence.pages, sequence.slot))
                ends.append(split == len(ids) == sequence.missing)
            kept = split if self._drafter else int(split > 0 and ends[-1])
            work.append(Work(sequence, ids, decoded, slice(prefilled, prefilled + kept)))
            prefilled += kept
            held = sequence.pages, sequence.slot
            decode += [Chunk(ids[i : i + 1], begin + i, *held) for i in range(split, len(ids))]
        if self._ahead and not prefill and len(decode) == len(plan.decode) and self._ahead.serve(plan.decode):
            return completions + self._taken_in(self._ahead.decode(plan.decode, decode, self._draws(work, [])))
        hidden_rc = self._forward(decode, prefill, None if self._drafter else ends)
        decoded_tc, prefilled_rc = hidden_rc.split((len(decode), prefilled))
        decoding, rest = work[: len(plan.decode)], work[len(plan.decode) :]
        for item in rest:
            item.sequence.computed += len(item.ids)
        if self._drafter:
            self._drafter.follow([(item.sequence, item.rows(decoded_tc, prefilled_rc)) for item in rest])
        ready = [item for item in rest if item.sequence.missing == 0]
        last = [item.rows(decoded_tc, prefilled_rc)[-1:] for item in ready]
        if decoding or ready:
            # The rows that decode are the first ones, unless a sequence is being recomputed beside them.
            rows = sum(len(item.ids) for item in decoding)
            logits = self._model.logits(torch.cat((decoded_tc[:rows], *last)))
            drawn = iter(sample(self._model.ops, logits, self._draws(decoding, ready)))
            for item in decoding:
                completions += self._continue(item, [next(drawn) for _ in item.ids], decoded_tc[item.decoded])
            for item in ready:
                completions += self._begin(item.sequence, drawn)
        return completions

    def generate(self, requests: Iterable[Request], deadline: float = math.inf) -> Iterator[Completion]:
        """Completions of `requests`, as they finish. Requests are pulled only as fast as they can be started, so an
        endless iterable is fine. Completions of requests queued by `add` come along; closing the generator aborts only
        its own. deadline: `time.monotonic()` after which no further step begins, and unfinished requests are aborted.
        """
        source = iter(requests)
        mine: set[str] = set()
        exhausted = False
        try:
            while True:
                while not exhausted and len(self._scheduler.waiting) < self._scheduler.max_batch:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                    else:
                        self.add(request)
                        mine.add(request.id)
                if (exhausted and not mine) or time.monotonic() >= deadline:
                    return
                for completion in self.step():
                    if completion.request_id in mine and completion.request_id not in self._unfinished:
                        mine.remove(completion.request_id)
                    yield completion
        finally:
            for request_id in mine:
                self.abort(request_id)

    @torch.inference_mode()
    def score(
        self,
        sequences: Sequence[Sequence[int]],
        top_k: int = 0,
        ids: GivenIds | None = None,
        after: Sequence[int] | None = None,
    ) -> list[Scores]:
        """Raw log-probabilities of given tokens, one `Scores` per sequence. top_k: likeliest alternatives to list too.

        after[i]: how many tokens at the beginning of sequence i are not scored, at least 1, which is the default.
        ids[i][t]: further tokens to list among the alternatives at position t of `Scores`, those that may follow the
        first after[i] + t tokens of sequence i. Each alternative is listed once, likeliest first.
        ValueError for an empty or too long sequence, for ids outside the vocabulary or of another number of positions,
        or while generation leaves too few pages free for a sequence.
        """
        self._check_usable()
        for number, tokens in enumerate(sequences):
            self._check_tokens(tokens, f"sequence {number}")
            if len(tokens) > self.max_context:
                raise ValueError(
                    f"sequence {number} has {len(tokens)} tokens, more than the context of "
                    f"{self.max_context}; shorten it"
                )
        budget, memory = self._scheduler.max_step_tokens, (self._pages, self._slots)
        with self._model.ops.session():
            forward = lambda chunks: self._forward([], chunks)  # noqa: E731
            return score(sequences, top_k, ids, after or [1] * len(sequences), budget, *memory, forward, self._model)

    def update(self, tensor: Callable[[str], Tensor]) -> None:
        """Replace all weights in place, where they are in memory (update.py). `numerics` follows their dtype.

        tensor: returns a tensor by its published (Hugging Face) name, on any device, in float32, bfloat16 or float16.
        It is called once a name, one at a time, in an order that depends on the model alone, and what it returns is
        not kept. No key or value of a prompt computed before is used after.
        Errors, before anything is replaced: ValueError while requests are queued, and for a model that has experts,
        latent attention or FP8 weights. ValueError for a tensor of another shape or dtype, or with a number that is
        not finite: then, and when `tensor` raises, some weights are new and others old, and until an update succeeds
        `add` and `score` raise ValueError.
        """
        refuse_update(self._model, len(self._unfinished))
        self._unusable = HALF_WAY
        self.numerics = replace(self.numerics, weights=update_weights(self._model, tensor))
        self._unusable = ""

    def release(self) -> None:
        """Give the memory of weights and cache back until the next `update`; before it `add` and `score` raise
        ValueError. On a GPU the memory stays. Errors: as `update`, before anything is replaced."""
        refuse_update(self._model, len(self._unfinished))
        self._unusable = RELEASED
        release_weights(self._model)
        self._cache.discard()

    def _check_usable(self) -> None:
        if self._unusable:
            raise ValueError(self._unusable)

    def _check_tokens(self, tokens: Sequence[int], what: str) -> None:
        if not tokens:
            raise ValueError(f"{what} has no tokens; a prompt needs at least one (the beginning-of-text token)")
        if min(tokens) < 0 or max(tokens) >= self.spec.vocab_size:
            raise ValueError(
                f"{what} has token ids from {min(tokens)} to {max(tokens)}, the vocabulary has {self.spec.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )

    def _forward(self, decode: list[Chunk], prefill: list[Chunk], ends: list[bool] | None = None) -> Tensor:
        """Hidden states of all tokens; with `ends`, of decoding tokens and the last one of chunks it is true for."""
        batch, wanted = self._batch(decode, prefill), None
        if ends is not None and prefill:
            rows, row = list(range(len(decode))), len(decode)
            for chunk, end in zip(prefill, ends, strict=True):
                row += len(chunk.ids)
                rows += [row - 1] * end
            ended = itertools.compress(prefill, ends)
            last = [replace(chunk, ids=chunk.ids[-1:], start=chunk.end - 1) for chunk in ended]
            wanted = Wanted(torch.tensor(rows, dtype=torch.int64, device=self._device), self._batch(decode, last))
        return self._model.forward(batch, self._cache, wanted)

    def _batch(self, decode: list[Chunk], prefill: list[Chunk]) -> Batch:
        return build_batch(decode, prefill, self._page_size, self.spec, self._device)

    def _draws(self, decoding: list[Work], ready: list[Work]) -> list[Draw]:
        """For the next token of every row of `decoding` and of every sequence in `ready` (of a trunk: each sample's
        first), in this order."""
        draws: list[Draw] = []
        row = 0
        for item in decoding:
            sequence = item.sequence
            for i in range(len(item.ids)):
                forced = sequence.forced(item.ids[1 : i + 1])
                draws.append(Draw(row, sequence.key, len(sequence.tokens) + i, sequence.request.sampling, forced))
                row += 1
        for item in ready:
            sequence, request = item.sequence, item.sequence.request
            keys = (
                [stream_key(request.seed, request.prompt_key, number) for number in request.samples]
                if sequence.sample is None
                else [sequence.key]
            )
            forced = sequence.forced([])
            draws += [Draw(row, key, len(sequence.tokens), request.sampling, forced) for key in keys]
            row += 1
        return draws

    def _decode(self, sequences: Sequence[SequenceState]) -> list[Completion]:
        """A step that is one token of each of these sequences, none of them forced: most of the steps on a processor,
        where an object for every row would take as long as a small model."""
        lengths = [len(s.tokens) for s in sequences]
        batch = decode_batch(
            [s.tokens[-1] for s in sequences],
            [length - 1 for length in lengths],
            [s.pages for s in sequences],
            [s.slot for s in sequences],
            self._page_size,
            self.spec,
            self._device,
        )
        logits_bv = self._model.logits(self._model.forward(batch, self._cache))
        drawn = sample_rows(
            self._model.ops, logits_bv, [s.key for s in sequences], lengths, [s.request.sampling for s in sequences]
        )
        completions: list[Completion] = []
        self._completion_tokens += len(sequences)
        for sequence, length, token, logprob, top in zip(sequences, lengths, *drawn, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if top is not None:
                sequence.tops.append(top)
            sequence.computed += 1
            if sequence.request.streamed:
                self._report(sequence, length + 1, 1)
            if reason := _finished(sequence, length + 1):
                completions.append(self._complete(sequence, reason))
        return completions

    def _continue(self, item: Work, drawn: list[Drawn], hidden_tc: Tensor | None = None) -> list[Completion]:
        """Append the drawn tokens of a sequence that decodes, as far as its drafts are accepted.

        hidden_tc: its states, for the draft layer."""
        sequence, drafts = item.sequence, item.ids[1:]
        count, reason = 0, None
        while count < accepted(drafts, [token.token for token in drawn]) and not reason:
            sequence.append(drawn[count])
            count += 1
            reason = _finished(sequence, len(sequence.tokens))
        sequence.computed += count
        self._completion_tokens += count
        self._report(sequence, len(sequence.tokens), count)
        if self._drafter:
            self._drafter.accepted += count - 1
            assert hidden_tc is not None
            sequence.hidden = hidden_tc[:count].clone()
        return [self._complete(sequence, reason)] if reason else []

    def _begin(self, sequence: SequenceState, drawn: Iterator[Drawn]) -> list[Completion]:
        """The first tokens of a prompt's samples, or the next one of a sample that was recomputed."""
        if sequence.sample is None:
            self._prompt_tokens += len(sequence.tokens)
            states = self._scheduler.fork(sequence, [next(drawn) for _ in sequence.request.samples])
        else:
            sequence.append(next(drawn))
            states = [sequence]
        self._completion_tokens += len(states)
        for state in states:
            self._report(state, len(state.tokens), 1)
        return [self._complete(state, reason) for state in states if (reason := _finished(state, len(state.tokens)))]

    def _taken_in(self, known: Iterator[tuple[SequenceState, int]]) -> list[Completion]:
        """Completions among the sequences that just received a token, given with how many tokens are known."""
        completions = []
        for sequence, length in known:
            self._completion_tokens += 1
            self._report(sequence, length, 1)
            if reason := _finished(sequence, length):
                del sequence.tokens[length:]
                completions.append(self._complete(sequence, reason))
        return completions

    def _report(self, state: SequenceState, length: int, count: int) -> None:
        """Note the last `count` of a sequence's first `length` tokens, where its request is streamed."""
        if not (count and state.request.streamed):
            return
        assert state.sample is not None
        end = length - len(state.request.prompt_ids)
        top = state.alternatives(slice(end - count, end))
        ids, logprobs = tuple(state.tokens[length - count : length]), tuple(state.logprobs[end - count : end])
        self._progress.append(Progress(state.request.id, state.sample, ids, logprobs, top))

    def _complete(self, state: SequenceState, reason: FinishReason) -> Completion:
        request = state.request
        self._scheduler.remove(state)
        self._unfinished[request.id] -= 1
        if self._unfinished[request.id] == 0:
            del self._unfinished[request.id]
        assert state.sample is not None
        return Completion(
            request_id=request.id,
            sample=state.sample,
            token_ids=tuple(state.tokens[len(request.prompt_ids) :]),
            finish_reason=reason,
            logprobs=tuple(state.logprobs),
            top=state.alternatives(),
        )


def _finished(state: SequenceState, length: int) -> FinishReason | None:
    """Whether the last of its first `length` tokens ends it."""
    sampling = state.request.sampling
    if state.tokens[length - 1] in sampling.stop_token_ids:
        return "stop"
    if length - len(state.request.prompt_ids) >= sampling.max_new_tokens:
        return "length"
    return None
