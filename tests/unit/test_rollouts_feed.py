"""The rows of a step, out of rollouts that are made by hand: which there are, how often, and what is in them."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import rollout_support
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.catalog import resolve_weights
from distill.chat import Chat, split_reasoning
from distill.prompts.prompt import Prompt
from distill.traces.rewarded import Reward
from distill.traces.store import TraceStore
from distill.traces.trace import Trace
from distill.train.rollouts.feed import Judges, PromptOrder, RolloutFeed
from distill.train.rollouts.store import RolloutStore
from distill.train.rollouts.student import Rollout
from distill.train.rollouts.teachers import Taught
from distill.train.rows.batches import Batching, Order, Row, collate
from distill.train.rows.stored import Counts

CHAT = Chat.load(resolve_weights("student", "tiny-qwen"))
PROMPTS = [Prompt.from_question(f"What is {n} + 1?", str(n + 1)) for n in range(7)]
WORLD = SimpleNamespace(rank=0, size=1, main=True, gathered=list, wait=lambda: None)
TEXTS = ("The answer is {}.", "{}", "I think that it is {}.")


class Student:
    """Answers differently in length, the same at every call."""

    def __init__(self):
        self.updates, self.asked, self.released = 0, [], False

    def update(self):
        self.updates += 1
        self.released = False

    def release(self):
        self.released = True

    def sample(self, jobs, name, top_k):
        assert not self.released, "the engine has weights between an update and the rows of the set only"
        self.asked.append([job.prompt.id for job in jobs])
        return [Rollout(rollout(job.prompt, sample)) for job in jobs for sample in reversed(job.samples)]


def rollout(prompt, sample):
    text = TEXTS[sample % 3].format(sample)
    ids = (*CHAT.text_ids(text), CHAT.stop_token_ids[-1])
    return Trace(
        prompt,
        sample,
        0,
        text,
        *split_reasoning(text),
        "stop",
        "student",
        prompt_token_ids=tuple(CHAT.prompt_ids(prompt.messages)),
        completion_token_ids=ids,
        logprobs=tuple(-0.5 - i / 8 for i in range(len(ids))),
    )


class Rewarder:
    """rewards: (prompt, sample within the group) → value."""

    def __init__(self, reward):
        self.reward = reward

    def rewards(self, traces):
        values = [self.reward(trace.prompt, trace.sample % 4) for trace in traces]
        return [Reward(value, None if value is None else value > 0.5) for value in values]


def make_feed(directory, objective, reward=None, traces=None, rollouts=None, student=None, **train):
    recipe = rollout_support.make_recipe(objective, rollouts, **train)
    judges = Judges(rewarder=Rewarder(reward) if reward else None)
    settings = recipe.train
    store = RolloutStore(directory / "rollouts", settings.objective.rollouts.samples)
    return RolloutFeed(settings.objective, settings, PROMPTS, student or Student(), CHAT, store, judges, WORLD, traces)


def by_sample(prompt, sample):
    return float(sample == 0)


def rows_of(feed, step):
    return [row for batch in feed.step(step) for row in batch]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("updates", [1, 3])
def test_every_rollout_is_a_row_once(tmp_path, packing, size, updates):
    feed = make_feed(
        tmp_path,
        rollout_support.GRPO,
        by_sample,
        rollouts={"updates": updates},
        packing=packing,
        per_device_train_batch_size=size,
        max_steps=6,
    )
    student = feed.student
    for number in range(2):
        keys = Counter()
        for part in range(updates):
            batches = feed.step(number * updates + part)
            lengths = [sum(len(row.ids) for row in batch) for batch in batches]
            assert lengths == sorted(lengths, reverse=True)
            assert all(batches) and max(map(len, batches)) <= (size if not packing else 16)
            assert not packing or max(lengths) <= 128 * size
            keys.update(row.key for batch in batches for row in batch)
            for row in (row for batch in batches for row in batch):
                trace = rollout(next(p for p in PROMPTS if p.id == row.key[0]), row.key[1])
                assert row.ids.tolist() == [*trace.prompt_token_ids, *trace.completion_token_ids]
                assert row.sampled[0] == pytest.approx(trace.logprobs) and (row.sampled[3] == 1).all()
        assert keys == Counter(feed.keys(number * updates)) and set(keys.values()) == {1} and len(keys) == 16
        assert {sample // 4 for _, sample in keys} == {number}
    assert student.updates == len(student.asked) == 2, "a set is sampled once"


def test_rollouts_of_a_prompt_are_in_one_batch(tmp_path):
    feed = make_feed(tmp_path, rollout_support.GRPO, by_sample, per_device_train_batch_size=4)
    batches = feed.step(0)
    assert len(batches) == 4 and all(len({row.key[0] for row in batch}) == 1 for batch in batches)


def test_advantages_are_worth_the_same_however_rows_are_split(tmp_path):
    """The loss of a step is a sum divided by its supervised tokens: each token weighs A / (rows · max_new_tokens)."""
    seen = []
    for name, settings in {"one": {}, "packed": {"packing": True}, "ones": {"per_device_train_batch_size": 1}}.items():
        feed = make_feed(tmp_path / name, rollout_support.GRPO, by_sample, **settings)
        rows = rows_of(feed, 0)
        supervised = sum(row.supervised for row in rows)
        weights = {row.key: float(row.sampled[1][0]) / supervised for row in rows}
        assert all((row.sampled[1] == row.sampled[1][0]).all() for row in rows)
        seen.append(weights)
        for (_, sample), weight in weights.items():
            advantage = 0.75 if sample % 4 == 0 else -0.25
            assert weight == pytest.approx(advantage / (16 * 12), rel=1e-6)
    assert seen[0] == pytest.approx(seen[1]) and seen[0] == pytest.approx(seen[2])


def test_groups_without_variance_are_skipped_and_counted(tmp_path):
    same = {PROMPTS[i].id for i in (0, 2, 5)}
    feed = make_feed(tmp_path, rollout_support.GRPO, lambda prompt, sample: 1.0 if prompt.id in same else sample / 4)
    rows = rows_of(feed, 0)
    asked = feed.student.asked[0]
    skipped = sum(prompt in same for prompt in asked)
    assert 0 < skipped < 4
    assert {row.key[0] for row in rows} == set(asked) - same and len(rows) == 4 * (4 - skipped)
    figures = feed.after(0, {"kl": 0.0, "entropy": 1.0})
    assert figures["skipped_groups"] == skipped / 4 and figures["unverifiable"] == 0
    assert figures["reward"] == pytest.approx((skipped * 4 + (4 - skipped) * 1.5) / 16)


def test_a_step_whose_groups_are_all_skipped_has_no_batches(tmp_path):
    feed = make_feed(tmp_path, rollout_support.GRPO, lambda *_: 1.0)
    assert feed.step(0) == []
    figures = feed.after(0, {"kl": 0.0, "entropy": 0.0})
    assert figures["skipped_groups"] == 1 and feed.monitor.first[0].entropy is None


def test_what_cannot_be_verified_has_no_advantage(tmp_path):
    feed = make_feed(tmp_path, rollout_support.GRPO, lambda _, sample: (1.0, 0.0, None, None)[sample])
    rows = rows_of(feed, 0)
    for row in rows:
        sign = np.sign(row.sampled[1][0])
        assert sign == (1, -1, 0, 0)[row.key[1] % 4]
    assert feed.after(0, {"kl": 0.0, "entropy": 1.0})["unverifiable"] == 0.5


def test_sets_on_the_disk_are_read_and_partial_ones_completed(tmp_path):
    feed = make_feed(tmp_path, rollout_support.GRPO, by_sample)
    expected = [rows_of(feed, step) for step in (0, 1)]
    stored = list(TraceStore(tmp_path / "rollouts"))
    assert sorted(trace.sample // 4 for trace in stored) == [0] * 16 + [1] * 16

    again = make_feed(tmp_path, rollout_support.GRPO, by_sample)
    same_rows([rows_of(again, step) for step in (0, 1)], expected)
    assert again.student.asked == [] and again.student.updates == 0

    with TraceStore(tmp_path / "half" / "rollouts") as half:
        half.append(stored[:21])  # a kill while the second set was appended
    cut = make_feed(tmp_path / "half", rollout_support.GRPO, by_sample)
    same_rows([rows_of(cut, step) for step in (0, 1)], expected)
    assert len(cut.student.asked) == 1
    lines = (tmp_path / "half" / "rollouts" / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == 32, "no rollout is stored twice"
    cut.store.compact(0)
    assert len(list(TraceStore(tmp_path / "half" / "rollouts"))) == 32


def same_rows(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert [row.key for row in a] == [row.key for row in b]
        for one, other in zip(a, b, strict=True):
            assert (one.ids == other.ids).all() and (one.sampled == other.sampled).all()


def test_rewards_on_the_disk_are_not_computed_again(tmp_path):
    """A grader that runs out of time at the resume does not change what was trained on."""
    feed = make_feed(tmp_path, rollout_support.GRPO, by_sample)
    expected = [rows_of(feed, step) for step in (0, 1)]
    lines = (tmp_path / "rollouts" / "rewards.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 32
    asked = []

    def unlike(prompt, sample):
        asked.append((prompt, sample))
        return 1.0 - by_sample(prompt, sample) if len(asked) < 5 else by_sample(prompt, sample)

    again = make_feed(tmp_path, rollout_support.GRPO, unlike)
    same_rows([rows_of(again, step) for step in (0, 1)], expected)
    assert asked == []
    (tmp_path / "rollouts" / "rewards.jsonl").write_text("".join(lines[:20]))  # a kill while the second set was graded
    cut = make_feed(tmp_path, rollout_support.GRPO, by_sample)
    same_rows([rows_of(cut, step) for step in (0, 1)], expected)
    assert (tmp_path / "rollouts" / "rewards.jsonl").read_text().splitlines(keepends=True) == lines


class Asking:
    """A teacher that is asked for the student's likeliest tokens, and says nothing."""

    asks = True

    def __init__(self):
        self.asked = []

    def score(self, rollouts):
        self.asked.append({each.trace.key: each.likeliest.tolist() for each in rollouts})
        return [Taught(each.trace, known(len(each.trace.completion_token_ids), 5)) for each in rollouts]


