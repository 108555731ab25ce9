"""Log-probabilities of given tokens: prompts that are prefilled and all of whose rows are used.

As many sequences as a step and the free pages allow are computed together; one that is longer than a step, in chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine.attention import Chunk
from distill.engine.cache import PageAllocator
from distill.engine.model import Model
from distill.engine.sampler import TopLogprobs, logprobs_of

# Hidden states become logits for so many rows × vocabulary entries at a time.
_SCORE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Scores:
    """Raw log-probabilities of tokens 1 … n-1 of a sequence, each given those before it; top_logprobs likewise."""

    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] | None


Forward = Callable[[list[Chunk]], Tensor]


def score(
    sequences: Sequence[Sequence[int]], top_k: int, budget: int, pages: PageAllocator, forward: Forward, model: Model
) -> list[Scores]:
    """One `Scores` per sequence. budget: tokens of a step. forward: hidden states of the tokens of some chunks, [t, c].

    Errors: ValueError while too few pages are free for a sequence; NonFiniteLogits.
    """
    scores: list[Scores] = []
    while len(scores) < len(sequences):
        taken = _that_fit(sequences, len(scores), budget, pages)
        held = [pages.allocate(pages.pages_for(len(tokens))) for tokens in taken]
        try:
            if len(taken) == 1:
                (tokens,), (own,) = taken, held
                starts = range(0, len(tokens), budget)
                hidden = [torch.cat([forward([Chunk(tokens[i : i + budget], i, own)]) for i in starts])]
            else:
                chunks = [Chunk(tokens, 0, own) for tokens, own in zip(taken, held, strict=True)]
                hidden = list(forward(chunks).split([len(tokens) for tokens in taken]))
            scores += [
                _scores(hidden_tc, tokens, top_k, model) for hidden_tc, tokens in zip(hidden, taken, strict=True)
            ]
        finally:
            for own in held:
                pages.release(own)
    return scores


def _that_fit(sequences: Sequence[Sequence[int]], first: int, budget: int, pages: PageAllocator) -> list[Sequence[int]]:
    """From number `first` on, what one step and the free pages allow; at least one."""
    free = pages.free_pages
    taken: list[Sequence[int]] = []
    for tokens in itertools.islice(sequences, first, None):
        need = pages.pages_for(len(tokens))
        if need > free or (taken and len(tokens) > budget):
            break
        taken.append(tokens)
        free, budget = free - need, budget - len(tokens)
    if not taken:
        raise ValueError(
            f"sequence {first} needs {pages.pages_for(len(sequences[first]))} pages of cache and {free} are free; "
            "raise cache_tokens, or finish or abort what is being generated"
        )
    return taken


def _scores(hidden_tc: Tensor, tokens: Sequence[int], top_k: int, model: Model) -> Scores:
    target_t = torch.tensor(tokens[1:], dtype=torch.int64, device=hidden_tc.device)
    block = max(1, _SCORE_ELEMENTS // model.spec.vocab_size)
    logprobs: list[float] = []
    tops: list[TopLogprobs] = []
    for start in range(0, len(tokens) - 1, block):
        target_r = target_t[start : start + block]
        logits_rv = model.logits(hidden_tc[start : start + len(target_r)])
        block_logprobs, block_tops = logprobs_of(logits_rv, target_r, top_k)
        logprobs += block_logprobs
        tops += block_tops
    return Scores(tuple(logprobs), tuple(tops) if top_k else None)
