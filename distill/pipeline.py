"""`distill run`: the stages in order, in one locked run directory.

`STAGES` is the only table of stages: a new one is a `Stage` in a room of its own and a line here. Each stage decides
itself whether it is finished, resumes or starts; here it is only called, timed and reported. A run in which nothing was
left to do says so.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill import catalog, generate, train
from distill import eval as evaluation
from distill.console import say, table
from distill.errors import UserError
from distill.eval.benchmark import benchmarks_of, published_scores
from distill.filters import pipeline as filters
from distill.filters.cluster import require_ray
from distill.report import Report
from distill.run import Run
from distill.stage import Stage
from distill.train.student import card

if TYPE_CHECKING:
    from distill.recipe import Recipe

TRAIN = train.PhasesStage((generate.STAGE, filters.STAGE))  # by which a phase samples and judges its base's own answers
STAGES: Mapping[str, Stage[Any]] = {  # each has a summary of its own type
    stage.name: stage for stage in (generate.STAGE, filters.STAGE, TRAIN, evaluation.STAGE, Report())
}
WEIGHTS: dict[str, Literal["teacher", "student"]] = {"generate": "teacher", "train": "student"}  # what a stage loads


def default_run_dir(recipe: "Recipe") -> Path:
    """`runs/NAME`, relative to where the command runs."""
    return Path("runs") / recipe.name


def run_recipe(
    recipe: "Recipe",
    directory: Path,
    stages: Sequence[str] | None = None,
    fresh: Sequence[str] = (),
    verify: bool = False,
    on: str = "local",
) -> None:
    """Run `stages` (default: all of `STAGES`) of a recipe in `directory`.

    fresh: stages whose output is moved aside first, with all that was made from it. verify: hash what finished stages
    wrote, instead of comparing sizes and times. on: where filters judge, `local` or `ray`. What can be refused is
    refused before the first stage begins, and then nothing was touched. Raises UserError and WorkError.
    """
    names = list(stages or _needed(recipe))
    for name in fresh:
        if name not in names:
            raise UserError(
                f"--fresh {name} moves the output of {name} aside, and this command does not recreate it; use "
                f"`distill {name} … --fresh {name}` or `distill run … --fresh {name}`"
            )
    if train.several():
        if names != ["train"]:
            raise UserError("several processes can only train: run the other stages by themselves, without torchrun")
        if train.follow(recipe, directory):
            return
    catalog.check_recipe(recipe, _loaded(recipe, names))
    if "filter" in names or ("train" in names and any(training.own for training in recipe.train.trainings)):
        filters.check_gradable(recipe)
        if on == "ray":
            require_ray()
    with Run(directory, recipe, verify, on) as run:
        _look_ahead(run, names, fresh)
        moved = list(STAGES)[min(map(list(STAGES).index, fresh)) :] if fresh else []
        if "filter" in moved or not run.begun("filter"):
            if "filter" in names:
                filters.load_resources(recipe)
            elif "generate" in names:
                filters.check_benchmark_names(recipe)
        if "eval" in names and ("eval" in moved or not run.begun("eval")):
            evaluation.check_benchmarks(recipe.eval, recipe.judge)
        run.restore_identity()
        run.fresh([STAGES[name] for name in moved])
        _perform(run, names)


def _needed(recipe: "Recipe") -> list[str]:
    """All stages but those that have nothing to do."""
    if recipe.reads_traces:
        return list(STAGES)
    say("generate and filter: skipped, because nothing is trained on the teacher's traces")
    return [name for name in STAGES if name not in ("generate", "filter")]


def _loaded(recipe: "Recipe", names: Sequence[str]) -> list[Literal["teacher", "student"]]:
    """The models whose weights these stages load."""
    loaded = {WEIGHTS[name] for name in names if name in WEIGHTS}
    if "train" in names and any(training.objective.teacher_top_k is not None for training in recipe.train.trainings):
        loaded.add("teacher")
    if recipe.traces:
        loaded.discard("teacher")
    return sorted(loaded)


def _perform(run: Run, names: Sequence[str]) -> None:
    rows = []
    for name in names:
        stage = STAGES[name]
        started = time.monotonic()
        summary = stage.perform(run, [STAGES[earlier] for earlier in stage.reads])
        if name in ("train", "eval"):
            card.refresh(run.recipe, run.models.student_card, run.paths)
        seconds = f"{time.monotonic() - started:.0f} s" if name in run.worked else "finished before"
        rows.append((name, seconds, stage.headline(summary)))
    if not run.worked:
        say(f"nothing to do: {', '.join(names)} of {run.directory} finished before, with these settings")
        return
    table("", ("stage", "time", "result"), rows)
    if "report" in names:
        say(f"report: {run.paths.report}")
        say(f"student: {run.paths.student}")


def _look_ahead(run: Run, names: Sequence[str], fresh: Sequence[str]) -> None:
    """UserError where the recipe contradicts what is in the run directory, in any stage, run now or not."""
    order = list(STAGES)
    begun = [name for name in order if run.begun(name)]
    stay = [name for name in begun if all(order.index(name) < order.index(moved) for moved in fresh)]
    for name in stay:
        run.refuse_other_settings(name, STAGES[name].recipe_settings(run.recipe))
    if "train" in names and "train" in stay and (unfinished := _unfinished_before_training(run, names)):
        raise UserError(
            f"{run.directory}: stage {unfinished} has work left (a prompt limit or samples changed), and the student "
            f"was trained on the traces that are there; --fresh train retrains it on all of them, or choose another "
            f"--run-dir"
        )
    for name in names:
        for earlier in order[: order.index(name)]:
            if earlier not in begun or earlier in names:
                continue
            if not run.is_finished(earlier) or (earlier in STAGES[name].reads and _lacks_output(run, earlier)):
                say(f"note: {earlier} is not finished with these settings; {name} reads what is there")


def _lacks_output(run: Run, name: str) -> bool:
    """Whether this recipe asks for more than a stage made; False where that is unknown, because its input is gone."""
    try:
        return run.has_work_left(STAGES[name], STAGES[name].extent(run))
    except UserError:  # the stage is not run: a file of prompts that was moved since does not matter here
        return False


def _unfinished_before_training(run: Run, names: Sequence[str]) -> str | None:
    for name in ("generate", "filter"):
        if name in names and run.has_work_left(STAGES[name], STAGES[name].extent(run)):
            return name
    return None


def check_stages(recipe: "Recipe") -> None:
    """Raise UserError for prompts whose traces no filter could judge, benchmarks or files in their place that cannot be
    used, and a model without published scores: what `distill run` refuses at its beginning."""
    filters.check_gradable(recipe)
    benchmarks = benchmarks_of(recipe.eval)
    published_scores(benchmarks, recipe.eval.published)
