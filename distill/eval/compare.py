"""Two models that answered the same problems: the difference, how sure it is, and which problems flipped.

Reads finished evaluations: `RUN/eval/<benchmark>/<model>/`, or `DIR/<benchmark>/<model>/` of `distill eval --model`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from distill.artefacts import Comparison, Interval
from distill.console import say, table
from distill.errors import UserError
from distill.eval.statistics import compare
from distill.evaluations import Results, finished_evaluations, read_results
from distill.traces.store import TraceStore

FLIPPED_SHOWN = 10
QUESTION_SHOWN = 100  # characters
COLUMNS = ("benchmark", "first", "second", "difference (95 %)", "gained, lost", "sign\ntest p")


def compare_evaluations(first: Path, second: Path, models: tuple[str | None, str | None]) -> list[Comparison]:
    """A comparison for each benchmark that both directories have.

    models: which of a directory's models; None: its student, or its only one. Errors: UserError when a directory has no
    finished evaluation or a damaged one, or when they share no problem.
    """
    chosen = [_evaluations(directory, model) for directory, model in zip((first, second), models, strict=True)]
    comparisons = []
    for benchmark in sorted(chosen[0].keys() & chosen[1].keys()):
        a, b = (read_results(of_directory[benchmark]) for of_directory in chosen)
        common = [prompt for prompt in a.samples if prompt in b.samples]
        if not common:
            continue
        comparison = comparison_of(
            benchmark,
            (a.scores.model, b.scores.model),
            {prompt: a.correct[prompt] for prompt in common},
            {prompt: b.correct[prompt] for prompt in common},
        )
        left_out = len(a.samples) + len(b.samples) - 2 * len(common)
        differing = tuple(_differences(a, b))
        comparisons.append(comparison.model_copy(update={"left_out": left_out, "differing": differing}))
    if not comparisons:
        raise UserError(f"{first} and {second} have no problem in common; evaluate both on one benchmark")
    for directory, own, other in ((first, chosen[0], chosen[1]), (second, chosen[1], chosen[0])):
        if only := sorted(own.keys() - other.keys()):
            say(f"note: only {directory} has an evaluation on {', '.join(only)}")
    return comparisons


def comparison_of(
    benchmark: str,
    models: tuple[str, str],
    first: Mapping[str, Sequence[bool]],
    second: Mapping[str, Sequence[bool]],
) -> Comparison:
    """Compare two models on the same problems. first, second: prompt id → whether each sample is right."""
    difference = compare(first, second)
    return Comparison(
        benchmark=benchmark,
        models=models,
        problems=len(first),
        first=_pass_at_1(first),
        second=_pass_at_1(second),
        difference=Interval(value=difference.value, low=difference.low, high=difference.high),
        gained=difference.gained,
        lost=difference.lost,
        p=difference.p,
    )


def _pass_at_1(correct: Mapping[str, Sequence[bool]]) -> float:
    return sum(sum(samples) / len(samples) for samples in correct.values()) / len(correct)


def _differences(first: Results, second: Results) -> list[str]:
    """What differs besides the model: settings, as `key: first, second`, and the number of samples."""
    a, b = (of.scores.settings | of.scores.grading for of in (first, second))
    keys = [key for key in {**a, **b} if not key.startswith("model.") or key.startswith("model.numerics")]
    differing = [f"{key}: {_shown(a.get(key))}, {_shown(b.get(key))}" for key in keys if a.get(key) != b.get(key)]
    counts = first.scores.samples_per_problem, second.scores.samples_per_problem
    if counts[0] != counts[1]:
        differing.append(f"samples per problem: {counts[0]}, {counts[1]}")
    return differing


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def show(comparisons: list[Comparison], questions: Mapping[str, str]) -> None:
    """Print the table, and the problems that flipped. questions: prompt id → text."""
    table("First minus second, on the same problems", COLUMNS, map(_cells, comparisons))
    for row in comparisons:
        if row.differing:
            say(f"note: {row.benchmark}: the two differ in more than the model: {'; '.join(row.differing)}")
        if row.left_out:
            say(
                f"note: {row.benchmark}: {row.left_out:,} problems that only one of the two has are left out; "
                "a question with another gold answer is another problem"
            )
        for label, prompts in (("gained", row.gained), ("lost", row.lost)):
            for prompt in prompts[:FLIPPED_SHOWN]:
                question = " ".join(questions.get(prompt, "").split())
                cut = question if len(question) <= QUESTION_SHOWN else f"{question[: QUESTION_SHOWN - 1]}…"
                say(f"  {label}: {prompt}  {cut}")
            if len(prompts) > FLIPPED_SHOWN:
                say(f"  {label}: and {len(prompts) - FLIPPED_SHOWN:,} more")


def questions_of(directories: Iterable[Path], prompts: set[str]) -> dict[str, str]:
    """Prompt id → the text of its question, from the stored samples."""
    questions: dict[str, str] = {}
    for directory in directories:
        for models in finished_evaluations(_root(directory)).values():
            for evaluation in models.values():
                if prompts <= questions.keys():
                    return questions
                for trace in TraceStore(evaluation / "traces"):
                    if trace.prompt.id in prompts:
                        questions.setdefault(trace.prompt.id, trace.prompt.messages[-1]["content"])
    return questions


def _cells(row: Comparison) -> tuple[str, ...]:
    difference = row.difference
    return (
        row.benchmark,
        f"{row.first:.1%}",
        f"{row.second:.1%}",
        f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f}, {100 * difference.high:+.1f})",
        f"{len(row.gained):,}, {len(row.lost):,} of {row.problems:,}",
        f"{row.p:.1g}",
    )


def _root(directory: Path) -> Path:
    """Where the benchmarks are: inside a run in `eval/`."""
    return directory / "eval" if (directory / "eval").is_dir() else directory


def _evaluations(directory: Path, model: str | None) -> dict[str, Path]:
    """Benchmark → the directory of the model's evaluation. Errors: UserError when there is none, or no such model."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a run directory, or the --out of `distill eval --model`")
    evaluations = finished_evaluations(_root(directory))
    if not evaluations:
        raise UserError(
            f"{directory} has no finished evaluation; `distill eval` makes one, and finishes one that was interrupted"
        )
    chosen = {}
    for benchmark, models in evaluations.items():
        name = model or ("student" if "student" in models else next(iter(models)) if len(models) == 1 else None)
        if name in models:
            chosen[benchmark] = models[name]
        elif name is None:
            raise UserError(
                f"{directory} has several models on {benchmark}: choose one of {', '.join(models)} with --models"
            )
    if not chosen:
        names = sorted({name for models in evaluations.values() for name in models})
        raise UserError(f"{directory} has no model {model}; --models can name {', '.join(names)}")
    return chosen
