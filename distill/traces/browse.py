"""`distill traces`: read the traces of a run, its rollouts, or the answers of an evaluation, in the terminal.

Everything goes through the user's pager (`$PAGER`, `less`) when the output is a terminal, and is plain text otherwise,
so that `distill traces RUN | grep …` works. `distill.console` escapes the control characters that a model's text may
hold.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from distill.artefacts import RunPaths
from distill.config import parse, read_yaml
from distill.errors import UserError
from distill.evaluations import EvaluationPaths, read_grades
from distill.objectives import RolloutSettings
from distill.recipe import Recipe
from distill.record import read_recipe
from distill.traces.published import IMPORTED
from distill.traces.rewarded import REWARDS, read_rewards
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict, dropped_by

WIDTH = 80
KEPT, DROPPED, NOT_FILTERED, NOT_GRADED = "kept", "dropped", "not filtered", "not graded"
TRUNCATED, ENDED = "truncated", "ended"  # of a rollout: at the token limit, by itself
NO_TRACES = "`distill generate RECIPE` makes those of a run"
FOLDED_LINES = 4  # shown of a long reasoning, at its beginning and at its end


@dataclass(frozen=True)
class Entry:
    """A trace, and what was decided about it.

    accepted: kept, or correct; None where nothing was decided yet. verdict: "kept", the first reason for dropping, or
    the grade of an evaluation's answer; of a rollout, how it ended. decisions: a line for each filter, or for the
    grade; of a rollout, its reward. model: who wrote it. steps: of a rollout, the optimiser steps that were trained on
    it. sample: its number among the answers to the prompt in its set, where that is not the trace's. reward: of a
    rollout; None where it has none.
    """

    trace: Trace
    accepted: bool | None
    verdict: str
    decisions: tuple[str, ...] = ()
    model: str = "teacher"
    steps: str | None = None
    sample: int | None = None
    reward: float | None = None

    @property
    def head(self) -> str:
        """The line above the texts: prompt and sample, steps of a rollout, verdict, length."""
        sample = self.trace.sample if self.sample is None else self.sample
        parts = (f"{self.trace.prompt.id}, sample {sample}", self.steps, self.verdict, self.length)
        return " · ".join(part for part in parts if part)

    @property
    def length(self) -> str:
        """Such as `57 teacher tokens`, or `40 words` where tokens were not counted."""
        value, unit = self.trace.length
        return f"{value:,} {unit.replace('teacher', self.model)}"

    def has_verdict(self, text: str) -> bool:
        """Whether the verdict begins with a text, in any case; "dropped" stands for all reasons for dropping."""
        wanted = text.casefold()
        dropped = self.accepted is False and wanted == DROPPED
        return dropped or self.verdict.casefold().startswith(wanted)


def entries(directory: Path) -> Iterator[Entry]:
    """All traces of a run, the kept ones first, or all answers of an evaluation inside or outside of a run.

    Errors: UserError when there are none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; `distill run RECIPE` makes a run directory")
    folders = [directory / "filtered" / name for name in ("kept", "dropped")]
    folders = [folder for folder in folders if folder.is_dir() and any(folder.glob("part-*.parquet"))]
    if EvaluationPaths(directory).settings.exists():
        yield from _answers(EvaluationPaths(directory))
    elif folders:
        for folder in folders:
            for trace, verdicts in read_traces(folder, ids=False):
                reason = verdict_of(verdicts)
                yield Entry(trace, reason == KEPT, reason, tuple(map(_decision, verdicts or ())))
    elif (directory / IMPORTED).is_file():
        for trace, verdicts in read_traces(directory / "traces", ids=False):
            yield Entry(trace, None, NOT_FILTERED, tuple(map(_decision, verdicts)))
    elif (directory / "traces").is_dir():
        for trace in TraceStore(directory / "traces").iterate(tokens=False):
            yield Entry(trace, None, NOT_FILTERED)
    else:
        evaluation = next(directory.glob("**/scores.json"), None)
        hint = f"give one of its evaluations, such as {evaluation.parent}" if evaluation else NO_TRACES
        raise UserError(f"{directory}: no traces here; {hint}")


