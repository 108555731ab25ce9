"""Stage 4: the base, the student and the teacher answer the same problems, and their scores are compared.

Each model on each benchmark is an `Evaluation` with a directory and settings of its own (`distill.evaluations` lists
its files), so that another model, another benchmark, more problems or more samples extend a finished stage, and a
student that was trained anew is refused rather than mixed with the old one's answers. Keeping all settings in the
stage's record was rejected: adding a benchmark would throw the others away.

The files: statistics.py (pure functions), benchmark.py (what is asked), models.py
(who is asked), evaluation.py (one model on one benchmark), grading.py (by which grader), this one (all of them, in
order); compare.py (two evaluations side by side), metrics.py (pass@k and consensus for use elsewhere).
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill import backends
from distill.artefacts import Comparison, EvalSummary, Interval, Scores, Settings
from distill.backends.device import device_type
from distill.console import counted, say, table
from distill.eval.benchmark import Benchmark, benchmarks_of, published_scores
from distill.eval.compare import comparison_of
from distill.eval.evaluation import Evaluation
from distill.eval.judging import check_judge, judge_settings, opened_judge
from distill.eval.models import Open, engine_for, model_at, models_of
from distill.evaluations import LABELS, difference_line, judge_line, published_line
from distill.fingerprint import digest
from distill.grading import Grader
from distill.grading.grade import AnswerJudge
from distill.lock import locked
from distill.stage import Stage

if TYPE_CHECKING:
    from distill.recipe import Eval, Judge, LocalEngine, Recipe
    from distill.run import Run

INSTRUCTION_COLUMNS = ("model", "accuracy of", "strict (95 %)", "loose (95 %)")
PARTS_SHOWN = 4  # sources whose scores fit beside one another in the terminal; scores.json and the report have all
DOUBTFUL = 0.2  # share of unverifiable samples that a note is about
COLUMNS = ("model", "pass@1 (95 %)", "truncated", "no\nanswer", "unverifiable", "mean\ntokens")


class EvalStage(Stage[EvalSummary]):
    """The scores of `recipe.eval.models` on `recipe.eval.benchmarks`. An interrupted evaluation draws and grades only
    the samples that are missing.

    open: what opens a model; `backends.open` unless a test brings something else.
    """

    name = "eval"
    outputs = ("eval",)
    products = (
        "eval/*/*/traces/part-*.parquet",
        "eval/*/*/settings.json",
        "eval/*/*/grading.json",
        "eval/*/*/grades.jsonl",
        "eval/*/*/votes.jsonl",
        "eval/*/*/scores.json",
        "eval/*/*/record.json",
    )
    reads = ("train",)
    summary = EvalSummary

    def __init__(self, open_: Open = backends.open) -> None:
        self.open = open_

    def recipe_settings(self, recipe: "Recipe") -> Settings:
        """The seed; all else belongs to one model on one benchmark."""
        return {"eval.seed": recipe.eval.seed}

    def settings(self, run: "Run") -> Settings:
        """The seed, and how the local engine computes."""
        device = {"engine.device": device_type(run.recipe.engine.device)}
        return self.recipe_settings(run.recipe) | run.recipe.engine_settings() | device

    def extent(self, run: "Run") -> Settings:
        """Which benchmarks, models, problems and samples. Errors: UserError when there is no student yet, a benchmark
        cannot be read or graded, or samples on the disk were drawn with other settings."""
        benchmarks = benchmarks_of(run.recipe.eval)
        evaluations = _evaluations(run, benchmarks)
        return {
            "sizes": {item.name: item.sizes for item in benchmarks},
            "parts": {item.name: digest(item.settings) for of_model in evaluations for item in of_model},
            "graded": {item.name: digest(item.grading.settings) for of_model in evaluations for item in of_model},
            "sources": {item.name: item.source_identity() for item in benchmarks},
            "published": run.recipe.eval.published,
        }

    def work(self, run: "Run", begin: Callable[[], None]) -> EvalSummary:
        """Draw, grade, score. Errors: as `extent`, and UserError when a problem cannot be used."""
        recipe = run.recipe.eval
        benchmarks = benchmarks_of(recipe)
        evaluations = _evaluations(run, benchmarks)
        published = tuple(published_scores(benchmarks, recipe.published))
        _read_problems(benchmarks)
        begin()
        _prepare([evaluation for of_model in evaluations for evaluation in of_model])
        scores: list[Scores] = []
        opened = opened_judge(benchmarks, run.recipe.judge, run.recipe.engine, run.paths.judgements)
        with Grader(level=recipe.sandbox) as grader, opened as judge:
            for of_model in evaluations:
                scores += _evaluate(of_model, self.open, run.recipe.engine, recipe.max_batch, grader, judge)
        order = [benchmark.name for benchmark in benchmarks]
        summary = EvalSummary(
            scores=tuple(sorted(scores, key=lambda row: order.index(row.benchmark))),  # stable: models keep their order
            comparisons=tuple(_comparisons(evaluations)),
            published=published,
        )
        show(summary)
        return summary

    def headline(self, summary: EvalSummary) -> str:
        """pass@1 of each model, on each benchmark."""
        benchmarks: dict[str, list[str]] = {}
        for row in summary.scores:
            benchmarks.setdefault(row.benchmark, []).append(f"{row.model} {row.pass_at_1.value:.1%}")
        scores = {name: ", ".join(of_models) for name, of_models in benchmarks.items()}
        if len(scores) == 1:
            return next(iter(scores.values()))
        return "; ".join(f"{name}: {of_models}" for name, of_models in scores.items())


STAGE = EvalStage()


def evaluate_model(
    model: str,
    name: str | None,
    recipe: "Eval",
    engine: "LocalEngine",
    directory: Path,
    key: str | None = None,
    open_: Open = backends.open,
    judge: "Judge | None" = None,
) -> EvalSummary:
    """Score one model without a recipe: a directory, a hub id, or an OpenAI-compatible server.

    name: of the model on the server, or what a directory's scores are called. The files are in
    `directory/<benchmark>/<name>/`, where a second call finds them, as in a run; damaged ones are recreated. Errors:
    as `EvalStage.work`.
    """
    benchmarks = benchmarks_of(recipe)
    published = tuple(published_scores(benchmarks, recipe.published))
    scored = model_at(model, name, key, open_, engine)
    _read_problems(benchmarks)
    remedy = "choose another --out, or delete that directory"
    asked = judge_settings(benchmarks, judge)
    evaluations = [Evaluation(directory, benchmark, scored, remedy, asked) for benchmark in benchmarks]
    for evaluation in evaluations:
        evaluation.refuse_other_settings()
    opened = opened_judge(benchmarks, judge, engine, directory / "judgements")
    with locked(directory), Grader(level=recipe.sandbox) as grader, opened as answer_judge:
        _prepare(evaluations)
        scores = _evaluate(evaluations, open_, engine, recipe.max_batch, grader, answer_judge)
    summary = EvalSummary(scores=tuple(scores), published=published)
    show(summary)
    return summary


def _evaluations(run: "Run", benchmarks: Sequence[Benchmark]) -> list[list[Evaluation]]:
    """For each model, its evaluations by benchmark. Errors: UserError when samples were drawn with other settings."""
    judge = judge_settings(benchmarks, run.recipe.judge)
    evaluations = [
        [Evaluation(run.paths.eval, benchmark, model, judge=judge) for benchmark in benchmarks]
        for model in models_of(run)
    ]
    for of_model in evaluations:
        for evaluation in of_model:
            evaluation.refuse_other_settings()
    return evaluations


def check_benchmarks(recipe: "Eval", judge: "Judge | None" = None) -> None:
    """Read every problem of the benchmarks. Errors: UserError for an unknown benchmark, or one that cannot be used."""
    benchmarks = benchmarks_of(recipe)
    check_judge(benchmarks, judge)
    _read_problems(benchmarks)


def _read_problems(benchmarks: Iterable[Benchmark]) -> None:
    """Read every problem, so that an unusable one is refused before any work."""
    for benchmark in benchmarks:
        benchmark.prompts  # noqa: B018  a cached property that checks what it reads


def _prepare(evaluations: Sequence[Evaluation]) -> None:
    """Set damaged files aside, and say how many gold answers no grader can read, before tokens are spent on them."""
    for evaluation in evaluations:
        evaluation.set_damage_aside()
    unanswered = {evaluation.benchmark.name: evaluation.benchmark for evaluation in evaluations if evaluation.missing()}
    for benchmark in unanswered.values():
        for note in benchmark.notes:
            say(f"note: {note}")


def _evaluate(
    evaluations: Sequence[Evaluation],
    open_: Open,
    engine: "LocalEngine",
    max_batch: int,
    grader: Grader,
    judge: AnswerJudge | None = None,
) -> list[Scores]:
    """The scores of one model on all benchmarks. It is loaded once, and only if samples are missing."""
    if incomplete := [evaluation for evaluation in evaluations if evaluation.needs_model()]:
        model = incomplete[0].model
        with open_(model, engine_for(model, engine), max_batch) as backend:
            for evaluation in incomplete:  # before the first sample: a launched server reserves the longest context
                evaluation.check(backend)
            for evaluation in incomplete:
                evaluation.sample(backend)
    for evaluation in evaluations:
        evaluation.grade(grader, judge)
        evaluation.vote(grader)
    return [evaluation.score() for evaluation in evaluations]


def _comparisons(evaluations: Sequence[Sequence[Evaluation]]) -> list[Comparison]:
    """The student with each of the others, problem by problem, by benchmark."""
    by_name = {of_model[0].model.name: of_model for of_model in evaluations}
    student = by_name.pop("student", [])
    comparisons = []
    for number, evaluation in enumerate(student):
        correct = evaluation.correct()
        for name, of_model in by_name.items():
            other = of_model[number].correct()
            comparisons.append(comparison_of(evaluation.benchmark.name, ("student", name), correct, other))
    return comparisons


def show(summary: EvalSummary) -> None:
    """Print the tables of scores, for each benchmark; differences and published scores below them."""
    for benchmark in dict.fromkeys(row.benchmark for row in summary.scores):
        rows = [row for row in summary.scores if row.benchmark == benchmark]
        size = f"{counted(rows[0].problems, 'problem')} × {rows[0].samples_per_problem:,}"  # the same for all models
        table(f"Scores on {benchmark}, {size}", COLUMNS, map(_cells, rows))
        if several := [row for row in rows if row.pass_at_k]:
            names = [f"pass@{k}" for k in several[0].pass_at_k] + [f"cons@{k}" for k in several[0].consensus_at_k]
            ties = ("ties",) if several[0].consensus_at_k else ()
            table("", ("model", *names, *ties), map(_cells_of_several, several))
        if followed := [row for row in rows if row.instructions is not None]:
            table("", INSTRUCTION_COLUMNS, (cells for row in followed for cells in _cells_of_instructions(row)))
        if 1 < len(rows[0].parts) <= PARTS_SHOWN:
            table("pass@1 by source", ("model", *rows[0].parts), map(_cells_of_parts, rows))
        for row in rows:
            if row.unverifiable_rate > DOUBTFUL:
                say(
                    f"note: {row.unverifiable_rate:.1%} of the samples of {row.model} are unverifiable and count as "
                    f"not correct; `distill traces RUN --verdict unverifiable` shows them with the reasons"
                )
        if (judged := judge_line(rows[0])) is not None:
            say(f"note: {judged}")
        for comparison in summary.comparisons:
            if comparison.benchmark == benchmark:
                say(difference_line(comparison))
        for published in summary.published:
            if published.benchmark == benchmark:
                say(published_line(published, next((row for row in rows if row.model == "student"), rows[0])))
    for line in LABELS:
        say(line)


def _cells(row: Scores) -> tuple[str, ...]:
    """One row of scores as text, in the order of COLUMNS."""
    return (
        row.model,
        _estimate(row.pass_at_1),
        f"{row.truncated_rate:.1%}",
        f"{row.no_answer_rate:.1%}",
        f"{row.unverifiable_rate:.1%}",
        "not counted" if row.mean_completion_tokens is None else f"{row.mean_completion_tokens:,.0f}",
    )


def _cells_of_several(row: Scores) -> tuple[str, ...]:
    estimates = [*row.pass_at_k.values(), *row.consensus_at_k.values()]
    ties = [f"{score.ties:,}" for score in row.consensus_at_k.values()]
    return (row.model, *map(_estimate, estimates), *ties)


def _cells_of_instructions(row: Scores) -> list[tuple[str, ...]]:
    scores = row.instructions
    assert scores is not None
    prompts, instructions = (
        (_estimate(strict), _estimate(loose))
        for strict, loose in (
            (scores.prompt_strict, scores.prompt_loose),
            (scores.instruction_strict, scores.instruction_loose),
        )
    )
    return [(row.model, "prompts", *prompts), ("", "instructions", *instructions)]


def _cells_of_parts(row: Scores) -> tuple[str, ...]:
    return (row.model, *(_estimate(part.pass_at_1) for part in row.parts.values()))


def _estimate(interval: Interval) -> str:
    return f"{interval.value:.1%} ({100 * interval.low:.1f}–{100 * interval.high:.1f})"
