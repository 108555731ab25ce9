"""Traces as rows: what is dropped, cut, refused or held out, always counted; and the cache they are read from."""

import numpy as np
import pytest
import train_support as support

from distill.chat import Chat
from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.recipe import Train
from distill.traces.trace import Trace
from distill.train.rows import stored as module
from distill.train.rows.encode import Encoder, Encoding, Source, conversation
from distill.train.rows.feed import StoredFeed
from distill.train.rows.prepare import check_steps


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return Chat.load(support.make_student(tmp_path_factory.mktemp("student")), "chatml")


@pytest.fixture
def encode(chat, tmp_path):
    """Traces → (rows, witnesses)."""

    def encode(traces, plain=False, wrap=False, **encoding):
        encoder = Encoder(tmp_path / "tokens", chat, Encoding(**({"max_length": 256} | encoding)))
        for _ in encoder.add(Source("test", traces, plain=plain, wrap=wrap), 0):
            pass
        return encoder.finish(), encoder.witnesses

    return encode


def test_rows_are_in_the_order_of_their_keys_whatever_the_order_of_the_traces(encode):
    traces = support.sums(20)
    there, back = ([r.key for r in encode(order)[0]] for order in (traces, traces[::-1]))
    assert there == back == sorted(t.key for t in traces)


def test_a_row_is_what_the_chat_renders(encode, chat):
    traces = support.sums(300)  # more than are tokenised together
    rows, _ = encode(traces)
    by_key = {trace.key: trace for trace in traces}
    place = 0
    for row in rows:
        ids, prompt_tokens = chat.training_ids(by_key[row.key].messages)
        assert (row.ids.tolist(), row.prompt_tokens, row.place) == (ids, prompt_tokens, place)
        place += row.supervised
    assert rows.counts.supervised == place and rows.counts.tokens == sum(len(row.ids) for row in rows)


def test_long_rows_are_dropped_whole_and_counted(encode, chat):
    short, long = support.trace("q", "<think>a</think>b"), support.trace("q", f"<think>{'a' * 100}</think>b", 1)
    rows, _ = encode([short, long], max_length=80)
    ids, _ = chat.training_ids(long.messages)
    assert [r.key for r in rows] == [short.key]
    assert (rows.counts.dropped_rows, rows.counts.dropped_tokens) == (1, len(ids))
    assert rows.counts.supervised == len("<think>a</think>b") + 1  # and the end token


def test_rows_that_are_all_cut_are_refused(encode):
    long = [support.trace("q", f"<think>{'a' * 100}</think>b", sample) for sample in range(2)]
    with pytest.raises(UserError, match=r"all 2 rows are longer than .* 80.*how to end; raise max_length"):
        encode(long, max_length=80, overlong="truncate")


def test_a_training_without_a_step_is_refused(encode):
    rows, _ = encode(support.sums(10))
    check_steps(rows, Train(), 1)
    few = Train.model_validate({"data": [{"kind": "kept", "weight": 0.01}]})
    with pytest.raises(UserError, match=r"10 rows in 3 epochs are less than one optimiser step: raise"):
        check_steps(rows, few, 1)


def test_an_epoch_counts_the_rows_of_a_source_as_often_as_it_sees_them(encode):
    rows, _ = encode(support.sums(10))
    rows.sources = np.array([0] * 6 + [1] * 4, np.int16)
    first, second = rows.supervised(range(6)), rows.supervised(range(6, 10))
    assert StoredFeed(rows, Train(), shares=(1.0, 2.5)).supervised_per_epoch == first + round(2.5 * second)
    assert StoredFeed(rows, Train(), shares=(1.0, 1.0)).supervised_per_epoch == rows.counts.supervised


def test_long_rows_are_cut_where_that_is_asked_for_and_counted(encode, chat):
    long = support.trace("q", f"<think>{'a' * 100}</think>b", 1)
    hopeless = support.trace("q" * 90, "<think>a</think>b", 2)  # its prompt alone is longer
    short = support.trace("q", "<think>a</think>b")
    rows, witnesses = encode([long, short, hopeless], max_length=80, overlong="truncate")
    ids, _ = chat.training_ids(long.messages)
    assert [(r.key[1], len(r.ids)) for r in rows] == [(0, len(chat.training_ids(short.messages)[0])), (1, 80)]
    assert rows[1].ids.tolist() == ids[:80] and rows.truncated.tolist() == [False, True]
    assert (rows.counts.truncated_rows, rows.counts.truncated_tokens) == (1, len(ids) - 80)
    assert rows.counts.dropped_rows == 1
    assert {w.sample for _, w in witnesses.values()} == {0}, "a cut row proves nothing about the text"


def test_long_rows_are_refused_where_that_is_asked_for(encode):
    with pytest.raises(
        UserError, match=r"sample 1 has \d+ tokens, more than train\.max_length 80.*`drop` or `truncate`"
    ):
        encode([support.trace("q", f"<think>{'a' * 100}</think>b", 1)], max_length=80, overlong="raise")


def test_only_long_rows_is_an_error_that_says_how_long(encode, chat):
    traces = [support.trace("q", "<think></think>" + "a" * 60), support.trace("q", "<think></think>" + "a" * 70, 1)]
    shortest = len(chat.training_ids(traces[0].messages)[0])
    with pytest.raises(
        UserError, match=rf"^all 2 kept traces .* train\.max_length 20; the shortest has {shortest} tokens$"
    ):
        encode(traces, max_length=20)


@pytest.mark.parametrize("question, text", [("q\ud800", "a"), ("q", "<think>\udfff</think>a")])
def test_text_that_is_not_unicode_is_one_line(encode, question, text):
    """JSON can hold it, and a tokenizer would stop with a TypeError."""
    trace = Trace(Prompt.from_question(question, None), 7, 0, text, None, text, "stop", "t")
    with pytest.raises(UserError, match=r"^trace \w+ sample 7 contains a lone surrogate"):
        encode([trace])


