"""A set of the keys of traces that takes 8 bytes for each, where Python's takes two hundred.

64 bits of a hash stand for a key: among a million traces, two share theirs with a probability of one in 37 million.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

Key = tuple[str, int]  # prompt id, sample number

RECENT = 16384  # hashes that wait to be sorted in


class KeySet:
    """Keys that were added, as hashes: the sorted ones in an array, the most recent ones in a set."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, keys: Sequence[Key]) -> list[bool]:
        """Add keys; returns whether each is new, also among those before it in `keys`."""
        hashes = list(map(_hash, keys))
        wanted = np.array(hashes, np.uint64)
        places = np.searchsorted(self._sorted, wanted)
        places[places == len(self._sorted)] = 0
        known = (self._sorted[places] == wanted).tolist() if len(self._sorted) else [False] * len(hashes)
        new = []
        for number, is_sorted in zip(hashes, known, strict=True):
            new.append(not is_sorted and number not in self._recent)
            if new[-1]:
                self._recent.add(number)
        if len(self._recent) >= RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return new


def _hash(key: Key) -> int:
    text = f"{key[0]}\0{key[1]}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
