"""Fill a trace store: ask a backend for the samples that are missing, and store each one as it finishes.

Generation and evaluation both sample many answers of many prompts and must survive being killed at any moment; this is
the one loop they share. A sample that is in the store is never requested again.

A server may refuse a prompt for good: it is too long, or the provider does not like it. Where it answers others, such a
refusal is stored as an answer without a text, or the work would never end.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import takewhile

from distill.backends.backend import Backend, Completed, Job
from distill.backends.budget import Allowance
from distill.backends.failures import Refusal, Refused
from distill.console import counted, say
from distill.engine.options import SamplingParams
from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.traces.store import TraceStore
from distill.traces.trace import REFUSED, Trace, form_of


def missing(prompts: Iterable[Prompt], samples: int, have: set[tuple[str, int]]) -> list[Job]:
    """The remaining jobs: every prompt with the sample numbers 0 … samples-1 that are not in `have`."""
    jobs = []
    for prompt in prompts:
        wanted = tuple(n for n in range(samples) if (prompt.id, n) not in have)
        if wanted:
            jobs.append(Job(prompt, wanted))
    return jobs


def collect(
    backend: Backend,
    store: TraceStore,
    jobs: Iterable[Job],
    sampling: SamplingParams,
    seed: int,
    teacher: str,
    advance: Callable[[int], None],
    suffix: str = "",
    allowance: Allowance | None = None,
    look: Callable[[Trace], None] = lambda trace: None,
) -> int:
    """Sample the jobs into an open store. `teacher` is the fingerprint written into every trace.

    suffix: text added to the last message of what the model is asked; the stored prompt stays as it was. allowance:
    what may be spent. look: called with each trace, once it is stored. Returns the number of samples made: fewer than
    wanted only where the allowance ends. Samples that the server refuses are stored with the finish reason `REFUSED`,
    where it has answered others. Errors: as `Backend.complete`; UserError where a server refuses, or takes, other
    parameters than when the stored samples were drawn.
    """
    made = 0
    traces = sampled(backend, jobs, sampling, seed, teacher, suffix, allowance, store.omitted(), keep_refused=True)
    with closing(traces):
        for trace in traces:
            store.append([trace])
            advance(1)
            look(trace)
            made += 1
    return made


def sampled(
    backend: Backend,
    jobs: Iterable[Job],
    sampling: SamplingParams,
    seed: int,
    teacher: str,
    suffix: str = "",
    allowance: Allowance | None = None,
    omitted: tuple[str, ...] | None = None,
    keep_refused: bool = False,
) -> Generator[Trace, None, None]:
    """Yield the samples of the jobs as they finish, for a caller that stores each before it asks for the next.

    As `collect`; ends early where the allowance does. Lazy in `jobs`. omitted: of the samples that are there already;
    None: as of the first to finish. keep_refused: whether refused samples are yielded, where the server has answered
    others; else they are an error.
    """
    prompts: dict[str, Prompt] = {}
    left: list[Job] = []

    def admitted() -> Iterator[Job]:
        for job in jobs:
            prompt, samples = asked(job.prompt, suffix), job.samples
            if allowance is not None:
                some = tuple(takewhile(partial(allowance.admit, prompt), samples)) if not left else ()
                if rest := samples[len(some) :]:
                    left.append(Job(job.prompt, rest))
                if not (samples := some):
                    continue
            prompts[job.prompt.id] = job.prompt
            yield Job(prompt, samples)

    while True:
        made, refusals = 0, list[Refusal]()
        try:
            with closing(backend.complete(admitted(), sampling, seed, allowance)) as completions:
                for done in completions:
                    trace = trace_of(done, prompts[done.prompt.id], seed, teacher)
                    if (omitted := trace.omitted if omitted is None else omitted) != trace.omitted:
                        raise _mixed(trace.omitted, omitted)
                    yield trace
                    made += 1
                    if allowance is not None:
                        allowance.settle(trace)
        except Refused as refused:
            if omitted is None or not keep_refused:  # nothing was ever answered
                raise
            refusals = refused.refusals
        for refusal in refusals:
            trace = _refused(refusal, prompts[refusal.prompt.id], seed, teacher, omitted or ())
            yield trace
            made += 1
            if allowance is not None:
                allowance.settle(trace)
        _say_refused(refusals)
        if allowance is None or not made or allowance.over:
            return
        left += [Job(prompts[prompt], (sample,)) for prompt, sample in allowance.under_way]  # not asked for again
        if not left:
            return
        allowance.release()
        jobs, left = left, []  # what was not used has become free


def check_all(backend: Backend, jobs: Iterable[Job], sampling: SamplingParams, suffix: str = "") -> None:
    """Errors: UserError when a job could never be completed: before any work, not in the middle of it."""
    backend.check((asked(job.prompt, suffix) for job in jobs), sampling)


def asked(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt as a model reads it: with the suffix, which some copies of a benchmark have in their questions."""
    *before, last = prompt.messages
    if not suffix or last["content"].rstrip().endswith(suffix.strip()):
        return prompt
    return replace(prompt, messages=(*before, {"role": last["role"], "content": last["content"] + suffix}))


def _mixed(now: tuple[str, ...], before: tuple[str, ...]) -> UserError:
    """The error of samples that would be drawn with other parameters than those beside them."""
    refused, taken = (", ".join(name for name in a if name not in b) for a, b in ((now, before), (before, now)))
    what = f"refuses {refused}, which the other samples were drawn with" if refused else ""
    also = f"takes {taken}, which a server refused when the other samples were drawn" if taken else ""
    return UserError(
        f"the server {' and '.join(filter(None, (what, also)))}; ask the server that they came from, or sample all of "
        f"them again (--fresh generate, or a new directory)"
    )


def _say_refused(refusals: Sequence[Refusal]) -> None:
    if refusals:
        say(
            f"note: the server refused {counted(len(refusals), 'sample')}, stored without a text under the finish "
            f"reason {REFUSED}; the first: {refusals[0].reason}"
        )


def _refused(refusal: Refusal, prompt: Prompt, seed: int, teacher: str, omitted: tuple[str, ...]) -> Trace:
    """A sample that the server refused, as a trace: it has no text, and no tokens were paid for."""
    trace = Trace(prompt, refusal.sample, seed, "", None, "", REFUSED, teacher, omitted=omitted)
    return replace(trace, completion_tokens=0, prompt_tokens=0)


def trace_of(done: Completed, prompt: Prompt, seed: int, teacher: str) -> Trace:
    """A finished sample as a trace of `prompt`, which may be without the suffix that the model was asked with. teacher:
    the fingerprint that the trace carries."""
    reasoning, response = done.split
    return Trace(
        prompt=prompt,
        sample=done.sample,
        seed=seed,
        text=done.text,
        reasoning=reasoning,
        response=response,
        finish_reason=done.finish_reason,
        teacher=teacher,
        prompt_token_ids=done.prompt_token_ids,
        completion_token_ids=done.completion_token_ids,
        logprobs=done.logprobs,
        top_logprobs=done.top_logprobs,
        completion_tokens=done.completion_tokens,
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        reasoning_tokens=done.reasoning_tokens,
        form=done.form or form_of(done.text, done.finish_reason),
        omitted=done.omitted,
    )
