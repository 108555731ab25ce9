"""`distill traces RUN`: read traces and their verdicts in the terminal.

Everything goes through the user's pager (`$PAGER`, `less`) when the output is a terminal, and is plain text otherwise,
so that `distill traces RUN | grep …` works. `distill.console` escapes the control characters that a model's text may
hold.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from distill.errors import UserError
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict

Judged = tuple[Trace, list[Verdict] | None]  # None: no filter has judged it yet
WIDTH = 80
KEPT = "kept"
FOLDED_LINES = 4  # shown of a long reasoning, at its beginning and at its end


def judged(run: Path) -> Iterator[Judged]:
    """All traces of a run, the kept ones first; without verdicts where no filter has judged them yet.

    Errors: UserError when there are none.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; `distill run RECIPE` makes one")
    folders = [run / "filtered" / name for name in ("kept", "dropped")]
    folders = [folder for folder in folders if folder.is_dir() and any(folder.glob("part-*.parquet"))]
    if folders:
        for folder in folders:
            yield from read_traces(folder, ids=False)
    elif (run / "traces").is_dir():
        for trace in TraceStore(run / "traces").iterate(tokens=False):
            yield trace, None
    else:
        raise UserError(f"{run}: no traces yet; `distill generate RECIPE` makes them")


def verdict_of(verdicts: Iterable[Verdict] | None) -> str:
    """ "kept", or the first reason for dropping."""
    if verdicts is None:
        return "not filtered"
    dropped = next((verdict for verdict in verdicts if not verdict.keep), None)
    return f"{dropped.filter}: {dropped.reason}" if dropped else KEPT


def counts(traces: Iterable[Judged]) -> list[tuple[str, str]]:
    """Rows of a table: verdict, number of traces."""
    numbers = Counter(verdict_of(verdicts) for _, verdicts in traces)
    return [(verdict, f"{count:,}") for verdict, count in numbers.most_common()]


def select(traces: Iterable[Judged], verdict: str | None, prompt: str | None, search: str | None) -> Iterator[Judged]:
    """The traces that match all conditions that are not None.

    verdict: how `verdict_of` begins ("dropped": all that were dropped). prompt: how the prompt's id begins. search:
    text in question or completion, in any case.
    """
    for trace, verdicts in traces:
        said = verdict_of(verdicts)
        wanted = verdict is None or said.startswith(verdict) or (verdict == "dropped" and ": " in said)
        if not wanted or not trace.prompt.id.startswith(prompt or ""):
            continue
        text = trace.prompt.messages[-1]["content"] + trace.text
        if search is None or search.casefold() in text.casefold():
            yield trace, verdicts


def texts(traces: Iterable[Judged], whole: bool) -> Iterator[str]:
    """The text of each trace, in pieces. whole: the reasoning in full, instead of its first and last lines.

    Errors: UserError when there is no trace.
    """
    traces = iter(traces)
    first = next(traces, None)
    if first is None:
        raise UserError("no trace matches; --counts lists the verdicts and how many traces have each")
    for trace, verdicts in chain([first], traces):
        length, unit = trace.length
        head = f"{trace.prompt.id}, sample {trace.sample} · {verdict_of(verdicts)} · {length:,} {unit}"
        yield f"{'─' * WIDTH}\n{head}\n\n"
        yield f"{trace.prompt.messages[-1]['content']}\n\n"
        if trace.prompt.answer is not None:
            yield f"gold answer: {trace.prompt.answer}\n\n"
        if trace.reasoning is not None:
            yield f"<think>\n{_folded(trace.reasoning.strip(), whole)}\n</think>\n\n"
        yield f"{trace.response.strip() if trace.reasoning is not None else _folded(trace.text, whole)}\n\n"
        for verdict in verdicts or ():
            decision = "kept   " if verdict.keep else "dropped"
            yield f"  {decision} {verdict.filter}: {verdict.reason}{_evidence(verdict)}\n"
        yield "\n"


def differences(traces: Iterable[Judged], prompt: str) -> Iterator[str]:
    """A unified diff of a kept and a dropped trace of one prompt, whose id begins with `prompt`.

    Errors: UserError unless there are both.
    """
    samples = [(trace, verdicts) for trace, verdicts in traces if trace.prompt.id.startswith(prompt)]
    if not samples:
        raise UserError(f"no trace of a prompt {prompt}; `distill traces RUN` shows the ids")
    if len({trace.prompt.id for trace, _ in samples}) > 1:
        raise UserError(f"several prompts begin with {prompt}: give more of the id")
    kept = next((sample for sample in samples if verdict_of(sample[1]) == KEPT), None)
    dropped = next((sample for sample in samples if ": " in verdict_of(sample[1])), None)
    if kept is None or dropped is None:
        missing = "kept" if kept is None else "dropped"
        raise UserError(f"prompt {samples[0][0].prompt.id} has no {missing} trace to compare")
    names = [f"sample {trace.sample}, {verdict_of(verdicts)}" for trace, verdicts in (kept, dropped)]
    yield f"{kept[0].prompt.messages[-1]['content']}\n\n"
    before, after = (f"{trace.text}\n".splitlines(keepends=True) for trace, _ in (kept, dropped))
    yield from difflib.unified_diff(before, after, names[0], names[1], n=2)
    yield "\n"


def _folded(text: str, whole: bool) -> str:
    lines = text.splitlines()
    hidden = len(lines) - 2 * FOLDED_LINES
    if whole or hidden <= 0:
        return text
    return "\n".join([*lines[:FOLDED_LINES], f"    … {hidden:,} lines; --whole shows them …", *lines[-FOLDED_LINES:]])


def _evidence(verdict: Verdict) -> str:
    known = ", ".join(f"{key} {value}" for key, value in verdict.evidence.items() if value is not None)
    return f"  {known}" if known else ""
