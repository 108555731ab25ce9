"""The only place that talks to the terminal.

On a terminal long work shows a Rich bar with rate and time left. Where the output is a pipe or a log file a bar is
noise, so the same calls print a plain line now and then. Rich is imported when something is printed, not before:
`--help` needs no tables.

Two properties hold for everything that is printed here. Control characters are escaped: a model's text must not move
the cursor, change colours or set the title of the reader's terminal. And every character can be printed: `prepare`
gives the streams an error handler that writes ASCII where the terminal's encoding lacks a character.
"""

import codecs
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, zip_longest
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from distill import interrupts

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL = 10.0  # seconds between lines when there is no terminal
INDENT = 2  # columns, of the cells below a name on a line of its own
GAP = "  "  # between columns
NARROW = 100  # columns: below, a bar shows less
FIGURES = 50  # columns that a narrow bar takes beside its description
PROSE = 24  # a column at least this wide may be wrapped between words

# C0 but tab and newline, DEL, C1, and the characters that reorder the text around them.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
ASCII = {
    "–": "-",
    "—": "-",
    "−": "-",
    "─": "-",
    "━": "-",
    "×": "x",
    "…": "...",
    "→": "->",
    "·": "|",
    "≤": "<=",
    "≥": ">=",
}


# ---- characters


def escaped(text: str) -> str:
    """The text with control characters written out, such as `\\x1b`; tabs and newlines stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def prepare() -> None:
    """Let standard output and standard error print every character, whatever their encoding. Called once, at start."""
    codecs.register_error("ascii_instead", _ascii_instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ascii_instead")


def _ascii_instead(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: the nearest ASCII where there is one, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in characters), error.end


@cache
def console() -> "Console":
    """The Rich console of standard output. Lines are wrapped on a terminal only."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say(message: str) -> None:
    """Print one line. Square brackets are text, not markup; control characters are escaped."""
    console().print(escaped(message), markup=False)


def counted(number: int, noun: str) -> str:
    """A number of things: `1 trace`, `2,000 traces`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: float) -> str:
    """A number with three digits and a unit: 174 k, 1.23 B (10⁹), 4.50 T (10¹²)."""
    return _scaled(value, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)))


def bytes_text(value: float) -> str:
    """A number of bytes with three digits, in decimal units: 1.37 MB, 141 GB."""
    return _scaled(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))) + (" B" if value < 999.5 else "")


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    for unit, size in units:
        if value >= size * 0.9995:
            digits = value / size
            return f"{digits:,.{max(0, 3 - len(str(int(digits))))}f} {unit}"
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def paged(parts: Iterable[str]) -> None:
    """Show a long text in the user's pager ($PAGER, less); plainly where the output is no terminal, or no pager is.

    Errors: of `parts`; in the middle of a text once the pager is quit.
    """
    command = shlex.split(os.environ.get("PAGER", "less")) if sys.stdout.isatty() else []
    texts = (escaped(part).encode("utf-8", "replace").decode() for part in parts)
    if not command or shutil.which(command[0]) is None:
        for text in texts:
            sys.stdout.write(text)
        return
    first = next(texts, "")  # an error of it is printed alone, not below an empty pager
    pager = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, encoding="utf-8")
    assert pager.stdin is not None

    def interrupted(number: int, frame: FrameType | None) -> None:
        if pager.poll() is not None:  # the next text is searched for a pager that has been quit
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)  # while it runs, Ctrl-C is the pager's
    try:
        with suppress(BrokenPipeError):  # the reader has quit the pager
            for text in chain([first], texts):
                pager.stdin.write(text)
    finally:
        with suppress(BrokenPipeError):
            pager.stdin.close()
        pager.wait()
        signal.signal(signal.SIGINT, before)


# ---- tables


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> None:
    """Print a small table; the columns after the first `text_columns` hold figures and are right-aligned.

    Figures are never broken, prose is wrapped between words. Where the terminal is too narrow for the table, the first
    column goes on lines of its own above the others; where it is still too narrow, every value gets a line.
    """
    from rich.text import Text

    texts = [[escaped(cell) for cell in row] for row in rows]
    width = console().width if console().is_terminal else sys.maxsize
    lines: Iterable[str]
    if widths := _widths(columns, texts, width):
        lines = _grid(columns, texts, widths, text_columns)
    elif widths := _widths(columns[1:], [row[1:] for row in texts], width - INDENT):
        lines = _below_names(columns, texts, widths, text_columns)
    else:
        lines = _values(columns, texts)
    if title:
        console().print(Text(escaped(title), style="bold"))
    console().print(Text("\n".join([*lines, ""])), soft_wrap=True)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column, the widest one of prose reduced as far as necessary; empty where there is no room."""
    cells = [[*header.split("\n"), *(row[at] for row in rows)] for at, header in enumerate(columns)]
    widths = [max(map(_width, column)) for column in cells]
    over = sum(widths) + len(GAP) * (len(widths) - 1) - room
    if not widths or over <= 0:
        return widths
    widest = max(range(len(widths)), key=widths.__getitem__)
    longest_word = max(_width(word) for cell in cells[widest] for word in (cell.split() or [""]))
    if widths[widest] < PROSE or widths[widest] - over < max(longest_word, PROSE // 2):
        return []
    widths[widest] -= over
    return widths


def _grid(
    columns: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int], text_columns: int
) -> Iterator[str]:
    """Header, rule and rows, each cell as wide as its column."""
    header = [column.split("\n") for column in columns]
    height = max(map(len, header))
    yield from _aligned([[""] * (height - len(lines)) + lines for lines in header], widths, text_columns)
    yield "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    for row in rows:
        yield from _aligned(
            [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)], widths, text_columns
        )