def _answers(paths: EvaluationPaths) -> Iterator[Entry]:
    grades = read_grades(paths.grades)
    for trace in TraceStore(paths.traces).iterate(tokens=False):
        if (row := grades.get(trace.key)) is None:
            yield Entry(trace, None, NOT_GRADED, model=paths.root.name)
        else:
            decision = f"{row.verdict}: {row.reason}{_evidence(row.evidence)}"
            yield Entry(trace, row.correct, row.verdict, (decision,), paths.root.name)


def rollouts(directory: Path, step: int | None = None) -> Iterator[Entry]:
    """What the student of a run, or of a phase, wrote during its training, set by set. step: an optimiser step, from 1
    as in checkpoints/log.jsonl; only the rollouts that it was trained on.

    Errors: UserError when there are none.
    """
    objective, settings = _rollout_settings(directory)
    place = RunPaths(directory).rollouts
    store, rewards = TraceStore(place), dict(read_rewards(place / REWARDS))
    wanted = None if step is None else settings.set_at(step)
    last = -1
    for trace in store.iterate(tokens=False):
        last = max(last, number := settings.set_of(trace.sample))
        if wanted in (None, number):
            ending = TRUNCATED if trace.finish_reason == "length" else ENDED
            reward = rewards.get(trace.key)
            decisions = () if reward is None else (reward.text if objective == "grpo" else reward.grade,)
            yield Entry(
                trace,
                None,
                ending,
                decisions,
                "student",
                steps_text(settings, number),
                trace.sample % settings.samples,
                None if reward is None else reward.value,
            )
    if last < 0:
        raise UserError(f"{directory}: the student has not written anything yet; `distill train` goes on")
    if wanted is not None and wanted > last:
        raise UserError(f"--step {step}: the last rollouts are those of {steps_text(settings, last)}")


