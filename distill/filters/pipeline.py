"""Stage 2: every trace gets its verdicts; the kept and the dropped are written, both with all of them.

Filters that judge one trace run on every trace, also on one that another filter drops (see `distill.filters.base`).
That goes for grading too, whose cost on the traces that other filters drop is small: a truncated one has no answer to
compare.

Per-trace verdicts go to a ledger as they come (`verdicts.jsonl`), so a killed run repeats next to no grading, and a run
that was extended by more samples grades only those. The choosing filters are cheap and start afresh. Judging reads
texts only, in one pass; writing copies the stored columns, in another.

The settings are the filters' only. Which teacher made the traces need not be among them: a run directory holds traces
of one identity, and `--fresh generate` moves the filter's output aside too. A trace whose text is not the one that its
row in the ledger was written for is judged again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from distill import console
from distill.artefacts import FilterSummary, GenerateSummary, Settings
from distill.errors import UserError
from distill.filters.base import Candidate
from distill.filters.judged import Judged, Key
from distill.filters.summary import print_summary, summarise
from distill.grading import Grade, Grader, require_grader
from distill.recipe import Filter, Recipe
from distill.run import Run
from distill.stage import Stage
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore
from distill.traces.trace import Trace, content_hash

KEPT, DROPPED = 0, 1  # of the two directories


def check_gradable(recipe: Recipe) -> None:
    """Raise UserError when the filters cannot judge what the prompts ask. Cheap: worth asking before generating."""
    if not recipe.filter.correct:
        return
    for i, source in enumerate((*recipe.prompts, *recipe.traces)):
        task = getattr(source, "task", "math")  # procedural problems are mathematics
        require_grader(task, "filter.correct", "set it to false, or leave such prompts out")
        if recipe.prompts and getattr(source, "answer", "") is None:
            raise UserError(
                f"filter.correct: prompts.{i} has no gold answers (its `answer` is null), so all of its traces would "
                f"be dropped; set filter.correct to false, or name the column with the answers"
            )


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
        digests = [figures.digest for figures in TraceStore(run.paths.traces).figures()]
        if not digests:
            raise UserError(f"{run.paths.traces}: no traces to filter; run `distill generate` first")
        return {"traces": len(digests), "content": content_hash(digests)}

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
        for choosing in settings.choosing_filters():
            survivors = [trace for trace in judged.values() if trace.kept]
            for key, verdict in choosing.choose(survivors, run.recipe.seed).items():
                judged[key].verdicts.append(verdict)
        store.split(
            [run.paths.kept, run.paths.dropped],
            lambda key: KEPT if judged[key].kept else DROPPED,
            {key: trace.verdicts for key, trace in judged.items()},
        )
        order = [each.name for each in (*settings.trace_filters(), *settings.choosing_filters())]
        summary = summarise(list(judged.values()), order)
        if not summary.kept:
            raise _nothing_kept(summary, run.directory)
        print_summary(summary, str(run.paths.kept))
        return summary

    def headline(self, summary: FilterSummary) -> str:
        """Kept of all."""
        return f"{summary.kept:,} of {summary.total:,} traces kept"


STAGE = FilterStage()


def _judge_each(store: TraceStore, keys: set[Key], settings: Filter, path: Path) -> dict[Key, Judged]:
    """The verdicts of the filters that judge one trace, from the ledger or made now."""
    ledger = Ledger(path)
    known = {judged.key: judged for judged in map(Judged.from_row, ledger.rows()) if judged.key in keys}
    judged: dict[Key, Judged] = {}
    filters = settings.trace_filters()

    def unknown() -> Iterator[Trace]:
        for trace in store.iterate(tokens=False):
            earlier = known.get(trace.key)
            if earlier and earlier.digest == trace.digest:
                judged[trace.key] = earlier
            else:
                yield trace

    with ExitStack() as stack:
        stack.enter_context(ledger)
        advance = stack.enter_context(console.progress("filter", len(keys), "traces", done=len(known)))
        graded: Iterable[tuple[Trace, Grade | None]] = ((trace, None) for trace in unknown())
        if settings.correct:
            grader = stack.enter_context(Grader(settings.correct.workers, settings.correct.timeout))
            graded = grader.grade((trace, trace.prompt, trace.answer) for trace in unknown())
        for trace, grade in graded:
            candidate = Candidate(trace, grade)
            judged[trace.key] = Judged.of(trace, [each.judge(candidate) for each in filters])
            ledger.add(judged[trace.key].to_row())
            advance(1)
    return judged


def _nothing_kept(summary: FilterSummary, run: Path) -> UserError:
    step = max(summary.funnel, key=lambda step: step.dropped)
    reason, count = next(iter(step.reasons.items()))
    return UserError(
        f"nothing kept of {summary.total:,} traces: {step.filter} dropped {step.dropped:,}, {count:,} of them as "
        f"{reason!r}; read them with `distill traces {run} --verdict dropped`, then change `generate`, or loosen or "
        f"turn off that filter: `--set filter.{step.filter}=false --fresh filter`"
    )
