"""`distill traces RUN`: read traces and their verdicts in the terminal.

Everything goes through the user's pager (`$PAGER`, `less`) when the output is a terminal, and is plain text otherwise,
so that `distill traces RUN | grep …` works.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from distill.errors import UserError
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict

Judged = tuple[Trace, list[Verdict] | None]  # None: no filter has seen it
WIDTH = 80
KEPT = "kept"


def judged(run: Path) -> Iterator[Judged]:
    """All traces of a run, kept ones first; those that no filter has seen yet have no verdicts. UserError for none."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; `distill run RECIPE` makes one")
    folders = [run / "filtered" / name for name in ("kept", "dropped")]
    folders = [folder for folder in folders if folder.is_dir() and any(folder.glob("part-*.parquet"))]
    if folders:
        for folder in folders:
            yield from read_traces(folder, ids=False)
    elif (run / "traces").is_dir():
        for trace in TraceStore(run / "traces"):
            yield trace, None
    else:
        raise UserError(f"{run}: no traces yet; `distill generate` makes them")


def verdict_of(verdicts: Iterable[Verdict] | None) -> str:
    """ "kept", or the first reason for dropping."""
    if verdicts is None:
        return "not filtered"
    dropped = next((verdict for verdict in verdicts if not verdict.keep), None)
    return f"{dropped.filter}: {dropped.reason}" if dropped else KEPT


def counts(traces: Iterable[Judged]) -> list[tuple[str, str]]:
    """Rows of a table: verdict, how many."""
    found = Counter(verdict_of(verdicts) for _, verdicts in traces)
    return [(verdict, f"{count:,}") for verdict, count in found.most_common()]


def chosen(traces: Iterable[Judged], verdict: str | None, prompt: str | None, search: str | None) -> Iterator[Judged]:
    """Those whose verdict begins with `verdict` ("dropped": all that were), of the prompt whose id begins so, with the
    text in question or completion."""
    for trace, verdicts in traces:
        said = verdict_of(verdicts)
        wanted = verdict is None or said.startswith(verdict) or (verdict == "dropped" and ": " in said)
        if not wanted or not trace.prompt.id.startswith(prompt or ""):
            continue
        text = trace.prompt.messages[-1]["content"] + trace.text
        if search is None or search.casefold() in text.casefold():
            yield trace, verdicts


def told(traces: Iterable[Judged], whole: bool) -> Iterator[str]:
    """Text of each trace. whole: the reasoning in full, and not its first and last lines. UserError for none."""
    traces = iter(traces)
    first = next(traces, None)
    if first is None:
        raise UserError("no trace is like that; --counts lists the verdicts, and how many traces each has")
    for trace, verdicts in chain([first], traces):
        head = f"{trace.prompt.id}, sample {trace.sample} · {verdict_of(verdicts)} · {trace.tokens:,} tokens"
        yield f"{'─' * WIDTH}\n{head}\n\n"
        yield f"{trace.prompt.messages[-1]['content']}\n\n"
        if trace.prompt.answer is not None:
            yield f"gold answer: {trace.prompt.answer}\n\n"
        if trace.reasoning is not None:
            yield f"<think>\n{_folded(trace.reasoning.strip(), whole)}\n</think>\n\n"
        yield f"{trace.response.strip() if trace.reasoning is not None else _folded(trace.text, whole)}\n\n"
        for verdict in verdicts or ():
            evidence = ", ".join(f"{key} {value}" for key, value in verdict.evidence.items() if value is not None)
            yield f"  {'kept   ' if verdict.keep else 'dropped'} {verdict.filter}: {verdict.reason}  {evidence}\n"
        yield "\n"


def _folded(text: str, whole: bool) -> str:
    lines = text.splitlines()
    if whole or len(lines) <= 8:
        return text
    return "\n".join([*lines[:4], f"    … {len(lines) - 8:,} lines; --whole shows them …", *lines[-4:]])


def differences(traces: Iterable[Judged], prompt: str) -> Iterator[str]:
    """A unified diff of a kept and a dropped trace of one prompt, whose id begins with `prompt`. UserError unless there
    are both."""
    of_one = [(trace, verdicts) for trace, verdicts in traces if trace.prompt.id.startswith(prompt)]
    if not of_one:
        raise UserError(f"no trace of a prompt {prompt}")
    if len({trace.prompt.id for trace, _ in of_one}) > 1:
        raise UserError(f"several prompts begin with {prompt}: give more of the id")
    kept = next((one for one in of_one if verdict_of(one[1]) == KEPT), None)
    dropped = next((one for one in of_one if ": " in verdict_of(one[1])), None)
    if kept is None or dropped is None:
        raise UserError(
            f"prompt {of_one[0][0].prompt.id} has no {'kept' if kept is None else 'dropped'} trace to compare"
        )
    names = [f"sample {trace.sample}, {verdict_of(verdicts)}" for trace, verdicts in (kept, dropped)]
    yield f"{kept[0].prompt.messages[-1]['content']}\n\n"
    before, after = (one[0].text.splitlines(keepends=True) for one in (kept, dropped))
    yield from difflib.unified_diff(before, after, names[0], names[1], n=2)
    yield "\n"
