"""`distill run`: the stages in order, in one locked run directory.

Each stage decides for itself whether it is finished, resumes or starts; here it is only called, timed and reported. A
run in which nothing was left to do says so. Stages are imported when they are called, so that a finished run is
recognised without loading torch.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.console import say, table
from distill.run import STAGES, Run

if TYPE_CHECKING:
    from distill.recipe import Recipe

ENTRY = {  # stage → the function that runs it
    "generate": ("distill.generate", "generate"),
    "filter": ("distill.filters", "filter_traces"),
    "train": ("distill.train", "train"),
    "eval": ("distill.eval", "evaluate"),
}

HEADLINE: dict[str, Callable[[dict[str, Any]], str]] = {  # stage → what its summary comes to, for the last table
    "generate": lambda s: f"{s['traces']:,} traces of {s['prompts']:,} prompts, {s['completion_tokens']:,} tokens",
    "filter": lambda s: f"{s['kept']:,} of {s['total']:,} traces kept",
    "train": lambda s: f"{s['steps']:,} steps, {s['supervised_tokens']:,} supervised tokens, loss {s['last_loss']:.3f}",
    "eval": lambda s: ", ".join(f"{row['model']} {row['pass@1']:.1%}" for row in s["scores"]),
}


def default_run_dir(recipe: "Recipe") -> Path:
    return Path("runs") / recipe.name


def run_recipe(
    recipe: "Recipe", directory: Path, stages: Sequence[str] | None = None, fresh: Sequence[str] = ()
) -> None:
    """Run `stages` (default: all four, then the report) of a recipe in `directory`.

    fresh: stages whose output is moved aside first, with all that was made from it. Raises UserError and WorkError.
    """
    if "filter" in (stages or STAGES):
        from distill.filters import check_recipe

        check_recipe(recipe)  # before generation is paid for
    with Run(directory, recipe) as run:
        for stage in sorted(fresh, key=STAGES.index):
            run.fresh(stage)
        rows = []
        for stage in stages or STAGES:
            started = time.monotonic()
            summary = _call(stage, run)
            seconds = f"{time.monotonic() - started:.0f} s" if stage in run.worked else "finished before"
            rows.append((stage, seconds, HEADLINE[stage](summary)))
        if not run.worked:
            say(f"nothing to do: {', '.join(stages or STAGES)} of {directory} finished before, with these settings")
            return
        table("", ("stage", "time", "result"), rows)
        if stages is None:
            from distill.report import write_report

            say(f"report: {write_report(directory)}")
            say(f"student: {directory / 'student'}")


def _call(stage: str, run: Run) -> dict[str, Any]:
    module, function = ENTRY[stage]
    summary = getattr(importlib.import_module(module), function)(run)
    assert isinstance(summary, dict)
    return summary
