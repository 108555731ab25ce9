"""What the report shows, read from the files of a run directory and nothing else.

A run may have stopped after any stage, so everything but the recipe may be missing; the page says so in its place.
Files that a finished stage recorded are hashed before they are shown: a page must not show figures of a damaged run.
Large runs are not put into a page: lengths are counted over all traces, texts are shown of some, chosen by rule (the
first kept ones, the first of each reason for dropping, as long as there is room), never by how well they look. Each
stored trace is read once.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from distill.artefacts import (
    Artefact,
    EvalSummary,
    FilterSummary,
    GenerateSummary,
    PublishedScores,
    RunPaths,
    Scores,
    TrainSummary,
)
from distill.console import progress
from distill.evaluations import (
    GradeRow,
    Results,
    counts_by_problem,
    difference_line,
    finished_evaluations,
    judge_line,
    published_line,
    read_results,
)
from distill.grading.grade import UNGRADABLE
from distill.planned import Plan
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.report.expected import ExpectedRow, compare_with_plan
from distill.report.phases import PhaseContents, read_phases
from distill.report.records import STAGES, LogRow, Place, read_log, read_record, read_summary, refuse_damage
from distill.report.rollouts import Rollouts, read_rollouts
from distill.report.shown import Shown, shown
from distill.traces.browse import KEPT, verdict_of
from distill.traces.store import TraceStore, count_traces, read_traces
from distill.traces.trace import REFUSED, WORDS, Trace, Verdict

KEPT_SHOWN = 60  # kept traces in the page
DROPPED_SHOWN = 15  # dropped traces of each reason
REASONS_SHOWN = 12
ROOM = 500_000  # characters of kept traces, and as many of dropped ones: the page stays below 3 MB
MANY = 20_000  # traces that take some seconds to read
MODELS = ("base", "student", "teacher")

Counts = tuple[int, int]  # (right, all) samples of one problem


@dataclass(frozen=True)
class StageTime:
    """One stage that was begun. seconds: worked, where they are known. tokens: generated or learnt; None where the
    stage has none, or they were not counted. cost: in the currency of the price; None without a price. machines: where
    it worked; empty where they were not recorded."""

    name: str
    begun: str
    finished: bool
    seconds: float | None
    tokens: int | None
    cost: float | None
    machines: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """Completion lengths of all traces, in `unit`: words where tokens were not counted for every trace."""

    kept: list[int]
    dropped: list[int]
    unit: str

    @property
    def total(self) -> int:
        """The number of traces."""
        return len(self.kept) + len(self.dropped)


@dataclass(frozen=True)
class Contents:
    """Everything the page needs; empty where a stage has not come so far.

    price: of an hour. solved: (right, all) samples of each prompt by the teacher, empty where every prompt has one
    sample or none is graded. solved_by: benchmark → model → the same of each problem. lines: below the scores,
    differences between models and published scores. rollouts: of the training; None without any. expected: as
    `distill plan` estimated. answers: to one problem of the first benchmark, by each model.
    """

    name: str
    recipe: Recipe
    recipe_text: str
    stages: list[StageTime]
    price: float | None
    generated: GenerateSummary | None
    filtered: FilterSummary | None
    trained: TrainSummary | None
    log: list[LogRow]
    rollouts: Rollouts | None
    phases: list[PhaseContents]
    lengths: Lengths
    solved: list[Counts]
    traces: list[Shown]
    scores: list[Scores]
    solved_by: dict[str, dict[str, list[Counts]]]
    published: list[PublishedScores]
    lines: list[str]
    answers: list[Shown]
    expected: list[ExpectedRow]
    plan: Plan | None

    @property
    def worked(self) -> float:
        """Seconds of all stages that are finished."""
        return sum(stage.seconds or 0 for stage in self.stages)

    @property
    def machines(self) -> list[str]:
        """Where the stages worked, in order, each once."""
        return list(dict.fromkeys(machine for stage in self.stages for machine in stage.machines))

    @property
    def rollouts_shown(self) -> list[Shown]:
        """Rollouts of the training, or of all its phases in order."""
        each = [self.rollouts, *(phase.rollouts for phase in self.phases)]
        return [trace for rollouts in each if rollouts for trace in rollouts.shown]

    @property
    def readable(self) -> list[Shown]:
        """What the page's reader pages through."""
        return self.traces + self.rollouts_shown

    @property
    def cost(self) -> float:
        """The price of all stages that are finished."""
        return sum(stage.cost or 0 for stage in self.stages)


