"""Stage 4: the base, the student and the teacher answer the same problems, and their scores stand side by side.

    eval/<benchmark>/<model>/settings.json    how the samples were drawn: nothing drawn otherwise is added to them
                             traces/          the samples, a TraceStore
                             grades.jsonl     one verdict a sample, and its lengths in the model's tokens
                             votes.jsonl      which answers of a problem are one
                             scores.json      pass@1 with its interval, the rates, and all it takes to repeat them

Each (benchmark, model) is a *part* with settings of its own, so that another model, another benchmark, more problems or
more samples extend a finished evaluation, and a student that was trained anew is refused rather than mixed with the old
one's answers. Keeping all of it in the stage's settings was rejected: adding a benchmark would throw the others away.

The files: statistics.py (pure functions), votes.py (which answers are one), part.py (one model on one benchmark),
models.py (which models, and loading them), this one (all of it, in order); compare.py (two evaluations side by side),
metrics.py (pass@k and consensus for use elsewhere).
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from distill import catalog
from distill.artefacts import Comparison, EvalSummary, Interval, PublishedScores, Scores, Settings
from distill.backends.local import device_type
from distill.backends.remote import RemoteBackend
from distill.console import table
from distill.errors import UserError
from distill.eval.compare import told
from distill.eval.models import Contender, LocalModels, Models, ServedModel, contenders, model_directory
from distill.eval.part import Exam, Part
from distill.eval.statistics import compare
from distill.fingerprint import digest
from distill.grading import Grader, require_grader
from distill.lock import locked
from distill.scores import beside_published, difference
from distill.stage import Stage

if TYPE_CHECKING:
    from distill.recipe import Eval, LocalEngine, Recipe
    from distill.run import Run

COLUMNS = ("model", "pass@1 (95 %)", "truncated", "no\nanswer", "unverifiable", "mean\ntokens")


class EvalStage(Stage[EvalSummary]):
    """The scores of `recipe.eval.models` on `recipe.eval.benchmarks`.

    models: what loads them; the local engine unless a caller brings something else. An interrupted evaluation draws and
    grades only the samples that are missing.
    """

    name = "eval"
    outputs = ("eval",)
    products = (
        "eval/*/*/traces/part-*.parquet",
        "eval/*/*/settings.json",
        "eval/*/*/grades.jsonl",
        "eval/*/*/votes.jsonl",
        "eval/*/*/scores.json",
    )
    reads = ("train",)
    summary = EvalSummary

    def __init__(self, models: Models | None = None) -> None:
        self.models = models

    def recipe_settings(self, recipe: "Recipe") -> Settings:
        """The seed; all else belongs to a (benchmark, model)."""
        return {"eval.seed": recipe.eval.seed}

    def settings(self, run: "Run") -> Settings:
        """The seed, and how the local engine computes."""
        device = {"engine.device": device_type(run.recipe.engine.device)}
        return self.recipe_settings(run.recipe) | run.recipe.engine_settings() | device

    def extent(self, run: "Run") -> Settings:
        """Which benchmarks, models, problems and samples. UserError when there is no student yet, a benchmark cannot be
        read or graded, or samples that are there were drawn with other settings."""
        exams, parts = _asked(run)
        extent: Settings = {
            "sizes": {exam.name: [exam.samples, exam.limit, exam.card.prompts.limit] for exam in exams},
            "parts": {part.name: digest(part.settings) for of_one in parts.values() for part in of_one},
            "sources": {exam.name: exam.source.settings() for exam in exams},
            "published": run.recipe.eval.published,
        }
        return extent

    def work(self, run: "Run", begin: Callable[[], None]) -> EvalSummary:
        """Draw, grade, score. Errors: as `extent`."""
        recipe = run.recipe.eval
        exams, parts = _asked(run)
        _published(exams, recipe.published)
        for exam in exams:
            for prompt in exam.prompts:
                require_grader(prompt.task, f"leave {exam.name} out of eval.benchmarks")
        begin()
        models = self.models or LocalModels(recipe.max_batch, run.recipe.engine)
        rows: list[Scores] = []
        with Grader() as grader:
            for rival, of_one in parts.items():
                rows += _examine(rival, of_one, models, grader)
        rows.sort(key=lambda row: [exam.name for exam in exams].index(row.benchmark))  # stable: models keep their order
        summary = EvalSummary(
            scores=tuple(rows),
            comparisons=tuple(_differences(exams, parts)),
            published=tuple(_published(exams, recipe.published)),
        )
        show(summary)
        return summary

    def headline(self, summary: EvalSummary) -> str:
        """pass@1 of each."""
        return ", ".join(f"{row.model} {row.pass_at_1.value:.1%}" for row in summary.scores)


STAGE = EvalStage()


def _asked(run: "Run") -> tuple[list[Exam], dict[Contender, list[Part]]]:
    exams = exams_of(run.recipe.eval)
    parts = {rival: [Part(run.paths.eval, exam, rival) for exam in exams] for rival in contenders(run)}
    for of_one in parts.values():
        for part in of_one:
            part.refuse_other_settings()
    return exams, parts


def exams_of(recipe: "Eval") -> list[Exam]:
    """The benchmarks that a recipe asks for. UserError when one cannot be, or `sources` names another."""
    exams = [Exam.of(catalog.load_benchmark(name), recipe) for name in dict.fromkeys(recipe.benchmarks)]
    names = [exam.name for exam in exams]
    if len(set(names)) < len(names):
        raise UserError("two cards in eval.benchmarks have one name: rename one, their samples share a directory")
    if strange := recipe.sources.keys() - set(names):
        raise UserError(f"eval.sources: {', '.join(sorted(strange))} is not evaluated; there are {', '.join(names)}")
    return exams


def evaluate_model(
    model: str, name: str | None, recipe: "Eval", engine: "LocalEngine", directory: Path, key: str | None = None
) -> EvalSummary:
    """Score one model without a recipe: a directory, or an OpenAI-compatible server.

    name: of the model on the server, or what the directory's scores are called. Samples lie in
    `directory/<benchmark>/<name>/`, where a second call finds them, as in a run. Raises UserError as `evaluate` does.
    """
    exams = exams_of(recipe)
    _published(exams, recipe.published)
    models: Models
    if "://" in model:
        models = ServedModel(RemoteBackend.connect(model, name, recipe.max_batch, key))
    else:
        models = LocalModels(recipe.max_batch, engine)
    rival = models.contender if isinstance(models, ServedModel) else model_directory(Path(model), name)
    for exam in exams:
        for prompt in exam.prompts:
            require_grader(prompt.task, f"leave {exam.name} out")
    advice = "choose another --out, or delete that directory"
    parts = [Part(directory, exam, rival, advice) for exam in exams]
    for part in parts:
        part.refuse_other_settings()
    with locked(directory), Grader() as grader:
        summary = EvalSummary(
            scores=tuple(_examine(rival, parts, models, grader)),
            published=tuple(_published(exams, recipe.published)),
        )
    show(summary)
    return summary


def _examine(rival: Contender, parts: list[Part], models: Models, grader: Grader) -> list[Scores]:
    """The scores of one model on all benchmarks. It is loaded once, and only if a sample is missing."""
    with ExitStack() as loaded:
        backend = None
        for part in parts:
            if jobs := part.missing():
                backend = backend or loaded.enter_context(models.backend(rival))
                part.sample(backend, jobs)
    for part in parts:
        part.grade(grader, lambda: models.token_counter(rival))
        part.vote(grader)
    return [part.score() for part in parts]


def _differences(exams: list[Exam], parts: dict[Contender, list[Part]]) -> list[Comparison]:
    """The student against each of the others, problem by problem."""
    by_name = {rival.name: of_one for rival, of_one in parts.items()}
    student = by_name.pop("student", [])
    rows = []
    for number, exam in enumerate(exams if student else ()):
        one = student[number].correct()
        for name, of_one in by_name.items():
            two = of_one[number].correct()
            rows.append(told(exam.name, ("student", name), compare(one, two), one, two, one))
    return rows


def _published(exams: list[Exam], model: str | None) -> list[PublishedScores]:
    """Scores that others have published for `model`, as shares; UserError where no card names it."""
    if model is None:
        return []
    found = [
        PublishedScores(
            benchmark=exam.name,
            model=model,
            scores={key: value / 100 for key, value in exam.card.published[model].items()},
        )
        for exam in exams
        if model in exam.card.published
    ]
    if not found:
        known = sorted({name for exam in exams for name in exam.card.published})
        raise UserError(f"eval.published: no benchmark has scores of {model}; there are {', '.join(known) or 'none'}")
    return found


def show(summary: EvalSummary) -> None:
    """Print the tables of scores, for each benchmark; differences and published scores under them."""
    for benchmark in dict.fromkeys(row.benchmark for row in summary.scores):
        rows = [row for row in summary.scores if row.benchmark == benchmark]
        size = f"{rows[0].problems:,} problems × {rows[0].samples_per_problem:,}"  # the same for all models
        table(f"Scores on {benchmark}, {size}", COLUMNS, map(cells, rows))
        if several := [row for row in rows if row.pass_at_k]:
            names = [f"pass@{k}" for k in several[0].pass_at_k] + [f"cons@{k}" for k in several[0].consensus_at_k]
            table("", ("model", *names, "ties"), map(_cells_of_several, several))
        for made in summary.comparisons:
            if made.benchmark == benchmark:
                print(difference(made))
        for other in summary.published:
            if other.benchmark == benchmark:
                print(beside_published(other, next((row for row in rows if row.model == "student"), rows[0])))


def _cells_of_several(row: Scores) -> tuple[str, ...]:
    made = [*row.pass_at_k.values(), *row.consensus_at_k.values()]
    ties = next(iter(row.consensus_at_k.values())).ties
    return (row.model, *map(_estimate, made), f"{ties:,}")


def cells(row: Scores) -> tuple[str, ...]:
    """One row of scores as text, in the order of COLUMNS."""
    return (
        row.model,
        _estimate(row.pass_at_1),
        f"{row.truncated_rate:.1%}",
        f"{row.no_answer_rate:.1%}",
        f"{row.unverifiable_rate:.1%}",
        "–" if row.mean_completion_tokens is None else f"{row.mean_completion_tokens:,.0f}",
    )


def _estimate(made: Interval) -> str:
    return f"{made.value:.1%} ({100 * made.low:.1f}–{100 * made.high:.1f})"
