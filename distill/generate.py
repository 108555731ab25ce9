"""Stage 1: the teacher answers the prompts.

Every (prompt, sample) is stored the moment it finishes, so that a killed run loses at most what was half written and
never pays twice. Raising `samples` or a prompt limit extends the ledger; changing what the samples *are* (sampling,
teacher, seed, prompts) is refused by the run directory. Lowering a count, or correcting a prompt, leaves traces in the
store that the recipe no longer asks for: they were paid for and may be wanted again, so they stay, uncounted.

Where a recipe has `traces:`, the answers that others have published are copied instead; everything after is the same.
They cost nothing, so another limit copies all of them anew: answers of several sources to one prompt are numbered in
order, and a row that is added to the first would take the number of one that is there.
"""

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill import backends, catalog
from distill.artefacts import Drafts, GenerateSummary, Settings
from distill.backends import SamplingParams
from distill.backends.budget import Allowance, Spent, spent_on
from distill.backends.collect import asked, check_all, collect, missing
from distill.backends.device import device_type
from distill.console import counted, progress, say
from distill.errors import UserError, WorkError
from distill.fingerprint import digest
from distill.grading import unreadable_golds
from distill.planned import Measured
from distill.prompts import Prompt
from distill.recipe import TeacherServer
from distill.stage import Stage
from distill.traces.ledger import Ledger
from distill.traces.published import content_of, read_published
from distill.traces.store import TraceStore, write_store
from distill.traces.trace import Trace, content_hash

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run

WATCHED = 20  # answers without any reasoning, after which one line says so
FORMS = {  # of a reasoning, as `Trace.form`
    "reasoning_content": "in reasoning_content",
    "reasoning": "in reasoning",
    "think": "in think tags",
    "end_think": "with </think> only",
    "none": "without any",
    "cut_off": "cut off",
    "no_content": "with no answer after it",
}


class Generate(Stage[GenerateSummary]):
    """The teacher's answers, or published ones, in `traces/`."""

    name = "generate"
    outputs = ("traces",)
    products = ("traces/part-*.parquet", "traces/ledger.jsonl")
    summary = GenerateSummary

    def recipe_settings(self, recipe: "Recipe") -> Settings:
        """What decides the traces, besides the teacher's weights; of a local one, how the engine computes."""
        settings = recipe.generate_settings()
        if recipe.traces or catalog.server_of(recipe) is not None:
            return settings
        return settings | recipe.engine_settings()

    def settings(self, run: "Run") -> Settings:
        """The recipe's settings; the content of published traces, or the teacher's identity and, of a local one, the
        kind of device. Errors: UserError for a source of traces that is not there."""
        settings = self.recipe_settings(run.recipe)
        if run.recipe.traces:
            return settings | _contents(run)
        settings |= {f"teacher.{key}": value for key, value in run.models.teacher.identity.items()}
        if run.models.teacher.is_remote:
            return settings
        return settings | {"engine.device": device_type(run.recipe.engine.device)}

    def extent(self, run: "Run") -> Settings:
        """How many samples of which prompts, or how many rows of each source."""
        recipe = run.recipe
        if recipe.traces:
            return {f"traces.{i}.limit": getattr(source, "limit", None) for i, source in enumerate(recipe.traces)}
        return {"samples": recipe.generate.samples, "prompts": digest([prompt.id for prompt in run.prompts])}

    def work(self, run: "Run", begin: Callable[[], None]) -> GenerateSummary:
        """Sample what is missing, or copy the published traces. Errors: UserError for what the user can correct: a
        missing or broken checkpoint, a broken prompt file, a prompt longer than the context."""
        return _copy(run, begin) if run.recipe.traces else _sample(run, begin)

    def headline(self, summary: GenerateSummary) -> str:
        """Traces, prompts and tokens."""
        tokens = f", {summary.completion_tokens:,} tokens" if summary.completion_tokens else ", published"
        return f"{counted(summary.traces, 'trace')} of {counted(summary.prompts, 'prompt')}{tokens}"


