"""The only place that talks to the terminal.

On a terminal long work shows a Rich bar with rate and time left. Where the output is a pipe or a log file a bar is
noise, so the same calls print a plain line now and then. Rich is imported when something is printed, not before:
`--help` needs no tables.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

from distill import interrupts

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL = 10.0  # seconds between lines when there is no terminal


@cache
def console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say(message: str) -> None:
    """Print one line, as it is: square brackets are text, not markup."""
    console().print(message, markup=False)


def paged(parts: Iterable[str]) -> None:
    """Show a long text in the user's pager ($PAGER, less); plainly where the output is no terminal, or no pager is."""
    command = shlex.split(os.environ.get("PAGER", "less")) if sys.stdout.isatty() else []
    texts = (part.encode("utf-8", "replace").decode() for part in parts)
    if not command or shutil.which(command[0]) is None:
        for text in texts:
            sys.stdout.write(text)
        return
    pager = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, encoding="utf-8")
    assert pager.stdin is not None
    with suppress(BrokenPipeError):  # who has read enough closes it
        for text in texts:
            pager.stdin.write(text)
        pager.stdin.close()
    pager.wait()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> None:
    """Print a small table; the columns after the first `text_columns` are right-aligned, as figures want."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        collapse_padding=True,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i < text_columns else "right", overflow="fold", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console().print(grid)


@contextmanager
def progress(description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. `done` of `total` were there before: they count in the bar and not in the rate."""
    if console().is_terminal:
        with _bar(description, total, unit, done) as advance:
            yield advance
    else:
        with _lines(description, total, unit, done) as advance:
            yield advance


@contextmanager
def _bar(description: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    start, count = time.monotonic(), 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with interrupts.held(), Progress(*columns, console=console()) as bar:
        task = bar.add_task(description, total=total, completed=done, rate=unit)

        def advance(n: int = 1) -> None:
            nonlocal count
            count += n
            rate = count / max(time.monotonic() - start, 1e-3)
            bar.update(task, advance=n, rate=f"{rate:,.1f} {unit}/s")

        yield advance


@contextmanager
def _lines(description: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    count = 0

    def line() -> str:
        elapsed = time.monotonic() - start
        of = f"/{total}" if total is not None else ""
        return f"{description}: {done + count}{of} {unit}, {count / max(elapsed, 1e-3):,.1f}/s, {elapsed:.0f} s"

    def advance(n: int = 1) -> None:
        nonlocal last, count
        count += n
        if time.monotonic() - last >= PLAIN_INTERVAL:
            last = time.monotonic()
            say(line())

    yield advance
    say(line())
