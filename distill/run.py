"""A run directory: who may write in it, what was done in it and how, and the refusal to mix.

    run.json            format version, the recipe's name, when the run began
    recipe.yaml         the recipe of the last stage that had work to do, every default written out
    .lock               held with flock while a process works here; holds that process's id
    stages/<name>.json  settings, extent, outputs, begun, finished (a time, or null), seconds, summary of a stage
    old/<stage>-<n>/    what `--fresh STAGE` moved aside

A stage says what it depends on in two groups. Its *settings* decide what the output is: with other settings it is
refused. Its *extent* says how much of it is wanted: with another extent the stage is merely not finished, and goes on.

Nothing is written but the lock until a stage has been accepted, and a directory that was made for a run that got no
further is removed again: a refused command leaves no trace. flock and not a pid file, because the kernel drops it when
the process dies, however it dies; and not fcntl's record locks, which any close of the file in the process drops.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.durable import aside, sync_directory, write_whole
from distill.errors import UserError
from distill.recipe import Recipe

FORMAT = 1
STAGES = ("generate", "filter", "train", "eval")  # each reads what those before it wrote

_UNUSABLE = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "read-only file system",
    errno.ENOENT: "cannot be made here",
    errno.ENOTDIR: "not a directory",
    errno.EEXIST: "not a directory",
    errno.ENAMETOOLONG: "name too long",
    errno.ELOOP: "a circle of links",
    errno.ENOLCK: "a file system without locks",
    errno.EOPNOTSUPP: "a file system without locks",
}


class Run:
    """A run directory, locked for this process while the `with` block lasts.

    Errors on entering: UserError when another process works there, when it belongs to another recipe, when it is
    something else than a run directory, or when it cannot be written.
    """

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.recipe = recipe
        self._lock: int | None = None
        self._made: list[Path] = []  # directories that were made for this run, the deepest first
        self.worked: set[str] = set()  # stages that had something to do in this process

    def __enter__(self) -> "Run":
        with self._usable():
            self._refuse_foreign()
            self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise UserError(f"{self.directory}: no permission to write here; choose another --run-dir")
            self._lock = _take_lock(self.directory)
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            self._refuse_other_recipe()
        except (UserError, OSError):
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def finished(self, name: str, settings: dict[str, Any], extent: dict[str, Any]) -> dict[str, Any] | None:
        """The summary of a stage that is finished as asked for, else None. Changes nothing.

        settings, extent: flat dictionaries of JSON values. A stage calls this first, then checks its input, and begins
        with `stage` only then: input that is refused leaves nothing behind. Errors: UserError naming each setting that
        differs from those the stage was begun with.
        """
        state = self._accepted(name, *_as_stored(settings))
        if state is None or not state["finished"] or state["extent"] != _as_stored(extent)[0]:
            return None
        summary: dict[str, Any] = state["summary"]
        return summary

    def begun(self, name: str) -> bool:
        return self._state_path(name).exists()

    def is_finished(self, name: str) -> bool:
        """Whether a stage was finished, as some recipe asked for it."""
        state = _read_json(self._state_path(name))
        return state is not None and state["finished"] is not None

    def refuse_other_settings(self, name: str, settings: dict[str, Any]) -> None:
        """UserError naming each of these settings that differs from those the stage was begun with.

        Unlike `finished`, these may be a part of them only.
        """
        state = _read_json(self._state_path(name))
        if state is not None:
            (settings,) = _as_stored(settings)
            self._refuse_unless_equal(name, {key: state["settings"].get(key) for key in settings}, settings)

    def stage(self, name: str, settings: dict[str, Any], extent: dict[str, Any], outputs: Sequence[str]) -> "Stage":
        """Begin, resume or recognise a stage; afterwards it may write its `outputs` (names inside the directory).

        Errors: as `finished`. A stage that is finished as asked for changes nothing.
        """
        assert self._lock is not None, "a stage needs the run opened by `with`"
        settings, extent = _as_stored(settings, extent)
        path = self._state_path(name)
        state = self._accepted(name, settings)
        if state is not None and state["finished"] and state["extent"] == extent:
            return Stage(path, state)
        self.worked.add(name)
        state = {
            "settings": settings,
            "extent": extent,
            "outputs": list(outputs),
            "begun": state["begun"] if state else _now(),
            "resumed": _now(),
            "seconds": self._seconds(state) if state else 0.0,
            "finished": None,
            "summary": None,
        }
        with self._usable():
            self._write_identity()
            path.parent.mkdir(exist_ok=True)
            _write_json(path, state)
        return Stage(path, state)

    def fresh(self, stage_name: str) -> None:
        """Move the outputs and states of a stage and of all later ones to `old/<stage>-<n>/`, if there are any.

        The states are set to unfinished first and moved last: killed in between, the run knows that work is missing.
        """
        assert self._lock is not None, "fresh needs the run opened by `with`"
        if stage_name not in STAGES:
            raise UserError(f"--fresh {stage_name}: no such stage; one of {', '.join(STAGES)}")
        paths = [self._state_path(name) for name in STAGES[STAGES.index(stage_name) :]]
        states = {path: state for path in paths if (state := _read_json(path)) is not None}
        if not states:
            return
        for path, state in states.items():
            _write_json(path, state | {"finished": None, "summary": None})
        old = self._new_old(stage_name)
        if (recipe := self.directory / "recipe.yaml").exists():
            shutil.copy(recipe, old)
        names = dict.fromkeys(name for state in states.values() for name in state["outputs"])
        for source in (self.directory / name for name in (*names, "report.html")):  # which told of what goes
            if source.exists():
                source.rename(old / source.name)
        for path in states:
            path.rename(old / "stages" / path.name)
        for changed in (old / "stages", old, self.directory / "stages", self.directory):
            sync_directory(changed)

    def _accepted(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The state of a stage on the disk, None when it was never begun. UserError when it was begun otherwise."""
        assert name in STAGES, name
        state = _read_json(self._state_path(name))
        if state is not None:
            self._refuse_unless_equal(name, state["settings"], settings)
        return state

    def _seconds(self, state: dict[str, Any]) -> float:
        """Worked on a stage that was begun before. A session that did not finish counts until its last write."""
        seconds: float = state.get("seconds", 0.0)
        if not state.get("resumed"):
            return seconds
        places = [self.directory / name for name in state["outputs"]]
        files = [path for place in places for path in (place, *place.rglob("*")) if path.exists()]
        last = max((path.stat().st_mtime for path in files), default=0.0)
        return seconds + max(0.0, last - datetime.fromisoformat(state["resumed"]).timestamp())

    def _refuse_unless_equal(self, name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old != new:
            raise UserError(
                f"{self.directory}: stage {name} was run with other settings ({_differences(old, new)}); "
                f"--fresh {name} moves its output aside, or choose another --run-dir"
            )

    def _state_path(self, name: str) -> Path:
        return self.directory / "stages" / f"{name}.json"

    def _new_old(self, stage_name: str) -> Path:
        number = 1
        while (old := self.directory / "old" / f"{stage_name}-{number}").exists():
            number += 1
        (old / "stages").mkdir(parents=True)
        return old

    def _write_identity(self) -> None:
        path = self.directory / "run.json"
        if not path.exists():
            _write_json(path, {"format": FORMAT, "recipe": self.recipe.name, "created": _now()})
        write_whole(self.directory / "recipe.yaml", self.recipe.to_yaml())

    def _refuse_foreign(self) -> None:
        """Before the lock is taken, so that not even a lock file is left in somebody else's directory."""
        if not self.directory.exists():
            return
        identity = self.directory / "run.json"
        ours = {".lock", aside(identity).name}  # what a run killed in its first moments leaves
        if not identity.exists() and any(entry.name not in ours for entry in self.directory.iterdir()):
            raise UserError(f"{self.directory}: not empty and not a run directory; choose another --run-dir")

    def _refuse_other_recipe(self) -> None:
        identity = _read_json(self.directory / "run.json")
        if identity is None:
            return
        if identity.get("format") != FORMAT:
            raise UserError(
                f"{self.directory}: written by another version of distill "
                f"(format {identity.get('format')}, this one knows {FORMAT}); choose another --run-dir"
            )
        if identity["recipe"] != self.recipe.name:
            raise UserError(
                f"{self.directory}: holds a run of recipe {identity['recipe']}, not of {self.recipe.name}; "
                f"choose another --run-dir"
            )

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """A directory that cannot be made, read or written is the user's to mend; a full or broken disk is not."""
        try:
            yield
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            raise UserError(
                f"{error.filename or self.directory}: {_UNUSABLE[error.errno]}; choose another --run-dir"
            ) from error

    def _release(self) -> None:
        assert self._lock is not None
        if not (self.directory / "run.json").exists():  # no stage was accepted: leave things as they were
            (self.directory / ".lock").unlink(missing_ok=True)
            for path in self._made:
                if any(path.iterdir()):
                    break
                path.rmdir()
        _held.discard(self._lock)
        os.close(self._lock)
        self._lock = None


class Stage:
    """One stage's state on the disk. `finished` and `summary` are those of a run with the same settings and extent."""

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self._path = path
        self._state = state

    @property
    def finished(self) -> bool:
        return self._state["finished"] is not None

    @property
    def summary(self) -> dict[str, Any] | None:
        return self._state["summary"]

    def finish(self, summary: dict[str, Any]) -> None:
        """Record, in one step, that the stage is done. Everything it wrote must be on the disk before."""
        now = datetime.now(UTC)
        seconds = self._state["seconds"] + (now - datetime.fromisoformat(self._state["resumed"])).total_seconds()
        told = {"resumed": None, "seconds": round(seconds, 3), "finished": now.isoformat(), "summary": summary}
        self._state |= told
        _write_json(self._path, self._state)


# The lock

_held: set[int] = set()  # descriptors of the locks that this process holds


def _forget_locks() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A forked worker shares the lock's open file and would hold it on after its parent was killed.
os.register_at_fork(after_in_child=_forget_locks)


def _take_lock(directory: Path, option: str = "--run-dir") -> int:
    """A descriptor that holds the lock until it is closed. Errors: UserError when another process holds it."""
    path = directory / ".lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode().strip()
            os.close(descriptor)
            by = f"process {holder}" if holder else "another process"
            raise UserError(f"{directory}: in use by {by}; wait for it, stop it, or choose another {option}") from error
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # its last holder removed the file between our open and our lock
    _held.add(descriptor)
    return descriptor


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A directory that is no run, made if it is not there, for this process alone while the context lasts. UserError
    when another process works there; the lock's file goes with it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(directory, "--out")
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        (directory / ".lock").unlink(missing_ok=True)
        _held.discard(lock)
        os.close(lock)


# Small files


def _as_stored(*values: dict[str, Any]) -> list[dict[str, Any]]:
    """The values as they will read from the disk: no tuples."""
    stored: list[dict[str, Any]] = json.loads(json.dumps(values))
    return stored


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore it, or choose another --run-dir") from error
    assert isinstance(content, dict), path
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`key: old → new` for each setting that differs, in the order of the new ones."""
    keys = [key for key in {**new, **old} if old.get(key, ...) != new.get(key, ...)]
    return ", ".join(f"{key}: {_shown(old, key)} → {_shown(new, key)}" for key in keys)


def _shown(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return "not set"
    text = json.dumps(settings[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
