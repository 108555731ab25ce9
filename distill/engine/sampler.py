"""From logits to tokens, for all sequences of a step at once.

Random numbers are keyed, not streamed: the uniform that decides a token is a hash of (seed, prompt, sample,
position). The text of a trace therefore does not depend on what else was in the batch, on the order of requests, on
preemption or on a resume; no generator state is saved anywhere. The hash is splitmix64's finaliser (Steele, Lea and
Flood, 2014), chained over the four words; 52 bits of it make the uniform. It is computed in numpy: a few hundred
64-bit words per step, and torch has no unsigned shifts.

Order of operations: divide by the temperature, keep the top k, of those the smallest set whose mass reaches top p,
draw. The draw (the op `draw`) inverts the cumulative distribution *in vocabulary order*, over the tokens that pass a
threshold. The usual draw over sorted tokens was rejected: it depends on how a sort breaks ties, and it must sort the
whole vocabulary.

Log-probabilities are raw: of the model's own distribution, temperature 1, before top k and top p.

Legend: r rows of logits, b draws (several may share a row), v vocabulary, m largest logits looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.engine.alternatives import Alternatives
from distill.engine.kernels import Ops
from distill.engine.options import SamplingParams

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# Rows are sampled in blocks of at most so many logits, so that a large vocabulary does not multiply the memory in use.
_BLOCK_ELEMENTS = 1 << 25


class NonFiniteLogits(ValueError):
    """The model's logits hold NaN or infinity, so that there is no distribution to draw from.

    position: of the token in its sequence, None where several were scored at once.
    """

    def __init__(self, position: int | None = None) -> None:
        self.position = position
        where = "" if position is None else f" of the token at position {position}"
        super().__init__(
            f"the logits{where} are not finite (NaN or infinity): the model's weights overflow its activations; check "
            "the checkpoint's norms and scales, or use another one"
        )


@dataclass(frozen=True)
class Draw:
    """One token to draw: from row `row` of the logits, with the uniform of (key, position). forced: the token that is
    taken instead, with its own log-probability."""

    row: int
    key: int
    position: int
    params: SamplingParams
    forced: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A drawn token, its raw log-probability (natural log), and the largest ones [1, k] where requested."""

    token: int
    logprob: float
    top: Alternatives | None = None


def stream_key(seed: int, prompt_key: int, sample: int) -> int:
    """The part of the hash that does not change along a sequence: an unsigned 64-bit integer."""
    state = 0
    for word in (seed, prompt_key, sample):
        state = _splitmix64(state ^ (word & _MASK64))
    return state


