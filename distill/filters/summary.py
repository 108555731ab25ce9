"""The funnel in figures: how many traces each filter judged and dropped, why, and how many are left."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from distill import console
from distill.artefacts import FilterSummary, FunnelStep
from distill.filters.judged import Judged
from distill.traces.trace import TOKENS, WORDS, ContentHash, dropped_by

UNVERIFIABLE = "unverifiable: the grader gives no verdict on the answer, for the reason named"


class Tally:
    """Counts judged traces as they pass by. order: the names of the filters that ran, as the funnel has them.

    Holds the length of the reasoning of each kept trace, in both units: which one all traces have is known at the end.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self._total = self._uncounted = 0
        self._verdicts: dict[str, Counter[str]] = {name: Counter() for name in order}
        self._dropped: dict[str, Counter[str]] = {name: Counter() for name in order}
        self._hash = ContentHash()
        self._length = dict.fromkeys((TOKENS, WORDS), 0)
        self._reasoning = {unit: array("q") for unit in self._length}

    def add(self, trace: Judged) -> None:
        """Count a trace with all its verdicts."""
        self._total += 1
        self._uncounted += trace.tokens is None
        for verdict in trace.verdicts:
            self._verdicts[verdict.filter][verdict.reason] += 1
        first = dropped_by(trace.verdicts)
        if first:
            self._dropped[first.filter][first.reason] += 1
            return
        self._hash.add(trace.digest)
        for unit, lengths in self._reasoning.items():
            self._length[unit] += trace.length(unit)
            lengths.append(trace.reasoning(unit))

    def summary(self, prompts: int, prompts_kept: int) -> FilterSummary:
        """The stage's summary. prompts: the number of prompts with a trace; prompts_kept: with a kept one.

        funnel: for every filter: traces that `entered` (not dropped by an earlier one), that it `dropped` and `kept`,
        and the `reasons` of the dropped. verdicts: filter → reason → count over *all* traces that it judged, so that
        the effect of each filter alone can be read off. tokens_kept and reasoning_… are in `unit`, which is one for all
        traces.
        """
        unit = WORDS if self._uncounted else TOKENS
        reasoning = np.asarray(self._reasoning[unit])
        kept = len(reasoning)
        return FilterSummary(
            total=self._total,
            kept=kept,
            dropped=self._total - kept,
            prompts=prompts,
            prompts_kept=prompts_kept,
            funnel=tuple(self._funnel()),
            verdicts={name: dict(reasons.most_common()) for name, reasons in self._verdicts.items()},
            unit=unit,
            tokens_kept=self._length[unit],
            reasoning_median=float(np.median(reasoning)) if kept else None,
            reasoning_mean=round(int(reasoning.sum()) / kept, 1) if kept else None,
            kept_hash=self._hash.value(),
        )

    def _funnel(self) -> Iterator[FunnelStep]:
        left = self._total
        for name, reasons in self._dropped.items():
            count, entered = reasons.total(), left
            left -= count
            most = dict(reasons.most_common())
            yield FunnelStep(filter=name, entered=entered, dropped=count, kept=left, reasons=most)


def print_summary(summary: FilterSummary, where: str) -> None:
    """Print the funnel as a table, and one line under it."""
    rows = [
        (
            step.filter,
            f"{step.entered:,}",
            f"{step.dropped:,}",
            f"{step.kept:,}",
            ", ".join(f"{reason} {count:,}" for reason, count in step.reasons.items()),
        )
        for step in summary.funnel
    ]
    console.table("Filter", ("filter", "in", "dropped", "kept", "why"), rows)
    if any(reason.startswith("unverifiable") for step in summary.funnel for reason in step.reasons):
        console.say(UNVERIFIABLE)
    reasoning = f"median reasoning {summary.reasoning_median:,.0f} {summary.unit}"
    if summary.reasoning_median == 0:
        reasoning = f"{summary.tokens_kept / summary.kept:,.0f} a trace, most without a think block"
    console.say(
        f"kept {summary.kept:,} of {summary.total:,} traces, for {summary.prompts_kept:,} of "
        f"{summary.prompts:,} prompts: {summary.tokens_kept:,} {summary.unit}, "
        f"{reasoning}; in {where}"
    )
