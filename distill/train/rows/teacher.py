"""The teacher's distribution at every supervised token, stored beside the rows for objectives that need it.

    tokens/teacher-ids.npy        int32 [supervised, k], the student's tokens
    tokens/teacher-logprobs.npy   float32 [supervised, k], −∞ after the last token known, at all k if none is

Traces that this teacher sampled with `generate.logprobs` carry the most likely tokens, if these are as many as the
objective asks for. For the others, another teacher's among them, the teacher is loaded and scores them: one prefill per
trace, no sampling. Scored traces are stored in `scored/`, so that an interruption costs little. The directory's name is
a hash over everything that decides the teacher's numbers, so that the scores of another teacher, of its other thinking
mode or of another dtype are never taken for these. In it each trace set has a store of its own, since two sets may hold
samples of one prompt. It is begun anew when a trace has another text than is stored.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from distill import backends
from distill.chat import Chat
from distill.console import progress, say
from distill.errors import UserError
from distill.fingerprint import digest
from distill.models import Model, Models
from distill.recipe import Recipe
from distill.traces.store import TraceStore
from distill.traces.trace import Trace, trace_digest
from distill.train.rows.align import Projector, Vocabulary, opened, token_bytes
from distill.train.rows.batches import Row
from distill.train.rows.stored import TrainingSet

Traces: TypeAlias = Callable[[], Iterator[Trace]]  # reads a trace set from its beginning

GROUP = 32  # traces scored per call: enough to fill the engine's steps
IDS, LOGPROBS = "teacher-ids.npy", "teacher-logprobs.npy"


class TraceSet(NamedTuple):
    """A set of traces. read: reads it from its beginning. own: whether this teacher sampled it."""

    read: Traces
    own: bool


@dataclass(frozen=True)
class Teaching:
    """The teacher's distributions in the student's vocabulary. known: share of the supervised tokens that have one."""

    ids: npt.NDArray[np.int32]  # [supervised, k]
    logprobs: npt.NDArray[np.float32]  # [supervised, k]
    known: float

    def with_row(self, row: Row) -> Row:
        """The row with the distributions at its supervised tokens."""
        places = slice(row.place, row.place + row.supervised)
        return replace(row, teacher=(self.ids[places], self.logprobs[places]))


def load(directory: Path) -> Teaching:
    """The distributions that `teach` stored, mapped into memory."""
    ids, logprobs = (np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in (IDS, LOGPROBS))
    return Teaching(ids, logprobs, float((logprobs[:, 0] > -np.inf).mean()))


def write(
    rows: TrainingSet,
    traces: Iterable[tuple[int, Trace]],
    projector: Projector,
    prefills: tuple[str, str],
    k: int,
    directory: Path,
) -> Teaching:
    """Map the traces' most likely tokens to the supervised tokens of the rows. Traces without a row are skipped.

    traces: each after the number of its source. prefills: of the teacher's template and of the student's.
    """
    shape = (rows.counts.supervised, k)
    ids = np.lib.format.open_memmap(directory / IDS, "w+", np.int32, shape)
    logprobs = np.lib.format.open_memmap(directory / LOGPROBS, "w+", np.float32, shape)
    logprobs[:] = -np.inf
    numbers = {place: i for i, place in enumerate(zip(rows.sources.tolist(), rows.keys, strict=True))}
    for source, trace in traces:
        if (number := numbers.get((source, trace.key))) is None or trace.top_logprobs is None or trace.logprobs is None:
            continue
        row = rows[number]
        supervised = row.ids[row.prompt_tokens :].tolist()
        given, skipped = opened(trace.text, *prefills)
        projected = projector.project(
            given, trace.completion_token_ids, trace.logprobs, trace.top_logprobs, supervised, skipped
        )
        for place, masses in enumerate(projected, row.place):
            if masses:
                likeliest = sorted(masses.items(), key=lambda item: -item[1])[:k]
                ids[place, : len(likeliest)] = [id_ for id_, _ in likeliest]
                logprobs[place, : len(likeliest)] = [logprob for _, logprob in likeliest]
    ids.flush()
    logprobs.flush()
    return load(directory)


def teach(
    recipe: Recipe,
    models: Models,
    rows: TrainingSet,
    sources: Sequence[TraceSet],
    chat: Chat,
    settings: Mapping[str, JsonValue],
    scored: Path,
    tokens: Path,
) -> Teaching:
    """Score the traces that do not list enough of this teacher's log-probabilities, map all of them, and report the
    share that is known.

    settings: everything that decides the teacher's numbers
    (`stage.teacher_settings`). scored: where scored traces are stored. Errors: UserError.
    """
    k = recipe.train.objective.teacher_top_k
    assert k is not None, "the objective needs no teacher"
    model = models.teacher
    teacher = model.chat
    projector = Projector(
        Vocabulary(token_bytes(teacher.tokenizer, teacher.where), frozenset(teacher.stop_token_ids)),
        Vocabulary(token_bytes(chat.tokenizer, chat.where), frozenset(chat.stop_token_ids)),
        rows.end(),
        lambda text: chat.tokenizer(text, add_special_tokens=False)["input_ids"],
    )
    stores = scored / digest({**settings, "top_k": k})
    least = min(k, len(projector.teacher.pieces))
    with_logprobs = _with_logprobs(sources, recipe, model, rows, k, least, stores)
    teaching = write(rows, with_logprobs, projector, (teacher.prefill, chat.prefill), k, tokens)
    if not teaching.known:
        raise UserError(
            f"none of the {rows.counts.supervised:,} supervised tokens begins where a token of {recipe.teacher} does: "
            f"the traces come from another teacher, or the chat template changes their text; set train.objective.kind "
            f"to `sft`"
        )
    say(
        f"teacher: top-{k} distributions at {teaching.known:.1%} of {rows.counts.supervised:,} supervised tokens; the "
        f"others use the cross-entropy of the trace's token"
    )
    return teaching


def _with_logprobs(
    sources: Sequence[TraceSet], recipe: Recipe, teacher: Model, rows: TrainingSet, k: int, least: int, stores: Path
) -> Iterator[tuple[int, Trace]]:
    """Every trace of a row with log-probabilities, after the number of its source: its own, if it lists at least so
    many tokens, stored ones from an earlier session, or new ones."""
    of_rows = rows.sources.tolist()
    wanted = [{key for key, its in zip(rows.keys, of_rows, strict=True) if its == i} for i in range(len(sources))]
    kept = [_of_these_traces(TraceStore(stores / str(i)), source.read) for i, source in enumerate(sources)]
    done = [store.keys() & keys for store, keys in zip(kept, wanted, strict=True)]
    with ExitStack() as stack:
        scoring = None
        for number, (source, store) in enumerate(zip(sources, kept, strict=True)):
            yield from ((number, trace) for trace in store if trace.key in done[number])
            left = (trace for trace in source.read() if trace.key in wanted[number] and trace.key not in done[number])
            missing = (trace if source.own else replace(trace, logprobs=None, top_logprobs=None) for trace in left)
            while group := list(islice(missing, GROUP)):
                unscored = [trace for trace in group if trace.listed < least]
                yield from ((number, trace) for trace in group if trace.listed >= least)
                if unscored and scoring is None:
                    scoring = stack.enter_context(_scoring(recipe, teacher, k, len(rows), sum(map(len, done))))
                if unscored and scoring is not None:
                    yield from ((number, trace) for trace in scoring(unscored, store))


def _of_these_traces(store: TraceStore, traces: Traces) -> TraceStore:
    """The store of a trace set, emptied if it has another text than the set for any of its traces."""
    if store.directory.exists():
        stored = {trace.key: trace_digest(*trace.key, trace.text) for trace in store.iterate(tokens=False)}
        if any(stored.get(trace.key, same) != same for trace, same in _digests(traces())):
            shutil.rmtree(store.directory)
    return store


def _digests(traces: Iterable[Trace]) -> Iterator[tuple[Trace, str]]:
    return ((trace, trace_digest(*trace.key, trace.text)) for trace in traces)


@contextmanager
def _scoring(
    recipe: Recipe, teacher: Model, k: int, total: int, done: int
) -> Iterator[Callable[[list[Trace], TraceStore], list[Trace]]]:
    """Load the teacher; yields a function that scores traces and stores them at once."""
    engine = recipe.engine.model_copy(update={"data_parallel_size": 1, "num_speculative_tokens": 0})
    opened: dict[Path, TraceStore] = {}
    with (
        backends.open(teacher, engine) as backend,
        ExitStack() as stack,
        progress("score", total, "traces", done=done) as advance,
    ):

        def score(traces: list[Trace], store: TraceStore) -> list[Trace]:
            scored = backend.score(traces, k)
            if store.directory not in opened:
                opened[store.directory] = stack.enter_context(store)
            store.append(scored)
            advance(len(scored))
            return scored

        yield score
    for store in opened.values():
        store.compact()
