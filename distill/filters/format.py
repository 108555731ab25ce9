"""Format: exactly one closed `<think>` block at the start, something in it, something after it.

Anything else teaches a student to think without end, to think twice, or not to answer. The raw text is looked at, not
the split views, which are forgiving on purpose.
"""

from distill.traces.trace import Trace, Verdict

THINK, END_THINK = "<think>", "</think>"


def check_format(trace: Trace) -> Verdict:
    """Reasons: ok, no_think, not_closed, not_opened, several_blocks, text_before, empty_reasoning, no_response."""
    before, _, rest = trace.text.partition(THINK)
    reasoning, _, response = rest.partition(END_THINK)
    opened, closed = trace.text.count(THINK), trace.text.count(END_THINK)
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
        return Verdict("format", True, "ok")
    return Verdict("format", False, reason, {"think": opened, "end_think": closed})
