"""Batches, packing and the order of steps: small cases worked out by hand, and properties over many."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.train.rows.batches import Batching, Order, Row, best_fit, collate


def row(length, prompt_tokens, first_id=0, **more):
    return Row(("p", 0), np.arange(first_id, first_id + length, dtype=np.int32), prompt_tokens, **more)


def test_a_batch_worked_out_by_hand():
    batch = collate([row(5, 2, 10), row(3, 1, 20)])
    assert batch.input_ids_t.tolist() == [10, 11, 12, 13, 14, 20, 21, 22]
    assert batch.position_ids_t.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    # Row 0 learns 12, 13, 14, said at its positions 1, 2, 3; row 1 learns 21, 22, at 0 and 1, which are 5 and 6.
    assert batch.positions_s.tolist() == [1, 2, 3, 5, 6]
    assert batch.targets_s.tolist() == [12, 13, 14, 21, 22]
    assert batch.teacher is None and batch.sampled is None
    assert batch.lengths == (5, 3)


def test_what_is_known_of_tokens_goes_with_them():
    ids, logprobs = np.array([[7, 8], [9, 0]], np.int32), np.array([[-1, -2], [-3, -np.inf]], np.float32)
    wide = np.array([[1, 2, 3]], np.int32), np.array([[-4, -5, -6]], np.float32)
    sampled = np.arange(8, dtype=np.float32).reshape(4, 2)
    batch = collate(
        [row(5, 3, teacher=(ids, logprobs), sampled=sampled), row(3, 2, teacher=wide, sampled=10 + sampled[:, :1])]
    )
    assert batch.teacher.ids_sk.tolist() == [[7, 8, 0], [9, 0, 0], [1, 2, 3]]
    assert batch.teacher.logprobs_sk.tolist() == [[-1, -2, -np.inf], [-3, -np.inf, -np.inf], [-4, -5, -6]]
    assert batch.sampled.logprobs_s.tolist() == [0, 1, 10] and batch.sampled.own_s.tolist() == [6, 7, 16]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_what_is_supervised_is_every_completion_whole(parts):
    rows = [
        Row(("p", i), np.asarray([5] * prompt + [6] * (done - 1) + [7], dtype=np.int32), prompt)
        for i, (prompt, done) in enumerate(parts)
    ]
    batch = collate(rows)
    starts = np.cumsum([0, *batch.lengths])
    for start, stop, (prompt, done) in zip(starts, starts[1:], parts, strict=False):
        mine = [
            (p - start, t)
            for p, t in zip(batch.positions_s.tolist(), batch.targets_s.tolist(), strict=True)
            if start <= p < stop
        ]
        assert [p + 1 for p, _ in mine] == list(range(prompt, prompt + done))
        assert [t for _, t in mine] == [6] * (done - 1) + [7]


def test_best_fit_worked_out_by_hand():
    # 7 opens a bin (room 3), 6 another (room 4); 4 fills the second, 3 the first; 2 opens a third, which takes the 1.
    assert best_fit([4, 7, 1, 6, 3, 2], 10) == [[1, 4], [3, 0], [5, 2]]
    # 5, 4 and 3 leave rooms of 1, 2 and 3 of six: the 2 goes where it leaves nothing.
    assert best_fit([5, 4, 3, 2], 6) == [[0], [1, 3], [2]]


@given(st.lists(st.integers(1, 64), max_size=300), st.integers(64, 200))
def test_best_fit_keeps_every_item_in_as_few_bins_as_promised(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in items) for items in bins]
    assert all(0 < total <= capacity for total in totals)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) * (4 / 3) + 1  # fewest ≥ ⌈Σ/c⌉; coarse, and never wrong
    assert sum(total <= capacity / 2 for total in totals) <= 1  # two half-empty bins would have been one


@pytest.mark.parametrize("packing", [None, 60])
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    batch_size=st.integers(1, 7),
    per_step=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_every_epoch_holds_every_row_once(packing, lengths, batch_size, per_step, seed):
    order = Order(lengths, Batching(batch_size, per_step, seed, packing))
    done = 0
    for epoch in range(2):
        last = order.steps(epoch + 1)
        steps = [order.step(i) for i in range(done, last)]
        done = last
        batches = list(itertools.chain.from_iterable(steps))
        assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
        assert all(1 <= len(step) <= per_step for step in steps)
        if packing:
            assert all(sum(lengths[i] for i in batch) <= packing * batch_size for batch in batches)
        else:
            assert all(1 <= len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("packing", [None, 40])
def test_a_step_depends_on_its_number_and_the_seed_alone(packing):
    lengths = [i % 13 + 1 for i in range(100)]
    one, other, reseeded = (Order(lengths, Batching(4, 2, seed, packing)) for seed in (0, 0, 1))
    forward = [one.step(k) for k in range(20)]
    assert [other.step(k) for k in reversed(range(20))] == forward[::-1]
    assert [reseeded.step(k) for k in range(20)] != forward
    first = one.steps(1)
    assert forward[:first] != forward[first : 2 * first]


def test_epochs_and_steps_by_hand():
    order = Order([1] * 10, Batching(2, 2, 0))  # five batches an epoch, three steps, the last of one batch
    assert [len(order.step(k)) for k in range(6)] == [2, 2, 1, 2, 2, 1]
    assert [order.epoch_of(k) for k in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [order.steps(epochs) for epochs in (0.5, 1, 1.34, 2, 2.1)] == [2, 3, 5, 6, 7]


def test_batches_hold_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(10, 100, 512).tolist()
    order = Order(lengths, Batching(16, 1, 0))
    batches = [[lengths[i] for i in order.step(k)[0]] for k in range(order.steps(1))]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.9  # unsorted batches of these lengths are filled to 0.58
    means = [np.mean(batch) for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5  # and the batches come in no order of length


def test_packed_batches_are_full():
    lengths = np.random.default_rng(0).integers(100, 2000, 4000).tolist()
    order = Order(lengths, Batching(1, 1, 0, packing=4096))
    totals = [sum(lengths[i] for i in order.step(k)[0]) for k in range(order.steps(1))]
    assert np.mean(totals) / 4096 > 0.99


def test_shares_say_how_often_an_epoch_sees_a_row():
    """Six rows once, four rows two and a quarter times: over four epochs each of these comes nine times."""
    order = Order([3] * 10, Batching(1, 1, 0), sources=[0] * 6 + [1] * 4, shares=(1.0, 2.25))
    epochs = [
        Counter(order.step(k)[0][0] for k in range(order.steps(epoch), order.steps(epoch + 1))) for epoch in range(4)
    ]
    assert all(epoch[i] == 1 for epoch in epochs for i in range(6))
    assert all(sum(epoch[i] for i in range(6, 10)) == 9 for epoch in epochs)
    assert all(sum(epoch[i] for epoch in epochs) == 9 for i in range(6, 10))
