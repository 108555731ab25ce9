"""`distill eval`: scores of a recipe's models, or of one model; the comparison of two evaluations."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distill import interrupts
from distill.cli.options import FreshOption, RunDirOption, SetOption, StageName, VerifyOption
from distill.cli.stages import run_stages
from distill.errors import UserError


class _ScoreFirst(TyperGroup):
    """`distill eval RECIPE` is `distill eval score RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `score` before arguments that name no command."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["score", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_ScoreFirst,
    no_args_is_help=True,
    help="Stage 4: score a recipe's models, or any one model; compare two evaluations.\n\n"
    "`distill eval …` is `distill eval score …`, whose --help has all options.\n\n"
    "Examples: `distill eval tiny` · `distill eval --model ./student --benchmark gsm8k --out scores` · "
    "`distill eval compare runs/a runs/b`",
)


@group.command("score")
def score(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="a name from `distill recipes list`, or a path; or --model instead"),
    ] = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    fresh: FreshOption = None,
    verify: VerifyOption = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH|URL", help="a model directory, a .gguf file, a hub id, or a server"),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", metavar="NAME", help="a name from the catalog, or a path; repeatable"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="directory for samples and scores")] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="the model's name on the server, or a name for its scores"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="answers per problem; default: the card's")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="maximum number of problems")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="of the answers, 0 for greedy; default: the card's")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="maximum tokens per answer; default: the card's")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="NAME=FILE",
            help="read a benchmark's problems from a file, such as a .jsonl or .csv; repeatable, also for a benchmark "
            "of several sources",
        ),
    ] = None,
    published: Annotated[
        str | None, typer.Option("--published", metavar="MODEL", help="compare with the published scores of this model")
    ] = None,
) -> None:
    """Score the base, the student and the teacher of a recipe, or one model without a recipe.

    Examples: `distill eval tiny --set eval.samples=4` · `distill eval --model http://localhost:8000/v1 --benchmark
    aime-2024 --samples 16 --out scores`
    """
    alone: dict[str, object] = {"--benchmark": benchmark, "--out": out, "--name": name, "--samples": samples}
    alone |= {"--limit": limit, "--temperature": temperature, "--max-new-tokens": max_new_tokens}
    alone |= {"--source": source, "--published": published}
    if recipe is not None:
        if model is not None:
            raise UserError("a recipe names its models; give either RECIPE or --model")
        if given := [flag for flag, value in alone.items() if value is not None]:
            raise UserError(
                f"{given[0]} needs --model; with a recipe, set the key under `eval:` (--set eval.KEY=VALUE)"
            )
        run_stages(recipe, [StageName.eval], set_, run_dir, fresh, verify)
        return
    missing = [flag for flag, value in (("--model", model), ("--benchmark", benchmark), ("--out", out)) if not value]
    if model is None or not benchmark or out is None:
        raise UserError(
            f"give a recipe, or --model with --benchmark and --out ({' and '.join(missing)} missing); see "
            f"`distill eval score --help`"
        )
    if run_dir is not None or fresh or verify:
        raise UserError(
            "--run-dir, --fresh and --verify need a recipe; with --model, --out is the directory for its scores, and "
            "damaged files in it are always recreated"
        )
    values: dict[str, object] = {"benchmarks": benchmark, "samples": samples, "limit": limit}
    values |= {"temperature": temperature, "max_new_tokens": max_new_tokens}
    values |= {"published": published, "sources": _files(source or ())}
    _score_model(model, name, values, set_ or (), out)
    print(f"scores: {out}")


def _score_model(
    model: str, name: str | None, values: Mapping[str, object], overrides: Sequence[str], out: Path
) -> None:
    """values: of `eval:`. overrides: --set, of `eval:`, or as `engine.KEY` or `judge.KEY` of the section."""
    interrupts.mark_resumable()
    from distill.config import parse
    from distill.eval import evaluate_model
    from distill.recipe import Eval, Judge, LocalEngine

    engine = [item.removeprefix("engine.") for item in overrides if item.startswith("engine.")]
    judge = [item.removeprefix("judge.") for item in overrides if item.startswith("judge.")]
    rest = [item.removeprefix("eval.") for item in overrides if not item.startswith(("engine.", "judge."))]
    settings, local = parse(Eval, values, "--model", rest), parse(LocalEngine, {}, "--model", engine, "engine")
    asked = parse(Judge, {}, "--set judge", judge, "judge") if judge else None
    evaluate_model(model, name, settings, local, out, os.environ.get("OPENAI_API_KEY"), judge=asked)


def _files(items: Sequence[str]) -> dict[str, str | list[str]]:
    """Benchmark → its file, or the list of its files in the order in which they are named."""
    files: dict[str, list[str]] = {}
    for name, path in map(_pair, items):
        files.setdefault(name, []).append(path)
    return {name: paths[0] if len(paths) == 1 else paths for name, paths in files.items()}


def _pair(item: str) -> tuple[str, str]:
    name, sign, path = item.partition("=")
    if not (name and sign and path):
        raise UserError(f"--source {item}: write it as NAME=FILE, e.g. gsm8k=data/test.jsonl")
    return name, path


@group.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or the --out of an evaluation")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="a second one, or the same with --models")],
    models: Annotated[
        str | None, typer.Option("--models", metavar="A,B", help="one model of each; default: the student")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the comparison to this file")
    ] = None,
) -> None:
    """Compare two models on the problems that both answered: the difference, its interval, and which problems flipped.

    Examples: `distill eval compare runs/a runs/b` · `distill eval compare runs/a runs/a --models student,base`
    """
    from distill.durable import write_whole
    from distill.eval.compare import compare_evaluations, questions_of, show

    names = (models or ",").split(",")
    if len(names) != 2:
        raise UserError(f"--models {models}: give two names separated by a comma, such as student,base")
    if json_ and not json_.parent.is_dir():
        raise UserError(f"--json {json_}: no such directory; create {json_.parent} first, or name another file")
    if json_ and json_.is_dir():
        raise UserError(f"--json {json_}: a directory; name a file in it")
    rows = compare_evaluations(first, second, (names[0] or None, names[1] or None))
    if json_:
        write_whole(json_, json.dumps([row.to_json() for row in rows], indent=2) + "\n")
    flipped = {prompt for row in rows for prompt in (*row.gained, *row.lost)}
    show(rows, questions_of((first, second), flipped))
