"""Format: exactly one closed `<think>` block at the start, something in it, something after it.

Anything else teaches a student to think without end, to think twice, or not to answer. The raw text is judged, not the
split views, which are forgiving on purpose.
"""

from collections.abc import Mapping
from typing import ClassVar

from distill.filters.base import OK, Candidate, Example, TraceFilter
from distill.prompts.prompt import END_THINK, THINK
from distill.traces.trace import Verdict


class Format(TraceFilter):
    """Keep traces with exactly one closed <think> block and text after it."""

    name = "format"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "one closed block, with text in it and after it",
        "no_think": "no tag at all",
        "not_closed": "a block that never ends",
        "not_opened": "only the closing tag",
        "several_blocks": "a tag more than once",
        "text_before": "text before the block",
        "empty_reasoning": "nothing in the block",
        "no_response": "nothing after the block",
    }
    examples = (
        Example(OK, "<think>\n20 + 22 = 42\n</think>\nThe answer is \\boxed{42}."),
        Example(OK, "\n<think>a</think>b"),
        Example("no_think", "42"),
        Example("no_think", ""),
        Example("not_closed", "<think>on and on"),
        Example("not_closed", "<think>a<think>b"),
        Example("not_opened", "a</think>b"),
        Example("several_blocks", "<think>a</think>b<think>c</think>d"),
        Example("several_blocks", "<think>a<think>b</think>c"),
        Example("several_blocks", "<think>a</think></think>b"),
        Example("text_before", "Well, <think>a</think>b"),
        Example("text_before", "</think>a<think>b"),
        Example("empty_reasoning", "<think> \n </think>b"),
        Example("no_response", "<think>a</think> \n"),
    )

    def judge(self, candidate: Candidate) -> Verdict:
        """Look at the tags. The evidence has the number of opening and of closing ones."""
        text = candidate.trace.text
        before, _, rest = text.partition(THINK)
        reasoning, _, response = rest.partition(END_THINK)
        opened, closed = text.count(THINK), text.count(END_THINK)
        if not opened and not closed:
            reason = "no_think"
        elif not closed:
            reason = "not_closed"
        elif not opened:
            reason = "not_opened"
        elif opened > 1 or closed > 1:
            reason = "several_blocks"
        elif before.strip():
            reason = "text_before"
        elif not reasoning.strip():
            reason = "empty_reasoning"
        elif not response.strip():
            reason = "no_response"
        else:
            return self.verdict(OK)
        return self.verdict(reason, think=opened, end_think=closed)
