"""The funnel in figures: how many traces each filter judged and dropped, why, and how many are left."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

from distill import console
from distill.artefacts import FilterSummary, FunnelStep
from distill.filters.judged import Judged, common_unit
from distill.traces.trace import content_hash


def summarise(traces: Sequence[Judged], order: Sequence[str]) -> FilterSummary:
    """The stage's summary. order: the names of the filters that ran, as the funnel has them.

    funnel: for every filter: traces that `entered` (not dropped by an earlier one), that it `dropped` and `kept`, and
    the `reasons` of the dropped. verdicts: filter → reason → count over *all* traces that it judged, so that the effect
    of each filter alone can be read off. tokens_kept and reasoning_… are in `unit`, which is one for all traces.
    """
    kept = [trace for trace in traces if trace.kept]
    unit = common_unit(traces)
    reasoning = [trace.reasoning(unit) for trace in kept]
    return FilterSummary(
        total=len(traces),
        kept=len(kept),
        dropped=len(traces) - len(kept),
        prompts=len({trace.key[0] for trace in traces}),
        prompts_kept=len({trace.key[0] for trace in kept}),
        funnel=tuple(_funnel(traces, order)),
        verdicts=_verdicts(traces, order),
        unit=unit,
        tokens_kept=sum(trace.length(unit) for trace in kept),
        reasoning_median=median(reasoning) if reasoning else None,
        reasoning_mean=round(mean(reasoning), 1) if reasoning else None,
        kept_hash=content_hash(trace.digest for trace in kept),
    )


def _funnel(traces: Sequence[Judged], order: Sequence[str]) -> list[FunnelStep]:
    dropped: dict[str, Counter[str]] = {name: Counter() for name in order}
    for trace in traces:
        first = next((verdict for verdict in trace.verdicts if not verdict.keep), None)
        if first:
            dropped[first.filter][first.reason] += 1
    steps, left = [], len(traces)
    for name, reasons in dropped.items():
        count = reasons.total()
        steps.append(
            FunnelStep(filter=name, entered=left, dropped=count, kept=left - count, reasons=dict(reasons.most_common()))
        )
        left -= count
    return steps


def _verdicts(traces: Sequence[Judged], order: Sequence[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in order}
    for trace in traces:
        for verdict in trace.verdicts:
            counts[verdict.filter][verdict.reason] += 1
    return {name: dict(reasons.most_common()) for name, reasons in counts.items()}


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
    console.say(
        f"kept {summary.kept:,} of {summary.total:,} traces, for {summary.prompts_kept:,} of "
        f"{summary.prompts:,} prompts: {summary.tokens_kept:,} {summary.unit}, "
        f"median reasoning {summary.reasoning_median:,.0f} {summary.unit}; in {where}"
    )
