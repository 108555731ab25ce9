"""What this machine can hold a program with, and whether that is enough for what was asked.

`full` and `landlock` protect the files of the user, `process` does not: see the package's note, and docs/code.md for
the limits of each level. The strongest walls that work are used, whatever level is required.
"""

import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from typing import Literal, get_args

from distill.errors import UserError, WorkError
from distill.grading.sandbox import walls
from distill.grading.sandbox.runner import NotAvailable, Zygote
from distill.grading.sandbox.zygote import Powers

Level = Literal["full", "landlock", "process"]
ALLOW = (
    "allow user namespaces (sysctl user.max_user_namespaces=10000, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0 as well; start a container with --privileged)"
)
LEVELS: tuple[Level, ...] = get_args(Level)  # from the strongest on


def level_of(powers: Powers) -> Level:
    """The level of what a zygote can do."""
    apart = powers["namespaces"] or powers["landlock"] > 0  # one program from the next
    if powers["walls"] in ("namespaces", "bubblewrap") and powers["seccomp"] and apart:
        return "full"
    if powers["landlock"] > 0 and powers["seccomp"]:
        return "landlock"
    return "process"


def open_zygote(level: Level = "process") -> Zygote:
    """A zygote behind the strongest walls of this machine.

    Errors: WorkError when none starts at all, and when the strongest walls give less than `level`.
    """
    refusals = list[str]()
    for kind in _kinds():
        try:
            zygote = Zygote(kind)
        except NotAvailable as error:
            refusals.append(f"{kind}: {error}")
            continue
        here = level_of(zygote.powers)
        if LEVELS.index(here) > LEVELS.index(level):
            zygote.close()
            why = f" ({refusals[0]})" if refusals else ""
            raise WorkError(
                f"{platform.node()}: programs are run at level {level!r} of isolation, and this machine gives "
                f"{here!r}{why}; `distill doctor` on it says what to install"
            )
        return zygote
    raise WorkError(f"the sandbox did not start ({'; '.join(refusals)})")


@cache
def this_machine() -> tuple[Level, Powers, tuple[str, ...]]:
    """The level of this machine, what its zygote can do, and why stronger walls do not work."""
    refusals = list[str]()
    for kind in _kinds():
        try:
            with Zygote(kind) as zygote:
                return level_of(zygote.powers), zygote.powers, tuple(refusals)
        except NotAvailable as error:
            refusals.append(f"{kind}: {error}")
    raise WorkError(f"the sandbox did not start ({'; '.join(refusals)})")


def require_level(level: Level, where: str) -> None:
    """Raise UserError when this machine holds programs less well than a level. where: the setting that names it."""
    here, _, refusals = this_machine()
    if LEVELS.index(here) > LEVELS.index(level):
        why = f" ({refusals[0]})" if refusals else ""
        raise UserError(
            f"{where}: programs are run at level {level!r} of isolation, and this machine gives {here!r}{why}; "
            f"`distill doctor` says what to install, or accept less: {where}: {here}"
        )


def describe() -> list[tuple[str, str]]:
    """What `distill doctor` shows: the level, what holds it, and what more would need."""
    level, powers, refusals = this_machine()
    parts = [f"walls: {powers['walls']}", f"user {powers['uid']}"]
    parts += [f"Landlock {powers['landlock']}"] if powers["landlock"] else []
    parts += ["seccomp"] if powers["seccomp"] else []
    rows = [("sandbox", f"level {level} ({', '.join(parts)})")]
    if level != "full":
        rows.append(("for more", f"{_remedy()}. Tried: {'; '.join(refusals)}"))
    return rows


def _remedy() -> str:
    if sys.platform != "linux":
        return "full isolation needs Linux; run code there, such as in a virtual machine"
    if os.geteuid() != 0 and walls.bubblewrap() is None:
        return f"install bubblewrap (the package `bubblewrap`), or {ALLOW}"
    return ALLOW


def _kinds() -> Iterator[str]:
    """The kinds of walls, from the strongest on, see `walls`."""
    if sys.platform == "linux":
        if os.geteuid() != 0 and walls.bubblewrap() is not None:
            yield "bubblewrap"
        yield "namespaces"
        if os.geteuid() == 0 and walls.bubblewrap() is not None:
            yield "bubblewrap"
        yield "landlock"
    yield "process"
