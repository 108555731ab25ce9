"""SIGINT and SIGTERM, from the first line of Python to the last.

Where nothing is held, a signal ends the process at once, with one line and exit code 130: during imports, and while a
command only reads. A `KeyboardInterrupt` there would surface in the middle of an import and end in a traceback. Where
something is held (a run's lock, a terminal's cursor, worker processes) code says so with `held()`, and a signal raises
`KeyboardInterrupt`, which unwinds as usual: a scheduler's SIGTERM is an interruption like any other.

Signals belong to the main program: importing this module changes nothing, the command line calls `install`.
Standard library only, and little of it: it is imported before everything else.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

CODE = 130

_holders = 0
_resumable = False


def install() -> None:
    """Handle SIGINT and SIGTERM as described above, until the process ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def handle(number: int, frame: object) -> None:
    """End the process, or raise KeyboardInterrupt where something is held."""
    if _holders:
        raise KeyboardInterrupt
    os.write(2, f"error: {message()}\n".encode())
    os._exit(CODE)


def mark_resumable() -> None:
    """Say that the command of this process goes on where it was interrupted, when it is run again."""
    global _resumable
    _resumable = True


def is_resumable() -> bool:
    """Whether the command resumes (`mark_resumable`)."""
    return _resumable


def message(done: str = "") -> str:
    """The line after an interruption. done: what is kept, as a clause."""
    kept = f" ({done})" if done else ""
    return f"interrupted{kept}" + ("; rerun the same command to resume" if _resumable else "")


def hold() -> None:
    """From now on signals raise KeyboardInterrupt, until `release` was called as often."""
    global _holders
    _holders += 1


def release() -> None:
    """Take back one `hold`."""
    global _holders
    assert _holders > 0, "release without hold"
    _holders -= 1


@contextmanager
def held() -> Iterator[None]:
    """`hold` while the context lasts."""
    hold()
    try:
        yield
    finally:
        release()
