"""Before the first step: the traces are encoded, once, and the integrity gate examines the rows.

A refusal leaves nothing behind: rows are encoded in a hidden directory and become `tokens/` only after the gate. There
they survive `--fresh train`, as long as the same rows are asked for. Every file of them is verified before a training
begins or resumes: three changed bits in the ids train another student, and no loss curve shows it.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue

from distill.artefacts import RunPaths
from distill.console import progress, say
from distill.durable import sync_directory
from distill.errors import UserError
from distill.fingerprint import digest
from distill.models import Model, Models
from distill.recipe import Recipe, Train
from distill.recipe.sources import MixedSource, TraceSource
from distill.record import StageRecord
from distill.traces.published import read_published
from distill.traces.store import read_traces
from distill.traces.trace import Trace
from distill.train.ranks import memory
from distill.train.rows import gate, stored
from distill.train.rows.encode import Encoder, Encoding, Source
from distill.train.rows.feed import StoredFeed
from distill.train.rows.stored import Counts, TrainingSet
from distill.train.rows.teacher import TraceSet, teach
from distill.train.student import float8, model


def prepare(
    recipe: Recipe,
    models: Models,
    paths: RunPaths,
    row_settings: Mapping[str, JsonValue],
    teacher_settings: Mapping[str, JsonValue],
    processes: int = 1,
) -> TrainingSet:
    """The rows of a run's training, proved; those on the disk if they were made from the same things and are whole.

    row_settings: everything that decides the rows. teacher_settings: everything that decides the teacher's numbers,
    empty for objectives without a teacher. processes: number of processes that will train. Errors: UserError, and then
    nothing was written.
    """
    settings, weights = recipe.train, models.base.directory
    limits = check_student(recipe, models)
    fingerprint = digest({**row_settings, **teacher_settings})
    if what := stored.damage(paths.tokens, fingerprint):
        say(f"{what}; encoding the rows again")
    elif (rows := stored.load(paths.tokens, fingerprint)) is not None:
        for line in rows.proved:
            say(line)
        check_steps(rows, settings, processes)
        memory.check(recipe, rows, model.configuration(weights, settings), processes)
        return rows
    chat = models.base.chat
    encoding = Encoding(settings.max_length, settings.content, settings.overlong, settings.val_size, settings.seed)
    encoder = Encoder(paths.root / f".{paths.tokens.name}.tmp", chat, encoding)
    try:
        with progress("encode", None, "traces") as advance:
            for number, source in enumerate(sources(recipe, paths)):
                for count in encoder.add(source, number):
                    advance(count)
        rows = encoder.finish()
        say_counts(rows.counts, settings.max_length)
        check_steps(rows, settings, processes)
        rows.proved = gate.prove(rows, encoder.witnesses, chat, settings.content, limits)
        memory.check(recipe, rows, model.configuration(weights, settings), processes)
        for line in rows.proved:
            say(line)
        if settings.objective.teacher_top_k:
            sets = [
                TraceSet(partial(traces_of, source, paths), is_teachers(source, recipe, models.teacher))
                for source in settings.data
            ]
            teach(recipe, models, rows, sets, chat, teacher_settings, paths.scored, encoder.directory)
    except BaseException:
        encoder.close()
        raise
    stored.store(rows, encoder.directory, fingerprint)
    return keep(encoder.directory, paths.tokens, fingerprint)


def check_steps(rows: TrainingSet, settings: Train, processes: int) -> None:
    """Refuse a training without a step. Errors: UserError."""
    shares = tuple(source.weight for source in settings.data)
    if settings.objective.rollout_settings is None and not StoredFeed(rows, settings, processes, shares).total:
        raise UserError(
            f"{len(rows):,} rows in {settings.num_train_epochs:g} epochs are less than one optimiser step: raise "
            f"train.num_train_epochs or the weight of a set in train.data"
        )


def check_student(recipe: Recipe, models: Models) -> gate.Limits:
    """Refuse a base whose files are broken, trackers that are not there, and FP8 where it cannot be computed.

    Errors: UserError.
    """
    limits = model.inspect(models.base.directory, recipe.train)
    check_trackers(recipe.train.report_to)
    if recipe.train.dtype == "float8":
        float8.require(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return limits


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate would silently skip: unknown ones, and those whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = list(LOGGER_TYPE_TO_CLASS), [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"train.report_to: unknown tracker {name!r}; expected one of {', '.join(known)}")
        if name not in available:
            raise UserError(f"train.report_to: the package of {name} is not installed: pip install {name}")


def sources(recipe: Recipe, paths: RunPaths) -> list[Source]:
    """The trace sets of `train.data`. The run's own traces need no think block if no filter demands one."""
    mixed = []
    for number, source in enumerate(recipe.train.data):
        name, plain = f"train.data[{number}]", source.plain
        if source.kind == "kept":
            name, plain = str(paths.kept), plain or not recipe.filter.format
        mixed.append(Source(name, traces_of(source, paths), plain, source.wrap))
    return mixed


def traces_of(source: MixedSource, paths: RunPaths) -> Iterator[Trace]:
    """The traces of one of the mixed sets."""
    if source.kind == "kept":
        return (trace for trace, _ in read_traces(paths.kept))
    assert source.kind != "own", "a phase reads its own answers as the kept traces of its directory"
    return read_published(source)


def is_teachers(source: MixedSource | TraceSource, recipe: Recipe, teacher: Model) -> bool:
    """Whether the recipe's teacher sampled the traces of a set: those of the run itself, and those of another run whose
    record names the same weights or model, template and mode."""
    if source.kind == "kept":
        return all(is_teachers(each, recipe, teacher) for each in recipe.traces)
    if source.kind != "run":
        return False
    record = StageRecord.read_if_there(RunPaths(Path(source.path)).record("generate"), "restore it")
    date = "teacher.date"  # in a template's text: decides little, and is another one every day
    ours = {f"teacher.{key}": value for key, value in teacher.identity.items()}
    theirs = {} if record is None else record.settings
    theirs = {key: value for key, value in theirs.items() if key.startswith("teacher.") and key != date}
    return theirs == {key: value for key, value in ours.items() if key != date}


def say_counts(counts: Counts, max_length: int) -> None:
    """Report rows that are not trained whole."""
    if counts.dropped_rows:
        say(
            f"dropped {counts.dropped_rows:,} of {counts.dropped_rows + counts.rows:,} traces "
            f"({counts.dropped_tokens:,} tokens): longer than train.max_length {max_length:,}"
        )
    if counts.wrapped_rows or counts.undivided_rows:
        say(
            f"wrapped {counts.wrapped_rows:,} traces: the text before the paragraph of the last \\boxed{{}} is their "
            f"reasoning; dropped {counts.undivided_rows:,} without such a text"
        )
    if counts.truncated_rows:
        say(
            f"truncated {counts.truncated_rows:,} of {counts.rows:,} traces at train.max_length {max_length:,} "
            f"({counts.truncated_tokens:,} tokens lost): these rows do not teach how to finish"
        )
    if counts.held_out_rows:
        say(f"held out {counts.held_out_rows:,} of {counts.rows:,} rows, by prompt")


def keep(scratch: Path, place: Path, fingerprint: str) -> TrainingSet:
    """Move finished rows to their place and load them from there."""
    shutil.rmtree(place, ignore_errors=True)
    scratch.rename(place)
    sync_directory(place.parent)
    rows = stored.load(place, fingerprint)
    assert rows is not None, "the rows that were just written are not whole"
    return rows
