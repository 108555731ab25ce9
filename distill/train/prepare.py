"""Before the first step: the traces are encoded, once, and the integrity gate looks at the rows.

Nothing is left behind when something is refused: rows are encoded aside and take their place in `tokens/` only after
the gate. There they survive `--fresh train`, as long as they are the rows that are asked for.
"""

import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from distill import catalog
from distill.chat import Chat
from distill.console import progress, say
from distill.durable import sync_directory
from distill.errors import UserError
from distill.recipe import Recipe
from distill.recipe.sources import MixedSource
from distill.traces.published import read_published
from distill.traces.store import read_traces
from distill.traces.trace import Trace
from distill.train import data, gate, memory, student
from distill.train.data import Counts, Encoder, Encoding, Source, TrainingSet
from distill.train.teaching import teach

TOKENS = "tokens"  # inside a run directory


def prepare(recipe: Recipe, directory: Path, fingerprint: str, processes: int = 1) -> TrainingSet:
    """The rows of a run's training, proved; from the cache where they were made from the same things.

    processes: that will train together. Raises UserError for whatever the user can mend; then nothing was written.
    """
    settings = recipe.train
    weights = catalog.resolve_weights("student", recipe.student)
    limits = student.inspect(weights, settings)
    check_trackers(settings.report_to)
    if (cached := data.load(directory / TOKENS, fingerprint)) is not None:
        for line in cached.proved:
            say(line)
        return cached
    chat = Chat.load(weights, catalog.training_template(recipe))
    encoding = Encoding(settings.max_length, settings.content, settings.overlong, settings.val_size, settings.seed)
    encoder = Encoder(directory / f".{TOKENS}.tmp", chat, encoding)
    try:
        with progress("encode", None, "traces") as advance:
            for number, source in enumerate(sources(recipe, directory)):
                for count in encoder.add(source, number):
                    advance(count)
        rows = encoder.finish()
        say_losses(rows.counts, settings.max_length)
        rows.proved = gate.prove(rows, encoder.witnesses, chat, settings.content, limits)
        memory.check(recipe, rows, student.configuration(weights, settings), processes)
        for line in rows.proved:
            say(line)
        if settings.objective == "logits":
            kept = chain.from_iterable(traces_of(source, directory) for source in recipe.train.data)
            teach(recipe, rows, kept, chat, directory, encoder.directory)
    except BaseException:
        encoder.close()
        raise
    data.store(rows, encoder.directory, fingerprint)
    return keep(encoder.directory, directory / TOKENS, fingerprint)


def check_trackers(names: Sequence[str]) -> None:
    """Accelerate passes over a tracker whose package is not installed; who asked for it would look in vain."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = list(LOGGER_TYPE_TO_CLASS), [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"train.report_to: no tracker is called {name!r}; one of {', '.join(known)}")
        if name not in available:
            raise UserError(f"train.report_to: the package of {name} is not installed: pip install {name}")


def sources(recipe: Recipe, directory: Path) -> list[Source]:
    """The trace sets that are mixed, as `train.data` says. Those that the run kept are plain where no filter asks for
    their form."""
    mixed = []
    for number, source in enumerate(recipe.train.data):
        name, plain = f"train.data[{number}]", source.plain
        if source.kind == "kept":
            name, plain = str(directory / "filtered" / "kept"), plain or not recipe.filter.format
        mixed.append(Source(name, traces_of(source, directory), plain))
    return mixed


def traces_of(source: MixedSource, directory: Path) -> Iterator[Trace]:
    if source.kind == "kept":
        return (trace for trace, _ in read_traces(directory / "filtered" / "kept"))
    return read_published(source)


def say_losses(counts: Counts, max_length: int) -> None:
    if counts.dropped_rows:
        say(
            f"dropped {counts.dropped_rows:,} of {counts.dropped_rows + counts.rows:,} traces "
            f"({counts.dropped_tokens:,} tokens): longer than train.max_length {max_length:,}"
        )
    if counts.truncated_rows:
        say(
            f"cut {counts.truncated_rows:,} of {counts.rows:,} traces at train.max_length {max_length:,} "
            f"({counts.truncated_tokens:,} tokens lost): these do not teach how to finish"
        )
    if counts.held_out_rows:
        say(f"held out {counts.held_out_rows:,} of {counts.rows:,} rows, by prompt")


def keep(scratch: Path, place: Path, fingerprint: str) -> TrainingSet:
    shutil.rmtree(place, ignore_errors=True)
    scratch.rename(place)
    sync_directory(place.parent)
    rows = data.load(place, fingerprint)
    assert rows is not None, "the cache that was just written is not whole"
    return rows
