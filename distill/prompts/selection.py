"""Which prompts of a source, and in which order those of several sources.

Both answers are prefixes of an order that a seed fixes, so that asking for more prompts extends the earlier selection:
the ledger keeps what was paid for. The order of a shuffled source follows from a hash of (seed, prompt id) and not from
a generator over row numbers, so it does not change when rows are reordered, and a row that is added displaces at most
one other. A mixture interleaves its sources so that in each prefix of n prompts the number from a source differs from
n × its share by less than one; drawing sources at random would be exact on average only.
"""

import hashlib
import heapq
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import count
from math import ceil, floor
from typing import TypeVar

from distill.prompts.prompt import Prompt

T = TypeVar("T")


def sampled(items: Iterable[T], seed: int, limit: int | None, prompt_of: Callable[[T], Prompt]) -> list[T]:
    """The first `limit` items in the order of a seed; None takes all. At most `limit` are held in memory."""

    def rank(item: T) -> bytes:
        return hashlib.sha256(f"{seed}/{prompt_of(item).id}".encode()).digest()

    return sorted(items, key=rank) if limit is None else heapq.nsmallest(limit, items, key=rank)


def in_turns(sources: Iterable[Iterable[T]]) -> Iterator[T]:
    """The first item of each source, then the second of each, and so on; a source without a further item is passed
    over. Lazy: a prefix reads no more of a source than it has items of it."""
    left = [iter(source) for source in sources]
    while left:
        for source in list(left):
            try:
                yield next(source)
            except StopIteration:
                left.remove(source)


def interleaved(
    sources: Sequence[Iterator[Prompt]], weights: Sequence[float], is_new: Callable[[Prompt], bool]
) -> Generator[Prompt, None, int]:
    """Prompts of the sources in proportion to their weights, until a source has no more; returns that one's index.

    is_new: whether a prompt was not read before; a repeated one does not count for its source. The j-th prompt of a
    source with share s belongs between the places ⌊j / s⌋ and ⌈(j + 1) / s⌉, and the earliest end goes first, which
    meets all ends (proportionate scheduling: Baruah, Cohen, Plaxton and Varvel, 1996, doi:10.1007/BF01940883).
    """
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    taken = [0] * len(sources)
    for place in count():
        ready = [i for i, share in enumerate(shares) if floor(taken[i] / share) <= place]
        chosen = min(ready, key=lambda i: ceil((taken[i] + 1) / shares[i]))
        prompt = next((prompt for prompt in sources[chosen] if is_new(prompt)), None)
        if prompt is None:
            return chosen
        taken[chosen] += 1
        yield prompt
    raise AssertionError("places do not end")
