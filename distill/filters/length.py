"""Length in the teacher's own tokens, or in words where a trace came without token ids.

Small students learn better from shorter reasoning (arXiv 2502.12143), so the limits are the recipe's, per student.
"""

from distill.traces.trace import Trace, Verdict

TOKENS, WORDS = "teacher tokens", "words"


def length(trace: Trace) -> tuple[int, str]:
    """(length of the whole completion, its unit)."""
    if trace.tokens:
        return trace.tokens, TOKENS
    return len(trace.text.split()), WORDS


def reasoning_length(trace: Trace) -> int:
    """The reasoning's share of `length`, by its share of the characters: no tokenizer is loaded to filter."""
    if not trace.text:
        return 0
    return round(length(trace)[0] * len(trace.reasoning or "") / len(trace.text))


def check_length(trace: Trace, shortest: int | None, longest: int | None) -> Verdict:
    """Reasons: ok, too_short, too_long. The evidence names the unit."""
    count, unit = length(trace)
    if shortest is not None and count < shortest:
        reason = "too_short"
    elif longest is not None and count > longest:
        reason = "too_long"
    else:
        reason = "ok"
    return Verdict("length", reason == "ok", reason, {"length": count, "unit": unit})
