"""Commands that make a run and show it: the stages, the report, the traces, what training would take."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from distill import interrupts
from distill.cli.options import (
    FreshOption,
    OnOption,
    RecipeArgument,
    RunDirOption,
    SetOption,
    StageName,
    VerifyOption,
    Where,
)
from distill.errors import UserError


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    fresh: FreshOption = None,
    verify: VerifyOption = False,
    on: OnOption = Where.local,
) -> None:
    """Run the four stages and write the report. Finished stages are skipped, interrupted ones resume.

    Examples: `distill run tiny` · `distill run my.yaml --set generate.samples=4` · `distill run tiny --fresh train`
    """
    run_stages(recipe, None, set_, run_dir, fresh, verify, on)


def generate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    fresh: FreshOption = None,
    verify: VerifyOption = False,
) -> None:
    """Stage 1: the teacher answers the prompts.

    Example: `distill generate tiny --set prompts.0.limit=100`
    """
    run_stages(recipe, [StageName.generate], set_, run_dir, fresh, verify)


def filter_(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    fresh: FreshOption = None,
    verify: VerifyOption = False,
    on: OnOption = Where.local,
) -> None:
    """Stage 2: decide which traces are kept, and record why.

    Example: `distill filter tiny --set filter.select.per_prompt=1 --fresh filter`
    """
    run_stages(recipe, [StageName.filter], set_, run_dir, fresh, verify, on)


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    fresh: FreshOption = None,
    verify: VerifyOption = False,
) -> None:
    """Stage 3: fine-tune the student on the kept traces.

    Example: `distill train tiny --set train.learning_rate=2e-5 --fresh train`
    """
    run_stages(recipe, [StageName.train], set_, run_dir, fresh, verify)


def run_stages(
    name: str,
    stages: Sequence[StageName] | None,
    overrides: Sequence[str] | None,
    run_dir: Path | None,
    fresh: Sequence[StageName] | None,
    verify: bool = False,
    on: Where = Where.local,
) -> None:
    """Load the recipe and run the stages. Errors: UserError and WorkError."""
    interrupts.mark_resumable()
    from distill.catalog import load_recipe

    recipe = load_recipe(name, overrides or ())
    from distill.pipeline import default_run_dir, run_recipe

    directory = run_dir or default_run_dir(recipe)
    try:
        run_recipe(recipe, directory, stages=stages, fresh=fresh or (), verify=verify, on=on.value)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            error.filename = error.filename or str(directory)  # a failed write to an open file does not say where
        raise


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. runs/tiny")],
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            metavar="N",
            min=0,
            help="price of an hour of the machine, for the cost of each stage; default: the recipe's",
        ),
    ] = None,
) -> None:
    """Write RUN/report.html from the files of the run directory.

    Example: `distill report runs/tiny --price-per-hour 2.50`
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run directory (no recipe.yaml in it); `distill run RECIPE` makes one")
    from distill.report import write_report

    print(write_report(run, price_per_hour))


def traces(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="a run directory, or an evaluation in one, e.g. runs/tiny/eval/tiny-arithmetic/student"
        ),
    ],
    verdict: Annotated[
        str | None,
        typer.Option(
            "--verdict",
            metavar="TEXT",
            help="kept, dropped, or the beginning of a verdict, such as `correct: wrong`; of an evaluation: correct, "
            "wrong or unverifiable; of rollouts: ended or truncated",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="ID", help="beginning of a prompt's id")] = None,
    search: Annotated[
        str | None, typer.Option("--search", metavar="TEXT", help="text in the question or the completion")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="show the reasoning in full")] = False,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff", help="compare a kept and a dropped trace of --prompt line by line, or a correct and a wrong one"
        ),
    ] = False,
    counts: Annotated[
        bool, typer.Option("--counts", help="count the traces of each verdict, or the rollouts of each step; show none")
    ] = False,
    rollouts: Annotated[
        bool, typer.Option("--rollouts", help="read what the student wrote during its training, by optimiser step")
    ] = False,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", min=1, help="with --rollouts: those of optimiser step N, as in the log"),
    ] = None,
) -> None:
    """Page through the traces of a run, with the verdict of every filter, or the graded answers of an evaluation.

    Examples: `distill traces runs/tiny --verdict dropped` · `distill traces runs/tiny --prompt 3f2a --diff` ·
    `distill traces runs/mine --rollouts --step 40`
    """
    from distill.console import paged, table
    from distill.traces import browse

    if diff and prompt is None:
        raise UserError("--diff compares the traces of one prompt: name it with --prompt ID")
    if step is not None and not rollouts:
        raise UserError("--step names rollouts: add --rollouts")
    if diff and rollouts:
        raise UserError("--diff compares traces by their verdicts, which rollouts do not have: leave out --rollouts")
    chosen = {"--verdict": verdict is not None, "--search": search is not None, "--counts": counts, "--whole": whole}
    if diff and (given := [flag for flag, is_given in chosen.items() if is_given]):
        raise UserError(f"--diff shows one pair of traces of the prompt: leave out {' and '.join(given)}")
    if counts and whole:
        raise UserError("--counts shows no trace: leave out --whole")
    entries = browse.rollouts(run, step) if rollouts else browse.entries(run)
    if diff:
        paged(browse.differences(entries, prompt or ""))
        return
    selected = browse.select(entries, verdict, prompt, search)
    if counts and rollouts:
        columns = ("step", "rollouts", "mean tokens", "truncated", "mean reward")
        table("", columns, browse.rollout_counts(selected))
    elif counts:
        table("", ("verdict", "traces"), browse.counts(selected))
    else:
        paged(browse.texts(selected, whole))


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            "--hardware", metavar="NAME", help="such as 8xH100, 1x24GB, or 4x8x80GB for four nodes; repeatable"
        ),
    ] = None,
    traces: Annotated[
        int | None,
        typer.Option("--traces", metavar="N", min=1, help="number of traces; default: counted, else assumed"),
    ] = None,
    mean_tokens: Annotated[
        int | None,
        typer.Option(
            "--mean-tokens", metavar="N", min=1, help="mean tokens per trace; default: of stored traces, else assumed"
        ),
    ] = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            "--pilot",
            metavar="N",
            min=2,
            help="first sample N prompts, chosen at random, into the run directory, where `distill generate` goes on",
        ),
    ] = None,
) -> None:
    """Estimate what a recipe takes: tokens, hours, money and disk of all stages, and memory of the training.

    Examples: `distill plan r1-distill-qwen-7b --hardware 8xH100` · `distill plan my.yaml --pilot 8`
    """
    if pilot is not None:
        interrupts.mark_resumable()
    from distill.catalog import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    from distill.pipeline import default_run_dir
    from distill.plan import plan_recipe

    plan_recipe(loaded, run_dir or default_run_dir(loaded), hardware or (), traces, mean_tokens, pilot)