class Sure(Student):
    """Finds at each place the tokens likeliest that follow its number."""

    def sample(self, jobs, name, top_k):
        return [Rollout(each.trace, ids) for each, ids in self._with_ids(super().sample(jobs, name, top_k), top_k)]

    def likeliest(self, traces, top_k):
        self.asked.append("likeliest")
        return [ids for _, ids in self._with_ids(map(Rollout, traces), top_k)]

    @staticmethod
    def _with_ids(rollouts, top_k):
        for each in rollouts:
            count = len(each.trace.completion_token_ids)
            yield each, (np.arange(count)[:, None] + np.arange(top_k) + each.trace.sample).astype(np.int32)


def test_likeliest_tokens_are_read_until_no_checkpoint_needs_them(tmp_path):
    def feed_of(student):
        feed = make_feed(tmp_path, rollout_support.ON_POLICY, rollouts={"updates": 2}, student=student)
        feed._prove = lambda judged: None
        feed.judges.teachers = {"": Asking()}
        return feed

    def files():
        return sorted(path.name for path in (tmp_path / "rollouts").glob("likeliest-*"))

    first = feed_of(Sure())
    for step in range(6):  # sets 0, 1 and 2
        first.step(step)
    expected = first.judges.teachers[""].asked
    again = feed_of(Sure())
    for step in range(6):
        again.step(step)
    assert again.judges.teachers[""].asked == expected and again.student.asked == []

    names = [f"likeliest-{number:06d}.npy" for number in range(3)]
    assert files() == names
    again.checkpointed()  # needs set 3; the one before, which there was none of, needs set 0
    assert files() == names
    again.checkpointed()
    assert files() == []

    without = feed_of(Sure())
    without.step(2)
    assert without.judges.teachers[""].asked == expected[1:2] and without.student.asked == ["likeliest"]
    assert without.student.updates == 1, "the engine has the trainer's weights before it scores"