def read_contents(
    directory: Path, recipe: Recipe, price_per_hour: float | None = None, verified: bool = False
) -> Contents:
    """Read a run directory. recipe: the one to show. It is not read here: the recipe.yaml of a run that goes on with
    another price or limit is written when the report begins, after this. price_per_hour: of the machine; default: the
    recipe's. verified: the recorded files were hashed already.

    Errors: UserError when a file in it is damaged.
    """
    paths = RunPaths(directory)
    place = Place(paths)
    records = {name: record for name in STAGES if (record := read_record(place, name))}
    if not verified:
        refuse_damage(place, records)
    summaries = {name: read_summary(place, name, record) for name, record in records.items() if record.finished}
    generated, filtered = summaries.get("generate"), summaries.get("filter")
    trained, evaluated = summaries.get("train"), summaries.get("eval")
    assert isinstance(generated, GenerateSummary | None) and isinstance(filtered, FilterSummary | None)
    assert isinstance(trained, TrainSummary | None) and isinstance(evaluated, EvalSummary | None)
    price = recipe.price_per_hour if price_per_hour is None else price_per_hour
    kept, dropped = _Traces.read(paths.kept), _Traces.read(paths.dropped)
    results = _results(paths.eval)
    scores = [result.scores for result in results]
    times = [_stage_time(name, record, summaries.get(name), price) for name, record in records.items()]
    log, phases = read_log(paths.log), read_phases(directory, recipe)
    rollouts = read_rollouts(paths, recipe.train, log, trained)
    every = [each for each in (rollouts, *(phase.rollouts for phase in phases)) if each is not None]
    plan = Plan.read_if_there(paths.plan, "remove it, or run `distill plan` again")
    return Contents(
        name=recipe.name,
        recipe=recipe,
        recipe_text=recipe.to_yaml(),
        stages=times,
        price=price,
        generated=generated,
        filtered=filtered,
        trained=trained,
        log=log,
        rollouts=rollouts,
        phases=phases,
        lengths=_lengths(kept, dropped),
        solved=_rates(list((kept + dropped).values())),
        traces=kept.shown + dropped.shown,
        scores=scores,
        solved_by=_solved_by(results),
        published=list(evaluated.published) if evaluated else [],
        lines=[*_judged_by(scores), *(_lines(evaluated, scores) if evaluated else [])],
        answers=_answers(paths.eval, results),
        expected=_compared(plan, paths, times, generated, trained, every) if plan else [],
        plan=plan,
    )


# ---- stages


def _stage_time(name: str, record: StageRecord, summary: Artefact | None, price: float | None) -> StageTime:
    begun = datetime.fromisoformat(record.begun).astimezone(UTC)
    seconds = record.seconds if record.finished else None
    cost = None if seconds is None or price is None else seconds / 3600 * price
    done = record.finished is not None
    return StageTime(name, f"{begun:%Y-%m-%d %H:%M} UTC", done, seconds, _tokens(summary), cost, record.machines)


def _compared(
    plan: Plan,
    paths: RunPaths,
    times: Iterable[StageTime],
    generated: GenerateSummary | None,
    trained: TrainSummary | None,
    rollouts: Sequence[Rollouts],
) -> list[ExpectedRow]:
    """rollouts: of all trainings. Their time is part of that of the stage `train`."""
    finished = [time for time in times if time.finished]
    tokens = {time.name: time.tokens for time in finished}
    if trained is not None:
        tokens["train"] = trained.tokens
    seconds = {time.name: time.seconds for time in finished}
    if rollouts and (whole := seconds.get("train")) is not None:
        spent = Counter[str]()
        for each in rollouts:
            spent.update({row.what: row.seconds for row in each.spent})
        tokens["rollouts"] = sum(each.tokens for each in rollouts)
        seconds |= {name: spent[name] for name in ("rollouts", "scoring")}
        seconds["train"] = whole - sum(seconds_ for what, seconds_ in spent.items() if what != "training")
    return compare_with_plan(plan, paths, tokens, seconds, generated.prompt_tokens if generated else None)


def _tokens(summary: Artefact | None) -> int | None:
    match summary:
        case GenerateSummary():
            return summary.tokens
        case TrainSummary():
            return summary.supervised_tokens
        case EvalSummary() if all(row.mean_completion_tokens is not None for row in summary.scores):
            return round(sum(row.samples * (row.mean_completion_tokens or 0) for row in summary.scores))
    return None


# ---- traces


