"""Arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class StageName(StrEnum):
    """The stages by name."""

    generate = "generate"
    filter = "filter"
    train = "train"
    eval = "eval"


class Where(StrEnum):
    """Where filters judge."""

    local = "local"
    ray = "ray"


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a name from `distill recipes list`, or a path")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. train.learning_rate=2e-5; repeatable"),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="the run directory; default: runs/NAME")
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="hash the files of finished stages, instead of comparing their sizes and times"),
]
FreshOption = Annotated[
    list[StageName] | None,
    typer.Option(
        "--fresh",
        metavar="STAGE",
        help="move the output of this stage and of later ones to old/ and start over: "
        "generate, filter, train or eval; repeatable",
    ),
]
OnOption = Annotated[
    Where,
    typer.Option(
        "--on",
        metavar="WHERE",
        help="where filters judge: local, or ray, the cluster that RAY_ADDRESS names or a new one on this machine",
    ),
]
