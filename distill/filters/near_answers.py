"""Near-duplicates among completions, of one prompt or of several: the same solution with a word changed.

`dedup` finds those that are equal but for white space, within a prompt. This one finds those that share most of their
runs of five words, in the whole collection; a short one, such as a bare answer, may be right for two prompts, and is
compared with those of its own prompt only.
"""

import hashlib
from collections.abc import Mapping
from typing import ClassVar

from distill.filters.base import OK, Group
from distill.filters.judged import Judged, Key
from distill.filters.near import NearDuplicates
from distill.filters.words import words_of
from distill.traces.trace import Trace

SHORT = 20  # words
SOLUTION = "First the tens are added, which gives forty, and then the ones, which gives two. So the sum of both is 42."


class NearAnswers(NearDuplicates):
    """Drop completions that are nearly the same as another one, of the same prompt or of another."""

    name = "near_answers"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "no similar completion comes before it",
        "near_duplicate": "a similar completion comes first, in order of prompt id and sample",
    }
    examples = (
        Group((OK, "near_duplicate", OK), (SOLUTION, f"{SOLUTION} Yes.", "20 + 22 = 42")),
        Group((OK, OK), (SOLUTION, f"{SOLUTION} Yes."), {"threshold": 1.0}),
        Group((OK, OK), ("It is 42.", "It is 42."), questions=("20 + 22?", "21 + 21?")),
    )

    def text_of(self, trace: Trace) -> str:
        """The completion."""
        return trace.text

    def salt_of(self, trace: Trace) -> int:
        """The prompt of a short completion."""
        if len(words_of(trace.text)) > SHORT:
            return 0
        return int.from_bytes(hashlib.blake2b(trace.prompt.id.encode(), digest_size=8).digest(), "big")

    def unit_of(self, judged: Judged) -> Key:
        """Each trace by itself."""
        return judged.key
