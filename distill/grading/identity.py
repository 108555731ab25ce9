"""Which grader gave a verdict: its version, those of the packages on which it rests, and the isolation of programs.

Stored beside verdicts, and compared before any is used again: two versions of a grader in one score would be two
graders. The version is a number that is raised by hand, because the version of distill changes without any verdict, and
a hash of the source with every comment.

A program may pass at one level of isolation and fail at another (it writes a file, it asks for its user), so the level
that the machine gives is part of the identity. `full` is left out: the default asks for it, and the verdicts that were
given before the level was recorded stay valid. Verdicts of a lower level are given again on a machine that gives more.
Time limits are not part of it: `filter.correct.timeout` is a setting of the filter, whose change is refused, and the
limit of evaluations is a constant, so that a change of it raises the versions.
"""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

from distill.artefacts import Settings
from distill.grading.graders import GRADERS

PYTHON = "python"


def graders_identity(tasks: Iterable[str]) -> Settings:
    """What decides the verdicts of the graders of these tasks, such as `math.version` and `math.sympy`; tasks without a
    grader are left out."""
    identity: Settings = {}
    for task in sorted(set(tasks) & GRADERS.keys()):
        identity |= versioned(task, GRADERS[task].version, GRADERS[task].packages)
        identity |= {f"{task}.{name}": value for name, value in GRADERS[task].conditions().items()}
    return identity


def versioned(name: str, number: int, packages: Sequence[str]) -> Settings:
    """A version and those of packages, under a name. A package that is not installed has none."""
    return {f"{name}.version": number} | {f"{name}.{package}": installed(package) for package in packages}


def installed(package: str) -> str | None:
    """The version of a distribution, or of Python; None where it is not installed."""
    if package == PYTHON:
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def changes(old: Settings | None, new: Settings) -> str:
    """`key: old → new` for each key that differs; for what was stored without an identity, that it was."""
    if old is None:
        return "their version is not recorded"
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {_shown(old.get(key))} → {_shown(new.get(key))}" for key in keys)


def _shown(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
