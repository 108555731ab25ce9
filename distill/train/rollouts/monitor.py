"""Watches the rollouts of a training, and stops it when they collapse.

Learning from one's own text can feed on itself: rollouts that never end, that loop, that are all the same or no longer
right, and every further step makes it worse. A loss does not show it. Each of these four has a rule here, which
compares the mean over the last sets of rollouts with the mean over as many first ones. The window is counted in
prompts, as the samples of a prompt are right or wrong together: at least `PROMPTS` of them, and `SETS` sets, so that a
student that does not change is not stopped by chance. The earliest stop is after two windows, and one bad set stops
nothing. A set serves one optimiser step or several (`updates`); it is watched after its last one.

- *Length explosion.* Most rollouts are cut off at the token limit, many more than at first, and they have become much
  longer. Length alone is no sign: a student that learns to reason goes from 9 tokens to 60, and R1-Zero went from
  hundreds to ten thousand. A base that rambled to the limit from the beginning is not stopped either.
- *Entropy gone.* The entropy of the student's distribution has fallen below a small share of its first value, so that
  all samples of a prompt are the same and none can be better than another. A student that is sure because it is right
  looks alike, so the rule does not apply where at least half of the answers are correct, or where the divergence from
  the teacher has at least halved or is small: a student at the level of a teacher that is often wrong learns as it
  should.
- *Repetition.* Most rollouts contain a loop, as `filter.repetition` defines it, and many more than at first.
- *Answers no longer right* (`grpo`). Less than half of the first pass@1 is left, and many points are lost: a student
  that stops reasoning writes short rollouts, of which no other rule complains. Under `on_policy` pass@1 is not what is
  learnt, and falls for some steps where the teacher's way of answering differs.

The thresholds are constants, far beyond what a training that learns shows, because a dial would be turned to silence
the message. Entropy falls in every training that sharpens a distribution (arXiv 2505.22617), so the limit is a fiftieth
of its first value.

State is the figures of the first and of the last window: a resumed training stops at the step at which an
uninterrupted one does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from statistics import fmean
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from distill.errors import WorkError
from distill.filters.base import Candidate
from distill.filters.repetition import Repetition
from distill.traces.trace import Trace
from distill.train.rollouts.rewards import is_truncated

SETS = 8  # in a mean, at least
PROMPTS = 128  # in a mean, at least: a share of them has an error of 4 points
RISE = 0.3  # a share that counts as "many more than at first" has risen by this much, seven such errors
TRUNCATED = 0.75  # share of truncated rollouts from which on the answers of too few can be rewarded
LONGER = 1.5  # times the first length; with RISE and TRUNCATED, rollouts that filled the limit from the start are out
LOST = 0.2  # pass@1 that has fallen by this much, five errors of a share, to less than half is gone
REPETITION = 0.5  # share of rollouts with a loop
ENTROPY = 0.02  # share of the first entropy
SUCCESS = 0.5  # share of correct answers that excuses a low entropy
NEAR = 0.05  # nats per token from the teacher that excuse it: a student at its teacher's level
BUCKETS = 8  # positions of a completion, by eighths of the token limit


@dataclass(frozen=True)
class StepFigures:
    """What the rollouts of one set looked like. step: the last optimiser step that was trained on them.

    length: mean completion tokens. truncated, repetition: shares of the rollouts. entropy: of the student, mean nats
    per token. correct: share of the verifiable answers. teacher_kl: divergence from the teacher, mean nats per token.
    None: not measured.
    """

    step: int
    length: float
    truncated: float
    repetition: float
    entropy: float | None = None
    correct: float | None = None
    teacher_kl: float | None = None


class MonitorState(TypedDict):
    """The monitor in a checkpoint: JSON values."""

    first: list[dict[str, float | None]]
    recent: list[dict[str, float | None]]


class Monitor:
    """Raises WorkError at a collapse. objective: whose options the message names. prompts: in a set of rollouts."""

    def __init__(self, objective: Literal["grpo", "on_policy"], prompts: int) -> None:
        self.objective = objective
        self.window = max(SETS, ceil(PROMPTS / prompts))  # sets in a mean
        self.first: list[StepFigures] = []
        self.recent: list[StepFigures] = []

    def step(self, figures: StepFigures) -> None:
        """Take the figures of a finished set. Errors: WorkError at a collapse, with what was seen and what to do."""
        if len(self.first) < self.window:
            self.first.append(figures)
            return
        self.recent = [*self.recent, figures][-self.window :]
        if len(self.recent) == self.window:
            for rule in (self._length, self._repetition, self._entropy, self._correct):
                if seen := rule():
                    raise WorkError(f"step {figures.step}: {seen}; the curves are in checkpoints/log.jsonl")

    def state(self) -> MonitorState:
        """The state for a checkpoint."""
        return {"first": [asdict(each) for each in self.first], "recent": [asdict(each) for each in self.recent]}

    def restore(self, state: MonitorState) -> None:
        """Go on from the state of a checkpoint, whose windows may be shorter."""
        known = [_figures(each) for part in (state["first"], state["recent"]) for each in part]
        self.first, self.recent = known[: self.window], known[self.window :]

    # ---- rules: what was seen and what to do, None where nothing is wrong

    def _length(self) -> str | None:
        before, now = self._means("truncated")
        short, long = self._means("length")
        if now < TRUNCATED or now - before < RISE or long < LONGER * short:
            return None
        return (
            f"the length of the rollouts has exploded: {now:.0%} are truncated, mean {long:,.0f} tokens, over the last "
            f"{self.window} sets ({before:.0%} and {short:,.0f} over the first {self.window}); if they are still of "
            f"use (see rollouts/), raise train.objective.rollouts.sampling.max_new_tokens, otherwise lower "
            f"train.learning_rate"
            + self._choose(", or set train.objective.rewards.length or train.objective.kl_weight", "")
        )

    def _repetition(self) -> str | None:
        before, now = self._means("repetition")
        if now < REPETITION or now - before < RISE:
            return None
        return (
            f"the rollouts repeat themselves: {now:.0%} contain a loop over the last {self.window} sets "
            f"({before:.0%} over the first {self.window}); lower train.learning_rate"
            + self._choose(", or set train.objective.kl_weight to keep the student near its base", "")
        )

    def _entropy(self) -> str | None:
        if not self._has("entropy"):
            return None
        before, now = self._means("entropy")
        if now >= ENTROPY * before or self._succeeds():
            return None
        return (
            f"the student's entropy is gone: {now:.2g} nats per token over the last {self.window} sets "
            f"({before:.2g} over the first {self.window}), so its samples of a prompt are all alike; raise "
            f"train.objective.rollouts.sampling.temperature, or lower train.learning_rate"
            + self._choose(", or set train.objective.kl_weight", "")
        )

    def _correct(self) -> str | None:
        if self.objective != "grpo" or not self._has("correct"):
            return None
        before, now = self._means("correct")
        if now > before / 2 or before - now < LOST:
            return None
        short, long = self._means("length")
        return (
            f"the answers are no longer right: {now:.0%} over the last {self.window} sets ({before:.0%} over the first "
            f"{self.window}; mean length {long:,.0f} and {short:,.0f} tokens); lower train.learning_rate, or set "
            f"train.objective.kl_weight to keep the student near its base"
        )

    def _succeeds(self) -> bool:
        """Whether the student is sure of what is right, or of what its teacher says."""
        if self._has("correct") and self._means("correct")[1] >= SUCCESS:
            return True
        if self._has("teacher_kl"):
            before, now = self._means("teacher_kl")
            return now <= max(before / 2, NEAR)
        return False

    # ---- means

    def _has(self, name: str) -> bool:
        """Whether a figure was measured, in both windows."""
        return all(any(getattr(each, name) is not None for each in part) for part in (self.first, self.recent))

    def _means(self, name: str) -> tuple[float, float]:
        """The mean of a figure over the first and over the last sets, of those at which it was measured."""
        before, now = (
            fmean(value for each in part if (value := getattr(each, name)) is not None)
            for part in (self.first, self.recent)
        )
        return before, now

    def _choose(self, grpo: str, on_policy: str) -> str:
        return grpo if self.objective == "grpo" else on_policy


def _figures(values: dict[str, float | None]) -> StepFigures:
    known = {each.name for each in fields(StepFigures)}
    assert values.keys() == known, f"a checkpoint has {sorted(values)}, not {sorted(known)}"
    return StepFigures(**values)  # type: ignore[arg-type]  # step is an integer, as it was written


def step_figures(
    step: int,
    rollouts: Sequence[Trace],
    *,
    entropy: float | None = None,
    correct: float | None = None,
    teacher_kl: float | None = None,
) -> StepFigures:
    """The figures of a set's rollouts, of which there is at least one; what they do not say is given. step: as of
    `StepFigures`."""
    return StepFigures(
        step,
        fmean(trace.tokens for trace in rollouts),
        fmean(map(is_truncated, rollouts)),
        fmean(map(is_repetitive, rollouts)),
        entropy,
        correct,
        teacher_kl,
    )


def is_repetitive(trace: Trace) -> bool:
    """Whether a rollout contains a loop, as `filter.repetition` defines it."""
    return not _REPETITION.judge(Candidate(trace)).keep


_REPETITION = Repetition()


def sums_by_position(
    positions: npt.NDArray[np.int64], values: npt.NDArray[np.float32], limit: int
) -> npt.NDArray[np.float64]:
    """Sums of per-token values and their numbers, by eighths of the token limit: [2, BUCKETS]. Sums of several batches
    or ranks may be added.

    positions: of each token in its completion, from 0. values: of each token. limit: max_new_tokens.
    """
    buckets = np.minimum(positions * BUCKETS // limit, BUCKETS - 1)
    return np.stack([np.bincount(buckets, values, BUCKETS), np.bincount(buckets, minlength=BUCKETS).astype(np.float64)])


def means_by_position(sums: npt.NDArray[np.float64]) -> list[float | None]:
    """The means of `sums_by_position`; None where there is no token."""
    return [float(total / count) if count else None for total, count in sums.T]
