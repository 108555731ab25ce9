"""Stage 1: the teacher answers the prompts.

Every (prompt, sample) is stored the moment it finishes, so that a killed run loses at most what was half written and
never pays twice. Raising `samples` or a prompt limit extends the ledger; changing what the samples *are* (sampling,
teacher, seed, prompts) is refused by the run directory.
"""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import catalog
from distill.backends import Sampling
from distill.backends.collect import check_all, collect, missing
from distill.backends.local import LocalBackend, device_type, identify
from distill.console import progress, say
from distill.fingerprint import digest
from distill.prompts import Prompt, load_prompts
from distill.traces.store import TraceStore

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run


def generate(run: "Run") -> dict[str, Any]:
    """Sample the teacher of the run's recipe into `traces/`; returns the stored summary.

    Raises UserError for what the user can mend: a missing or broken checkpoint, a broken prompt file, a prompt longer
    than the context.
    """
    recipe = run.recipe
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


def is_finished(run: "Run") -> bool:
    """Whether the traces are all there, as the recipe asks for them. Raises UserError as `generate` does."""
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
    traces = list(store)
    lengths = [len(trace.completion_token_ids) for trace in traces]
    return {
        "traces": len(traces),
        "prompts": len({trace.prompt.id for trace in traces}),
        "truncated": sum(trace.finish_reason == "length" for trace in traces),
        "completion_tokens": sum(lengths),
        "median_completion_tokens": statistics.median(lengths),
        "made": made,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(backend.engine.tokens_generated / max(seconds, 1e-3)),
        "drafts": dict(zip(("proposed", "accepted"), backend.engine.drafts, strict=True)),
        "numerics": backend.engine.numerics,
    }
