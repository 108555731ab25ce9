"""Stage 4: the base, the student and the teacher answer the same problems, and their scores stand side by side.

    eval/<benchmark>/<model>/settings.json    how the samples were drawn: nothing drawn otherwise is added to them
                             traces/          the samples, a TraceStore
                             grades.jsonl     one verdict a sample, and its lengths in the model's tokens
                             scores.json      pass@1 with its interval, the rates, and all it takes to repeat them

Each (benchmark, model) is a *part* with settings of its own, so that another model, another benchmark, more problems or
more samples extend a finished evaluation, and a student that was trained anew is refused rather than mixed with the old
one's answers. Keeping all of it in the stage's settings was rejected: adding a benchmark would throw the others away.

The files: statistics.py (pure functions), part.py (one model on one benchmark), models.py (which models, and loading
them), this one (all of it, in order).
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from distill import catalog
from distill.backends.local import device_type
from distill.console import table
from distill.errors import UserError
from distill.eval.models import Contender, LocalModels, Models, contenders
from distill.eval.part import Exam, Part
from distill.fingerprint import digest
from distill.grading import Grader, require_grader

if TYPE_CHECKING:
    from distill.run import Run

OUTPUTS = ("eval",)
COLUMNS = ("model", "pass@1", "95 % interval", "truncated", "no answer", "median reasoning")


def evaluate(run: "Run", models: Models | None = None) -> dict[str, Any]:
    """Score `recipe.eval.models` on `recipe.eval.benchmarks`; returns {"scores": [one scores.json per part]}.

    models: what loads them; the local engine unless a caller brings something else. A finished stage returns its
    summary without loading anything; an interrupted one draws and grades only the samples that are missing.

    Raises UserError when there is no student yet, a benchmark cannot be read or graded, or samples that are there were
    drawn with other settings.
    """
    recipe = run.recipe.eval
    exams = [Exam.of(catalog.load_benchmark(name), recipe) for name in dict.fromkeys(recipe.benchmarks)]
    if len({exam.name for exam in exams}) < len(exams):
        raise UserError("two cards in eval.benchmarks have one name: rename one, their samples share a directory")
    rivals = contenders(run)
    parts = {rival: [Part(run.directory / "eval", exam, rival) for exam in exams] for rival in rivals}
    for of_one in parts.values():
        for part in of_one:
            part.refuse_other_settings()
    settings = {"eval.seed": recipe.seed} | run.recipe.engine_settings()
    settings["engine.device"] = device_type(run.recipe.engine.device)
    extent = {
        "sizes": {exam.name: [exam.samples, exam.limit, exam.card.prompts.limit] for exam in exams},
        "parts": {part.name: digest(part.settings) for of_one in parts.values() for part in of_one},
    }
    if (summary := run.finished("eval", settings, extent)) is not None:
        return summary

    for exam in exams:
        for prompt in exam.prompts:
            require_grader(prompt.task, f"leave {exam.name} out of eval.benchmarks")
    stage = run.stage("eval", settings, extent, OUTPUTS)
    models = models or LocalModels(recipe.max_batch, run.recipe.engine)
    rows: list[dict[str, Any]] = []
    with Grader() as grader:
        for rival in rivals:
            rows += _examine(rival, parts[rival], models, grader)
    rows.sort(key=lambda row: [exam.name for exam in exams].index(row["benchmark"]))  # stable: models keep their order
    summary = {"scores": rows}
    stage.finish(summary)
    show(summary)
    return summary


def _examine(rival: Contender, parts: list[Part], models: Models, grader: Grader) -> list[dict[str, Any]]:
    """The scores of one model on all benchmarks. It is loaded once, and only if a sample is missing."""
    with ExitStack() as loaded:
        backend = None
        for part in parts:
            if jobs := part.missing():
                backend = backend or loaded.enter_context(models.backend(rival))
                part.sample(backend, jobs)
    for part in parts:
        part.grade(grader, lambda: models.token_counter(rival))
    return [part.score() for part in parts]


def show(summary: dict[str, Any]) -> None:
    """Print the table of scores, one for each benchmark."""
    for benchmark in dict.fromkeys(row["benchmark"] for row in summary["scores"]):
        rows = [row for row in summary["scores"] if row["benchmark"] == benchmark]
        size = f"{rows[0]['problems']:,} problems × {rows[0]['samples_per_problem']:,}"  # the same for all models
        table(f"Scores on {benchmark}, {size}", COLUMNS, map(cells, rows))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of scores as text, in the order of COLUMNS."""
    return (
        row["model"],
        f"{row['pass@1']:.1%}",
        f"{100 * row['pass@1_low']:.1f} – {row['pass@1_high']:.1%}",
        f"{row['truncated_rate']:.1%}",
        f"{row['no_answer_rate']:.1%}",
        f"{row['median_reasoning_tokens']:,.0f} tokens",
    )
