"""Near-duplicates among completions, of one prompt or of several: the same solution with a word changed.

`dedup` finds those that are equal but for white space, within a prompt. This one finds those that share most of their
runs of five words, in the whole collection.
"""

from collections.abc import Mapping
from typing import ClassVar

from distill.filters.base import OK, Group
from distill.filters.judged import Judged, Key
from distill.filters.near import NearDuplicates
from distill.traces.trace import Trace

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
    )

    def text_of(self, trace: Trace) -> str:
        """The completion."""
        return trace.text

    def unit_of(self, judged: Judged) -> Key:
        """Each trace by itself."""
        return judged.key
