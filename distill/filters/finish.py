"""Finish reason: a trace that ran into the token limit stops in the middle, and so would its student.

A server may end a sample for reasons of its own (`content_filter`), or not say why it ended: such a text may be cut off
anywhere, so it is dropped too, under a reason that names what the server said.
"""

from collections.abc import Mapping
from typing import ClassVar

from distill.filters.base import OK, Candidate, Example, TraceFilter
from distill.traces.trace import REFUSED, Verdict


class Finish(TraceFilter):
    """Keep traces that ended with an end token, not at the token limit or for another reason."""

    name = "finish"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "it ended with an end token",
        "truncated": "it ran into the token limit",
        "unknown": "the server did not say why it ended",
        REFUSED: "the server refused the prompt: there is no answer",
        "ended": "the server ended it for the reason named",
    }
    examples = (
        Example(OK, "<think>a</think>b"),
        Example("truncated", "<think>on and on", finish_reason="length"),
        Example("ended: content_filter", "<think>a</think>b", finish_reason="content_filter"),
        Example("refused", "", finish_reason="refused"),
        Example("unknown", "<think>a</think>b", finish_reason=None),
    )

    def judge(self, candidate: Candidate) -> Verdict:
        """Look at the finish reason, which is the evidence."""
        why = candidate.trace.finish_reason
        known = {"stop": OK, "length": "truncated", REFUSED: REFUSED, None: "unknown"}
        return self.verdict(known.get(why, f"ended: {why}"), finish_reason=why)
