"""Two models that answered the same problems: the difference, how sure it is, and which problems flipped.

Reads what evaluations left: `RUN/eval/<benchmark>/<model>/`, or `DIR/<benchmark>/<model>/` of one without a recipe.
"""

from collections.abc import Iterable
from pathlib import Path

from distill.artefacts import Comparison, Interval, Settings
from distill.console import table
from distill.errors import UserError
from distill.eval.statistics import Difference, compare
from distill.scores import grades, scores_of
from distill.traces.store import TraceStore

FLIPPED_SHOWN = 10
COLUMNS = ("benchmark", "first", "second", "difference (95 %)", "gained, lost", "sign\ntest p")


def compare_evaluations(first: Path, second: Path, models: tuple[str | None, str | None]) -> list[Comparison]:
    """One row a benchmark that both have. models: which of a directory's models; None: its student, or its only one.

    UserError when a directory has no evaluation, or they share no problem.
    """
    parts = [_parts(directory, model) for directory, model in zip((first, second), models, strict=True)]
    rows = []
    for benchmark in sorted(parts[0].keys() & parts[1].keys()):
        one, two = (_correct(of_one[benchmark]) for of_one in parts)
        common = [problem for problem in one if problem in two]
        if common:
            made = compare({key: one[key] for key in common}, {key: two[key] for key in common})
            a, b = (scores_of(of_one[benchmark]) for of_one in parts)
            rows.append(
                told(benchmark, (a.model, b.model), made, one, two, common).model_copy(
                    update={
                        "left_out": len(one) + len(two) - 2 * len(common),
                        "differing": tuple(_differ(a.settings, b.settings)),
                    }
                )
            )
    if not rows:
        raise UserError(f"{first} and {second} have no benchmark with a problem in common: evaluate both on one")
    return rows


def _differ(one: Settings, two: Settings) -> list[str]:
    """Settings that were not the same, the models' own left out: `key: first, second`."""
    keys = [key for key in one if not key.startswith("model.") or key.startswith("model.numerics")]
    return [f"{key}: {one[key]}, {two.get(key)}" for key in keys if one[key] != two.get(key)]


def told(
    benchmark: str,
    models: tuple[str, str],
    made: Difference,
    one: dict[str, list[bool]],
    two: dict[str, list[bool]],
    common: Iterable[str],
) -> Comparison:
    common = list(common)
    return Comparison(
        benchmark=benchmark,
        models=models,
        problems=len(common),
        first=sum(sum(one[key]) / len(one[key]) for key in common) / len(common),
        second=sum(sum(two[key]) / len(two[key]) for key in common) / len(common),
        difference=Interval(value=made.value, low=made.low, high=made.high),
        gained=made.gained,
        lost=made.lost,
        p=made.p,
    )


def show(rows: list[Comparison], questions: dict[str, str]) -> None:
    """The table, and the problems that flipped. questions: prompt id → text."""
    table("First less second, on the same problems", COLUMNS, map(_cells, rows))
    for row in rows:
        if row.differing:
            print(f"{row.benchmark}: not drawn alike: {'; '.join(row.differing)}")
        if row.left_out:
            print(f"{row.benchmark}: {row.left_out} problems that only one of them answered are left out")
        for what, keys in (("gained", row.gained), ("lost", row.lost)):
            for key in keys[:FLIPPED_SHOWN]:
                print(f"  {what} {key}: {' '.join(questions.get(key, '').split())[:90]}")
            if len(keys) > FLIPPED_SHOWN:
                print(f"  {what}: and {len(keys) - FLIPPED_SHOWN:,} more")


def questions(directories: Iterable[Path], keys: set[str]) -> dict[str, str]:
    """The texts of these problems, from the stored samples."""
    found: dict[str, str] = {}
    for directory in directories:
        for traces in sorted(directory.glob("**/traces")):
            for trace in TraceStore(traces):
                if trace.prompt.id in keys:
                    found.setdefault(trace.prompt.id, trace.prompt.messages[-1]["content"])
    return found


def _cells(row: Comparison) -> tuple[str, ...]:
    apart = row.difference
    return (
        row.benchmark,
        f"{row.first:.1%}",
        f"{row.second:.1%}",
        f"{100 * apart.value:+.1f} ({100 * apart.low:+.1f}, {100 * apart.high:+.1f})",
        f"{len(row.gained):,}, {len(row.lost):,} of {row.problems:,}",
        f"{row.p:.1g}",
    )


def _parts(directory: Path, model: str | None) -> dict[str, Path]:
    """Benchmark → the directory of the model's samples."""
    root = directory / "eval" if (directory / "eval").is_dir() else directory
    found: dict[str, dict[str, Path]] = {}
    for scores in root.glob("*/*/scores.json"):
        found.setdefault(scores.parent.parent.name, {})[scores.parent.name] = scores.parent
    if not found:
        raise UserError(f"{directory} holds no finished evaluation: `distill eval` makes one")
    chosen = {}
    for benchmark, of_one in found.items():
        name = model or ("student" if "student" in of_one else next(iter(of_one)) if len(of_one) == 1 else None)
        if name is None or name not in of_one:
            names = ", ".join(sorted(of_one))
            raise UserError(f"{directory}: which model of {benchmark}? there are {names}: name one with --models")
        chosen[benchmark] = of_one[name]
    return chosen


def _correct(part: Path) -> dict[str, list[bool]]:
    wanted = scores_of(part).samples_per_problem
    found: dict[str, list[bool]] = {}
    for row in grades(part):
        if row["sample"] < wanted:
            found.setdefault(row["prompt"], []).append(row["verdict"] == "correct")
    return found
