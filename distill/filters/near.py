"""What the filters of near-duplicates share: clusters of texts that MinHash connects, of which the first stays.

Two texts are near-duplicates when their estimated similarity reaches the threshold, less the error of the estimate
(`MARGIN` standard errors): a pair at the threshold is missed in about one of 700 cases, and one a tenth below it may
be dropped, too; the estimate is in the evidence. Clusters are transitive, and independent of the order in which
traces were finished: the one that stays is the first in order of (prompt id, sample). Rejected: to compare the sets
of shingles of candidates exactly, which needs their texts a second time.
"""

import base64
import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby

import numpy as np
from pydantic import Field, JsonValue

from distill.filters.base import OK, Candidate, Corpus, CorpusFilter, Resources
from distill.filters.judged import Judged, Key
from distill.filters.minhash import MinHash, Signature
from distill.traces.trace import Trace, Verdict

MARGIN = 3.0


class NearDuplicates(CorpusFilter):
    """Filters that drop all but the first of a cluster of similar texts."""

    threshold: float = Field(0.8, gt=0, le=1, description="similarity (Jaccard, of shingles) of near-duplicates")
    shingle: int = Field(5, ge=1, le=64, description="words in a shingle")
    bands: int = Field(20, ge=1, le=256, description="bands of the MinHash signature; more find more pairs")
    rows: int = Field(6, ge=1, le=64, description="minima in a band; more leave fewer pairs to compare")

    @cached_property
    def minhash(self) -> MinHash:
        """How signatures are made."""
        return MinHash(self.shingle, self.bands, self.rows)

    @abstractmethod
    def text_of(self, trace: Trace) -> str:
        """The text that is compared."""

    def salt_of(self, trace: Trace) -> int:
        """What must be equal in near-duplicates beside most of the text, as 64 bits."""
        return 0

    @abstractmethod
    def unit_of(self, judged: Judged) -> Key:
        """What is kept or dropped together."""

    def note(self, candidate: Candidate) -> JsonValue:
        """The signature, as text."""
        signature = self.minhash.signature(self.text_of(candidate.trace), self.salt_of(candidate.trace))
        return base64.b85encode(signature.tobytes()).decode()

    def judge_corpus(self, corpus: Corpus, resources: Resources) -> Iterator[tuple[Key, Verdict]]:
        """Keep the first of each cluster. The evidence names it, with the similarity to the nearest member."""
        count = sum(1 for _ in groupby(corpus, self.unit_of))
        parent = np.arange(count)
        similarity = np.zeros(count, np.float32)  # the highest that each was found to have to another
        least = self.threshold - MARGIN * math.sqrt(self.threshold * (1 - self.threshold) / self.minhash.permutations)
        for pair in self.minhash.pairs(self._read(corpus), corpus.scratch, least):
            first, second = sorted((_root(parent, pair.first), _root(parent, pair.second)))
            parent[second] = first
            for number in (pair.first, pair.second):
                similarity[number] = max(float(similarity[number]), pair.similarity)
        stays: dict[int, Key] = {}  # of clusters with several members
        for number, (unit, traces) in enumerate(groupby(corpus, self.unit_of)):
            head = _root(parent, number)
            if head == number and similarity[number]:
                stays[number] = unit
            for trace in traces:
                if head == number:
                    yield trace.key, self.verdict(OK)
                else:
                    yield trace.key, self._dropped(stays[head], float(similarity[number]))

    def _dropped(self, unit: Key, similarity: float) -> Verdict:
        prompt, sample = unit
        return self.verdict("near_duplicate", of_prompt=prompt, of_sample=sample, similarity=round(similarity, 3))

    def _read(self, corpus: Corpus) -> Iterator[Signature]:
        for _, traces in groupby(corpus, self.unit_of):
            note = self.noted(next(traces))
            assert isinstance(note, str), "every trace has a signature"
            yield np.frombuffer(base64.b85decode(note), np.uint32)


def _root(parent: "np.ndarray[tuple[int], np.dtype[np.int64]]", number: int) -> int:
    """The first member of a cluster; halves the path to it."""
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = int(parent[number])
    return number
