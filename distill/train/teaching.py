"""What a teacher would have said at every supervised token: kept beside the rows, for the `logits` objective.

    tokens/teacher-ids.npy        int32 [supervised, k], the student's tokens
    tokens/teacher-logprobs.npy   float32 [supervised, k], −∞ behind the last one known; none at all where nothing is

The likeliest tokens are in the traces where they were asked for (`generate.logprobs`). Where they are not, the teacher
is loaded and scores the traces: one prefill a trace, no sampling. Scored traces are stored by themselves, in `scored/`,
so that an interruption costs little.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill import backends
from distill.chat import Chat
from distill.console import progress, say
from distill.errors import UserError
from distill.fingerprint import digest
from distill.models import Model, Models
from distill.recipe import Recipe
from distill.traces.store import TraceStore
from distill.traces.trace import Trace
from distill.train.align import Projector, Vocabulary, token_bytes
from distill.train.data import TrainingSet

TOGETHER = 32  # traces scored at once: enough to fill the engine's steps


@dataclass(frozen=True)
class Teaching:
    """The teacher's distributions, mapped. known: share of the supervised tokens that have one."""

    ids: np.ndarray  # int32 [supervised, k]
    logprobs: np.ndarray  # float32 [supervised, k]
    known: float


def load(directory: Path) -> Teaching:
    ids, logprobs = (np.load(directory / f"teacher-{name}.npy", mmap_mode="r") for name in ("ids", "logprobs"))
    return Teaching(ids, logprobs, float((logprobs[:, 0] > -np.inf).mean()))


def write(
    rows: TrainingSet, traces: Iterable[Trace], projector: Projector, prefill: str, k: int, directory: Path
) -> Teaching:
    """Map the traces' likeliest tokens to the rows' supervised tokens. What is not among the rows is left out."""
    shape = (rows.counts.supervised, k)
    ids = np.lib.format.open_memmap(directory / "teacher-ids.npy", "w+", np.int32, shape)
    logprobs = np.lib.format.open_memmap(directory / "teacher-logprobs.npy", "w+", np.float32, shape)
    logprobs[:] = -np.inf
    by_key = {key: i for i, key in enumerate(rows.keys)}
    for trace in traces:
        if (number := by_key.get(trace.key)) is None or trace.top_logprobs is None or trace.logprobs is None:
            continue
        row = rows[number]
        supervised = row.ids[row.prompt_tokens :].tolist()
        given = prefill.encode() if trace.text.startswith(prefill) else b""
        found = projector.project(given, trace.completion_token_ids, trace.logprobs, trace.top_logprobs, supervised)
        for place, masses in enumerate(found, row.place):
            if masses:
                likeliest = sorted(masses.items(), key=lambda item: -item[1])[:k]
                ids[place, : len(likeliest)] = [id_ for id_, _ in likeliest]
                logprobs[place, : len(likeliest)] = [logprob for _, logprob in likeliest]
    ids.flush()
    logprobs.flush()
    return load(directory)


def teach(recipe: Recipe, rows: TrainingSet, traces: Iterator[Trace], chat: Chat, run: Path, tokens: Path) -> Teaching:
    """Score what has no log-probabilities yet, map all of it, and say how much is known. Errors: UserError."""
    model = Models(recipe, run).teacher
    teacher = model.chat
    projector = Projector(
        Vocabulary(token_bytes(teacher.tokenizer, teacher.where), frozenset(teacher.stop_token_ids)),
        Vocabulary(token_bytes(chat.tokenizer, chat.where), frozenset(chat.stop_token_ids)),
        rows.end(),
        lambda text: chat.tokenizer(text, add_special_tokens=False)["input_ids"],
    )
    k = recipe.train.logits_top_k
    teaching = write(rows, scored(traces, recipe, model, rows, run), projector, teacher.prefill, k, tokens)
    if not teaching.known:
        raise UserError(
            f"none of {rows.counts.supervised:,} supervised tokens begins where a token of {recipe.teacher} does: the "
            f"traces are of another teacher, or the chat template changes their text; set train.objective to `sft`"
        )
    say(
        f"the teacher's {k} likeliest tokens are known at {teaching.known:.1%} of {rows.counts.supervised:,} "
        f"supervised tokens; at the others the trace's own token is learnt"
    )
    return teaching


def scored(traces: Iterator[Trace], recipe: Recipe, teacher: Model, rows: TrainingSet, run: Path) -> Iterator[Trace]:
    """Every trace of a row with log-probabilities: its own, those that were scored before, or those scored now."""
    k = recipe.train.logits_top_k
    wanted = set(rows.keys)
    store = TraceStore(run / "scored" / digest({"teacher": teacher.identity, "dtype": recipe.engine.dtype, "top_k": k}))
    done = store.keys() if store.directory.exists() else set()
    if done:
        yield from store
    left: list[Trace] = []
    with ExitStack() as stack:
        score = None
        for trace in traces:
            if trace.key not in wanted or trace.key in done:
                continue
            if trace.top_logprobs is not None and trace.logprobs is not None:
                yield trace
                continue
            if score is None:
                score = stack.enter_context(scoring(store, recipe, teacher, len(rows), len(done)))
            left.append(trace)
            if len(left) == TOGETHER:
                yield from score(left)
                left = []
        if score and left:
            yield from score(left)


@contextmanager
def scoring(
    store: TraceStore, recipe: Recipe, teacher: Model, total: int, done: int
) -> Iterator[Callable[[list[Trace]], list[Trace]]]:
    """The teacher, loaded; what it scores is stored at once."""
    engine = recipe.engine.model_copy(update={"data_parallel_size": 1, "num_speculative_tokens": 0})
    with (
        backends.open(teacher, engine) as backend,
        store,
        progress("score", total, "traces", done=done) as advance,
    ):

        def score(traces: list[Trace]) -> list[Trace]:
            finished = backend.score(traces, recipe.train.logits_top_k)
            store.append(finished)
            advance(len(finished))
            return finished

        yield score
    store.compact()