def _sample(run: "Run", begin: Callable[[], None]) -> GenerateSummary:
    recipe = run.recipe
    store = TraceStore(run.paths.traces)
    wanted = missing(run.prompts, recipe.generate.samples, store.keys())
    sampling = SamplingParams(**recipe.generate.sampling.model_dump(), logprobs=recipe.generate.logprobs)
    suffix = recipe.generate.prompt_suffix
    total = len(run.prompts) * recipe.generate.samples
    left = sum(len(job.samples) for job in wanted)
    allowance = _allowance(run, store)
    if wanted and allowance is not None and not allowance.fits(first := asked(wanted[0].prompt, suffix)):
        if (shortfall := allowance.shortfall(first)) is not None:
            raise UserError(f"{shortfall}; raise it, or lower generate.sampling.max_new_tokens")
        raise _used_up(allowance, left, total)
    with backends.open(run.models.teacher, recipe.engine, recipe.generate.max_batch) as backend:
        check_all(backend, wanted, sampling, suffix)
        if wanted:
            _say_unreadable(run)
        had_begun = run.begun(STAGE.name)
        begin()
        started, teacher = time.monotonic(), _teacher(run, backend)
        with _forgotten_if_refused(run, store, had_begun), store:
            if store.cut_off:
                say(f"a trace of {store.cut_off:,} bytes was cut off in the middle; it is sampled again")
            with progress("generate", total, "traces", done=total - left, stored=True) as advance:
                look = _Reasoning(run)
                made = collect(backend, store, wanted, sampling, recipe.seed, teacher, advance, suffix, allowance, look)
        seconds, usage, numerics = time.monotonic() - started, backend.usage, dict(backend.numerics)
    if allowance is not None:
        if made < left:
            raise _used_up(allowance, left - made, total)
        say(f"budget: {allowance.report()}")
    store.compact()
    part = store.part_of(run.prompts, recipe.generate.samples)
    counts = _counts(part)
    if (note := part.left_out) is not None:
        say(note)
    if len(counts.forms) > 1 or "none" in counts.forms:
        say("reasoning: " + ", ".join(f"{count:,} {FORMS[form]}" for form, count in counts.forms.items()))
    return counts.model_copy(
        update={
            "made": left,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(usage.completion_tokens / max(seconds - usage.starting, 1e-3)),
            "drafts": usage.drafts and Drafts(proposed=usage.drafts[0], accepted=usage.drafts[1]),
            "numerics": numerics,
        }
    )


class _Reasoning:
    """Watches answers until one has a reasoning: where none of the first `WATCHED` has, and the filter `format` drops
    such traces, one line says so before all others are paid for."""

    def __init__(self, run: "Run") -> None:
        self._remote = run.models.teacher.is_remote
        self._watches = run.recipe.filter.format is not None
        self._without = self._hidden = 0

    def __call__(self, trace: Trace) -> None:
        if not self._watches or not trace.text:
            return
        self._without += 1
        self._hidden += bool(trace.reasoning_tokens)
        self._watches = trace.form == "none" and self._without < WATCHED
        if trace.form == "none" and not self._watches:
            say(f"note: none of the first {WATCHED} answers has reasoning, {self._why()}, or set filter.format to null")

    def _why(self) -> str:
        """What the line says of the cause, and the remedy."""
        drops = "and the filter `format` drops such traces"
        if self._hidden:
            return f"though the provider counts its tokens: it is hidden, {drops}; use a provider that returns it"
        field = "its server's field for thinking in server.extra_body" if self._remote else "`thinking` on its card"
        return f"{drops}; if the teacher is to think, set {field}"


@contextmanager
def _forgotten_if_refused(run: "Run", store: TraceStore, had_begun: bool) -> Iterator[None]:
    """Take the beginning of the stage back when the work ends in an error without a trace: a server that refuses every
    request, whose settings may then be corrected. had_begun: in an earlier session, which is kept."""
    try:
        yield
    except (UserError, WorkError):
        if not had_begun and store.is_empty():
            run.forget(STAGE)
        raise


