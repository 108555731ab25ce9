"""Stage 1: the teacher answers the prompts.

Every (prompt, sample) is stored the moment it finishes, so that a killed run loses at most what was half written and
never pays twice. Raising `samples` or a prompt limit extends the ledger; changing what the samples *are* (sampling,
teacher, seed, prompts) is refused by the run directory.

Or somebody else has asked a teacher and published its answers: then these are taken, and everything after is the same.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import catalog
from distill.backends import Sampling
from distill.backends.collect import check_all, collect, missing
from distill.backends.local import LocalBackend, device_type, identify
from distill.console import progress, say
from distill.fingerprint import digest
from distill.prompts import Prompt, load_prompts
from distill.traces.published import read_published
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run

TOGETHER = 256  # published traces stored at once


def generate(run: "Run") -> dict[str, Any]:
    """Sample the teacher of the run's recipe into `traces/`; returns the stored summary.

    Raises UserError for what the user can mend: a missing or broken checkpoint, a broken prompt file, a prompt longer
    than the context.
    """
    recipe = run.recipe
    if recipe.traces:
        return take_published(run)
    weights, prompts, settings, extent = _asked(recipe)
    if (summary := run.finished("generate", settings, extent)) is not None:
        return summary

    store = TraceStore(run.directory / "traces")
    wanted = missing(prompts, recipe.generate.samples, store.keys())
    sampling = Sampling(**recipe.generate.sampling.model_dump(), logprobs=recipe.generate.logprobs)
    suffix = recipe.generate.prompt_suffix
    backend = LocalBackend.load(
        weights,
        thinking=catalog.load_teacher(recipe.teacher).thinking,
        max_batch=recipe.generate.max_batch,
        **recipe.engine.model_dump(),
    )
    check_all(backend, wanted, sampling, suffix)
    stage = run.stage("generate", settings, extent, ["traces"])

    total = len(prompts) * recipe.generate.samples
    left = sum(len(job.samples) for job in wanted)
    started, teacher = time.monotonic(), digest(settings | backend.identity)
    with store:
        if store.cut_off:
            say(f"a trace of {store.cut_off:,} bytes was cut off in the middle; it is sampled again")
        with progress("generate", total, "traces", done=total - left) as advance:
            collect(backend, store, wanted, sampling, recipe.seed, teacher, advance, suffix)
    store.compact()
    summary = _summary(store, backend, left, time.monotonic() - started)
    stage.finish(summary)
    return summary


def take_published(run: "Run") -> dict[str, Any]:
    """Copy the published traces of the run's recipe into `traces/`; returns the stored summary. Errors: UserError."""
    recipe = run.recipe
    settings, extent = _published(recipe)
    if (summary := run.finished("generate", settings, extent)) is not None:
        return summary
    traces = (trace for source in recipe.traces for trace in read_published(source))
    first = list(islice(traces, 1))  # a source that cannot be read is refused before anything is written
    stage = run.stage("generate", settings, extent, ["traces"])
    started, made = time.monotonic(), 0
    with TraceStore(run.directory / "traces") as store, progress("take", None, "traces") as advance:
        known = store.keys()
        samples: Counter[str] = Counter()
        for some in batched(chain(first, traces), TOGETHER):
            renumbered = [_renumbered(trace, samples) for trace in some]  # the sources may share a prompt
            new = [trace for trace in renumbered if trace.key not in known]
            store.append(new)
            made += len(new)
            advance(len(some))
    store.compact()
    summary = _counts(store) | {"made": made, "seconds": round(time.monotonic() - started, 1)}
    stage.finish(summary)
    return summary


def batched(traces: Iterable[Trace], count: int) -> Iterator[list[Trace]]:
    traces = iter(traces)
    while some := list(islice(traces, count)):
        yield some


def _renumbered(trace: Trace, samples: Counter[str]) -> Trace:
    samples[trace.prompt.id] += 1
    return replace(trace, sample=samples[trace.prompt.id] - 1)


def _published(recipe: "Recipe") -> tuple[dict[str, Any], dict[str, Any]]:
    extent = {f"traces.{i}.limit": getattr(source, "limit", None) for i, source in enumerate(recipe.traces)}
    return recipe.generate_settings(), extent


def is_finished(run: "Run") -> bool:
    """Whether the traces are all there, as the recipe asks for them. Raises UserError as `generate` does."""
    if run.recipe.traces:
        return run.finished("generate", *_published(run.recipe)) is not None
    _, _, settings, extent = _asked(run.recipe)
    return run.finished("generate", settings, extent) is not None


def _asked(recipe: "Recipe") -> tuple[Path, list[Prompt], dict[str, Any], dict[str, Any]]:
    """The teacher's weights, the prompts, and the stage's settings and extent."""
    weights = catalog.resolve_weights("teacher", recipe.teacher)
    prompts = list(load_prompts(recipe.prompts))
    identity = identify(weights, thinking=catalog.load_teacher(recipe.teacher).thinking)
    settings = recipe.generate_settings() | {f"teacher.{key}": value for key, value in identity.items()}
    settings["engine.device"] = device_type(recipe.engine.device)
    extent = {"samples": recipe.generate.samples, "prompts": digest([prompt.id for prompt in prompts])}
    return weights, prompts, settings, extent


def _summary(store: TraceStore, backend: LocalBackend, made: int, seconds: float) -> dict[str, Any]:
    """Counts over the whole store; `made`, seconds and the rate are of this session."""
    return _counts(store) | {
        "made": made,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(backend.engine.tokens_generated / max(seconds, 1e-3)),
        "drafts": dict(zip(("proposed", "accepted"), backend.engine.drafts, strict=True)),
        "numerics": backend.engine.numerics,
    }


def _counts(store: TraceStore) -> dict[str, Any]:
    """completion_tokens: of the traces whose token ids are known; published ones have text alone."""
    lengths, prompts, truncated = [], set(), 0
    for trace in store.figures():
        lengths.append(trace.tokens)
        prompts.add(trace.key[0])
        truncated += trace.finish_reason == "length"
    return {
        "traces": len(lengths),
        "prompts": len(prompts),
        "truncated": truncated,
        "completion_tokens": sum(lengths),
        "median_completion_tokens": statistics.median(lengths),
    }