class Drifting(Sure):
    """Samples other texts at every call, as kernels do that sum in another order."""

    def sample(self, jobs, name, top_k):
        more = len([each for each in self.asked if each != "likeliest"])
        return [replaced(each, more) for each in super().sample(jobs, name, top_k)]


def replaced(each, more):
    """A rollout with so many more tokens."""
    ids = (*CHAT.text_ids("1" * more), *each.trace.completion_token_ids)
    logprobs = tuple(-0.5 for _ in ids)
    trace = replace(each.trace, completion_token_ids=ids, logprobs=logprobs)
    return Rollout(trace, np.full((len(ids), each.likeliest.shape[1]), more, np.int32))


def test_of_a_set_that_a_kill_left_in_part_the_stored_rollouts_are_trained_on(tmp_path):
    def feed_of(directory, student):
        feed = make_feed(directory, rollout_support.ON_POLICY, student=student)
        feed._prove = lambda judged: None
        feed.judges.teachers = {"": Asking()}
        return feed

    first = feed_of(tmp_path, Drifting())
    first.step(0)
    stored = list(TraceStore(tmp_path / "rollouts"))
    with TraceStore(tmp_path / "half" / "rollouts") as half:
        half.append(stored[:5])
    student = Drifting()
    student.asked.append(["an earlier call"])
    cut = feed_of(tmp_path / "half", student)
    trained = {row.key: row.ids.tolist() for row in rows_of(cut, 0)}
    on_disk = {
        t.key: [*t.prompt_token_ids, *t.completion_token_ids] for t in TraceStore(tmp_path / "half" / "rollouts")
    }
    assert trained == on_disk and len(on_disk) == 16
    assert {trace.key: trained[trace.key] for trace in stored[:5]} == {
        trace.key: [*trace.prompt_token_ids, *trace.completion_token_ids] for trace in stored[:5]
    }
    assert student.asked[-1] == "likeliest" and cut.student.updates == 1
    for key, likeliest in cut.judges.teachers[""].asked[0].items():
        assert len(likeliest) == len(trained[key]) - len(CHAT.prompt_ids(by_id(key[0]).messages))


