"""What the report shows of the rollouts of one training: how many they were, where the time went, and some to read.

A large training has a million of them, so texts are shown of a few sets at even distances, the first and the last among
them: the same rule for every run, never by how well they look.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.artefacts import RunPaths, TrainSummary
from distill.recipe import Training
from distill.report.curves import Spent, time_spent
from distill.report.records import LogRow
from distill.report.shown import Shown, shown
from distill.traces.browse import steps_text
from distill.traces.store import TraceStore

SETS_SHOWN = 8
OF_SET_SHOWN = 4  # rollouts of a set
ROOM = 250_000  # characters of all rollouts in the page


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of one training. tokens: of all completions. truncated: number of those that ended at the token
    limit. spent: the time by what it was spent on. shown: some in order of the steps; the verdict names these."""

    count: int
    sets: int
    tokens: int
    truncated: int
    spent: list[Spent]
    shown: list[Shown]

    @property
    def mean(self) -> float:
        """Completion tokens per rollout."""
        return self.tokens / self.count


def read_rollouts(
    paths: RunPaths, training: Training, log: Sequence[LogRow], trained: TrainSummary | None, title: str = ""
) -> Rollouts | None:
    """The rollouts of a run, or of a phase; None where there are none. title: begins the name of each set.

    Errors: UserError when a file is damaged.
    """
    settings, store = training.objective.rollout_settings, TraceStore(paths.rollouts)
    if settings is None or store.is_empty():
        return None
    count = tokens = truncated = 0
    stored = set()
    for figures in store.figures():
        count, tokens, truncated = count + 1, tokens + figures.tokens, truncated + (figures.finish_reason == "length")
        stored.add(settings.set_of(figures.key[1]))
    numbers = sorted(stored)
    wanted = {numbers[round(i * (len(numbers) - 1) / (SETS_SHOWN - 1))] for i in range(SETS_SHOWN)}
    chosen: dict[int, list[Shown]] = {number: [] for number in sorted(wanted)}
    room = ROOM
    for trace in store.iterate(tokens=False):
        rollouts = chosen.get(settings.set_of(trace.sample))
        if rollouts is not None and len(rollouts) < OF_SET_SHOWN and (room > 0 or not rollouts):
            name = title + steps_text(settings, settings.set_of(trace.sample))
            rollouts.append(shown("student", name, trace.finish_reason != "length", trace))
            room -= len(trace.text) + len(trace.prompt.messages[-1]["content"])
    return Rollouts(
        count=count,
        sets=len(numbers),
        tokens=tokens,
        truncated=truncated,
        spent=time_spent(log, settings, trained.seconds if trained else None),
        shown=[trace for rollouts in chosen.values() for trace in rollouts],
    )
