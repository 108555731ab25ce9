"""Log-probabilities of given tokens: prompts that are prefilled and all of whose rows are used.

As many sequences as a step and the free pages allow are computed together; one that is longer than a step, in chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.engine.attention import Chunk
from distill.engine.cache import PageAllocator
from distill.engine.model import Model
from distill.engine.sampler import TopLogprobs, normalisers

# Hidden states become logits for so many rows × vocabulary entries at a time.
_SCORE_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Scores:
    """Raw log-probabilities of tokens 1 … n-1 of a sequence, each given those before it.

    Arrays, because a tuple for each alternative takes longer than a small model's pass on a GPU; the properties are
    those tuples, made when they are read.

    logprob_t: of the tokens, float32 [n-1].
    top_id_tk, top_logprob_tk: the alternatives at each position, likeliest first, int32 and float32 [n-1, k]; None
    where none were asked for. Entries past the last alternative of a position have log-probability −∞ (and id 0).
    """

    logprob_t: np.ndarray
    top_id_tk: np.ndarray | None
    top_logprob_tk: np.ndarray | None

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the tokens."""
        return tuple(self.logprob_t.tolist())

    @property
    def top_logprobs(self) -> tuple[TopLogprobs, ...] | None:
        """(id, log-probability) of the alternatives at each position, likeliest first."""
        if self.top_id_tk is None or self.top_logprob_tk is None:
            return None
        count_t = (self.top_logprob_tk > -np.inf).sum(1).tolist()
        rows = zip(self.top_id_tk.tolist(), self.top_logprob_tk.tolist(), count_t, strict=True)
        return tuple(tuple(zip(ids[:count], logprobs[:count], strict=True)) for ids, logprobs, count in rows)

    def after(self, tokens: int) -> Scores:
        """The scores of the tokens that follow the first `tokens` ones, at least one."""
        top_id, top_logprob = (
            None if top is None else top[tokens - 1 :] for top in (self.top_id_tk, self.top_logprob_tk)
        )
        return Scores(self.logprob_t[tokens - 1 :], top_id, top_logprob)


Forward = Callable[[list[Chunk]], Tensor]
GivenIds = Sequence[Sequence[Sequence[int]]]  # by sequence and position


def score(
    sequences: Sequence[Sequence[int]],
    top_k: int,
    ids: GivenIds | None,
    budget: int,
    pages: PageAllocator,
    forward: Forward,
    model: Model,
) -> list[Scores]:
    """One `Scores` per sequence; see `Engine.score`. budget: tokens of a step. forward: hidden states of the tokens of
    some chunks, [t, c].

    Errors: ValueError for given ids that do not fit, and while too few pages are free for a sequence; NonFiniteLogits.
    """
    given = _padded(ids, sequences, model.spec.vocab_size)
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
            for hidden_tc, tokens in zip(hidden, taken, strict=True):
                scores.append(_scores(hidden_tc, tokens, top_k, given[len(scores)], model))
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


def _padded(ids: GivenIds | None, sequences: Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray | None]:
    """The given ids of each sequence, [n-1, m], with -1 in places past the last of a position."""
    if ids is None:
        return [None] * len(sequences)
    if len(ids) != len(sequences):
        raise ValueError(f"ids are given for {len(ids)} sequences and there are {len(sequences)}; give each its own")
    padded: list[np.ndarray | None] = []
    for number, (rows, tokens) in enumerate(zip(ids, sequences, strict=True)):
        if len(rows) != len(tokens) - 1:
            raise ValueError(
                f"sequence {number} has {len(tokens)} tokens and ids for {len(rows)} positions; give ids for "
                f"{len(tokens) - 1}: the first token is predicted by none"
            )
        count_t = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(count_t.sum()))
        if flat.size and not 0 <= flat.min() <= flat.max() < vocab_size:
            raise ValueError(
                f"sequence {number} is to be scored for token ids from {flat.min()} to {flat.max()}, the vocabulary "
                f"has {vocab_size}; use the tokenizer that belongs to the model"
            )
        id_tm = np.full((len(rows), int(count_t.max(initial=0))), -1, np.int64)
        id_tm[np.arange(id_tm.shape[1]) < count_t[:, None]] = flat
        padded.append(id_tm)
    return padded


def _scores(hidden_tc: Tensor, tokens: Sequence[int], top_k: int, given_tm: np.ndarray | None, model: Model) -> Scores:
    device = hidden_tc.device
    target_t = torch.tensor(tokens[1:], dtype=torch.int64, device=device)
    given = None if given_tm is None else torch.from_numpy(given_tm).to(device)
    top_k = min(top_k, model.spec.vocab_size)
    block = max(1, _SCORE_ELEMENTS // model.spec.vocab_size)
    logprobs = [torch.empty(0)]
    tops = [(torch.empty(0, top_k, dtype=torch.int32), torch.empty(0, top_k))]
    for start in range(0, len(tokens) - 1, block):
        target_r = target_t[start : start + block]
        logits_rv = model.logits(hidden_tc[start : start + len(target_r)])
        normaliser_r1 = normalisers(logits_rv)
        logprobs.append((logits_rv.gather(-1, target_r[:, None]) - normaliser_r1)[:, 0].cpu())
        given_rm = None if given is None else given[start : start + block]
        id_rk, logprob_rk = _alternatives(logits_rv, normaliser_r1, top_k, given_rm)
        tops.append((id_rk.int().cpu(), logprob_rk.cpu()))
    joined = _joined(tops[1:] or tops) if top_k or given is not None else (None, None)
    return Scores(torch.cat(logprobs).numpy(), *joined)


def _alternatives(
    logits_rv: Tensor, normaliser_r1: Tensor, top_k: int, given_rm: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the `top_k` likeliest tokens and the given ones, [r, k + m], each once."""
    top = logits_rv.topk(top_k, dim=-1)
    id_rk, logprob_rk = top.indices, top.values - normaliser_r1
    if given_rm is None:
        return id_rk, logprob_rk
    known_rm = (given_rm[:, :, None] == id_rk[:, None, :]).any(-1)
    known_rm |= (given_rm[:, :, None] == given_rm[:, None, :]).tril(-1).any(-1)  # by one before it
    at_rm = given_rm.clamp(min=0)
    given_logprob_rm = logits_rv.gather(-1, at_rm) - normaliser_r1
    given_logprob_rm.masked_fill_(known_rm | (given_rm < 0), -torch.inf)
    logprob_rk, order_rk = torch.cat((logprob_rk, given_logprob_rm), dim=-1).sort(dim=-1, descending=True, stable=True)
    id_rk = torch.cat((id_rk, at_rm), dim=-1).gather(-1, order_rk)
    return id_rk.masked_fill(logprob_rk == -torch.inf, 0), logprob_rk


def _joined(tops: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    ids, logprobs = zip(*tops, strict=True)
    return torch.cat(ids).numpy(), torch.cat(logprobs).numpy()
