"""Stage 2: every trace gets its verdicts; the kept and the dropped are written, both with all of them.

Filters that judge one trace run on every trace, also on one that another filter drops (see `distill.filters.base`).
That goes for grading too, whose cost on the traces that other filters drop is small: a truncated one has no answer to
compare.

Per-trace verdicts go to a ledger as they come (`verdicts.jsonl`), so a killed run repeats next to no grading, and a run
that was extended by more samples grades only those. Rows hold a hash of the versions of filters and graders: rows of
other versions are judged again, also those of a finished stage, so that no output mixes two graders. The choosing
filters are cheap and start afresh. Judging reads texts only, in one pass; writing copies the stored columns, in
another.

The settings are the filters' only. Which teacher made the traces need not be among them: a run directory holds traces
of one identity, and `--fresh generate` moves the filter's output aside too. A trace whose text is not the one that its
row in the ledger was written for is judged again.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from distill import console
from distill.artefacts import FilterSummary, GenerateSummary, RunPaths, Settings
from distill.durable import replacing
from distill.errors import UserError, WorkError
from distill.filters.base import ChoosingFilter, CorpusFilter, GroupFilter, PromptGroup, Resources
from distill.filters.cluster import ClusterJudge, require_ray
from distill.filters.judge import Judge
from distill.filters.judged import Judged
from distill.filters.resources import RunResources, judges_identity
from distill.filters.summary import Tally, print_summary
from distill.filters.table import JudgedTable, Survivors
from distill.fingerprint import digest
from distill.grading import require_grader
from distill.grading.judge import check_budget
from distill.grading.mixed import require_judge
from distill.grading.sandbox.levels import require_level
from distill.recipe import Recipe
from distill.run import Run
from distill.stage import Stage
from distill.traces.ledger import Ledger, line_of
from distill.traces.published import tasks_of_run
from distill.traces.store import Decision, TraceStore
from distill.traces.trace import Trace, Verdict, content_hash

KEPT, DROPPED = 0, 1  # of the two directories


def check_gradable(recipe: Recipe, tasks: Collection[str] | None = None) -> None:
    """Raise UserError when the filters cannot judge what the prompts ask. Cheap: worth asking before generating.

    tasks: those of the traces; None, before there are any: those that the recipe and the runs it reads have.
    """
    if recipe.judge is not None:
        check_budget(recipe.judge)
    if not recipe.filter.correct:
        return
    if tasks is None:
        tasks = recipe.tasks | {task for source in recipe.traces for task in tasks_of_run(source)}
    require_judge(tasks, recipe.judge is not None, "filter.correct")
    for task in sorted(tasks):
        require_grader(task, "filter.correct", "set it to false, or leave such prompts out")
    if "code" in tasks:
        require_level(recipe.filter.correct.sandbox, "filter.correct.sandbox")
    for i, source in enumerate(recipe.prompts):
        if getattr(source, "answer", "") is None:
            raise UserError(
                f"filter.correct: prompts.{i} has no gold answers (its `answer` is null), so all of its traces would "
                f"be dropped; set filter.correct to false, or name the column with the answers"
            )


def load_resources(
    recipe: Recipe, judgements: Path | None = None, tasks: Collection[str] | None = None
) -> RunResources:
    """Load what the filters need besides the traces. judgements, tasks: as `RunResources` has them.

    Errors: UserError, such as for a benchmark that cannot be read.
    """
    resources = RunResources(recipe, judgements, tasks)
    for each in (*recipe.filter.judging_filters(), *recipe.filter.choosing_filters()):
        each.check(resources)
    return resources


def check_benchmark_names(recipe: Recipe) -> None:
    """Raise UserError when `decontaminate` names a benchmark that is unknown or a file that is missing.

    Reads no problem and needs no network: asked before traces are paid for on a machine that may not filter them.
    """
    RunResources(recipe).benchmarks_identity()


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
        """Those of the recipe, the content of the benchmarks of `decontaminate`, and the judge's identity where one is
        asked."""
        tasks, judge = _tasks(run), run.recipe.judge
        settings = run.recipe.filter_settings(tasks) | RunResources(run.recipe).benchmarks_identity()
        if judge is not None and run.recipe.filters_ask_the_judge(tasks):
            settings |= {f"judge_model.{key}": value for key, value in run.models.judge.identity.items()}
        return settings

    def extent(self, run: Run) -> Settings:
        """The traces, and the versions of what judges them.

        From the record of a finished `generate`, else from the store. Errors: UserError when there are no traces.
        """
        judges: Settings = {"judged_by": judges_identity(run.recipe, _tasks(run))}
        if (generated := run.stored_summary("generate", GenerateSummary)) is not None:
            return judges | {"traces": generated.traces, "content": generated.content_hash}
        digests = [figures.digest for figures in _stored(run).figures()]
        if not digests:
            raise UserError(f"{run.paths.traces}: no traces to filter; run `distill generate` first")
        return judges | {"traces": len(digests), "content": content_hash(digests)}

    def work(self, run: Run, begin: Callable[[], None]) -> FilterSummary:
        """Judge the traces that have no verdict yet, choose among them, write both directories.

        Errors: UserError when there are no traces, when a task has no grader, and when nothing is kept (the dropped
        traces are written before).
        """
        tasks = _tasks(run)
        check_gradable(run.recipe, tasks)
        if run.on == "ray":
            require_ray()
            if run.recipe.filters_ask_the_judge(tasks):
                raise UserError(
                    "--on ray: a judge is asked by one process, which stores its judgements and keeps its budget; "
                    "remove --on ray (a server judges many responses at once), or turn the judge's filters off"
                )
        settings, store = run.recipe.filter, _stored(run)
        total, had_begun = len(store), run.begun(self.name)
        resources = load_resources(run.recipe, run.paths.judgements, tasks)
        filters, choosing = settings.judging_filters(), settings.choosing_filters()
        begin()
        if (note := store.left_out) is not None:
            console.say(note)
        run.paths.filtered.mkdir(exist_ok=True)
        judge = ClusterJudge(run.recipe, tasks) if run.on == "ray" else Judge(filters, choosing, resources)
        judged_by = digest(judges_identity(run.recipe, tasks) | {"benchmarks": resources.benchmarks_digest()})
        with JudgedTable(run.paths.filtered / ".judged.sqlite") as table:
            try:
                _judge(store, total, judge, table, run.paths.verdicts, judged_by)
            except (UserError, WorkError):
                if not had_begun and not any(Ledger(run.paths.verdicts).rows()):
                    run.forget(self)  # a judge that cannot be asked: its settings may be corrected
                raise
            _choose(table, choosing, resources, run.paths.filtered / ".scratch")
            tally = Tally([each.name for each in (*filters, *choosing)])
            _write(store, total, table, tally, run.paths)
            summary = tally.summary(*table.prompt_counts())
        summary.write(run.paths.funnel)
        if not summary.kept:
            raise _nothing_kept(summary, run.directory)
        print_summary(summary, str(run.paths.kept))
        return summary

    def headline(self, summary: FilterSummary) -> str:
        """Kept of all."""
        return f"{summary.kept:,} of {summary.total:,} traces kept"


STAGE = FilterStage()


def _stored(run: Run) -> TraceStore:
    """The stored traces that the recipe asks for, as a finished `generate` counted them. Where these are all, or where
    it is not finished, every stored trace, and the prompts are not read again."""
    store = TraceStore(run.paths.traces)
    generated = run.stored_summary("generate", GenerateSummary)
    if run.recipe.traces or generated is None or generated.traces == len(store):
        return store
    return store.part_of(run.prompts, run.recipe.generate.samples)


def _tasks(run: Run) -> set[str]:
    """The tasks of the run's traces. Reads the traces only if they were published and `generate` is not finished."""
    if run.recipe.prompts:
        return run.recipe.tasks
    if (generated := run.stored_summary("generate", GenerateSummary)) is not None and generated.tasks is not None:
        return set(generated.tasks)
    return TraceStore(run.paths.traces).tasks()