def uniforms(keys: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) per (stream key, position of the token in its sequence)."""
    z = np.array(keys, dtype=np.uint64) ^ np.array(positions, dtype=np.uint64)
    z = z + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _splitmix64(x: int) -> int:
    z = (x + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def sample(ops: Ops, logits_rv: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw one token per entry of `draws` from float32 logits."""
    block = max(1, _BLOCK_ELEMENTS // logits_rv.shape[1])
    drawn: list[Drawn] = []
    for start in range(0, len(draws), block):
        drawn += _sample_block(ops, logits_rv, draws[start : start + block])
    return drawn


def _sample_block(ops: Ops, logits_rv: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    rows = np.array([draw.row for draw in draws], np.int64)
    numbers = [torch.from_numpy(given).to(logits_rv.device) for given in (rows, *draw_numbers(draws))]
    token_b, logprob_b = ops.draw(logits_rv, *numbers)
    return drawn_of(ops, draws, token_b, logprob_b, logits_rv)


def sample_rows(
    ops: Ops, logits_rv: Tensor, keys: Sequence[int], positions: Sequence[int], params: Sequence[SamplingParams]
) -> tuple[list[int], list[float], list[Alternatives | None]]:
    """Draw one token from each row, none of them forced: as `sample`, without an object per token."""
    tokens: list[int] = []
    logprobs: list[float] = []
    tops: list[Alternatives | None] = []
    block = max(1, _BLOCK_ELEMENTS // logits_rv.shape[1])
    for start in range(0, len(keys), block):
        rows = slice(start, start + block)
        numbers = numbers_of(keys[rows], positions[rows], params[rows])
        row_b = np.arange(len(numbers[0]))
        drawn = ops.draw(logits_rv[rows], *(torch.from_numpy(each).to(logits_rv.device) for each in (row_b, *numbers)))
        tokens += drawn[0].tolist()
        logprobs += drawn[1].tolist()
        _refuse_undefined(logprobs[rows], positions[rows])
        tops += _tops(ops, logits_rv[rows], params[rows])
    return tokens, logprobs, tops


def draw_numbers(draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the op `draw` takes: uniforms, temperatures (float32), top k (int64) and top p, else float64."""
    return numbers_of([draw.key for draw in draws], [draw.position for draw in draws], [draw.params for draw in draws])


def numbers_of(
    keys: Sequence[int], positions: Sequence[int], params: Sequence[SamplingParams]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`draw_numbers` of tokens that are given by their keys, positions and parameters."""
    return (
        uniforms(keys, positions),
        np.array([p.temperature for p in params], np.float32),
        np.array([p.top_k for p in params], np.int64),
        np.array([p.top_p for p in params], np.float64),
    )


def drawn_of(ops: Ops, draws: Sequence[Draw], token_b: Tensor, logprob_b: Tensor, logits_rv: Tensor) -> list[Drawn]:
    """Tokens and raw log-probabilities, with the largest ones where requested. Errors: NonFiniteLogits where a row has
    no distribution."""
    tokens, logprobs = token_b.tolist(), logprob_b.tolist()
    _refuse_undefined(logprobs, [draw.position for draw in draws])
    if forced := [i for i, draw in enumerate(draws) if draw.forced is not None]:
        row_b = torch.tensor([draws[i].row for i in forced], device=logits_rv.device)
        forced_b = torch.tensor([draws[i].forced for i in forced], device=logits_rv.device)
        for i, logprob in zip(forced, logprobs_of(logits_rv.index_select(0, row_b), forced_b), strict=True):
            tokens[i], logprobs[i] = draws[i].forced, logprob
    tops: Sequence[Alternatives | None] = [None] * len(draws)
    if any(draw.params.logprobs for draw in draws):
        row_b = torch.tensor([draw.row for draw in draws], device=logits_rv.device)
        tops = _tops(ops, logits_rv.index_select(0, row_b), [draw.params for draw in draws])
    return [Drawn(*drawn) for drawn in zip(tokens, logprobs, tops, strict=True)]


def _refuse_undefined(logprobs: Sequence[float], positions: Sequence[int]) -> None:
    """Errors: NonFiniteLogits where a row had no distribution to draw from."""
    for logprob, position in zip(logprobs, positions, strict=True):
        if math.isnan(logprob):
            raise NonFiniteLogits(position)


def _tops(ops: Ops, logits_bv: Tensor, params: Sequence[SamplingParams]) -> list[Alternatives | None]:
    """The likeliest tokens of each row, as many as its parameters request."""
    counts = [p.logprobs or 0 for p in params]
    width = min(max(counts), logits_bv.shape[1])
    if not width:
        return [None] * len(counts)
    likeliest = ops.likeliest(logits_bv, normalisers(logits_bv), width, None)
    id_bk, logprob_bk = (numbers.cpu().numpy() for numbers in likeliest)
    return [Alternatives(id_bk[i : i + 1, :k], logprob_bk[i : i + 1, :k]) if k else None for i, k in enumerate(counts)]


def normalisers(logits_bv: Tensor) -> Tensor:
    """What is subtracted from logits to make them log-probabilities, [b, 1]. NonFiniteLogits where they are not
    finite."""
    normaliser_b1 = logits_bv.logsumexp(-1, keepdim=True)
    if not normaliser_b1.isfinite().all():
        raise NonFiniteLogits
    return normaliser_b1


def logprobs_of(logits_bv: Tensor, token_b: Tensor) -> list[float]:
    """Raw log-probabilities of given tokens. NonFiniteLogits for logits that are not finite."""
    logprobs: list[float] = (logits_bv.gather(-1, token_b[:, None]) - normalisers(logits_bv))[:, 0].tolist()
    return logprobs