@dataclass
class _Traces:
    """What is kept of one directory of judged traces, which is read once."""

    tokens: list[int] = field(default_factory=list)  # 0 where they were not counted
    counted: bool = True  # all of them
    words: list[int] = field(default_factory=list)
    graded: dict[str, Counts] = field(default_factory=dict)  # by prompt
    shown: list[Shown] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> "_Traces":
        """Read a directory; nothing where it is missing. Errors: UserError when it is damaged."""
        traces, room = cls(), ROOM
        by_verdict: dict[str, list[Shown]] = defaultdict(list)
        for trace, verdicts in _judged(directory) if directory.is_dir() else ():
            traces.tokens.append(trace.tokens)
            traces.counted &= trace.counted
            traces.words.append(len(trace.text.split()))
            grades = [each for each in verdicts if each.filter == "correct" and each.reason != UNGRADABLE]
            for correct in (each.keep for each in grades if trace.finish_reason != REFUSED):
                right, count = traces.graded.get(trace.prompt.id, (0, 0))
                traces.graded[trace.prompt.id] = (right + correct, count + 1)
            verdict = verdict_of(verdicts)
            chosen = by_verdict[verdict]
            wanted = len(chosen) < (KEPT_SHOWN if verdict == KEPT else DROPPED_SHOWN)
            if wanted and (room > 0 or not chosen):  # one of each reason, however long
                chosen.append(shown("teacher", verdict, verdict == KEPT, trace, verdicts))
                room -= len(trace.text) + len(trace.prompt.messages[-1]["content"])
        traces.shown = [trace for chosen in list(by_verdict.values())[:REASONS_SHOWN] for trace in chosen]
        return traces

    def __add__(self, other: "_Traces") -> dict[str, Counts]:
        """Prompt → (right, all) samples of both."""
        counts = dict(self.graded)
        for prompt, (right, count) in other.graded.items():
            before = counts.get(prompt, (0, 0))
            counts[prompt] = (before[0] + right, before[1] + count)
        return counts


def _judged(directory: Path) -> Iterator[tuple[Trace, list[Verdict]]]:
    """All traces with their verdicts; with a progress bar where they are many."""
    total = count_traces(directory)
    bar = progress("report", total, f"{directory.name} traces") if total >= MANY else nullcontext(lambda _: None)
    with bar as advance:
        for judged in read_traces(directory, ids=False):
            yield judged
            advance(1)


def _lengths(kept: _Traces, dropped: _Traces) -> Lengths:
    if kept.counted and dropped.counted:
        return Lengths(kept.tokens, dropped.tokens, "tokens")
    return Lengths(kept.words, dropped.words, WORDS)


# ---- scores


def _results(directory: Path) -> list[Results]:
    """The finished evaluations, by benchmark, models from base to teacher. Errors: UserError when one is damaged."""
    evaluations = finished_evaluations(directory)
    return [
        read_results(models[name]) for _, models in sorted(evaluations.items()) for name in MODELS if name in models
    ]


def _rates(counts: list[Counts]) -> list[Counts]:
    """Nothing where no problem has two samples: then each rate is 0 or 1, and their mean says all."""
    return counts if any(count > 1 for _, count in counts) else []


def _solved_by(results: Iterable[Results]) -> dict[str, dict[str, list[Counts]]]:
    solved: dict[str, dict[str, list[Counts]]] = {}
    for result in results:
        if rates := _rates(counts_by_problem(result.samples)):
            solved.setdefault(result.scores.benchmark, {})[result.scores.model] = rates
    return solved


def _judged_by(scores: list[Scores]) -> list[str]:
    """For each benchmark whose verdicts are those of a judge, which one."""
    return list(dict.fromkeys(line for row in scores if (line := judge_line(row)) is not None))


def _lines(summary: EvalSummary, scores: list[Scores]) -> list[str]:
    lines = [f"{comparison.benchmark}: {difference_line(comparison)}" for comparison in summary.comparisons]
    for published in summary.published:
        row = next((row for row in scores if (row.benchmark, row.model) == (published.benchmark, "student")), None)
        if row is not None:
            lines.append(f"{published.benchmark}: {published_line(published, row)}")
    return lines


def _answers(directory: Path, results: list[Results]) -> list[Shown]:
    """What each model answered to one problem: one that the student learnt (right, base wrong), else the first."""
    if not results:
        return []
    benchmark = results[0].scores.benchmark
    graded = {
        result.scores.model: {row.key: row for rows in result.samples.values() for row in rows}
        for result in results
        if result.scores.benchmark == benchmark
    }
    common = set.intersection(*(set(rows) for rows in graded.values()))

    def learnt(key: tuple[str, int]) -> bool:
        correct = {model: rows[key].correct for model, rows in graded.items()}
        return correct.get("student", True) and not correct.get("base", False)

    key = next(iter(sorted(common, key=lambda key: (not learnt(key), key))), None)
    return [] if key is None else list(_answers_to(directory / benchmark, graded, key))


def _answers_to(
    directory: Path, graded: Mapping[str, Mapping[tuple[str, int], GradeRow]], key: tuple[str, int]
) -> Iterator[Shown]:
    for model, rows in graded.items():
        trace = next((trace for trace in TraceStore(directory / model / "traces") if trace.key == key), None)
        if trace is not None:
            yield shown(model, rows[key].verdict, rows[key].correct, trace)
