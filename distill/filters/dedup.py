"""Exact duplicates: of several answers to one prompt that differ in white space at most, the first sample stays.

Near-duplicates and duplicates across prompts are another question (what was asked twice), with other evidence.
"""

from collections.abc import Sequence

from distill.filters.judged import Judged, Key
from distill.traces.trace import Verdict


def check_duplicates(traces: Sequence[Judged]) -> dict[Key, Verdict]:
    """Reasons: ok, duplicate; the evidence names the sample that stays. The order of `traces` does not matter."""
    first: dict[tuple[str, str], int] = {}
    verdicts = {}
    for trace in sorted(traces, key=lambda t: t.key):
        prompt, sample = trace.key
        stays = first.setdefault((prompt, trace.digest), sample)
        if stays == sample:
            verdicts[trace.key] = Verdict("dedup", True, "ok")
        else:
            verdicts[trace.key] = Verdict("dedup", False, "duplicate", {"of_sample": stays})
    return verdicts