def by_id(id_):
    return next(prompt for prompt in PROMPTS if prompt.id == id_)


def test_the_last_set_is_logged_and_counted_where_the_steps_end_inside_it(tmp_path):
    feed = make_feed(tmp_path, rollout_support.GRPO, by_sample, rollouts={"updates": 3}, max_steps=4)
    logged = []
    for step in range(4):
        feed.step(step)
        logged.append(bool(feed.after(step, {"kl": 0.0, "entropy": 1.0})))
    assert logged == [False, False, True, True] and feed.rollouts == 32
    assert [figures.step for figures in feed.monitor.first] == [3, 4]


# ---- traces of the teacher's beside the student's rows


class Traces:
    """Rows of a stored feed; every third is held out."""

    def __init__(self, count, shares=(1.0,)):
        self.all = [
            Row(("trace", i), np.arange(10, 16 + i % 3, dtype=np.int32), 4, teacher=known(2 + i % 3))
            for i in range(count)
        ]
        self.numbers = [i for i in range(count) if i % 3]
        self.counts = Counts()
        sources = [place % len(shares) for place in range(len(self.numbers))]
        self.order = Order([len(self.all[i].ids) for i in self.numbers], Batching(1, 1, 0), sources, shares)

    def row(self, i):
        return self.all[i]

    def held_out(self):
        return [[row for i, row in enumerate(self.all) if i % 3 == 0]]


def known(count, k=3):
    return np.zeros((count, k), np.int32), np.full((count, k), -1.0, np.float32)


