"""Rows, batches and the order of steps: small cases worked out by hand, and properties over many."""

import itertools

import numpy as np
import pytest
import train_support as support
from hypothesis import given
from hypothesis import strategies as st

from distill.chat import Chat
from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace
from distill.train.data import Order, Row, collate, conversation, encode


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return Chat.load(support.make_student(tmp_path_factory.mktemp("student")), "chatml")


def row(length, prompt_tokens, first_id=0):
    return Row(("p", 0), np.arange(first_id, first_id + length, dtype=np.int32), prompt_tokens)


def test_a_batch_worked_out_by_hand():
    batch = collate([row(5, 2, 10), row(3, 1, 20)], pad_id=99)
    assert batch.input_ids_bt.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 99, 99]]
    # Row 0 learns 12, 13, 14, said at its positions 1, 2, 3; row 1 learns 21, 22, at 0 and 1, flat 5 and 6.
    assert batch.positions_s.tolist() == [1, 2, 3, 5, 6]
    assert batch.targets_s.tolist() == [12, 13, 14, 21, 22]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_what_is_supervised_is_every_completion_whole_even_where_pad_is_eos(parts):
    """The pad id is also the id of every row's end token: masking by id would lose it."""
    rows = [
        Row(("p", i), np.asarray([5] * prompt + [6] * (done - 1) + [7], dtype=np.int32), prompt)
        for i, (prompt, done) in enumerate(parts)
    ]
    batch = collate(rows, pad_id=7)
    width = batch.input_ids_bt.shape[1]
    for b, (prompt, done) in enumerate(parts):
        mine = [
            (p, t) for p, t in zip(batch.positions_s.tolist(), batch.targets_s.tolist(), strict=True) if p // width == b
        ]
        assert [p % width + 1 for p, _ in mine] == list(range(prompt, prompt + done))
        assert [t for _, t in mine] == [6] * (done - 1) + [7]


def test_rows_are_in_the_order_of_their_keys_whatever_the_order_of_the_traces(chat):
    traces = support.sums(20)
    there, back = (encode(order, chat, "reasoning", 256, 0) for order in (traces, traces[::-1]))
    assert [r.key for r in there.rows] == [r.key for r in back.rows] == sorted(t.key for t in traces)


def test_long_rows_are_dropped_whole_and_counted(chat):
    short, long = support.trace("q", "<think>a</think>b"), support.trace("q", f"<think>{'a' * 100}</think>b", 1)
    data = encode([short, long], chat, "reasoning", 80, 0)
    ids, _ = chat.training_ids(long.messages)
    assert [r.key for r in data.rows] == [short.key]
    assert (data.dropped_rows, data.dropped_tokens) == (1, len(ids))
    assert data.tokens == len(data.rows[0].ids) and data.supervised == len("<think>a</think>b") + 1  # and the end token


def test_only_long_rows_is_an_error_that_says_how_long(chat):
    traces = [support.trace("q", "a" * 60), support.trace("q", "a" * 70, 1)]
    shortest = len(chat.training_ids(traces[0].messages)[0])
    with pytest.raises(
        UserError, match=rf"^all 2 kept traces .* train\.max_length 20; the shortest has {shortest} tokens$"
    ):
        encode(traces, chat, "reasoning", 20, 0)


@pytest.mark.parametrize("question, text", [("q\ud800", "a"), ("q", "<think>\udfff</think>a")])
def test_text_that_is_not_unicode_is_one_line(chat, question, text):
    """JSON can hold it, and a tokenizer would stop with a TypeError."""
    trace = Trace(Prompt.from_question(question, None), 7, 0, text, None, text, "stop", "t")
    with pytest.raises(UserError, match=r"^trace \w+ sample 7 holds half a character"):
        encode([trace], chat, "reasoning", 99, 0)


def test_the_witnesses_are_the_first_the_longest_and_one_at_random(chat):
    traces = support.sums(30)
    seeds = [encode(traces, chat, "reasoning", 256, seed).witnesses for seed in range(20)]
    longest = max(traces, key=lambda t: len(chat.training_ids(t.messages)[0]))
    assert {w["first"].key for w in seeds} == {traces[0].key}
    assert {w["longest"].key for w in seeds} == {longest.key}
    assert len({w["random"].key for w in seeds}) > 5


def test_answer_leaves_the_reasoning_out():
    trace = support.trace("q", "<think>\nwhy\n</think>\n\nbecause")
    assert conversation(trace, "answer")[-1]["content"] == "because"
    assert conversation(trace, "reasoning")[-1]["content"] == trace.text


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_epoch_holds_every_row_once(lengths, batch_size, accumulation, seed):
    order = Order(lengths, batch_size, accumulation, seed)
    for epoch in range(2):
        steps = [order.step(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(steps))) == list(range(len(lengths)))
        assert all(1 <= len(step) <= accumulation for step in steps)
        assert all(1 <= len(batch) <= batch_size for step in steps for batch in step)


def test_a_step_depends_on_its_number_and_the_seed_alone():
    lengths = [i % 13 + 1 for i in range(100)]
    one, other, reseeded = Order(lengths, 4, 2, 0), Order(lengths, 4, 2, 0), Order(lengths, 4, 2, 1)
    forward = [one.step(k) for k in range(40)]
    assert [other.step(k) for k in reversed(range(40))] == forward[::-1]
    assert [reseeded.step(k) for k in range(40)] != forward
    assert forward[: one.steps_per_epoch] != forward[one.steps_per_epoch : 2 * one.steps_per_epoch]


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(10, 100, 512).tolist()
    order = Order(lengths, 16, 1, 0)
    batches = [[lengths[i] for i in order.step(k)[0]] for k in range(order.steps_per_epoch)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.9  # unsorted batches of these lengths are filled to 0.58
    means = [np.mean(batch) for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5  # and the batches come in no order of length
