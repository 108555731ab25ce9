"""Stage 2: every trace gets its verdicts; the kept and the dropped are written, both with all of them.

Filters that look at one trace (format, finish, correct, length) all run on every trace, also on one that an earlier
filter has dropped: then the verdicts tell what each filter does alone, and an ablation is a count, not another run.
That goes for grading too, whose cost on the traces that other filters drop is small: a truncated one has no answer to
compare. Filters that choose among traces (dedup, select) see only the survivors of those before them, or they would
keep a duplicate of something dropped.

Per-trace verdicts go to a ledger as they come (`verdicts.jsonl`, at most FLUSH_SECONDS behind), so a killed run repeats
next to no grading, and a run that was extended by more samples grades only those. The choosing filters are cheap and
start afresh.

The fingerprint has the filter's settings only. Which teacher made the traces need not be in it: a run directory holds
traces of one identity, and `--fresh generate` moves the filter's output aside too. Should a text change under its key
all the same, its digest no longer fits its ledger row, and it is judged again.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill import console
from distill.artefacts import FilterSummary, GenerateSummary, Settings
from distill.errors import UserError
from distill.filters.correct import check_correct
from distill.filters.dedup import check_duplicates
from distill.filters.finish import check_finish
from distill.filters.format import check_format
from distill.filters.judged import Judged, Key, digest
from distill.filters.length import check_length
from distill.filters.select import check_selected
from distill.filters.summary import print_summary, summarise
from distill.grading import Grade, Grader, require_grader
from distill.recipe import Filter, Recipe
from distill.run import Run
from distill.stage import Stage
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, write_traces
from distill.traces.trace import Trace, Verdict, content_hash

FLUSH_SECONDS = 0.5  # an fsync a trace would cost more than most gradings


def check_gradable(recipe: Recipe) -> None:
    """Raise UserError when the filters cannot judge what the prompts ask. Cheap: worth asking before generating."""
    if recipe.filter.correct:
        for source in (*recipe.prompts, *recipe.traces):
            task = getattr(source, "task", "math")  # procedural problems are mathematics
            require_grader(task, "filter.correct", "set it to false, or leave such prompts out")


class FilterStage(Stage[FilterSummary]):
    """The traces with their verdicts, in `filtered/kept` and `filtered/dropped`."""

    name = "filter"
    outputs = ("filtered",)
    products = ("filtered/kept/part-*.parquet", "filtered/dropped/part-*.parquet")
    reads = ("generate",)
    summary = FilterSummary

    def recipe_settings(self, recipe: Recipe) -> Settings:
        """What decides the verdicts, besides the traces."""
        return recipe.filter_settings()

    def settings(self, run: Run) -> Settings:
        """Those of the recipe."""
        return self.recipe_settings(run.recipe)

    def extent(self, run: Run) -> Settings:
        """The traces: from the record of a finished `generate`, else from the store. UserError when there are none."""
        if (generated := run.stored_summary("generate", GenerateSummary)) is not None:
            return {"traces": generated.traces, "content": generated.content_hash}
        store = TraceStore(run.paths.traces)
        count = len(store)
        if not count:
            raise UserError(f"{run.paths.traces}: no traces to filter; run `distill generate` first")
        return {"traces": count, "content": content_hash(store)}

    def work(self, run: Run, begin: Callable[[], None]) -> FilterSummary:
        """Judge the traces that have no verdict yet, choose among them, write both directories.

        Errors: UserError when there are no traces, when a task has no grader, and when nothing is kept (the dropped
        traces are written before).
        """
        check_gradable(run.recipe)
        settings = run.recipe.filter
        store = TraceStore(run.paths.traces)
        keys = store.keys()
        begin()
        run.paths.filtered.mkdir(exist_ok=True)
        judged = _judge_each(store, keys, settings, run.paths.verdicts)
        _choose(judged, settings, run.recipe.seed)
        kept = {trace.key for trace in judged.values() if trace.kept}
        verdicts = {key: trace.verdicts for key, trace in judged.items()}
        write_traces(run.paths.kept, (trace for trace in store if trace.key in kept), verdicts)
        write_traces(run.paths.dropped, (trace for trace in store if trace.key not in kept), verdicts)
        kept_hash = content_hash(trace for trace in store if trace.key in kept)
        summary = summarise(list(judged.values()), kept_hash)
        if not kept:
            raise _nothing_kept(summary, run.paths.dropped)
        print_summary(summary, str(run.paths.kept))
        return summary

    def headline(self, summary: FilterSummary) -> str:
        """Kept of all."""
        return f"{summary.kept:,} of {summary.total:,} traces kept"


STAGE = FilterStage()


def _judge_each(store: TraceStore, keys: set[Key], settings: Filter, path: Path) -> dict[Key, Judged]:
    """The verdicts of the filters that look at one trace, from the ledger or made now."""
    ledger = Ledger(path)
    known = {judged.key: judged for judged in map(Judged.from_row, ledger.rows()) if judged.key in keys}
    judged: dict[Key, Judged] = {}

    def unknown() -> Iterator[Trace]:
        for trace in store:
            earlier = known.get(trace.key)
            if earlier and earlier.digest == digest(trace):
                judged[trace.key] = earlier
            else:
                yield trace

    with ExitStack() as stack:
        stack.enter_context(ledger)
        advance = stack.enter_context(console.progress("filter", len(keys), "traces", done=len(known)))
        graded: Iterable[tuple[Trace, Grade | None]] = ((trace, None) for trace in unknown())
        if settings.correct:
            grader = stack.enter_context(Grader(settings.workers, settings.grade_timeout))
            graded = grader.grade((trace, trace.prompt, trace.response) for trace in unknown())
        rows: list[dict[str, Any]] = []
        flushed = time.monotonic()
        try:
            for trace, grade in graded:
                judged[trace.key] = Judged.of(trace, _verdicts(trace, grade, settings))
                rows.append(judged[trace.key].to_row())
                advance(1)
                if time.monotonic() - flushed >= FLUSH_SECONDS:
                    ledger.append(rows)
                    rows, flushed = [], time.monotonic()
        finally:
            ledger.append(rows)
    return judged


def _verdicts(trace: Trace, grade: Grade | None, settings: Filter) -> list[Verdict]:
    """In the funnel's order. `grade` is None where correctness is not asked for."""
    verdicts = []
    if settings.format:
        verdicts.append(check_format(trace))
    if settings.finish:
        verdicts.append(check_finish(trace))
    if grade is not None:
        verdicts.append(check_correct(grade))
    if settings.min_tokens is not None or settings.max_tokens is not None:
        verdicts.append(check_length(trace, settings.min_tokens, settings.max_tokens))
    return verdicts


def _choose(judged: dict[Key, Judged], settings: Filter, seed: int) -> None:
    """Add the verdicts of the filters that choose among traces."""
    if settings.dedup:
        for key, verdict in check_duplicates([trace for trace in judged.values() if trace.kept]).items():
            judged[key].verdicts.append(verdict)
    if settings.per_prompt is not None:
        survivors = [trace for trace in judged.values() if trace.kept]
        for key, verdict in check_selected(survivors, settings.per_prompt, settings.select, seed).items():
            judged[key].verdicts.append(verdict)


def _nothing_kept(summary: FilterSummary, dropped: Path) -> UserError:
    step = max(summary.funnel, key=lambda step: step.dropped)
    reason, count = next(iter(step.reasons.items()))
    return UserError(
        f"nothing kept of {summary.total:,} traces: {step.filter} dropped {step.dropped:,}, {count:,} of them "
        f"as {reason!r}; read them with their verdicts in {dropped}, then loosen `filter` or change `generate`"
    )