def test_a_trace_without_reasoning_is_refused_unless_it_is_meant(encode):
    plain = support.trace("q", "four")
    with pytest.raises(
        UserError, match=r"sample 0 of test has no closed think block: set filter\.format .* `plain: true`"
    ):
        encode([*support.sums(3), plain])
    rows, _ = encode([*support.sums(3), plain], plain=True)
    assert len(rows) == 4 and rows.counts.plain_rows == 1
    rows, _ = encode([plain], content="answer")
    assert rows.counts.plain_rows == 0


def test_reasoning_without_tags_is_wrapped_and_counted(encode, chat):
    steps = "First 2 + 2.\n\nThat is 4.\n\nThe answer is \\boxed{4}."
    traces = [*support.sums(2), support.trace("q", steps), support.trace("r", "four"), support.trace("s", "\\boxed{4}")]
    rows, _ = encode(traces, wrap=True)
    assert (rows.counts.rows, rows.counts.wrapped_rows, rows.counts.undivided_rows) == (3, 1, 2)
    assert rows.counts.plain_rows == 0
    texts = {row.key[0]: chat.decode(row.ids[row.prompt_tokens :].tolist()) for row in rows}
    wrapped = "<think>\nFirst 2 + 2.\n\nThat is 4.\n</think>\n\nThe answer is \\boxed{4}."
    assert texts[traces[2].prompt.id].startswith(wrapped)
    rows, _ = encode(traces, wrap=True, content="answer")
    assert chat.decode(rows[rows.keys.index(traces[2].key)].ids.tolist()).count("First") == 0
    with pytest.raises(UserError, match=r"wrap finds reasoning before a \\boxed\{\} in none of 1 traces; set `plain"):
        encode([support.trace("r", "four")], wrap=True)


def test_the_witnesses_are_the_first_the_longest_and_one_at_random(encode, chat):
    traces = support.sums(30)
    seeds = [encode(traces, seed=seed)[1] for seed in range(20)]
    longest = max(traces, key=lambda t: len(chat.training_ids(t.messages)[0]))
    assert {w["first"][1].key for w in seeds} == {traces[0].key}
    assert {w["longest"][1].key for w in seeds} == {longest.key}
    assert len({w["random"][1].key for w in seeds}) > 5


def test_answer_leaves_the_reasoning_out():
    trace = support.trace("q", "<think>\nwhy\n</think>\n\nbecause")
    assert conversation(trace, "answer")[-1]["content"] == "because"
    assert conversation(trace, "reasoning")[-1]["content"] == trace.text


def test_held_out_rows_are_whole_prompts_about_as_many_as_asked_for_and_stay(encode):
    traces = [support.trace(f"{i}?", f"<think>{s}</think>b", s) for i in range(400) for s in range(2)]
    rows, _ = encode(traces, held_out=0.2)
    out = {key for key, held in zip(rows.keys, rows.held_out, strict=True) if held}
    assert 0.14 < len(out) / len(traces) < 0.26 and rows.counts.held_out_rows == len(out)
    assert all((prompt, 1 - sample) in out for prompt, sample in out)
    fewer, _ = encode(traces[:300], held_out=0.2)
    assert {key for key, held in zip(fewer.keys, fewer.held_out, strict=True) if held} == out & set(fewer.keys)
    assert not encode(traces)[0].held_out.any()


def test_holding_out_everything_is_an_error(encode):
    with pytest.raises(UserError, match=r"train\.val_size 0\.999999 holds out all 2 rows"):
        encode(support.sums(2), held_out=0.999999)


def test_the_cache_gives_back_the_rows_and_knows_what_it_was_made_from(encode, tmp_path):
    rows, _ = encode(support.sums(20), held_out=0.3)
    rows.proved = ("proved",)
    place = tmp_path / "tokens"
    assert module.load(place, "abc") is None, "without its last file it is not whole"
    module.store(rows, place, "abc")
    again = module.load(place, "abc")
    assert [(r.key, r.ids.tolist(), r.prompt_tokens, r.place) for r in again] == [
        (r.key, r.ids.tolist(), r.prompt_tokens, r.place) for r in rows
    ]
    assert np.array_equal(again.held_out, rows.held_out)
    assert (again.counts, again.proved) == (rows.counts, ("proved",))
    assert isinstance(again.ids, np.memmap)
    assert module.load(place, "abd") is None
    assert module.load(place) is not None


@pytest.mark.parametrize("file", ["ids.bin", "index.parquet", "rows.json", "teacher-ids.npy"])
@pytest.mark.parametrize("damage", ["a bit", "the end", "all of it"])
def test_a_damaged_file_of_the_cache_is_named(encode, tmp_path, file, damage):
    rows, _ = encode(support.sums(20))
    place = tmp_path / "tokens"
    np.save(place / "teacher-ids.npy", np.arange(40))
    module.store(rows, place, "abc")
    assert module.damage(place, "abc") is None
    path = place / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "a bit":
            path.write_bytes(data)
        case "the end":
            path.write_bytes(data[:-8])
        case "all of it":
            path.unlink()
    assert str(path) in module.damage(place, "abc")
    if file != "rows.json":
        assert module.damage(place, "abd") is None, "rows of other things are made again anyway"
    if file in ("rows.json", "index.parquet"):
        assert module.load(place, "abc") is None


def test_a_directory_that_is_not_there_is_not_damaged(tmp_path):
    assert module.damage(tmp_path / "tokens", "abc") is None and module.load(tmp_path / "tokens") is None
