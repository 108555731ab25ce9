"""Commands of the four catalogs: `list`, `show`, `copy` and `check`, the same for each."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import SetOption
from distill.errors import UserError

if TYPE_CHECKING:
    from distill.catalog import Kind

WORKERS, TIMEOUT = 2, 5.0  # processes that read gold answers, and seconds of processor time for one


def catalog(kind: "Kind", what: str) -> typer.Typer:
    """The commands of one catalog. what: its entries, for the help."""
    group = typer.Typer(no_args_is_help=True, help=f"Catalog of {kind}s: {what}.")
    name_argument = typer.Argument(metavar="NAME", help=f"name of a {kind}, or path of a YAML file")

    @group.command("list", help=f"List the {kind}s by name.")
    def list_() -> None:
        from distill.catalog import entries, load
        from distill.console import table

        rows = [(name, getattr(load(kind, name), "description", "")) for name in entries(kind)]
        table("", (kind, "description"), rows, text_columns=2)

    @group.command(help=f"Print a {kind} as written, or with every default.")
    def show(
        name: Annotated[str, name_argument],
        resolved: Annotated[bool, typer.Option("--resolved", help="include every default")] = False,
        set_: SetOption = None,
    ) -> None:
        from distill.catalog import find, load

        item = load(kind, name, set_ or ())
        print(item.to_yaml() if resolved or set_ else find(kind, name).read_text(encoding="utf-8"), end="")

    @group.command("copy", help=f"Copy a {kind} to a new file, to edit. Never overwrites.")
    def copy_(
        name: Annotated[str, name_argument],
        file: Annotated[Path | None, typer.Argument(metavar="FILE", help="new file; default: ./NAME.yaml")] = None,
    ) -> None:
        from distill.catalog import copy

        print(copy(kind, name, file))

    @group.command("check", help=f"Validate {kind}s and the files that they name. Without names: all.")
    def check_(
        names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="names or paths")] = None,
    ) -> None:
        from distill.catalog import check, entries, load_recipe
        from distill.pipeline import check_stages

        wrong = False
        for name in names or entries(kind):
            try:
                notes = check(kind, name)
                if kind == "recipe":
                    check_stages(load_recipe(name))
                if kind == "benchmark":
                    _require_task_with_grader(name)
                notes += _unreadable_golds(kind, name)
            except UserError as error:
                wrong = True
                print(f"error: {error}", file=sys.stderr)
            else:
                print("\n  note: ".join([f"{name}: ok", *notes]))
        raise typer.Exit(2 if wrong else 0)

    return group


def _require_task_with_grader(name: str) -> None:
    """Raise UserError for a benchmark card whose responses cannot be graded. The grader's packages may be missing here:
    a card is also checked where it is not evaluated."""
    from distill.catalog import load_benchmark
    from distill.grading import GRADERS

    if (task := load_benchmark(name).task) not in GRADERS:
        raise UserError(f"benchmark {name}: task {task!r} has no grader; set `task` to one of {', '.join(GRADERS)}")


def _unreadable_golds(kind: "Kind", name: str) -> list[str]:
    """A note when gold answers in the files of a recipe or a benchmark cannot be read by a grader."""
    from distill.catalog import load_benchmark, load_recipe
    from distill.grading import unreadable_golds
    from distill.prompts import load_prompts

    sources = load_recipe(name).prompts if kind == "recipe" else ()
    if kind == "benchmark":
        sources = load_benchmark(name).sources
    files = [source.model_copy(update={"weight": None}) for source in sources if source.kind == "file"]
    if not files:
        return []
    golds, tried = unreadable_golds(load_prompts(files), WORKERS, TIMEOUT)
    if not golds:
        return []
    return [
        f"{len(golds):,} of {tried:,} gold answers cannot be read by a grader, such as {golds[0][:60]!r}: an answer is "
        f"correct only in the same spelling, and unverifiable in any other"
    ]


recipes = catalog("recipe", "a teacher-student pair and its four stages")
teachers = catalog("teacher", "reasoning models that answer the prompts")
students = catalog("student", "dense base models that are trained")
benchmarks = catalog("benchmark", "problems with known answers")


@recipes.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from distill.recipe import recipe_schema

    print(recipe_schema(), end="")
