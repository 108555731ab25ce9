"""Exact duplicates: among answers to one prompt that differ in white space at most, the first sample stays.

Near-duplicates and duplicates across prompts are another question (was it asked twice?), with other evidence.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from distill.filters.base import OK, ChoosingFilter, Group
from distill.filters.judged import Judged, Key
from distill.traces.trace import Verdict


class Dedup(ChoosingFilter):
    """Keep the first of several identical answers to one prompt."""

    name = "dedup"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "no earlier sample has the same text",
        "duplicate": "an earlier sample has it",
    }
    examples = (Group((OK, "duplicate", OK), ("20 + 22 = 42", "20 + 22\n  = 42", "22 + 20 = 42")),)

    def choose(self, survivors: Sequence[Judged], seed: int) -> dict[Key, Verdict]:
        """Keep first samples; the evidence names the one that stays. The order of `survivors` does not matter."""
        first: dict[tuple[str, str], int] = {}
        verdicts = {}
        for trace in sorted(survivors, key=lambda trace: trace.key):
            prompt, sample = trace.key
            stays = first.setdefault((prompt, trace.spelling), sample)
            verdicts[trace.key] = self.verdict(OK) if stays == sample else self.verdict("duplicate", of_sample=stays)
        return verdicts
