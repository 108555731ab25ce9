"""Exact duplicates: among answers to one prompt that differ in white space at most, the first sample stays.

Near-duplicates and duplicates across prompts are another question (was it asked twice?), with other evidence.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import JsonValue

from distill.filters.base import OK, Candidate, Group, GroupFilter, PromptGroup, Resources
from distill.filters.words import composed
from distill.traces.trace import Verdict


class Dedup(GroupFilter):
    """Keep the first of several identical answers to one prompt."""

    name = "dedup"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "no earlier sample has the same text",
        "duplicate": "an earlier sample has it",
    }
    examples = (Group((OK, "duplicate", OK), ("20 + 22 = 42", "20 + 22\n  = 42", "22 + 20 = 42")),)

    def note(self, candidate: Candidate) -> JsonValue:
        """32 hex digits over the text with composed accents and every run of white space as one space."""
        spelling = " ".join(composed(candidate.trace.text).split())
        return hashlib.sha256(spelling.encode(errors="surrogatepass")).hexdigest()[:32]

    def judge_group(self, group: PromptGroup, resources: Resources) -> Sequence[Verdict]:
        """Keep first samples; the evidence names the sample that stays."""
        first: dict[JsonValue, int] = {}
        verdicts = []
        for trace in group.survivors:
            stays = first.setdefault(self.noted(trace), trace.key[1])
            is_first = stays == trace.key[1]
            verdicts.append(self.verdict(OK) if is_first else self.verdict("duplicate", of_sample=stays))
        return verdicts
