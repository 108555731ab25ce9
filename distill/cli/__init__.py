"""The command line: parse, call, print. Nothing else happens here.

Commands import what they call when they are called: `distill --help` must not wait for torch. `main` is where errors
become exit codes: 0 done, 1 the work failed, 2 the user's input is wrong (one line, no traceback), 130 interrupted.
Everything else is a bug and keeps its traceback.
"""

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from distill import __version__, console, interrupts
from distill.cli import catalogs, evaluation, exchange, serving, stages
from distill.errors import UserError, WorkError

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


app.command()(stages.run)
app.command()(stages.generate)
app.command("filter")(stages.filter_)
app.command()(stages.train)
app.add_typer(evaluation.group, name="eval")
app.command()(stages.traces)
app.command()(stages.report)
app.command()(stages.plan)
app.command("import")(exchange.import_)
app.command()(exchange.export)
app.command()(exchange.push)
app.command()(serving.serve)
app.add_typer(catalogs.recipes, name="recipes")
app.add_typer(catalogs.teachers, name="teachers")
app.add_typer(catalogs.students, name="students")
app.add_typer(catalogs.benchmarks, name="benchmarks")


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


def main() -> None:
    """Run a command and exit with its code. Signals are handled by `distill.interrupts`, installed before."""
    console.prepare()
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
            fix = "; change its permissions (chmod), or name another place" if error.errno == errno.EACCES else ""
            code = _fail(f"{os.fsdecode(error.filename)}: {error.strerror or error}{fix}", 2)
        else:
            raise
    except KeyboardInterrupt:
        code = interrupts.CODE
    if code == interrupts.CODE:  # Typer turns an interruption inside a command into this code
        _fail(interrupts.message(console.kept()), code)
    sys.exit(code)


def _fail(message: object, code: int) -> int:
    print("error:", console.escaped(" ".join(str(message).split())), file=sys.stderr)
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
    resumes = ", which resumes" if interrupts.is_resumable() else ""
    return f"the disk is full ({free:.0f} MB free at {place}): make room and rerun the same command{resumes}"
