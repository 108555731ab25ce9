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
from distill.engine.batch import Chunk
from distill.engine.cache import PageAllocator
from distill.engine.kernels import Ops
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
    slots: PageAllocator | None,
    forward: Forward,
    model: Model,
) -> list[Scores]:
    """One `Scores` per sequence; see `Engine.score`. budget: tokens of a step. slots: of recurrent states. forward:
    hidden states of the tokens of some chunks, [t, c].

    Errors: ValueError for given ids that do not fit, and while too few pages are free for a sequence; NonFiniteLogits.
    """
    counts = [len(tokens) - first for tokens, first in zip(sequences, after, strict=True)]
    given = padded(ids, counts, model.spec.vocab_size)
    scores: list[Scores] = []
    while len(scores) < len(sequences):
        taken = _that_fit(sequences, len(scores), budget, pages, slots)
        held = [pages.allocate(pages.pages_for(len(tokens))) for tokens in taken]
        states = [-1] * len(taken) if slots is None else slots.allocate(len(taken))
        try:
            if len(taken) == 1:
                (tokens,), (own,), (slot,) = taken, held, states
                starts = range(0, len(tokens), budget)
                hidden = [torch.cat([forward([Chunk(tokens[i : i + budget], i, own, slot)]) for i in starts])]
            else:
                chunks = [Chunk(tokens, 0, own, slot) for tokens, own, slot in zip(taken, held, states, strict=True)]
                hidden = list(forward(chunks).split([len(tokens) for tokens in taken]))
            these = slice(len(scores), len(scores) + len(taken))
            predicting = [hidden_tc[n - 1 : -1] for hidden_tc, n in zip(hidden, after[these], strict=True)]
            targets = [tokens[n:] for tokens, n in zip(taken, after[these], strict=True)]
            head = Head(model.logits, model.spec.vocab_size, model.ops)
            scores += scores_of(predicting, targets, top_k, given[these], head)
        finally:
            for own in held:
                pages.release(own)
            if slots is not None:
                slots.release(states)
    return scores


def _that_fit(
    sequences: Sequence[Sequence[int]], first: int, budget: int, pages: PageAllocator, slots: PageAllocator | None
) -> list[Sequence[int]]:
    """From number `first` on, what one step and the free pages and slots allow; at least one."""
    free, most = pages.free_pages, None if slots is None else first + slots.free_pages
    if most == first:
        raise ValueError(
            f"sequence {first} needs a recurrent state, and all slots are in use; raise max_batch, or finish or abort "
            "what is being generated"
        )
    taken: list[Sequence[int]] = []
    for tokens in itertools.islice(sequences, first, most):
        need = pages.pages_for(len(tokens))
        if need > free or (taken and len(tokens) > budget):
            break
        taken.append(tokens)
        free, budget = free - need, budget - len(tokens)
    if not taken:
        raise ValueError(
            f"sequence {first} needs {pages.pages_for(len(sequences[first]))} pages of cache and {free} are free; "
            "raise memory_budget, or finish or abort what is being generated"
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


@dataclass(frozen=True)
class Head:
    """What makes logits. logits: of hidden states [r, c], float32 [r, v]. ops: of the device that they are on."""

    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    ops: Ops


def scores_of(
    hidden: Sequence[Tensor],
    targets: Sequence[Sequence[int]],
    top_k: int,
    given: Sequence[np.ndarray | None],
    head: Head,
) -> list[Scores]:
    """The scores of several sequences together. hidden: the states [n, c] that predict the n targets of each. given:
    further ids to score at each position, [n, m], −1 for none. NonFiniteLogits for logits that are not finite."""
    top_k = min(top_k, head.vocab_size)
    counts = [len(own) for own in targets]
    hidden_rc = torch.cat(list(hidden))
    target_r = torch.tensor([*itertools.chain.from_iterable(targets)], dtype=torch.int64, device=hidden_rc.device)
    widths = [0 if own is None else own.shape[1] for own in given]
    given_rm = _beside(given, counts, max(widths), hidden_rc.device)
    block = max(1, _SCORE_ELEMENTS // head.vocab_size)
    width = top_k + max(widths)
    logprob_r = np.empty(len(target_r), np.float32)
    id_rk, logprob_rk = np.empty((len(target_r), width), np.int32), np.empty((len(target_r), width), np.float32)
    for start in range(0, len(target_r), block):
        rows = slice(start, start + block)
        logits_rv = head.logits(hidden_rc[rows])
        normaliser_r1 = normalisers(logits_rv)
        logprob_r[rows] = (logits_rv.gather(-1, target_r[rows, None]) - normaliser_r1)[:, 0].cpu().numpy()
        if width:
            given_bm = None if given_rm is None else given_rm[rows]
            likeliest = head.ops.likeliest(logits_rv, normaliser_r1, top_k, given_bm)
            id_rk[rows], logprob_rk[rows] = (numbers.cpu().numpy() for numbers in likeliest)
    listed = top_k > 0 or given_rm is not None
    scores: list[Scores] = []
    ends = itertools.accumulate(counts)
    for end, count, own in zip(ends, counts, widths, strict=True):
        places = slice(end - count, end), slice(top_k + own)  # past them are none
        top = (id_rk[places], logprob_rk[places]) if listed else (None, None)
        scores.append(Scores(logprob_r[places[0]], *top))
    return scores


def _beside(
    given: Sequence[np.ndarray | None], counts: Sequence[int], width: int, device: torch.device
) -> Tensor | None:
    """The given ids of several sequences below each other, as wide as the widest; None where none are given."""
    if all(own is None for own in given):
        return None
    id_rm = np.full((sum(counts), width), -1, np.int64)
    for end, count, own in zip(itertools.accumulate(counts), counts, given, strict=True):
        if own is not None:
            id_rm[end - count : end, : own.shape[1]] = own
    return torch.from_numpy(id_rm).to(device)
