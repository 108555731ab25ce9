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

from distill.engine.alternatives import Alternatives, TopLogprobs
from distill.engine.attention import Chunk
from distill.engine.cache import PageAllocator
from distill.engine.model import Model
from distill.engine.sampler import normalisers

# Hidden states become logits for so many rows × vocabulary entries at a time.
_SCORE_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Scores:
    """Raw log-probabilities of the n tokens at the end of a sequence, each given those before it.

    Arrays, because a tuple for each alternative takes longer than a small model's pass on a GPU; the properties are
    those tuples, made when they are read.

    logprob_t: of the tokens, float32 [n].
    top_id_tk, top_logprob_tk: the alternatives at each position, likeliest first, int32 and float32 [n, k]; None
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
        return Alternatives(self.top_id_tk, self.top_logprob_tk).pairs


Forward = Callable[[list[Chunk]], Tensor]
GivenIds = Sequence[np.ndarray | Sequence[Sequence[int]]]  # by sequence: [n, m] with −1 for none, or rows of ids


def score(
    sequences: Sequence[Sequence[int]],
    top_k: int,
    ids: GivenIds | None,
    after: Sequence[int],
    budget: int,
    pages: PageAllocator,
    forward: Forward,
    model: Model,
) -> list[Scores]:
    """One `Scores` per sequence; see `Engine.score`. budget: tokens of a step. forward: hidden states of the tokens of
    some chunks, [t, c].

    Errors: ValueError for given ids that do not fit, and while too few pages are free for a sequence; NonFiniteLogits.
    """
    counts = [len(tokens) - first for tokens, first in zip(sequences, after, strict=True)]
    given = padded(ids, counts, model.spec.vocab_size)
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
                last = after[len(scores)] - 1  # of the tokens before those that are scored
                scores.append(
                    scores_of(
                        model.logits, model.spec.vocab_size, hidden_tc[last:], tokens[last:], top_k, given[len(scores)]
                    )
                )
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


def padded(ids: GivenIds | None, counts: Sequence[int], vocab_size: int) -> list[np.ndarray | None]:
    """The given ids of each sequence, [n, m], with -1 for none. counts: tokens scored of each sequence."""
    if ids is None:
        return [None] * len(counts)
    if len(ids) != len(counts):
        raise ValueError(f"ids are given for {len(ids)} sequences and there are {len(counts)}; give each its own")
    padded: list[np.ndarray | None] = []
    for number, (rows, count) in enumerate(zip(ids, counts, strict=True)):
        if len(rows) != count:
            raise ValueError(
                f"sequence {number} has {count} tokens to score and ids for {len(rows)} positions; give ids for each "
                "(the first token of a sequence is predicted by none)"
            )
        id_tm = rows if isinstance(rows, np.ndarray) else _rectangle(rows)
        if id_tm.size and not -1 <= id_tm.min() <= id_tm.max() < vocab_size:
            raise ValueError(
                f"sequence {number} is to be scored for token ids from {id_tm.min()} to {id_tm.max()}, the vocabulary "
                f"has {vocab_size}; use the tokenizer that belongs to the model"
            )
        padded.append(id_tm.astype(np.int64))
    return padded


def _rectangle(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids as an array, [n, m], with -1 in places past the last of a row."""
    count_t = np.fromiter(map(len, rows), np.int64, len(rows))
    id_tm = np.full((len(rows), int(count_t.max(initial=0))), -1, np.int64)
    id_tm[np.arange(id_tm.shape[1]) < count_t[:, None]] = [*itertools.chain.from_iterable(rows)]
    return id_tm


def scores_of(
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    hidden_tc: Tensor,
    tokens: Sequence[int],
    top_k: int,
    given_tm: np.ndarray | None,
) -> Scores:
    """The scores of `tokens` but the first. logits: of hidden states, float32 [r, v]; they are made in blocks of rows.
    hidden_tc: what precedes each token. given_tm: further ids to score at each position, −1 for none.

    NonFiniteLogits for logits that are not finite.
    """
    device = hidden_tc.device
    target_t = torch.tensor(tokens[1:], dtype=torch.int64, device=device)
    given = None if given_tm is None else torch.from_numpy(given_tm).to(device)
    top_k = min(top_k, vocab_size)
    block = max(1, _SCORE_ELEMENTS // vocab_size)
    logprobs = [torch.empty(0)]
    tops = [(torch.empty(0, top_k, dtype=torch.int32), torch.empty(0, top_k))]
    for start in range(0, len(tokens) - 1, block):
        target_r = target_t[start : start + block]
        logits_rv = logits(hidden_tc[start : start + len(target_r)])
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