def _allowance(run: "Run", store: TraceStore) -> Allowance | None:
    """What the recipe's budget still allows, after what all sessions of the run have spent."""
    recipe = run.recipe
    if recipe.generate.budget is None:
        return None
    suffix, limit = recipe.generate.prompt_suffix, recipe.generate.sampling.max_new_tokens
    prompts = {prompt.id: asked(prompt, suffix) for prompt in run.prompts}
    used, remote = spent_on(store, prompts, limit), isinstance(catalog.server_of(recipe), TeacherServer)
    hourly, failed = None if remote else recipe.price_per_hour, Ledger(run.paths.failed_attempts)
    used = sum((Spent(row["prompt_tokens"], row["completion_tokens"]) for row in failed.rows()), used)

    def store_loss(spent: Spent) -> None:
        with failed:
            failed.append([{"prompt_tokens": spent.prompt, "completion_tokens": spent.completion}])

    price, seconds = catalog.price_of(recipe), run.seconds(STAGE)
    return Allowance(recipe.generate.budget, limit, used, seconds, price, hourly, store_loss)


def _used_up(allowance: Allowance, left: int, total: int) -> WorkError:
    return WorkError(
        f"the budget is used up ({allowance.report()}): {left:,} of {total:,} samples are left, the others are stored; "
        f"raise generate.budget, or lower generate.samples or the number of prompts"
    )


