"""The four catalogs. They have the same commands, because a card is a card."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import SetOption
from distill.errors import UserError

if TYPE_CHECKING:
    from distill.catalog import Kind


def catalog(kind: "Kind", what: str) -> typer.Typer:
    """`list`, `show`, `copy` and `check` of one catalog."""
    group = typer.Typer(no_args_is_help=True, help=f"The catalog of {kind}s: {what}.")
    name_argument = typer.Argument(metavar="NAME", help=f"a {kind}'s name, or a path")

    @group.command("list", help=f"List the {kind}s by name.")
    def list_() -> None:
        from distill.catalog import entries, load
        from distill.console import table

        rows = [(name, getattr(load(kind, name), "description", "")) for name in entries(kind)]
        table("", (kind, "what it is"), rows, text_columns=2)

    @group.command(help=f"Print a {kind} as it was written, or with every default written out.")
    def show(
        name: Annotated[str, name_argument],
        resolved: Annotated[bool, typer.Option("--resolved", help="write every default out")] = False,
        set_: SetOption = None,
    ) -> None:
        from distill.catalog import find, load

        item = load(kind, name, set_ or ())
        print(item.to_yaml() if resolved or set_ else find(kind, name).read_text(encoding="utf-8"), end="")

    @group.command("copy", help=f"Copy a {kind} to a file of your own, to edit. Never overwrites.")
    def copy_(
        name: Annotated[str, name_argument],
        file: Annotated[Path | None, typer.Argument(metavar="FILE", help="./NAME.yaml by default")] = None,
    ) -> None:
        from distill.catalog import copy

        print(copy(kind, name, file))

    @group.command(
        "check", help=f"Read {kind}s, and what they name, and say what is wrong. Without names: all of them."
    )
    def check_(
        names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="names or paths")] = None,
    ) -> None:
        from distill.catalog import check, entries

        wrong = False
        for name in names or entries(kind):
            try:
                notes = check(kind, name)
            except UserError as error:
                wrong = True
                print(f"error: {error}", file=sys.stderr)
            else:
                print("\n  note: ".join([f"{name}: ok", *notes]))
        raise typer.Exit(2 if wrong else 0)

    return group


recipes = catalog("recipe", "one teacher-student pair and the four stages between them")
teachers = catalog("teacher", "reasoning models that answer the prompts")
students = catalog("student", "dense base models that are trained")
benchmarks = catalog("benchmark", "problems with known answers")


@recipes.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from distill.recipe import recipe_schema

    print(recipe_schema(), end="")