class Teacher:
    asks = False

    def score(self, rollouts):
        return [Taught(each.trace, known(len(each.trace.completion_token_ids), 5)) for each in rollouts]


def mixed_feed(directory, traces, share, **rollouts):
    feed = make_feed(
        directory, rollout_support.ON_POLICY | {"student_share": share}, traces=traces, rollouts=rollouts, max_steps=40
    )
    feed._prove = lambda judged: None  # the teacher here says nothing that could be proved
    feed.judges.teachers = {"": Teacher()}
    return feed


@pytest.mark.parametrize(("share", "updates", "traces"), [(0.5, 1, 30), (0.8, 1, 60), (0.5, 3, 60), (0.97, 1, 60)])
def test_traces_are_mixed_in_the_ratio_of_the_share(tmp_path, share, updates, traces):
    feed = mixed_feed(tmp_path, Traces(traces), share, updates=updates)
    seen, wanted = Counter({i: 0 for i in range(traces) if i % 3}), 16 / updates * (1 - share) / share
    for step in range(9):
        rows = rows_of(feed, step)
        theirs = [row for row in rows if row.key[0] == "trace"]
        assert len(theirs) - int(wanted + 1e-9) in (0, 1)
        assert all((row.sampled == 0).all() and row.sampled.shape == (4, row.supervised) for row in theirs)
        seen.update(row.key[1] for row in theirs)
        batch = collate(rows)
        own = sum(row.supervised for row in rows if row.key[0] != "trace")
        assert batch.sampled.own_s.sum() == own and batch.teacher.ids_sk.shape == (len(batch.targets_s), 5)
        wide = batch.teacher.logprobs_sk[batch.sampled.own_s == 0]
        assert torch.isinf(wide[:, 3:]).all() and not torch.isinf(wide[:, :3]).any()
    assert set(seen) <= {i for i in range(traces) if i % 3}, "a held-out row was trained"
    assert sum(seen.values()) == round(9 * wanted), "over the end of an epoch, and with fractions of a trace"
    assert max(seen.values()) - min(seen.values()) <= 1, "within a pass every trace is seen once"


def test_held_out_traces_are_evaluated(tmp_path):
    feed = mixed_feed(tmp_path, Traces(60), 0.5)
    rows = [row for batch in feed.held_out() for row in batch]
    assert [row.key[1] for row in rows] == list(range(0, 60, 3)) and all((row.sampled == 0).all() for row in rows)
    assert make_feed(tmp_path, rollout_support.GRPO, by_sample).held_out() == []


def test_the_weights_of_mixed_sets_are_kept(tmp_path):
    feed = mixed_feed(tmp_path, Traces(60, (1.0, 0.5)), 0.5)  # 20 rows of each source; an epoch has 20 and 10
    seen = Counter(row.key[1] for step in range(30) for row in rows_of(feed, step) if row.key[0] == "trace")
    sources = {number: i % 2 for i, number in enumerate(feed.traces.numbers)}
    counts = [sum(n for i, n in seen.items() if sources[i] == source) for source in (0, 1)]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.1)


# ---- prompts


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_every_prompt_is_asked_once_in_an_epoch(count, per_set, seed):
    order = PromptOrder(count, per_set, seed)
    for epoch in range(2):
        sets = [order.set(epoch * order.sets_per_epoch + i) for i in range(order.sets_per_epoch)]
        asked = [i for each in sets for i in each]
        assert len(asked) == len(set(asked)) and set(asked) <= set(range(count))
        assert all(len(each) == min(per_set, count) for each in sets) and count - len(asked) < per_set


def test_epochs_are_counted_in_prompts(tmp_path):
    feed = make_feed(
        tmp_path, rollout_support.GRPO, by_sample, rollouts={"updates": 2}, max_steps=None, num_train_epochs=3
    )
    assert feed.total == 3 * 1 * 2  # seven prompts are one set of four, and three that wait
    assert feed.epoch(2) == 1.0 and math.isclose(feed.epoch(6), 3.0)