def pilot_prompts(seed: int, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The prompts of a pilot, at most `count`: the same for the same seed."""
    return random.Random(f"pilot {seed}").sample(prompts, min(count, len(prompts)))


def sample_pilot(run: "Run", count: int) -> Measured | None:
    """Sample `count` prompts, chosen at random by the recipe's seed, into the run's store: `distill generate` goes on
    from them. Returns the speed, None where all of them were there already.

    The stage is begun and not finished. Errors: as `Generate.work`, and UserError for a run with other settings.
    """
    recipe, settings, extent = run.recipe, STAGE.settings(run), STAGE.extent(run)
    run.finished(STAGE, settings, extent)
    store = TraceStore(run.paths.traces)
    chosen = pilot_prompts(recipe.seed, run.prompts, count)
    wanted = missing(chosen, recipe.generate.samples, store.keys())
    if not wanted:
        return None
    sampling = SamplingParams(**recipe.generate.sampling.model_dump(), logprobs=recipe.generate.logprobs)
    suffix, total = recipe.generate.prompt_suffix, sum(len(job.samples) for job in wanted)
    allowance = _allowance(run, store)
    with backends.open(run.models.teacher, recipe.engine, recipe.generate.max_batch) as backend:
        check_all(backend, wanted, sampling, suffix)
        had_begun = run.begun(STAGE.name)
        run.begin(STAGE, settings, extent)
        before, started = backend.usage, time.monotonic()
        with (
            _forgotten_if_refused(run, store, had_begun),
            store,
            progress("pilot", total, "traces", stored=True) as advance,
        ):
            teacher, look = _teacher(run, backend), _Reasoning(run)
            made = collect(backend, store, wanted, sampling, recipe.seed, teacher, advance, suffix, allowance, look)
        if allowance is not None and made < total:
            raise _used_up(allowance, total - made, total)
        seconds, usage = time.monotonic() - started, backend.usage
        seconds -= usage.starting - before.starting
    prompts = usage.prompt_tokens - before.prompt_tokens
    requests = total if run.models.teacher.is_remote else len(wanted)  # the engine reads a prompt once for all samples
    return Measured(
        rate=(usage.completion_tokens - before.completion_tokens) / max(seconds, 1e-3),
        at_once=min(total, at_once(recipe)),
        settings=digest(STAGE.recipe_settings(recipe)),
        prompt_tokens=prompts / requests if prompts else None,
    )


def at_once(recipe: "Recipe") -> int:
    """Samples under way at most."""
    server = catalog.server_of(recipe)
    return (server.concurrency if server else None) or recipe.generate.max_batch


def _say_unreadable(run: "Run") -> None:
    """Say how many gold answers no grader can read, before anything is spent on their prompts."""
    if (correct := run.recipe.filter.correct) is None:
        return
    golds, tried = unreadable_golds(run.prompts, correct.workers, correct.timeout)
    if golds:
        say(
            f"note: {len(golds):,} of {tried:,} gold answers cannot be read by a grader, such as {golds[0][:60]!r}: an "
            f"answer counts as correct only in the same spelling, and as unverifiable in every other"
        )


def _teacher(run: "Run", backend: backends.Backend) -> str:
    """The fingerprint that every trace carries: settings, weights and numerics."""
    numerics = {f"numerics.{key}": value for key, value in backend.numerics.items()}
    return digest(STAGE.settings(run) | numerics)


def _contents(run: "Run") -> Settings:
    """A hash of each source of traces on this machine. A run that began without these settings goes on without them,
    and a source that is gone since is as it was recorded: the traces are copied already."""
    record = run.record(STAGE.name)
    contents: Settings = {}
    for i, source in enumerate(run.recipe.traces):
        key, place = f"traces.{i}.content", Path(source.dataset if source.kind == "hub" else source.path)
        if record is not None and (key not in record.settings or not place.exists()):
            contents |= {key: record.settings[key]} if key in record.settings else {}
        elif (content := content_of(source)) is not None:
            contents[key] = content
    return contents


def _copy(run: "Run", begin: Callable[[], None]) -> GenerateSummary:
    traces = (trace for source in run.recipe.traces for trace in read_published(source))
    first = list(islice(traces, 1))  # a source that cannot be read is refused before anything is written
    store, had_begun = TraceStore(run.paths.traces), run.begun(STAGE.name)
    begin()
    started = time.monotonic()
    with _forgotten_if_refused(run, store, had_begun), progress("copy", None, "traces") as advance:
        write_store(run.paths.traces, _numbered(chain(first, traces), advance))
    counts = _counts(store)
    return counts.model_copy(update={"made": counts.traces, "seconds": round(time.monotonic() - started, 1)})


def _numbered(traces: Iterable[Trace], advance: Callable[[int], None]) -> Iterator[Trace]:
    """The traces, numbered by prompt: the sources may share one."""
    samples: Counter[str] = Counter()
    for trace in traces:
        yield replace(trace, sample=samples[trace.prompt.id])
        samples[trace.prompt.id] += 1
        advance(1)


def _counts(store: TraceStore) -> GenerateSummary:
    """Counts over a store, in one pass."""
    lengths, prompts, tasks, truncated = [], set(), set(), 0
    digests, counts, forms = [], Counter[str](), Counter[str]()
    for figures in store.figures():
        digests.append(figures.digest)
        lengths.append(figures.tokens)
        prompts.add(figures.key[0])
        tasks.add(figures.task)
        truncated += figures.finish_reason == "length"
        counts["counted"] += figures.counted
        counts["prompt_tokens"] += figures.prompt_tokens
        counts["cached_tokens"] += figures.cached_tokens
        counts["reasoning_tokens"] += figures.reasoning_tokens
        if figures.form is not None:
            forms[figures.form] += 1
    return GenerateSummary(
        traces=len(lengths),
        content_hash=content_hash(digests),
        prompts=len(prompts),
        tasks=tuple(sorted(tasks)),
        truncated=truncated,
        completion_tokens=sum(lengths),
        median_completion_tokens=statistics.median(lengths),
        prompt_tokens=counts["prompt_tokens"],
        cached_tokens=counts["cached_tokens"],
        reasoning_tokens=counts["reasoning_tokens"],
        forms=dict(sorted(forms.items())),
        made=0,
        seconds=0.0,
        counted=counts["counted"],
    )


STAGE = Generate()
