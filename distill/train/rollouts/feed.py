"""The rows of a step, written by the student itself.

    prompts ─▶ the student samples ─▶ rollouts/ ─▶ the teacher scores, the graders reward ─▶ rows

One *set* of rollouts serves `updates` optimiser steps, each on a part of it. Which prompts a set has is a function of
its number and the seed; what is sampled, one of the weights, too. So a resumed training needs no state beyond its
checkpoint; sets that are on the disk (`store`) are read instead of being sampled and rewarded again.

Ranks share the prompts of a set, sample, score and reward their own, and exchange the results, so that every rank has
the same rows and takes its batches of them as of any other rows. A judge is asked by the first rank alone (`judge`).

With `student_share` below 1 some rows of a step are traces of the teacher's, in the ratio of the share (GKD's λ).
"""

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple, cast

import numpy as np
from pydantic import JsonValue

from distill.backends.backend import Backend, Job
from distill.chat import Chat
from distill.console import say
from distill.grading.judged import JUDGE
from distill.objectives import Grpo, OnPolicy
from distill.objectives.grpo import advantages
from distill.prompts import Prompt
from distill.recipe import Train
from distill.traces.keys import Key
from distill.traces.rewarded import Reward
from distill.traces.trace import Trace
from distill.train.ranks.world import World
from distill.train.rollouts import gate
from distill.train.rollouts.monitor import Monitor, MonitorState, means_by_position, step_figures, sums_by_position
from distill.train.rollouts.rewards import Rewarder
from distill.train.rollouts.store import RolloutStore
from distill.train.rollouts.student import Rollout, StudentEngine
from distill.train.rollouts.teachers import Taught, Teacher
from distill.train.rows.batches import Batching, Order, Row, best_fit
from distill.train.rows.feed import Feed, Figures, StoredFeed
from distill.train.rows.stored import Counts


