"""Finish reason: a trace that ran into the token limit stops in the middle, and so would its student."""

from distill.traces.trace import Trace, Verdict


def check_finish(trace: Trace) -> Verdict:
    """Reasons: ok, truncated."""
    keep = trace.finish_reason == "stop"
    return Verdict("finish", keep, "ok" if keep else "truncated", {"finish_reason": trace.finish_reason})
