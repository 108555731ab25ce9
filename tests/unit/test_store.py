"""The trace store: exact, readable by `datasets`, and complete after `kill -9` or a full disk at any point."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import full_disk, killed_writers, trace

from distill.errors import UserError
from distill.prompts.prompt import Prompt
from distill.traces import parts as parts_module
from distill.traces import store as store_module
from distill.traces.store import Decision, TraceStore, count_traces, read_traces, write_traces
from distill.traces.trace import Trace, Verdict

TEXT = st.text(st.characters(exclude_categories=[]), max_size=30)  # lone surrogates included
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
LOGPROB = st.floats(max_value=0, width=32, allow_nan=False)
PROMPTS = st.builds(
    Prompt,
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}), max_size=3
    ).map(tuple),
    task=st.sampled_from(["math", "code", "choice", "chat"]),
    answer=st.none() | TEXT,
    source=TEXT,
)
TRACES = st.builds(
    Trace,
    prompt=PROMPTS,
    sample=st.integers(0, 2**31 - 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    text=TEXT,
    reasoning=st.none() | TEXT,
    response=TEXT,
    finish_reason=st.sampled_from(["stop", "length", "content_filter", None]),
    teacher=st.just("0123abcd"),
    prompt_token_ids=TOKENS,
    completion_token_ids=TOKENS,
    logprobs=st.none() | st.lists(LOGPROB, max_size=3).map(tuple),
    top_logprobs=st.none()
    | st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), LOGPROB), max_size=2).map(tuple), max_size=3).map(tuple),
)
UNIQUE = st.lists(TRACES, max_size=6, unique_by=lambda trace: trace.key)


def filled(directory: Path, *samples: int) -> TraceStore:
    with TraceStore(directory) as store:
        store.append(trace(sample) for sample in samples)
    return store


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "SHARD_ROWS", 4)
    monkeypatch.setattr(parts_module, "GROUP_ROWS", 3)


# Exactness


@given(first=UNIQUE, second=UNIQUE)
@settings(deadline=None, max_examples=40)
def test_traces_come_back_exactly_before_and_after_compaction(
    tmp_path_factory: pytest.TempPathFactory, first: list[Trace], second: list[Trace]
) -> None:
    store = TraceStore(tmp_path_factory.mktemp("store") / "traces")
    keys = {t.key for t in first}
    expected = first + [t for t in second if t.key not in keys]
    for batch in (first, second):
        with store:
            store.append(batch)
        before = list(store)
        store.compact()
        assert list(store) == before
    assert list(store) == expected
    assert store.keys() == {t.key for t in expected} and len(store) == len(expected)


@given(traces=UNIQUE, reason=st.text(max_size=5), evidence=st.dictionaries(TEXT, TEXT | st.none(), max_size=2))
@settings(deadline=None, max_examples=40)
def test_judged_traces_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, traces: list[Trace], reason: str, evidence: dict[str, str | None]
) -> None:
    directory = tmp_path_factory.mktemp("store") / "kept"
    verdicts = {
        t.key: [Verdict("length", True, reason, evidence), Verdict("correct", False, "wrong")] for t in traces[1:]
    }
    write_traces(directory, traces, verdicts)
    assert list(read_traces(directory)) == [(t, verdicts.get(t.key, [])) for t in traces]
    assert count_traces(directory) == len(traces)
    for (light, said), t in zip(read_traces(directory, ids=False), traces, strict=True):
        assert (light.text, light.prompt, light.key, light.tokens) == (t.text, t.prompt, t.key, t.tokens)
        assert said == verdicts.get(t.key, [])


def test_log_probabilities_are_rounded_to_float32_when_stored(tmp_path: Path) -> None:
    fine = replace(trace(0), logprobs=(-0.1,) * 5, top_logprobs=(((7, -0.1),),))
    with TraceStore(tmp_path) as store:
        store.append([fine])
    (before,) = store
    store.compact()
    assert [before] == list(store)
    assert before.logprobs == (-0.10000000149011612,) * 5  # float32(-0.1), written as float64
    assert before.top_logprobs == (((7, -0.10000000149011612),),)


def test_datasets_reads_the_parts(tmp_path: Path, small_shards: None) -> None:
    import datasets

    store = filled(tmp_path / "traces", *range(10))
    store.compact()
    write_traces(tmp_path / "kept", store, {trace(0).key: [Verdict("f", True, "ok", {"n": 1})]})
    parts = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]  # 4 + 4 + 2, and no ledger
    for folder in ("traces", "kept"):
        rows = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / folder / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert rows.num_rows == 10
        assert rows[3]["messages"] == [
            {"role": "user", "content": "question 0"},
            {"role": "assistant", "content": trace(3).text},
        ]
        assert rows[3]["completion_token_ids"] == [3, 4, 5, 6, 7]
    assert rows[0]["verdicts"] == [{"filter": "f", "keep": True, "reason": "ok", "evidence": '{"n": 1}'}]


def test_half_a_surrogate_pair_shows_as_a_replacement_character(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    odd = replace(trace(0), text="a\ud800b")
    with TraceStore(tmp_path) as store:
        store.append([odd, trace(1)])
    store.compact()
    table = pq.read_table(tmp_path / "part-00000.parquet").to_pylist()
    assert table[0]["text"] == table[0]["messages"][-1]["content"] == "a\ufffdb"
    assert table[1]["exact"] is None
    assert list(store) == [odd, trace(1)]


# Fields from outside

HUGE = 10**4000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sample", -1, "sample: -1 is not an integer from 0"),
        ("sample", True, "sample: True is not"),
        ("seed", 2**63, "seed: 9223372036854775808 is not"),
        ("completion_tokens", "seven", "completion_tokens: 'seven' is not"),
        ("completion_tokens", 10**30, "completion_tokens: 1000000000000000000000000000000 is not"),
        ("completion_tokens", HUGE, "completion_tokens: an integer of more than 40 digits is not"),
        ("completion_tokens", 7.0, "completion_tokens: 7.0 is not"),
        ("text", None, "text: None is not text"),
        ("response", 3, "response: 3 is not text"),
        ("reasoning", ["a"], "reasoning: .* is not text"),
        ("finish_reason", 3, "finish_reason: 3 is not text"),
    ],
)
def test_a_value_that_cannot_be_stored_makes_no_trace(field: str, value: object, message: str) -> None:
    values = {field: value} | ({"completion_token_ids": ()} if field == "completion_tokens" else {})
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        replace(trace(0), **values)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_token_ids", (1, -1)),
        ("completion_token_ids", (2**31,)),
        ("completion_token_ids", (1.5,)),
        ("completion_token_ids", ("a", 1)),
        ("logprobs", ("a",)),
        ("top_logprobs", (((2**40, -1.0),),)),
        ("top_logprobs", (((2, None),),)),
    ],
)
def test_tokens_that_cannot_be_stored_are_refused_and_nothing_is_written(
    tmp_path: Path, field: str, value: object
) -> None:
    with TraceStore(tmp_path) as store:
        with pytest.raises(ValueError, match=f"^{field}: "):
            store.append([trace(1), replace(trace(0), **{field: value})])
        assert list(store) == []


def test_any_finish_reason_is_stored_as_it_is(tmp_path: Path) -> None:
    traces = [replace(trace(i), finish_reason=reason) for i, reason in enumerate(["content_filter", None, "\ud800"])]
    with TraceStore(tmp_path) as store:
        store.append(traces)
    assert list(store) == traces
    store.compact()
    assert list(store) == traces


# Three prices of reading


def test_figures_and_texts_are_those_of_the_traces(tmp_path: Path, small_shards: None) -> None:
    traces = [trace(i) for i in range(5)]
    traces += [replace(trace(5), completion_token_ids=(), completion_tokens=9, text="\ud800")]
    traces += [replace(trace(6), completion_token_ids=(), completion_tokens=None, finish_reason=None)]
    traces += [replace(trace(7), cached_tokens=1, reasoning_tokens=3, form="think")]
    expected = [
        (
            t.key,
            t.finish_reason,
            tokens,
            t.digest,
            2,
            t.cached_tokens or 0,
            t.reasoning_tokens or 0,
            t.form,
            "math",
            known,
        )
        for t, tokens, known in zip(traces, [5] * 5 + [9, 0, 5], [True] * 6 + [False, True], strict=True)
    ]
    light = [
        replace(t, prompt_token_ids=(), completion_token_ids=(), logprobs=None, completion_tokens=t.completion_tokens)
        for t in traces
    ]
    with TraceStore(tmp_path) as store:
        store.append(traces[:3])
    store.compact()
    with store:
        store.append(traces[2:])  # one of them twice
    for _ in range(2):
        assert list(store.figures()) == expected
        assert list(store.iterate(tokens=False)) == light
        store.compact()


def test_every_pass_over_the_traces_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Path] = []
    monkeypatch.setattr(store_module, "decoded", lambda directory, traces: passes.append(directory) or traces)
    store = filled(tmp_path / "traces", *range(3))
    store.compact()
    assert list(store) and list(store.iterate(tokens=False)) and len(passes) == 3
    store.split([tmp_path / "kept"], [Decision(trace(i).key, 0, []) for i in range(3)])
    store.compact()
    assert len(store) == 3 and len(list(store.figures())) == 3 and count_traces(tmp_path / "kept") == 3
    assert len(passes) == 3, "columns are copied and counted without making traces"
    assert list(read_traces(tmp_path / "kept")) and passes[3:] == [tmp_path / "kept"]


# Splitting


def test_split_gives_every_trace_with_its_verdicts_to_one_directory(tmp_path: Path, small_shards: None) -> None:
    odd = replace(trace(9), text="\ud800", top_logprobs=(((1, -0.5),), ()))
    store = filled(tmp_path / "traces", *range(7))
    store.compact()
    with store:
        store.append([trace(6), trace(7), odd])  # the first is in both
    verdicts = {trace(n).key: [Verdict("f", n % 2 == 0, "ok", {"n": n})] for n in range(8)}
    kept, dropped = tmp_path / "filtered" / "kept", tmp_path / "filtered" / "dropped"

    def decisions(place: Callable[[tuple[str, int]], int]) -> Iterator[Decision]:
        return (Decision(key, place(key), verdicts.get(key, [])) for key in [t.key for t in store])

    for _ in range(2):
        store.split([kept, dropped], decisions(lambda key: key[1] % 2))
        assert list(read_traces(kept)) == [(trace(n), verdicts[trace(n).key]) for n in (0, 2, 4, 6)]
        assert list(read_traces(dropped)) == [*((trace(n), verdicts[trace(n).key]) for n in (1, 3, 5, 7)), (odd, [])]
        store.compact()
    verdicts.clear()
    store.split([kept, dropped], decisions(lambda key: 1))
    assert count_traces(dropped) == 9 and list(read_traces(kept)) == []
    assert sorted(path.name for path in kept.parent.iterdir()) == ["dropped", "kept"]

    def fail(key: tuple[str, int]) -> int:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        store.split([kept, dropped], decisions(fail))
    with pytest.raises(AssertionError, match="a decision for each trace"):
        store.split([kept, dropped], reversed(list(decisions(lambda key: 1))))
    assert count_traces(dropped) == 9
    assert sorted(path.name for path in kept.parent.iterdir()) == ["dropped", "kept"]


# Compaction


def test_ledger_and_parts_together_give_each_trace_once(tmp_path: Path, small_shards: None) -> None:
    store = filled(tmp_path, *range(6))
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    store.compact()
    (tmp_path / "part-00001.parquet").unlink()  # killed after the first part of two had its name
    (tmp_path / "ledger.jsonl").write_bytes(ledger)
    (tmp_path / ".part-00001.parquet.tmp").write_bytes(b"half")
    assert [t.sample for t in store] == list(range(6)) and len(store) == 6
    filled(tmp_path, 6)
    store.compact()
    assert list(store) == [trace(sample) for sample in range(7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]


def test_readers_are_not_overtaken_by_compaction(tmp_path: Path) -> None:
    """The parts are listed, then the ledger becomes a part and is removed: nothing is missed, nothing comes twice."""
    store = filled(tmp_path, 0)
    store.compact()
    filled(tmp_path, 1, 2)
    traces, figures = iter(store), store.figures()
    first = next(traces), next(figures)
    TraceStore(tmp_path).compact()
    assert not (tmp_path / "ledger.jsonl").exists()
    assert [first[0], *traces] == [trace(sample) for sample in range(3)]
    assert [each.key for each in (first[1], *figures)] == [trace(sample).key for sample in range(3)]


@pytest.mark.parametrize("reading", [TraceStore.keys, TraceStore.tasks, TraceStore.is_empty, len])
def test_the_ledger_is_read_before_the_parts_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: Callable[[TraceStore], object]
) -> None:
    store = filled(tmp_path, 0)
    expected, listed = reading(store), parts_module.parts

    def compacted(directory: Path) -> list[Path]:
        before = listed(directory)
        with monkeypatch.context() as patch:
            patch.setattr(parts_module, "parts", listed)
            TraceStore(tmp_path).compact()
        return before

    for module in (parts_module, store_module):
        monkeypatch.setattr(module, "parts", compacted)
    assert reading(store) == expected


def test_new_parts_never_take_a_number_in_use(tmp_path: Path, small_shards: None) -> None:
    store = filled(tmp_path, *range(12))
    store.compact()
    (tmp_path / "part-00001.parquet").unlink()  # a user removed a damaged one
    assert [t.sample for t in store] == [0, 1, 2, 3, 8, 9, 10, 11]
    filled(tmp_path, 4, 5, 6, 7)
    store.compact()
    assert sorted(t.sample for t in store) == list(range(12))


def test_part_that_was_copied_in_twice_counts_once(tmp_path: Path) -> None:
    store = filled(tmp_path, 0, 1)
    store.compact()
    shutil.copy(tmp_path / "part-00000.parquet", tmp_path / "part-00007.parquet")
    assert [t.sample for t in store] == [0, 1] and len(store) == 2


def test_damaged_part_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    store.compact()
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1 nonsense")
    for read in (lambda: list(store), store.keys, lambda: list(read_traces(tmp_path))):
        with pytest.raises(UserError, match=r"part-00000\.parquet: damaged .*delete it and rerun") as refusal:
            read()
        assert "\n" not in str(refusal.value)


def test_empty_stores(tmp_path: Path) -> None:
    store = TraceStore(tmp_path / "none")
    assert list(store) == [] and len(store) == 0
    store.compact()
    assert not (tmp_path / "none").exists()
    filled(tmp_path / "empty").compact()
    assert list((tmp_path / "empty").iterdir()) == []


def test_write_traces_replaces_the_directory_and_keeps_it_when_it_fails(tmp_path: Path) -> None:
    kept = tmp_path / "filtered" / "kept"
    write_traces(kept, [trace(0), trace(1)])
    write_traces(kept, [trace(2)])
    assert [t.sample for t, _ in read_traces(kept)] == [2]

    def failing():
        yield trace(3)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="gone"):
        write_traces(kept, failing())
    assert [t.sample for t, _ in read_traces(kept)] == [2]
    write_traces(kept, [])
    assert list(read_traces(kept)) == []
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_reading_where_nothing_was_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage"):
        list(read_traces(tmp_path / "kept"))


# Full disks and killed processes


def test_full_disk_while_appending_keeps_what_was_whole(tmp_path: Path) -> None:
    with TraceStore(tmp_path) as store:
        store.append([trace(0)])
        with full_disk(5000), pytest.raises(OSError):
            store.append([trace(1, size=20_000)])
        assert list(store) == [trace(0)]
        store.append([trace(1)])
    assert list(store) == [trace(0), trace(1)]


def test_full_disk_while_compacting_loses_nothing_and_the_rerun_finishes(tmp_path: Path, small_shards: None) -> None:
    traces = [trace(sample, size=50_000 if sample == 5 else 10) for sample in range(8)]
    with TraceStore(tmp_path) as store:
        store.append(traces)
    with full_disk(20_000), pytest.raises(OSError):
        store.compact()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.jsonl", "part-00000.parquet"]
    assert list(store) == traces
    store.compact()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    assert list(store) == traces


def test_every_acknowledged_trace_survives_kill_minus_nine(tmp_path: Path) -> None:
    """Twenty writers, one after the other, each killed at a random moment of appending or compacting."""
    store = TraceStore(tmp_path / "traces")
    for acknowledged in killed_writers("store", store.directory, times=20, longest=0.15):
        samples = [t.sample for t in store]
        assert sorted(samples) == list(range(len(samples))) and len(store) == len(samples)
        assert acknowledged <= set(samples)
    assert all(t == trace(t.sample, size=150_000) for t in store)
    with store:
        store.append([trace(len(store))])
    store.compact()
    assert len(store) == len(samples) + 1 and not (store.directory / "ledger.jsonl").exists()


def test_a_part_of_a_store_has_the_wanted_prompts_and_samples(tmp_path):
    store = TraceStore(tmp_path)
    with store:
        store.append([trace(0), trace(1), trace(2)])
    for _ in range(2):  # in the ledger, then in a part
        part = store.part_of([trace(0).prompt, trace(1).prompt], 1)
        wanted = [key for key in (trace(0).key, trace(1).key, trace(2).key) if key[1] < 1]
        wanted = [key for key in wanted if key[0] in (trace(0).prompt.id, trace(1).prompt.id)]
        assert [each.key for each in part] == [each.key for each in part.figures()] == wanted
        assert len(part) == len(wanted) < 3 and len(store) == 3
        assert f"{3 - len(wanted)} of 3 stored traces are left out" in part.left_out
        store.compact()
