"""What the report shows of the rollouts of one training: how many they were, where the time went, and some to read.

A large training has a million of them, so texts are shown of a few sets at even distances, the first and the last among
them: the same rule for every run, never by how well they look. Beside these, where rewards are trained on, the best and
the worst of the first, the middle and the last set are shown as such: they say what is rewarded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from distill.artefacts import RunPaths, TrainSummary
from distill.objectives import RolloutSettings
from distill.recipe import Training
from distill.report.curves import Spent, time_spent
from distill.report.records import LogRow
from distill.report.shown import Shown, shown
from distill.traces.browse import steps_text
from distill.traces.keys import Key
from distill.traces.rewarded import REWARDS, Reward, read_rewards
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

SETS_SHOWN = 8
OF_SET_SHOWN = 4  # rollouts of a set
ROOM = 250_000  # characters of all rollouts in the page
EXTREMES = 2  # best ones of a set, and as many worst ones


@dataclass(frozen=True)
class RewardedSet:
    """The rewards of one set of rollouts. steps: such as `step 9`. mean: of those with a reward. best, worst: some,
    the highest first and the lowest first; none where all rewards are equal."""

    steps: str
    count: int
    unverifiable: int
    mean: float | None
    best: list[Shown]
    worst: list[Shown]


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of one training. tokens: of all completions. truncated: number of those that ended at the token
    limit. spent: the time by what it was spent on. shown: some in order of the steps; the verdict names these.
    rewarded: the first, the middle and the last set, where rewards are trained on."""

    count: int
    sets: int
    tokens: int
    truncated: int
    spent: list[Spent]
    shown: list[Shown]
    rewarded: list[RewardedSet] = field(default_factory=list)

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
    if not count:  # the ledger holds a part of its first line
        return None
    numbers = sorted(stored)
    wanted = {numbers[round(i * (len(numbers) - 1) / (SETS_SHOWN - 1))] for i in range(SETS_SHOWN)}
    chosen: dict[int, list[Shown]] = {number: [] for number in sorted(wanted)}
    thirds = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}) if training.objective.kind == "grpo" else []
    rewards = _rewards(paths, settings, wanted.union(thirds))
    extremes: dict[Key, Trace | None] = {key: None for n in thirds for keys in _extremes(rewards[n]) for key in keys}
    room = ROOM
    for trace in store.iterate(tokens=False):
        if trace.key in extremes:
            extremes[trace.key] = trace
        rollouts = chosen.get(settings.set_of(trace.sample))
        if rollouts is not None and len(rollouts) < OF_SET_SHOWN and (room > 0 or not rollouts):
            name = title + steps_text(settings, settings.set_of(trace.sample))
            reward = rewards[settings.set_of(trace.sample)].get(trace.key)
            text = None if reward is None else reward.text if thirds else reward.grade
            rollouts.append(replace(shown("student", name, trace.finish_reason != "length", trace), reward=text))
            room -= len(trace.text) + len(trace.prompt.messages[-1]["content"])
    return Rollouts(
        count=count,
        sets=len(numbers),
        tokens=tokens,
        truncated=truncated,
        spent=time_spent(log, settings, trained.seconds if trained else None),
        shown=[trace for rollouts in chosen.values() for trace in rollouts],
        rewarded=[_rewarded(steps_text(settings, number), rewards[number], extremes) for number in thirds],
    )


def _rewards(paths: RunPaths, settings: RolloutSettings, sets: Collection[int]) -> dict[int, dict[Key, Reward]]:
    """The stored rewards of some sets. Errors: UserError for a damaged file."""
    rewards: dict[int, dict[Key, Reward]] = {number: {} for number in sets}
    for key, reward in read_rewards(paths.rollouts / REWARDS):
        if (of_set := rewards.get(settings.set_of(key[1]))) is not None:
            of_set[key] = reward
    return rewards


def _extremes(rewards: Mapping[Key, Reward]) -> tuple[list[Key], list[Key]]:
    """The best and the worst rollouts of a set; none where all rewards are equal."""
    values = {key: reward.value for key, reward in rewards.items() if reward.value is not None}
    order = sorted(values, key=lambda key: (-values[key], key))
    if not order or values[order[0]] == values[order[-1]]:
        return [], []
    count = min(EXTREMES, len(order) // 2)
    return order[:count], order[::-1][:count]


def _rewarded(steps: str, rewards: Mapping[Key, Reward], traces: Mapping[Key, Trace | None]) -> RewardedSet:
    values = [reward.value for reward in rewards.values() if reward.value is not None]

    def texts(keys: Sequence[Key], good: bool) -> list[Shown]:
        chosen = ((rewards[key], trace) for key in keys if (trace := traces[key]) is not None)
        return [
            replace(shown("student", f"reward {reward.value:.4g}", good, trace), reward=reward.text)
            for reward, trace in chosen
        ]

    best, worst = _extremes(rewards)
    mean = fmean(values) if values else None
    return RewardedSet(steps, len(rewards), len(rewards) - len(values), mean, texts(best, True), texts(worst, False))