class PromptOrder:
    """The prompts of every set, from the seed alone: every epoch is another permutation, cut into whole sets. Prompts
    that are left over at the end of an epoch wait for the next."""

    def __init__(self, count: int, per_set: int, seed: int) -> None:
        self.count, self.per_set, self.seed = count, min(per_set, count), seed
        self.sets_per_epoch = count // self.per_set

    def set(self, number: int) -> list[int]:
        """The prompts of a set, as indices, each once."""
        epoch, place = divmod(number, self.sets_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        chosen: list[int] = order[place * self.per_set : (place + 1) * self.per_set].tolist()
        return chosen


class Judged(NamedTuple):
    """A rollout with what is known of it. taught: None without a teacher. reward: None where nothing rewards.
    reference: log-probabilities of its tokens under the base, where the objective reads them."""

    rollout: Trace
    taught: Taught | None
    reward: Reward | None
    reference: tuple[float, ...] | None


@dataclass
class RolloutSet:
    """One set: the rows of each of its updates, and its figures for the log."""

    number: int
    parts: list[list[Row]]
    rollouts: list[Trace]
    figures: dict[str, JsonValue]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Judges:
    """What a set is judged with. base: the student before training, where the objective reads its probabilities."""

    teachers: Mapping[str, Teacher] = field(default_factory=dict)  # by task; "" for every other
    rewarder: Rewarder | None = None
    base: Backend | None = None

    def teacher(self, prompt: Prompt) -> Teacher | None:
        """The teacher that a prompt is routed to, by its task."""
        return self.teachers.get(prompt.task, self.teachers.get(""))

    @property
    def ask(self) -> bool:
        """Whether a teacher is asked for what the student finds likely."""
        return any(teacher.asks for teacher in self.teachers.values())


class RolloutFeed(Feed):
    """The rows of an objective with rollouts. prompts: what the student is asked, at least one. traces: rows of the
    teacher's, mixed with the student's where `student_share` is below 1."""

    def __init__(
        self,
        objective: OnPolicy | Grpo,
        settings: Train,
        prompts: Sequence[Prompt],
        student: StudentEngine,
        chat: Chat,
        store: RolloutStore,
        judges: Judges,
        world: World,
        traces: StoredFeed | None = None,
    ) -> None:
        self.objective, self.settings, self.how = objective, settings, objective.rollout_settings
        self.prompts, self.student, self.chat = prompts, student, chat
        self.store, self.judges, self.world, self.traces = store, judges, world, traces
        self.counts = traces.counts if traces else Counts()
        self.order = PromptOrder(len(prompts), self.how.prompts_per_step, settings.seed)
        self.total = self.how.total_steps(len(prompts), settings.num_train_epochs, settings.max_steps)
        self.mixed = self._order_of_traces()
        self.monitor = Monitor(objective.kind, self.order.per_set)
        self._set: RolloutSet | None = None
        self._figures: dict[int, RolloutSet] = {}  # by step, until the step is logged
        self._stored: dict[int, list[Trace]] | None = None  # sets on the disk that are not trained on yet
        self._rewards: dict[Key, Reward] = {}  # those on the disk of these sets
        self._trained, self._needed = 0, 0  # steps; the first set that a resume at the last checkpoint needs

    # ---- as a feed

    def step(self, number: int) -> list[list[Row]]:
        """See `Feed`."""
        wanted, part = divmod(number, self.how.updates)
        if self._set is None or self._set.number != wanted:
            self._set = self._make(wanted)
            self.student.release()
        self._figures[number], self._trained = self._set, number + 1
        return self._batches(self._set.parts[part] + self._teachers_rows(number))

    def held_out(self) -> list[list[Row]]:
        """See `Feed`; traces of the teacher's."""
        if self.traces is None:
            return []
        return [[_of_the_teacher(row) for row in batch] for batch in self.traces.held_out()]

    def epoch(self, steps: int) -> float:
        """See `Feed`."""
        return round(steps / self.how.updates / self.order.sets_per_epoch, 4)

    def keys(self, number: int) -> list[tuple[str, int]]:
        """See `Feed`; the rollouts of the step's whole set."""
        jobs = self._jobs(number // self.how.updates)
        return [(job.prompt.id, sample) for job in jobs for sample in job.samples]

    def after(self, number: int, parts: Mapping[str, float]) -> Figures:
        """See `Feed`. Errors: WorkError at a collapse (`monitor`)."""
        made = self._figures.pop(number)
        if (number + 1) % self.how.updates and number + 1 < self.total:
            return {}  # the set has further steps
        teacher_kl = parts["kl"] if isinstance(self.objective, OnPolicy) else None
        correct = cast(float | None, made.figures.get("correct"))
        known = bool(made.parts[number % self.how.updates])  # without rows the means of the loss parts are of nothing
        figures = step_figures(
            number + 1,
            made.rollouts,
            entropy=parts["entropy"] if known else None,
            correct=correct,
            teacher_kl=teacher_kl if known else None,
        )
        self.monitor.step(figures)
        self.rollouts += len(made.rollouts)
        self.rollout_tokens += sum(trace.tokens for trace in made.rollouts)
        shape: dict[str, JsonValue] = {
            "length": figures.length,
            "truncated": figures.truncated,
            "repetition": figures.repetition,
        }
        return {**made.figures, **shape, **made.seconds}

    def saved(self) -> JsonValue:
        """See `Feed`: the monitor, and the counts."""
        state = {"monitor": self.monitor.state(), "rollouts": self.rollouts, "tokens": self.rollout_tokens}
        return cast(JsonValue, state)

    def restore(self, state: JsonValue) -> None:
        """See `Feed`."""
        if isinstance(state, dict):
            self.monitor.restore(cast(MonitorState, state["monitor"]))
            self.rollouts, self.rollout_tokens = cast(int, state["rollouts"]), cast(int, state["tokens"])

    def checkpointed(self) -> None:
        """See `Feed`. The likeliest tokens that the checkpoint before this one needs are kept: this one may be found
        damaged."""
        self.store.compact()
        self.store.forget(self._needed)
        self._needed = self._trained // self.how.updates

    # ---- one set

    def _jobs(self, number: int) -> list[Job]:
        samples = tuple(range(number * self.how.samples, (number + 1) * self.how.samples))
        return [Job(self.prompts[i], samples) for i in self.order.set(number)]

    def _make(self, number: int) -> RolloutSet:
        seconds: dict[str, float] = {}
        jobs = self._jobs(number)
        mine = jobs[self.world.rank :: self.world.size]
        rollouts, stored = self._sampled(number, jobs, mine, seconds)
        ours = {job.prompt.id for job in mine}
        storing = self.world.main and stored is not None
        with (
            self.store.appending(number, rollouts, stored or ()) if storing else nullcontext(),
            timed(seconds, "seconds_scoring"),
        ):
            judged = self.world.gathered(self._judge([each for each in rollouts if each.trace.prompt.id in ours]))
            judged = self._with_judge(judged)
        by_key = {each.rollout.key: each for each in judged}
        judged = [by_key[each.trace.key] for each in rollouts]
        self._store_rewards(judged)
        if number == 0:
            self._prove(judged)
        return self._rows(number, judged, seconds)

    def _sampled(
        self, number: int, jobs: Sequence[Job], mine: Sequence[Job], seconds: dict[str, float]
    ) -> tuple[list[Rollout], Set[Key] | None]:
        """The rollouts of a set in the order of its jobs: from the disk, or sampled now. And the keys of those that are
        on the disk, None where all are. Of a part that a kill left, those on the disk are used: what is trained on is
        what is stored."""
        if self._stored is None:
            self._stored, self._rewards = self.store.from_set(number), self.store.rewards_from(number)
            self.world.wait()  # every rank has read them before the first appends
        keys = [(job.prompt.id, sample) for job in jobs for sample in job.samples]
        stored = {trace.key: trace for trace in self._stored.pop(number, ())}
        if all(key in stored for key in keys):
            return self._resumed(number, [stored[key] for key in keys]), None
        with timed(seconds, "seconds_sync"):
            self.student.update()
        with timed(seconds, "seconds_rollouts"):
            sampled = self.student.sample(mine, f"student, set {number}", self._top_k)
            by_key = {each.trace.key: each for each in self.world.gathered(sampled)}
            by_key |= {each.trace.key: each for each in self._with_likeliest([stored[k] for k in keys if k in stored])}
        return [by_key[key] for key in keys], stored.keys()

    @property
    def _top_k(self) -> int | None:
        """How many of the student's likeliest tokens the teachers are asked for."""
        return self.objective.rollout_top_k if isinstance(self.objective, OnPolicy) and self.judges.ask else None

    def _resumed(self, number: int, traces: Sequence[Trace]) -> list[Rollout]:
        """The rollouts of a set on the disk. Without the file of their likeliest tokens these are those of the current
        weights, which have sampled the set unless some of its steps are done."""
        likeliest = None if self._top_k is None else self.store.likeliest(number, traces)
        if likeliest is not None:
            return [Rollout(*each) for each in zip(traces, likeliest, strict=True)]
        if self._top_k is not None:
            self.student.update()
        return self._with_likeliest(traces)

    def _with_likeliest(self, traces: Sequence[Trace]) -> list[Rollout]:
        """Rollouts on the disk with the likeliest tokens of the engine's weights, where a teacher is asked for them."""
        if self._top_k is None or not traces:
            return [Rollout(trace) for trace in traces]
        return [Rollout(*each) for each in zip(traces, self.student.likeliest(traces, self._top_k), strict=True)]

    def _judge(self, rollouts: Sequence[Rollout]) -> list[Judged]:
        """This rank's rollouts with everything that is known of them."""
        taught: dict[Key, Taught] = {}
        for teacher in dict.fromkeys(self.judges.teachers.values()):
            routed = [each for each in rollouts if self.judges.teacher(each.trace.prompt) is teacher]
            if routed:
                taught |= {each.trace.key: of for each, of in zip(routed, teacher.score(routed), strict=True)}
        traces = [each.trace for each in rollouts]
        rewards = self._rewarded([trace for trace in traces if trace.prompt.task != JUDGE])
        reference: Sequence[tuple[float, ...] | None] = [None] * len(traces)
        if self.judges.base is not None and traces:
            reference = [trace.logprobs for trace in self.judges.base.score(traces, 1)]
        return [
            Judged(trace, taught.get(trace.key), rewards.get(trace.key), logprobs)
            for trace, logprobs in zip(traces, reference, strict=True)
        ]

    def _with_judge(self, judged: list[Judged]) -> list[Judged]:
        """The rollouts of all ranks with the rewards for which the first rank asks the judge."""
        asked = [each.rollout for each in judged if each.rollout.prompt.task == JUDGE]
        if not asked:
            return judged
        rewards = dict(self.world.gathered(list(self._rewarded(asked).items()) if self.world.main else []))
        return [each._replace(reward=rewards.get(each.rollout.key, each.reward)) for each in judged]

    def _rewarded(self, traces: Sequence[Trace]) -> dict[Key, Reward]:
        """The rewards of rollouts: from the disk, or computed now; none where nothing rewards."""
        if self.judges.rewarder is None:
            return {}
        new = [trace for trace in traces if trace.key not in self._rewards]
        computed = zip((trace.key for trace in new), self.judges.rewarder.rewards(new), strict=True)
        return {trace.key: self._rewards[trace.key] for trace in traces if trace.key in self._rewards} | dict(computed)

    def _store_rewards(self, judged: Sequence[Judged]) -> None:
        """Store the rewards that are not on the disk."""
        rewards = [(each.rollout.key, each.reward) for each in judged if each.reward is not None]
        if self.world.main:
            self.store.append_rewards(item for item in rewards if item[0] not in self._rewards)
        for key, _ in rewards:
            self._rewards.pop(key, None)

    def _prove(self, judged: Sequence[Judged]) -> None:
        """The gate, on the first set. Errors: UserError (`gate`)."""
        lines = list(gate.prove_rollouts([each.rollout for each in judged], self.chat))
        for teacher in dict.fromkeys(self.judges.teachers.values()):
            given = [each for each in judged if self.judges.teacher(each.rollout.prompt) is teacher]
            known = [(each.rollout, each.taught) for each in given if each.taught is not None]
            if known:
                lines += gate.prove_teacher(
                    [rollout for rollout, _ in known],
                    [taught.scored for _, taught in known],
                    [taught.distribution for _, taught in known],
                    self.chat,
                    teacher.chat,
                )
        if self.world.main:
            for line in lines:
                say(line)

    def _rows(self, number: int, judged: Sequence[Judged], seconds: dict[str, float]) -> RolloutSet:
        figures: dict[str, JsonValue] = {}
        rewards = [each.reward for each in judged if each.reward is not None]
        if rewards:
            decided = [reward.correct for reward in rewards if reward.correct is not None]
            figures["correct"] = fmean(decided) if decided else None
            figures["unverifiable"] = fmean(reward.value is None for reward in rewards)
        if isinstance(self.objective, Grpo):
            groups, values = self._groups(judged)
            figures["reward"] = fmean(values) if values else None
            figures["skipped_groups"] = fmean(not group for group in groups)
            rows = [row for group in groups for row in group]
        else:
            rows = [self._row(each, 0.0) for each in judged]
            figures["kl_by_position"] = cast(JsonValue, self._kl_by_position(judged))
        parts = [rows[i :: self.how.updates] for i in range(self.how.updates)]
        if isinstance(self.objective, Grpo):
            parts = [self._weighted(self.objective, part) for part in parts]
        return RolloutSet(number, parts, [each.rollout for each in judged], figures, seconds)

    def _groups(self, judged: Sequence[Judged]) -> tuple[list[list[Row]], list[float]]:
        """The rows of each prompt's group with their advantages, none of a group without variance or of a rollout that
        cannot be verified; and all rewards."""
        assert isinstance(self.objective, Grpo)
        groups, values = [], []
        for start in range(0, len(judged), self.how.samples):
            group = judged[start : start + self.how.samples]
            given = [None if each.reward is None else each.reward.value for each in group]
            values += [value for value in given if value is not None]
            compared = advantages(given, self.objective.normalise)
            members = [] if compared is None else list(zip(group, given, compared, strict=True))
            groups.append([self._row(each, advantage) for each, value, advantage in members if value is not None])
        return groups, values

    @staticmethod
    def _weighted(objective: Grpo, rows: Sequence[Row]) -> list[Row]:
        """The rows of one optimiser step, their advantages scaled by the normalisation of the objective."""
        supervised = sum(row.supervised for row in rows)
        weighted = []
        for row in rows:
            assert row.sampled is not None
            scale = np.array([[1.0], [objective.row_weight(row.supervised, supervised, len(rows))], [1.0], [1.0]])
            weighted.append(replace(row, sampled=(row.sampled * scale).astype(np.float32)))
        return weighted

    def _row(self, judged: Judged, advantage: float) -> Row:
        trace = judged.rollout
        ids = np.array((*trace.prompt_token_ids, *trace.completion_token_ids), np.int32)
        count = len(trace.completion_token_ids)
        sampled = np.zeros((4, count), np.float32)
        assert trace.logprobs is not None, "the engine gives the log-probability of each token"
        sampled[0], sampled[1], sampled[3] = trace.logprobs, advantage, 1.0
        if judged.reference is not None:
            sampled[2] = judged.reference
        teacher = None if judged.taught is None else judged.taught.distribution
        return Row(trace.key, ids, len(trace.prompt_token_ids), teacher=teacher, sampled=sampled)

    def _kl_by_position(self, judged: Sequence[Judged]) -> list[float | None]:
        """ln q(y) − ln p(y) of the sampled tokens, the mean by eighths of the token limit: an estimate of the reverse
        KL at each. Tokens that the teacher's distribution does not name are left out."""
        limit = self.how.sampling.max_new_tokens
        sums = np.zeros((2, 8))
        for each in judged:
            if each.taught is None or each.rollout.logprobs is None:
                continue
            ids, logprobs = each.taught.distribution
            chosen = np.array(each.rollout.completion_token_ids)[:, None] == ids
            theirs = np.where(chosen & (logprobs > -np.inf), logprobs, -np.inf).max(1)
            known = np.flatnonzero(theirs > -np.inf)
            excess = (np.array(each.rollout.logprobs, np.float32) - theirs)[known].astype(np.float32)
            sums += sums_by_position(known, excess, limit)
        return means_by_position(sums)

    # ---- rows of a step

    def _order_of_traces(self) -> Order | None:
        """The teacher's traces, one in each step of the order, epoch after epoch."""
        if self.traces is None or not isinstance(self.objective, OnPolicy):
            return None
        order = self.traces.order
        return Order(order.lengths.tolist(), Batching(1, 1, self.settings.seed), order.sources.tolist(), order.shares)

    def _teachers_rows(self, number: int) -> list[Row]:
        """The traces of the teacher's that are mixed into a step: as many as the share of the student leaves. A
        fraction of a trace is carried to the next step."""
        if self.traces is None or self.mixed is None or not isinstance(self.objective, OnPolicy):
            return []
        share, own = self.objective.student_share, self.order.per_set * self.how.samples / self.how.updates
        first, last = (round(step * own * (1 - share) / share) for step in (number, number + 1))
        chosen = [i for place in range(first, last) for batch in self.mixed.step(place) for i in batch]
        return [_of_the_teacher(self.traces.row(self.traces.numbers[i])) for i in chosen]

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows of a step in batches, those of a prompt together and similar lengths, the one with the most tokens
        first; none without rows."""
        size, lengths = self.settings.per_device_train_batch_size, [len(row.ids) for row in rows]
        if self.settings.packing:
            bins = best_fit(lengths, self.settings.max_length * size)
        else:
            longest: dict[str, int] = {}
            for row, length in zip(rows, lengths, strict=True):
                longest[row.key[0]] = max(length, longest.get(row.key[0], 0))
            # Rollouts of a prompt stay together, as a batch computes their prompt once.
            order = sorted(range(len(rows)), key=lambda i: (-longest[rows[i].key[0]], rows[i].key[0], -lengths[i]))
            bins = [order[i : i + size] for i in range(0, len(rows), size)]
        return [[rows[i] for i in items] for items in sorted(bins, key=lambda items: -sum(lengths[i] for i in items))]


def _of_the_teacher(row: Row) -> Row:
    """A row that the student did not write."""
    return replace(row, sampled=np.zeros((4, row.supervised), np.float32))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took."""
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 3)
