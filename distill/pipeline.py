"""`distill run`: the stages in order, in one locked run directory.

Each stage decides for itself whether it is finished, resumes or starts; here it is only called, timed and reported. A
run in which nothing was left to do says so. Stages are imported when they are called, so that a finished run is
recognised without loading torch.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill import catalog
from distill import train as training
from distill.console import say, table
from distill.errors import UserError
from distill.run import STAGES, Run
from distill.train.card import add_scores

if TYPE_CHECKING:
    from distill.recipe import Recipe

ENTRY = {  # stage → the function that runs it
    "generate": ("distill.generate", "generate"),
    "filter": ("distill.filters", "filter_traces"),
    "train": ("distill.train", "train"),
    "eval": ("distill.eval", "evaluate"),
}

SETTINGS = {  # stage → what the recipe alone says of its settings; what it reads adds to them
    "generate": lambda recipe: recipe.generate_settings(),
    "filter": lambda recipe: recipe.filter_settings(),
    "train": lambda recipe: recipe.train.settings(),
    "eval": lambda recipe: {"eval.seed": recipe.eval.seed},
}

WEIGHTS: dict[str, Literal["teacher", "student"]] = {"generate": "teacher", "train": "student"}  # what a stage loads

HEADLINE: dict[str, Callable[[dict[str, Any]], str]] = {  # stage → what its summary comes to, for the last table
    "generate": lambda s: (
        f"{s['traces']:,} traces of {s['prompts']:,} prompts"
        + (f", {s['completion_tokens']:,} tokens" if s["completion_tokens"] else ", published")
    ),
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

    fresh: stages whose output is moved aside first, with all that was made from it. What can be refused is refused
    before the first stage begins, and then nothing was touched. Raises UserError and WorkError.
    """
    if training.several():
        if list(stages or ()) != ["train"]:
            raise UserError("several processes can only train: run the other stages by themselves, without torchrun")
        if training.follow(recipe, directory):
            return
    loaded = [WEIGHTS[stage] for stage in stages or STAGES if stage in WEIGHTS]
    catalog.check_recipe(recipe, [kind for kind in loaded if kind == "student" or not recipe.traces])
    if "filter" in (stages or STAGES):
        from distill.filters import check_gradable

        check_gradable(recipe)
    with Run(directory, recipe) as run:
        _look_ahead(run, stages or STAGES, fresh)
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
        if "eval" in run.worked:
            add_scores(directory / "student", summary["scores"])
        table("", ("stage", "time", "result"), rows)
        if stages is None:
            from distill.report import write_report

            say(f"report: {write_report(directory)}")
            say(f"student: {directory / 'student'}")


def _look_ahead(run: Run, stages: Sequence[str], fresh: Sequence[str]) -> None:
    """UserError where the recipe contradicts what is in the run directory, in any stage, run now or not."""
    begun = [stage for stage in STAGES if run.begun(stage)]
    stay = begun[: min((begun.index(stage) for stage in fresh if stage in begun), default=len(begun))]
    for stage in stay:
        run.refuse_other_settings(stage, SETTINGS[stage](run.recipe))
    if "train" in stages and "train" in stay and (unfinished := _unfinished_before_training(run, stages)):
        raise UserError(
            f"{run.directory}: stage {unfinished} has work left (a prompt limit or samples changed), and the student "
            f"was trained on the traces that are there; --fresh train trains it anew on all of them, or choose another "
            f"--run-dir"
        )
    for stage in stages:
        for earlier in STAGES[: STAGES.index(stage)]:
            if earlier in begun and earlier not in stages and not run.is_finished(earlier):
                say(f"note: {earlier} is not finished; {stage} reads what is there")


def _unfinished_before_training(run: Run, stages: Sequence[str]) -> str | None:
    from distill import filters, generate

    if "generate" in stages and not generate.is_finished(run):
        return "generate"
    return "filter" if "filter" in stages and not filters.is_finished(run) else None


def _call(stage: str, run: Run) -> dict[str, Any]:
    module, function = ENTRY[stage]
    summary = getattr(importlib.import_module(module), function)(run)
    assert isinstance(summary, dict)
    return summary
