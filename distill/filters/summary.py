"""The funnel in figures: what each filter saw, dropped and why, and what is left."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

from distill import console
from distill.artefacts import FilterSummary, FunnelStep
from distill.filters.judged import Judged

ORDER = ("format", "finish", "correct", "length", "dedup", "select")


def summarise(traces: Sequence[Judged], kept_hash: str) -> FilterSummary:
    """The stage's summary.

    funnel: for every filter that ran, in order: `entered` (not dropped by an earlier one), `dropped`, `kept`, and the
    `reasons` of the dropped. verdicts: filter → reason → count over *all* traces that the filter looked at, so that
    what each one does alone can be read off. tokens_kept and reasoning_… are in `unit`.
    """
    kept = [trace for trace in traces if trace.kept]
    reasoning = [trace.reasoning for trace in kept]
    units = {trace.unit for trace in traces}
    return FilterSummary(
        total=len(traces),
        kept=len(kept),
        dropped=len(traces) - len(kept),
        prompts=len({trace.key[0] for trace in traces}),
        prompts_kept=len({trace.key[0] for trace in kept}),
        funnel=tuple(_funnel(traces)),
        verdicts=_verdicts(traces),
        unit=units.pop() if len(units) == 1 else "teacher tokens, or words where there are no token ids",
        tokens_kept=sum(trace.length for trace in kept),
        reasoning_median=median(reasoning) if reasoning else None,
        reasoning_mean=round(mean(reasoning), 1) if reasoning else None,
        kept_hash=kept_hash,
    )


def _funnel(traces: Sequence[Judged]) -> list[FunnelStep]:
    ran = {verdict.filter for trace in traces for verdict in trace.verdicts}
    dropped: dict[str, Counter[str]] = {name: Counter() for name in ORDER if name in ran}
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


def _verdicts(traces: Sequence[Judged]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for trace in traces:
        for verdict in trace.verdicts:
            counts.setdefault(verdict.filter, Counter())[verdict.reason] += 1
    return {name: dict(counts[name].most_common()) for name in ORDER if name in counts}


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
        f"{summary.prompts:,} prompts, {summary.tokens_kept:,} {summary.unit} long, "
        f"with {summary.reasoning_median:,.0f} tokens of reasoning in the median: {where}"
    )
