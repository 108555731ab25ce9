"""A run directory: who may write in it, what was done in it and how, whether it is still there, the refusal to mix.

    run.json            format version, the recipe's name, when the run began, the checksum of recipe.yaml
    recipe.yaml         the recipe of the last stage that had work to do, every default written out
    .lock               held while a process works here; holds that process's id
    stages/<name>.json  the record of a stage: settings, extent, times, summary, and the files that later stages read
    old/<stage>-<n>/    what `--fresh STAGE` moved aside
    old/damaged-<n>/    files that were not as the record says, before they were recreated

A stage is finished while its record says so *and* its products are there and whole. Before "nothing to do" names, sizes
and times are compared, one `stat` a file; where they differ, and with `verify`, the content is hashed. Content is also
hashed when a later stage is about to read it. What is damaged is moved aside, and the stage recreates it.

Nothing is written but the lock until a stage begins, and a directory that was made for a run that got no further is
removed again: a refused command leaves no trace.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from distill import lock
from distill.artefacts import Artefact, RunPaths, Settings
from distill.console import say
from distill.durable import aside, sync_directory, write_whole
from distill.errors import UserError
from distill.hardware import description
from distill.integrity import record_files
from distill.models import Models
from distill.prompts import Prompt, PromptCounts, load_prompts
from distill.recipe import Recipe
from distill.record import FORMAT, Identity, StageFiles, StageRecord, read_identity

S = TypeVar("S", bound=Artefact)

_UNUSABLE = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "read-only file system",
    errno.ENOENT: "cannot be created here",
    errno.ENOTDIR: "not a directory",
    errno.EEXIST: "not a directory",
    errno.ENAMETOOLONG: "name too long",
    errno.ELOOP: "too many symbolic links",
    errno.ENOLCK: "a file system without locks",
    errno.EOPNOTSUPP: "a file system without locks",
}


class Run:
    """A run directory, locked for this process while the `with` block lasts.

    models: the teacher, the base and the student, resolved once. on: where filters judge, `local` or `ray`. verify:
    hash what finished stages wrote. option: how the command line names the directory, for messages. Errors on entering:
    UserError when another process works there, when it belongs to another recipe, when it is something else than a run
    directory, or when it cannot be written.
    """

    def __init__(
        self, directory: Path, recipe: Recipe, verify: bool = False, on: str = "local", option: str = "--run-dir"
    ) -> None:
        self.directory = directory
        self.paths = RunPaths(directory)
        self.recipe = recipe
        self.verify = verify
        self.on = on
        self.option = option
        self.worked: set[str] = set()  # stages that had something to do in this process
        self._lock: int | None = None
        self._created: list[Path] = []  # directories that were created for this run, the deepest first
        self._damaged: dict[str, dict[str, str]] = {}  # stage → file → what is wrong with it

    @cached_property
    def _machine(self) -> str:
        return description()  # which may start a program that lists GPUs

    @cached_property
    def models(self) -> Models:
        """The models of the recipe."""
        return Models(self.recipe, self.directory)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The recipe's prompts, read once. Errors: UserError naming file and line."""
        counts = PromptCounts()
        prompts = list(load_prompts(self.recipe.prompts, counts, self.recipe.generate.max_prompts))
        for note in counts.notes():
            say(f"note: {note}")
        if self.recipe.prompts and not prompts:
            raise UserError("prompts: no problem is inside the window of `since` and `until`; change these dates")
        return prompts

    def __enter__(self) -> "Run":
        with self._usable():
            self._refuse_foreign()
            self._created = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise UserError(f"{self.directory}: no permission to write here; choose another {self.option}")
            self._lock = lock.take(self.directory, self.option)
        try:
            self._refuse_other_recipe()
        except (UserError, OSError):
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    # ---- what was done

    def finished(self, stage: StageFiles[S], settings: Settings, extent: Settings) -> S | None:
        """The summary of a stage that is finished as asked for and whose products are whole, else None.

        Changes nothing. Errors: UserError naming each setting that differs from those the stage was begun with.
        """
        record = self.record(stage.name)
        if record is None:
            return None
        self._refuse_unless_equal(stage.name, record.settings, _as_stored(settings))
        if record.finished is None:
            return None
        self._damaged[stage.name] = self._damage(stage, record, content=self.verify)
        if self._damaged[stage.name] or record.extent != _as_stored(extent):
            return None
        return self._summary(stage.name, stage.summary, record)

    def has_work_left(self, stage: StageFiles[S], extent: Settings) -> bool:
        """Whether a stage lacks output that was never there. Damaged products do not count: their content is known."""
        record = self.record(stage.name)
        if record is None or record.extent != _as_stored(extent):
            return True
        return record.finished is None and not record.repairing

    def stored_summary(self, name: str, model: type[S]) -> S | None:
        """The summary of a finished stage, by name: for a stage that builds on another one's figures."""
        record = self.record(name)
        if record is None or record.finished is None:
            return None
        return self._summary(name, model, record)

    def record(self, name: str) -> StageRecord | None:
        """The record of a stage; None when it was never begun. Errors: UserError when it is damaged."""
        path = self.paths.record(name)
        return StageRecord.read_if_there(path, self._remedy(name))

    def seconds(self, stage: StageFiles[S]) -> float:
        """Seconds that a stage was worked on, in all sessions that have ended or were killed."""
        record = self.record(stage.name)
        return self._seconds(stage, record) if record is not None else 0.0

    def begun(self, name: str) -> bool:
        """Whether a stage was ever begun."""
        return self.paths.record(name).exists()

    def is_finished(self, name: str) -> bool:
        """Whether a stage was finished, as some recipe asked for it."""
        record = self.record(name)
        return record is not None and record.finished is not None

    def refuse_other_settings(self, name: str, settings: Settings) -> None:
        """UserError naming each of these settings that differs from those the stage was begun with.

        Unlike `finished`, these may be a part of them only.
        """
        record = self.record(name) if settings else None  # nothing of the report is compared, nor is its record read
        if record is not None:
            stored = _as_stored(settings)
            self._refuse_unless_equal(name, {key: record.settings.get(key) for key in stored}, stored)

    def check_inputs(self, stages: Sequence[StageFiles[Artefact]], content: bool = True) -> None:
        """Hash the products of finished stages that are about to be read. Errors: UserError naming the damaged file.

        content: False hashes only those whose size or time differ.
        Stages that worked in this process were hashed when they finished.
        """
        for stage in stages:
            record = self.record(stage.name)
            if record is None or record.finished is None or stage.name in self.worked:
                continue
            for name, what in self._damage(stage, record, content=content).items():
                raise UserError(
                    f"{self.directory / name} {what}; `distill {stage.name} --verify` with this recipe recreates it"
                )

    # ---- doing it

    def begin(self, stage: StageFiles[S], settings: Settings, extent: Settings) -> None:
        """Record that a stage is under way: from now on it may write its outputs. Errors: as `finished`."""
        assert self._lock is not None, "a stage needs the run opened by `with`"
        record = self.record(stage.name)
        if record is not None:
            self._refuse_unless_equal(stage.name, record.settings, _as_stored(settings))
        self.worked.add(stage.name)
        new = StageRecord(
            settings=_as_stored(settings),
            extent=_as_stored(extent),
            begun=record.begun if record else _now(),
            resumed=_now(),
            seconds=self._seconds(stage, record) if record else 0.0,
            finished=None,
            summary=None,
            files={},
            repairing=record is not None and record.repairing,
            machines=tuple(dict.fromkeys((*(record.machines if record else ()), self._machine))),
        )
        with self._usable():
            self._write_identity()
            self.paths.record(stage.name).parent.mkdir(exist_ok=True)
            new.write(self.paths.record(stage.name))

    def forget(self, stage: StageFiles[S]) -> None:
        """Take back `begin` of a stage that has made nothing: with other settings it may begin anew."""
        self.paths.record(stage.name).unlink(missing_ok=True)
        self.worked.discard(stage.name)

    def finish(self, stage: StageFiles[S], summary: S) -> None:
        """Record, in one step, that a stage is done, and what its products hold. They must be on the disk before."""
        record = self.record(stage.name)
        assert record is not None and record.resumed is not None, f"{stage.name} was not begun"
        now = datetime.now(UTC)
        seconds = record.seconds + (now - datetime.fromisoformat(record.resumed)).total_seconds()
        changes: dict[str, object] = {
            "resumed": None,
            "seconds": round(seconds, 3),
            "finished": now.isoformat(),
            "summary": summary.to_json(),
            "files": record_files(self.directory, self._products(stage)),
            "repairing": False,
        }
        record.model_copy(update=changes).write(self.paths.record(stage.name))

    def set_damage_aside(self, stage: StageFiles[S]) -> None:
        """Move products that `finished` did not find whole to `old/damaged-<n>/`, so that the stage recreates them.

        The record is set to unfinished first: killed in between, the run knows that work is missing.
        """
        damaged = self._damaged.pop(stage.name, {})
        for name, what in damaged.items():
            if any(fnmatch(name, pattern) for pattern in stage.irreplaceable):
                raise UserError(
                    f"{self.directory / name} {what}, and only the {stage.name} stage as a whole would write it again: "
                    f"put the file back, or repeat the stage with --fresh {stage.name}"
                )
        record = self.record(stage.name)
        if not damaged or record is None:
            return
        record.model_copy(update={"finished": None, "files": {}, "repairing": True}).write(
            self.paths.record(stage.name)
        )
        old = self._new_old("damaged")
        for name, what in damaged.items():
            say(f"{stage.name}: {self.directory / name} {what}; regenerating it")
            source, target = self.directory / name, old / name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
        sync_directory(old)

    def fresh(self, stages: Sequence[StageFiles[Artefact]]) -> None:
        """Move the outputs and records of these stages (one and all later ones), if any, to `old/<stage>-<n>/`.

        Outputs may be there without a record: the first phases of a training whose next one was refused. The records
        are set to unfinished first and moved last: killed in between, the run knows that work is missing. A damaged
        record is moved like any other: this is the way out of it.
        """
        assert self._lock is not None, "fresh needs the run opened by `with`"
        paths = [path for stage in stages if (path := self.paths.record(stage.name)).exists()]
        outputs = dict.fromkeys(name for stage in stages for name in stage.outputs)
        moved = [name for name in outputs if (self.directory / name).exists()]
        if not paths and not moved:
            return
        for stage in stages:
            with suppress(UserError):  # a damaged record
                if (record := self.record(stage.name)) is not None:
                    unfinished = record.model_copy(update={"finished": None, "summary": None, "files": {}})
                    unfinished.write(self.paths.record(stage.name))
        old = self._new_old(stages[0].name)
        if self.paths.recipe.exists():
            shutil.copy(self.paths.recipe, old)
        for name in moved:
            (self.directory / name).rename(old / name)
        (old / "stages").mkdir()
        for path in paths:
            path.rename(old / "stages" / path.name)
        for changed in (old / "stages", old, *(path.parent for path in paths[:1]), self.directory):
            sync_directory(changed)
        if moved:
            say(f"moved {', '.join(moved)} to {old}")

    def restore_identity(self) -> None:
        """Write run.json and recipe.yaml again where a stage has begun and one of them is missing or damaged."""
        if not any(self.paths.record("any").parent.glob("*.json")):
            return
        identity = self._identity()
        text = self.paths.recipe.read_bytes() if self.paths.recipe.is_file() else b""
        if identity is None or hashlib.sha256(text).hexdigest() != identity.recipe_sha256:
            name = self.paths.identity.name if identity is None else self.paths.recipe.name
            say(f"{self.directory / name} was missing or changed; rewriting it")
            self._write_identity()

    # ---- products

    def _products(self, stage: StageFiles[S]) -> list[Path]:
        found = {path for pattern in stage.products for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(path for path in found if not path.name.startswith("."))

    def _damage(self, stage: StageFiles[S], record: StageRecord, content: bool) -> dict[str, str]:
        """Products that are not as recorded: path relative to the run directory → what is wrong with it."""
        damaged = {}
        for name, file in record.files.items():
            path = self.directory / name
            if (content or not file.looks_unchanged(path)) and (what := file.damage(path)) is not None:
                damaged[name] = what
        names = (path.relative_to(self.directory).as_posix() for path in self._products(stage))
        return damaged | {name: "was not written by this run" for name in names if name not in record.files}

    def _summary(self, name: str, model: type[S], record: StageRecord) -> S:
        try:
            return model.model_validate_json(json.dumps(record.summary))
        except ValueError:
            raise UserError(f"{self.paths.record(name)} is damaged; {self._remedy(name)}") from None

    def _remedy(self, name: str) -> str:
        """What to do about a damaged record."""
        if name == "report":  # which --fresh does not take: it is written again in any case
            return f"delete it; `distill report {self.directory}` writes it again"
        return f"--fresh {name} moves the stage's output aside and starts it over"

    def _seconds(self, stage: StageFiles[S], record: StageRecord) -> float:
        """Worked on a stage that was begun before. A session that did not finish counts until its last write."""
        if record.resumed is None:
            return record.seconds
        places = [self.directory / name for name in stage.outputs]
        files = [path for place in places for path in (place, *place.rglob("*")) if path.exists()]
        last = max((path.stat().st_mtime for path in files), default=0.0)
        return record.seconds + max(0.0, last - datetime.fromisoformat(record.resumed).timestamp())

    # ---- identity

    def _refuse_unless_equal(self, name: str, old: Settings, new: Settings) -> None:
        if old != new:
            raise UserError(
                f"{self.directory}: stage {name} was run with other settings ({_differences(old, new)}); "
                f"--fresh {name} moves its output aside, or choose another {self.option}"
            )

    def _new_old(self, name: str) -> Path:
        number = 1
        while (old := self.paths.old / f"{name}-{number}").exists():
            number += 1
        old.mkdir(parents=True)
        return old

    def _write_identity(self) -> None:
        text, path = self.recipe.to_yaml(), self.paths.identity
        identity = self._identity()
        new = Identity(
            format=FORMAT,
            recipe=self.recipe.name,
            created=identity.created if identity else _now(),
            recipe_sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
        if new != identity:
            new.write(path)
        write_whole(self.paths.recipe, text)

    def _identity(self) -> Identity | None:
        return read_identity(self.directory, self.option)

    def _refuse_foreign(self) -> None:
        """Before the lock is taken, so that not even a lock file is left in a directory that is not a run."""
        if not self.directory.exists():
            return
        identity = self.paths.identity
        ours = {lock.NAME, aside(identity).name}  # what a run killed in its first moments leaves
        begun = any(self.paths.record("any").parent.glob("*.json"))  # run.json alone was lost
        if not begun and not identity.exists() and any(entry.name not in ours for entry in self.directory.iterdir()):
            raise UserError(f"{self.directory}: not empty and not a run directory; choose another {self.option}")

    def _refuse_other_recipe(self) -> None:
        identity = self._identity()
        if identity is not None and identity.recipe != self.recipe.name:
            raise UserError(
                f"{self.directory}: holds a run of recipe {identity.recipe}, not of {self.recipe.name}; "
                f"choose another {self.option}"
            )

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Turn what is wrong with the place into UserError; a full or broken disk is no user's mistake."""
        try:
            yield
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            raise UserError(
                f"{error.filename or self.directory}: {_UNUSABLE[error.errno]}; choose another {self.option}"
            ) from error

    def _release(self) -> None:
        assert self._lock is not None
        if not self.paths.identity.exists() and not self.paths.record("any").parent.exists():  # no stage began
            (self.directory / lock.NAME).unlink(missing_ok=True)
            for path in self._created:
                if any(path.iterdir()):
                    break
                path.rmdir()
        lock.release(self._lock)
        self._lock = None


def _as_stored(values: Settings) -> Settings:
    """The values as they will read from the disk: no tuples."""
    stored: Settings = json.loads(json.dumps(values))
    return stored


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _differences(old: Settings, new: Settings) -> str:
    """`key: old → new` for each setting that differs, in the order of the new ones."""
    keys = [key for key in {**new, **old} if old.get(key, ...) != new.get(key, ...)]
    return ", ".join(f"{key}: {_shown(old, key)} → {_shown(new, key)}" for key in keys)


def _shown(settings: Settings, key: str) -> str:
    if key not in settings:
        return "not set"
    text = json.dumps(settings[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