def _rollout_settings(directory: Path) -> tuple[str, RolloutSettings]:
    """The objective of a run directory with rollouts, and their settings. Errors: UserError naming those of its phases
    where it has none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; `distill run RECIPE` makes a run directory")
    read_recipe(directory)
    paths = RunPaths(directory)
    objective = parse(Recipe, read_yaml(paths.recipe), str(paths.recipe)).train.objective
    settings = objective.rollout_settings
    inside = next(iter(sorted(directory.glob("phases/*/rollouts"))), None)
    if inside is not None:
        raise UserError(f"{directory}: each phase has its own rollouts; give one, such as {inside.parent}")
    if settings is None:
        raise UserError(f"{directory}: no rollouts; a student writes some with train.objective on_policy or grpo")
    return objective.kind, settings


def steps_text(settings: RolloutSettings, number: int) -> str:
    """The optimiser steps that a set of rollouts is trained on, such as `step 9` or `steps 9 – 12`."""
    first, last = settings.steps_of(number)
    return f"step {first:,}" if first == last else f"steps {first:,} – {last:,}"


def verdict_of(verdicts: Iterable[Verdict] | None) -> str:
    """ "kept", or the first reason for dropping."""
    if verdicts is None:
        return NOT_FILTERED
    dropped = dropped_by(verdicts)
    return f"{dropped.filter}: {dropped.reason}" if dropped else KEPT


def counts(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """Rows of a table: verdict, number of traces."""
    numbers = Counter(entry.verdict for entry in entries)
    return [(verdict, f"{count:,}") for verdict, count in numbers.most_common()]


def rollout_counts(entries: Iterable[Entry]) -> list[tuple[str, str, str, str, str]]:
    """Rows of a table, in the order of the steps: steps, rollouts, mean tokens, truncated, mean reward of those that
    have one."""
    by_steps: dict[str, list[tuple[int, bool, float | None]]] = {}
    for entry in entries:
        row = entry.trace.tokens, entry.verdict == TRUNCATED, entry.reward
        by_steps.setdefault(entry.steps or "", []).append(row)
    rows = []
    for steps, figures in by_steps.items():
        tokens, truncated, rewards = zip(*figures, strict=True)
        known = [reward for reward in rewards if reward is not None]
        mean = f"{fmean(known):.4g}" if known else "–"
        rows.append((steps, f"{len(figures):,}", f"{fmean(tokens):,.0f}", f"{sum(truncated):,}", mean))
    return rows


def select(entries: Iterable[Entry], verdict: str | None, prompt: str | None, search: str | None) -> Iterator[Entry]:
    """The entries that match all conditions that are not None.

    verdict: as `Entry.has_verdict`. prompt: how the prompt's id begins. search: text in question or completion, in any
    case.
    """
    for entry in entries:
        trace = entry.trace
        if verdict is not None and not entry.has_verdict(verdict):
            continue
        if not trace.prompt.id.startswith(prompt or ""):
            continue
        text = trace.prompt.messages[-1]["content"] + trace.text
        if search is None or search.casefold() in text.casefold():
            yield entry


def texts(entries: Iterable[Entry], whole: bool) -> Iterator[str]:
    """The text of each trace, in pieces. whole: the reasoning in full, instead of its first and last lines."""
    entry = None
    for entry in entries:
        trace = entry.trace
        yield f"{'─' * WIDTH}\n{entry.head}\n\n"
        yield f"{trace.prompt.messages[-1]['content']}\n\n"
        if trace.prompt.answer is not None:
            yield f"gold answer: {trace.prompt.answer}\n\n"
        if trace.reasoning is not None:
            yield f"<think>\n{_folded(trace.reasoning.strip(), whole)}\n</think>\n\n"
        yield f"{trace.response.strip() if trace.reasoning is not None else _folded(trace.text, whole)}\n\n"
        yield "".join(f"  {decision}\n" for decision in entry.decisions) + "\n"
    if entry is None:
        yield "no trace matches; --counts lists the verdicts and how many traces have each\n"


def differences(entries: Iterable[Entry], prompt: str) -> Iterator[str]:
    """A unified diff of an accepted and a rejected trace of one prompt, whose id begins with `prompt`.

    Errors: UserError unless there are both.
    """
    samples = [entry for entry in entries if entry.trace.prompt.id.startswith(prompt)]
    if not samples:
        raise UserError(f"no trace of a prompt {prompt}; `distill traces` without --diff shows the ids")
    if len({entry.trace.prompt.id for entry in samples}) > 1:
        raise UserError(f"several prompts begin with {prompt}: give more of the id")
    accepted = next((entry for entry in samples if entry.accepted), None)
    rejected = next((entry for entry in samples if entry.accepted is False), None)
    if accepted is None or rejected is None:
        missing = "a kept or correct" if accepted is None else "a dropped or wrong"
        raise UserError(f"prompt {samples[0].trace.prompt.id} has no pair to compare: {missing} trace is missing")
    names = [f"sample {entry.trace.sample}, {entry.verdict}" for entry in (accepted, rejected)]
    yield f"{accepted.trace.prompt.messages[-1]['content']}\n\n"
    before, after = (f"{entry.trace.text}\n".splitlines(keepends=True) for entry in (accepted, rejected))
    yield from difflib.unified_diff(before, after, names[0], names[1], n=2)
    yield "\n"


def _folded(text: str, whole: bool) -> str:
    lines = text.splitlines()
    hidden = len(lines) - 2 * FOLDED_LINES
    if whole or hidden <= 1:
        return text
    return "\n".join([*lines[:FOLDED_LINES], f"    … {hidden:,} lines; --whole shows them …", *lines[-FOLDED_LINES:]])


def _decision(verdict: Verdict) -> str:
    decision = "kept   " if verdict.keep else "dropped"
    return f"{decision} {verdict.filter}: {verdict.reason}{_evidence(verdict.evidence)}"


def _evidence(evidence: Mapping[str, object]) -> str:
    known = ", ".join(f"{key} {value}" for key, value in evidence.items() if value is not None)
    return f"  {known}" if known else ""