def _judge(
    store: TraceStore, total: int, judge: Judge | ClusterJudge, table: JudgedTable, path: Path, judged_by: str
) -> None:
    """Fill the table: from the ledger, and with verdicts that are made now. judged_by: digest of `judges_identity`."""
    with Ledger(path) as ledger:
        others = 0
        for row in ledger.rows():
            if (earlier := Judged.from_row(row)) is not None and earlier.judged_by == judged_by:
                table.remember(earlier)
            else:
                others += 1
        if others:
            console.say(
                f"filter: {console.counted(others, 'trace')} had verdicts of other versions of the filters or graders "
                f"and will be judged again"
            )
        with console.progress("filter", total, "traces") as advance, judge:

            def unknown() -> Iterator[tuple[int, Trace]]:
                for position, trace in enumerate(store.iterate(tokens=False)):
                    if (earlier := table.recall(trace.key, trace.digest)) is not None:
                        table.add(position, earlier)
                        advance(1)
                    else:
                        yield position, trace

            for position, judged in judge.judge(unknown()):
                judged.judged_by = judged_by
                ledger.add(judged.to_row())
                table.add(position, judged)
                advance(1)
    with replacing(path) as file:  # in the store's order, which no kill and no cluster changes
        file.writelines(line_of(judged.to_row()) for judged in table)
    table.arrange()


