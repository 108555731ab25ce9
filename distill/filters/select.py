"""Select k traces a prompt, so that easy prompts do not crowd out hard ones.

`random` draws by a hash of (seed, prompt, sample): the choice does not depend on the order in which traces were
finished, and raising k or adding samples keeps as much of the earlier choice as can be kept.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from distill.filters.judged import Judged, Key
from distill.traces.trace import Verdict


def check_selected(
    traces: Sequence[Judged], per_prompt: int, how: Literal["first", "shortest", "random"], seed: int
) -> dict[Key, Verdict]:
    """Reasons: ok, surplus; the evidence has the trace's rank (from 1) among those of its prompt."""

    def order(trace: Judged) -> tuple[Any, ...]:
        prompt, sample = trace.key
        if how == "random":
            return (hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest(),)
        return (trace.length, sample) if how == "shortest" else (sample,)

    by_prompt: dict[str, list[Judged]] = defaultdict(list)
    for trace in traces:
        by_prompt[trace.key[0]].append(trace)
    verdicts = {}
    for group in by_prompt.values():
        for rank, trace in enumerate(sorted(group, key=order), 1):
            keep = rank <= per_prompt
            verdicts[trace.key] = Verdict("select", keep, "ok" if keep else "surplus", {"rank": rank, "by": how})
    return verdicts