def _below_names(
    columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], text_columns: int
) -> Iterator[str]:
    """As `_grid`, with the first cell of each row on a line of its own."""
    inner = [line.rstrip() for line in _grid(columns[1:], (), widths, text_columns - 1)]
    yield from (" " * INDENT + line for line in inner)
    for row in rows:
        yield row[0]
        cells = [_wrapped(cell, width) for cell, width in zip(row[1:], widths, strict=True)]
        yield from (" " * INDENT + line for line in _aligned(cells, widths, text_columns - 1))


def _values(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Each row as lines: its first cell, then `column: value` for the others."""
    for row in rows:
        yield row[0]
        for column, cell in zip(columns[1:], row[1:], strict=True):
            yield f"{' ' * INDENT}{' '.join(column.split())}: {cell}"


def _aligned(cells: Sequence[Sequence[str]], widths: Sequence[int], text_columns: int) -> Iterator[str]:
    """The lines of one row of cells, each a list of lines."""
    for line in zip_longest(*cells, fillvalue=""):
        padded = (
            part + " " * (width - _width(part)) if at < text_columns else " " * (width - _width(part)) + part
            for at, (part, width) in enumerate(zip(line, widths, strict=True))
        )
        yield GAP.join(padded).rstrip()


def _wrapped(cell: str, width: int) -> list[str]:
    return [cell] if _width(cell) <= width else textwrap.wrap(cell, width) or [""]


def _width(text: str) -> int:
    """Terminal columns that a text takes: a Chinese character takes two."""
    from rich.cells import cell_len

    return cell_len(text)


# ---- progress

_kept = ""


def kept() -> str:
    """What an interrupted piece of work had finished and stored, as a clause; empty where none was interrupted."""
    return _kept


class Advance(Protocol):
    """Counts finished units of work."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Count `n` more. note: a short text beside the rate, such as `loss 1.23`; it stays until the next one."""


@contextmanager
def waiting(description: str) -> Iterator[Callable[[str], None]]:
    """Yield `show(note)`, for work whose end is not known: the time that has passed, and the latest note, on one line.

    On a terminal the line is rewritten; elsewhere a line is printed now and then.
    """
    started = last = time.monotonic()

    def line(note: str) -> str:
        seconds = round(time.monotonic() - started)
        return f"{description}: {seconds // 60}:{seconds % 60:02}" + (f"  {escaped(note)}" if note else "")

    if console().is_terminal:
        from rich.markup import escape

        with interrupts.held(), console().status(escape(line(""))) as status:
            yield lambda note: status.update(escape(line(note)[: max(20, console().width - 4)]))
        return

    def show(note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_INTERVAL:
            last = time.monotonic()
            say(line(note))

    yield show


class _Count:
    """Units that were done before and now, and what to say of them."""

    def __init__(self, total: int | None, unit: str, before: int) -> None:
        self.total, self.unit, self.before = total, unit, before
        self.start, self.now, self.note = time.monotonic(), 0, ""

    def add(self, n: int, note: str) -> None:
        self.now += n
        self.note = note or self.note

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return max(time.monotonic() - self.start, 1e-3)

    @property
    def done(self) -> str:
        """`120/400 traces`."""
        number = self.before + self.now
        if self.total is None:
            return f"{number} {self.unit.removesuffix('s') if number == 1 else self.unit}"
        return f"{number}/{self.total} {self.unit}"

    @property
    def left(self) -> str:
        """`3 min left`, by the rate so far; empty where it is unknown, or nothing is left."""
        if self.total is None or not self.now or self.before + self.now >= self.total:
            return ""
        seconds = (self.total - self.before - self.now) * self.elapsed / self.now
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"

    @property
    def rate(self) -> str:
        """`3.2 traces/s`, or `4.1 s/trace` where it takes more than a second; empty before the first."""
        if not self.now:
            return ""
        rate = self.now / self.elapsed
        return f"{rate:,.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{self.unit.removesuffix('s')}"

    def beside(self, *parts: str) -> str:
        """The parts that are not empty."""
        return ", ".join(part for part in parts if part)


@contextmanager
def progress(description: str, total: int | None, unit: str, done: int = 0, stored: bool = False) -> Iterator[Advance]:
    """Yield `advance(n, note)`. `done` of `total` were there before: they count in the bar and not in the rate.

    stored: a unit is on the disk when it is counted, so that an interruption can say how many are kept (`kept`).
    """
    global _kept
    count = _Count(total, unit, done)
    try:
        with (_bar if console().is_terminal else _lines)(description, count) as advance:
            yield advance
    except KeyboardInterrupt:
        if stored:
            _kept = f"{description}: {count.done} are kept"
        raise


@contextmanager
def _bar(description: str, count: _Count) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    figures = (MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    columns: tuple[ProgressColumn, ...] = (BarColumn(), *figures, TimeElapsedColumn(), TimeRemainingColumn())
    if console().width < NARROW:
        columns = (BarColumn(bar_width=10), *figures, TimeRemainingColumn())
    if len(description) + FIGURES > console().width:
        say(description)
    else:
        columns = (TextColumn("{task.description}"), *columns)
    with interrupts.held(), Progress(*columns, console=console()) as bar:
        task = bar.add_task(description, total=count.total, completed=count.before, rate=count.unit)

        def advance(n: int = 1, note: str = "") -> None:
            count.add(n, note)
            bar.update(task, advance=n, rate=count.beside(count.rate or count.unit, count.note))

        yield advance


@contextmanager
def _lines(description: str, count: _Count) -> Iterator[Advance]:
    last = time.monotonic()

    def line() -> str:
        return (
            f"{description}: {count.beside(count.done, count.rate, count.note, f'{count.elapsed:.0f} s', count.left)}"
        )

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal last
        count.add(n, note)
        finished = count.before + count.now == count.total  # the last line is printed below
        if time.monotonic() - last >= PLAIN_INTERVAL and not finished:
            last = time.monotonic()
            say(line())

    yield advance
    say(line())