def _choose(table: JudgedTable, filters: Sequence[ChoosingFilter], resources: Resources, scratch: Path) -> None:
    """Let the choosing filters choose, in their order; neighbours that look at one prompt share a pass."""
    for is_group, neighbours in groupby(filters, lambda each: isinstance(each, GroupFilter)):
        if is_group:
            groups = [each for each in neighbours if isinstance(each, GroupFilter)]
            table.choose(_chosen_in_groups(table, groups, resources), len(groups))
            continue
        for each in neighbours:
            assert isinstance(each, CorpusFilter)
            with _empty_directory(scratch):
                verdicts = each.judge_corpus(Survivors(table, scratch), resources)
                table.choose(((table.position(key), [verdict]) for key, verdict in verdicts), 1)


def _chosen_in_groups(
    table: JudgedTable, filters: Sequence[GroupFilter], resources: Resources
) -> Iterator[tuple[int, Sequence[Verdict]]]:
    for placed in table.prompts():
        group = PromptGroup([each.judged for each in placed])
        before = [len(each.judged.verdicts) for each in placed]
        for each in filters:
            if survivors := group.survivors:
                verdicts = each.judge_group(group, resources)
                for trace, verdict in zip(survivors, verdicts, strict=True):
                    trace.verdicts.append(verdict)
        for (position, judged), start in zip(placed, before, strict=True):
            yield position, judged.verdicts[start:]


def _write(store: TraceStore, total: int, table: JudgedTable, tally: Tally, paths: RunPaths) -> None:
    """Copy the traces to their two directories, and count them."""
    with console.progress("write", total, "traces") as advance:

        def decisions() -> Iterator[Decision]:
            for judged in table:
                tally.add(judged)
                advance(1)
                yield Decision(judged.key, KEPT if judged.kept else DROPPED, judged.verdicts)

        store.split([paths.kept, paths.dropped], decisions())


@contextmanager
def _empty_directory(path: Path) -> Iterator[None]:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    yield
    shutil.rmtree(path)


def _nothing_kept(summary: FilterSummary, run: Path) -> UserError:
    step = max(summary.funnel, key=lambda step: step.dropped)
    reason, count = next(iter(step.reasons.items()))
    return UserError(
        f"nothing kept of {summary.total:,} traces: {step.filter} dropped {step.dropped:,}, {count:,} of them as "
        f"{reason!r}; read them with `distill traces {run} --verdict dropped`, then change `generate`, or loosen or "
        f"turn off that filter: `--set filter.{step.filter}=false --fresh filter`"
    )
