"""The command line: parse, call, print. Nothing else happens here.

Commands import what they call when they are called: `distill --help` must not wait for torch. The four catalog groups
are one function, because a card is a card. `main` is where errors become exit codes: 0 done, 1 the work failed, 2 the
user's input is wrong (one line, no traceback), 130 interrupted. What is none of these is a bug and keeps its traceback.
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from distill import __version__
from distill.errors import UserError, WorkError

if TYPE_CHECKING:
    from distill.catalog import Kind


class StageName(StrEnum):
    generate = "generate"
    filter = "filter"
    train = "train"
    eval = "eval"


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a name from `distill recipes list`, or a path")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. train.learning_rate=2e-5; repeatable"),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="where everything is written; runs/NAME by default")
]
FreshOption = Annotated[
    list[StageName] | None,
    typer.Option(
        "--fresh",
        metavar="STAGE",
        help="move aside what this stage wrote, and what was made from it, and start over: "
        "generate, filter, train or eval; repeatable",
    ),
]

app = typer.Typer(
    name="distill",
    help="Move reasoning from a DeepSeek-R1-family teacher into a dense student.\n\n"
    "prompts → generate → traces → filter → kept traces → train → student → eval → scores, report\n\n"
    "Start with `distill run tiny`: it needs no network and no GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ---- the stages


@app.command()
def run(
    recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None, fresh: FreshOption = None
) -> None:
    """Run all four stages and write the report. What is finished is skipped; what was interrupted resumes.

    Examples: `distill run tiny` · `distill run my.yaml --set generate.samples=4` · `distill run tiny --fresh train`
    """
    _run_stages(recipe, None, set_, run_dir, fresh)


@app.command()
def generate(
    recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None, fresh: FreshOption = None
) -> None:
    """Stage 1: the teacher answers the prompts.

    Example: `distill generate tiny --set prompts.0.limit=100`
    """
    _run_stages(recipe, [StageName.generate], set_, run_dir, fresh)


@app.command("filter")
def filter_(
    recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None, fresh: FreshOption = None
) -> None:
    """Stage 2: decide which traces are kept, and record why.

    Example: `distill filter tiny --set filter.per_prompt=1 --fresh filter`
    """
    _run_stages(recipe, [StageName.filter], set_, run_dir, fresh)


@app.command()
def train(
    recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None, fresh: FreshOption = None
) -> None:
    """Stage 3: fine-tune the student on the kept traces.

    Example: `distill train tiny --set train.learning_rate=2e-5 --fresh train`
    """
    _run_stages(recipe, [StageName.train], set_, run_dir, fresh)


class _ScoreFirst(TyperGroup):
    """`distill eval RECIPE` is `distill eval score RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["score", *args]
        return super().parse_args(ctx, args)


eval_ = typer.Typer(
    cls=_ScoreFirst,
    no_args_is_help=True,
    help="Stage 4: score a recipe's models, or any one model; compare two evaluations.\n\n"
    "Examples: `distill eval tiny` · `distill eval --model ./student --benchmark gsm8k --out scores` · "
    "`distill eval compare runs/a runs/b`",
)
app.add_typer(eval_, name="eval")


@eval_.command("score")
def eval_score(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="a name from `distill recipes list`, or a path; or --model instead"),
    ] = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    fresh: FreshOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH|URL", help="a model directory, a hub id, or an OpenAI-compatible server"),
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option("--benchmark", metavar="NAME", help="from the catalog, or a card; repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where samples and scores go")] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="of the model on the server, or for its scores")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="answers per problem; the card's")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="problems at most")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="NAME=FILE", help="read a benchmark from a .jsonl or .parquet; repeatable"),
    ] = None,
    published: Annotated[
        str | None, typer.Option("--published", metavar="MODEL", help="set its published scores beside these")
    ] = None,
) -> None:
    """Score the base, the student and the teacher of a recipe, or one model without a recipe.

    Examples: `distill eval tiny --set eval.samples=4` · `distill eval --model http://localhost:8000/v1 --benchmark
    aime-2024 --samples 16 --out scores`
    """
    alone = {"--benchmark": benchmark, "--out": out, "--name": name, "--samples": samples, "--limit": limit}
    alone |= {"--source": source, "--published": published}
    if recipe is not None:
        given = ["--model"] * (model is not None) + [flag for flag, value in alone.items() if value is not None]
        if given:
            raise UserError(f"{given[0]} goes with --model and without a recipe; a recipe has it under `eval:` (--set)")
        _run_stages(recipe, [StageName.eval], set_, run_dir, fresh)
        return
    if model is None or not benchmark or out is None:
        raise UserError("give a recipe, or --model with --benchmark and --out; see `distill eval score --help`")
    if run_dir is not None or fresh:
        raise UserError("--run-dir and --fresh go with a recipe; --out DIR is where a model's scores go")
    from distill.config import parse
    from distill.eval import evaluate_model
    from distill.recipe import Eval, LocalEngine

    sources = dict(_pair(item) for item in source or ())
    values = {"benchmarks": benchmark, "samples": samples, "limit": limit, "published": published, "sources": sources}
    overrides = [item.removeprefix("eval.") for item in set_ or () if not item.startswith("engine.")]
    engine = [item.removeprefix("engine.") for item in set_ or () if item.startswith("engine.")]
    asked = parse(Eval, values, "--model", overrides)
    evaluate_model(model, name, asked, parse(LocalEngine, {}, "--model", engine), out, os.environ.get("OPENAI_API_KEY"))
    print(out)


def _pair(item: str) -> tuple[str, str]:
    name, sign, path = item.partition("=")
    if not (name and sign and path):
        raise UserError(f"--source {item}: write it as NAME=FILE, e.g. gsm8k=data/test.jsonl")
    return name, path


@eval_.command("compare")
def eval_compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or the --out of an evaluation")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="another; or the same, with --models")],
    models: Annotated[
        str | None, typer.Option("--models", metavar="A,B", help="which model of each; the student of a run by default")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the comparison there, too")
    ] = None,
) -> None:
    """Compare two models on the problems that both answered: the difference, its interval, and which ones flipped.

    Examples: `distill eval compare runs/a runs/b` · `distill eval compare runs/a runs/a --models student,base`
    """
    from distill.eval.compare import compare_evaluations, questions, show

    names = (models or ",").split(",")
    if len(names) != 2:
        raise UserError(f"--models {models}: name two, separated by a comma, as student,base")
    rows = compare_evaluations(first, second, (names[0] or None, names[1] or None))
    if json_:
        json_.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    flipped = {key for row in rows for key in (*row["gained"], *row["lost"])}
    show(rows, questions((first, second), flipped))


@app.command()
def traces(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. runs/tiny")],
    verdict: Annotated[
        str | None,
        typer.Option("--verdict", metavar="TEXT", help="kept, dropped, or how a verdict begins: `correct: wrong`"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="ID", help="how a prompt's id begins")] = None,
    search: Annotated[str | None, typer.Option("--search", metavar="TEXT", help="in question or completion")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="the reasoning in full")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="a kept and a dropped trace of --prompt, line by line")] = False,
    counts: Annotated[bool, typer.Option("--counts", help="only how many traces each verdict has")] = False,
) -> None:
    """Page through the traces of a run, with what the filters said of each.

    Examples: `distill traces runs/tiny --verdict dropped` · `distill traces runs/tiny --prompt 3f2a --diff`
    """
    from distill.console import paged, table
    from distill.traces import browse

    if diff and prompt is None:
        raise UserError("--diff compares the traces of one prompt: name it with --prompt ID")
    judged = browse.judged(run)
    if counts:
        table("", ("verdict", "traces"), browse.counts(browse.chosen(judged, verdict, prompt, search)))
    elif diff:
        paged(browse.differences(judged, prompt or ""))
    else:
        paged(browse.told(browse.chosen(judged, verdict, prompt, search), whole))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. runs/tiny")]) -> None:
    """Write RUN/report.html anew from what the run directory holds.

    Example: `distill report runs/tiny`
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run directory (no recipe.yaml in it); `distill run RECIPE` makes one")
    from distill.report import write_report

    print(write_report(run))


def _run_stages(
    name: str,
    stages: Sequence[StageName] | None,
    overrides: Sequence[str] | None,
    run_dir: Path | None,
    fresh: Sequence[StageName] | None,
) -> None:
    from distill.catalog import load_recipe

    recipe = load_recipe(name, overrides or ())
    from distill.pipeline import default_run_dir, run_recipe

    directory = run_dir or default_run_dir(recipe)
    try:
        run_recipe(recipe, directory, stages=stages, fresh=fresh or ())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            error.filename = error.filename or str(directory)  # a failed write to an open file does not say where
        raise


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option("--hardware", metavar="NAME", help="8xH100, 1x24GB, 4x8x80GB; repeatable"),
    ] = None,
    traces: Annotated[int | None, typer.Option("--traces", metavar="N", help="how many will be trained on")] = None,
    mean_tokens: Annotated[
        int | None, typer.Option("--mean-tokens", metavar="N", help="how many tokens one has in the mean")
    ] = None,
) -> None:
    """Show what training a recipe takes: memory by part, hours and disk, on machines you name.

    Example: `distill plan r1-distill-qwen-7b --hardware 8xH100`
    """
    from distill.catalog import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    from distill.pipeline import default_run_dir
    from distill.plan import plan_training

    plan_training(loaded, run_dir or default_run_dir(loaded), hardware or (), traces, mean_tokens)


# ---- the catalogs


def _catalog_group(kind: "Kind", what: str) -> typer.Typer:
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


recipes = _catalog_group("recipe", "one teacher-student pair and the four stages between them")


@recipes.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from distill.recipe import recipe_schema

    print(recipe_schema(), end="")


app.add_typer(recipes, name="recipes")
app.add_typer(_catalog_group("teacher", "reasoning models that answer the prompts"), name="teachers")
app.add_typer(_catalog_group("student", "dense base models that are trained"), name="students")
app.add_typer(_catalog_group("benchmark", "problems with known answers"), name="benchmarks")


# ---- the machine


@app.command()
def doctor(
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="NAME", help="only this teacher's speed: a name, or a path")
    ] = None,
) -> None:
    """Show what this machine can run: processor, memory, kernels, and tokens a second to expect of each teacher.

    Example: `distill doctor --teacher deepseek-v2-lite-chat`
    """
    from distill.doctor import doctor

    doctor(teacher)


# ---- errors become exit codes


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupted)  # a scheduler's polite end is an interruption like any other
    try:
        code = app(prog_name="distill", standalone_mode=False) or 0
        sys.stdout.flush()
    except UserError as error:
        code = _fail(error, 2)
    except WorkError as error:
        code = _fail(error, 1)
    except typer.TyperException as error:  # an unknown option or command, a missing argument, or none and the help
        message = _usage(error)
        code = _fail(message, 2) if message else 2
    except BrokenPipeError:  # only the flush: inside a command Typer sees it first, and ends as quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        code = 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code = _fail(_disk_full(error), 1)
        elif error.filename is not None:
            fix = "; give yourself the right to it, or name another place" if error.errno == errno.EACCES else ""
            code = _fail(f"{os.fsdecode(error.filename)}: {error.strerror or error}{fix}", 2)
        else:
            raise
    except KeyboardInterrupt:
        code = 130
    if code == 130:  # Typer turns an interruption inside a command into this code
        _fail("interrupted; rerun the same command to resume", code)
    sys.exit(code)


def _fail(message: object, code: int) -> int:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return code


def _usage(error: typer.TyperException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = message.replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    return message and f"{message}; see `{context.command_path if context else 'distill'} --help`"


def _disk_full(error: OSError) -> str:
    place = Path(os.fsdecode(error.filename or ".")).absolute()
    existing = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e6
    return f"the disk is full ({free:.0f} MB free at {place}): make room and rerun the same command, which resumes"


if __name__ == "__main__":
    main()
