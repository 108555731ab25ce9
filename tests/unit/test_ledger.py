"""The ledger: any rows go through, and a cut-off end is the only damage a crash can do."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import full_disk, killed_writers, row

from distill.errors import UserError
from distill.traces import ledger as ledger_module
from distill.traces.ledger import Ledger

# st.text() leaves surrogates out; a model's output may hold half of one
TEXT = st.text(st.characters(exclude_categories=[]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=5)


@given(batches=st.lists(ROWS, max_size=3))
@settings(deadline=None, max_examples=60)
def test_rows_come_back_exactly_in_order(tmp_path_factory: pytest.TempPathFactory, batches: list[Any]) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    for batch in batches:
        with ledger:
            ledger.append(batch)
        assert ledger.cut_off == 0
    assert list(ledger.rows()) == [row for batch in batches for row in batch]


@given(rows=st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=4), data=st.data())
@settings(deadline=None, max_examples=60)
def test_cut_anywhere_keeps_every_whole_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.append(rows)
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    kept = rows[: whole[:size].count(b"\n")]
    assert list(Ledger(path).rows()) == kept  # reading alone changes nothing
    assert path.stat().st_size == size
    with Ledger(path) as ledger:
        assert ledger.cut_off == size - path.stat().st_size
        ledger.append([{"new": 1}])
    assert list(ledger.rows()) == [*kept, {"new": 1}]


def written(path: Path, *rows: dict[str, Any]) -> bytes:
    with Ledger(path) as ledger:
        ledger.append(rows)
    return path.read_bytes()


def test_unwritten_blocks_of_a_power_cut_count_as_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = written(path, {"a": 1})
    path.write_bytes(whole + b"\0" * 100 + b"\n")
    assert list(Ledger(path).rows()) == [{"a": 1}]
    with Ledger(path) as ledger:
        assert ledger.cut_off == 101
    assert path.read_bytes() == whole


@pytest.mark.parametrize("broken", [b'{"a": ', b"[1]", b"\xff", b"", b'{"a": 2}', b'{"a": 2, "crc32": "00000000"}'])
def test_broken_line_in_the_middle_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = written(path, {"a": 1}, {"a": 3}).splitlines(keepends=True)
    path.write_bytes(whole[0] + broken + b"\n" + whole[1])
    with Ledger(path) as ledger, pytest.raises(UserError, match=r"ledger\.jsonl, line 2: .*delete") as refusal:
        list(ledger.rows())
    assert "\n" not in str(refusal.value)
    assert ledger.cut_off == 0


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """A flipped bit never changes a row: reading names the line, and opening for appending removes nothing."""
    path = tmp_path / "ledger.jsonl"
    whole = written(path, {"n": 1}, {}, {"n": 10, "crc32": "x", "text": "a\u2028 @"})
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"ledger\.jsonl, line \d"):
            list(Ledger(path).rows())
        try:
            with Ledger(path):
                pass
        except UserError as error:
            assert "its last line: damaged" in str(error)
        assert path.read_bytes() == damaged


def test_added_rows_are_stored_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_SECONDS", 3600.0)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.add({"n": 0})
        ledger.add({"n": 1})
        assert list(ledger.rows()) == []
    assert list(ledger.rows()) == [{"n": 0}, {"n": 1}]
    with pytest.raises(KeyboardInterrupt), ledger:
        ledger.add({"n": 2})
        raise KeyboardInterrupt
    assert [row["n"] for row in ledger.rows()] == [0, 1, 2]
    monkeypatch.setattr(ledger_module, "FLUSH_SECONDS", 0.0)
    with ledger:
        ledger.add({"n": 3})
        assert [row["n"] for row in ledger.rows()] == [0, 1, 2, 3]


def test_absent_ledger_has_no_rows_and_is_not_made_by_reading(tmp_path: Path) -> None:
    assert list(Ledger(tmp_path / "ledger.jsonl").rows()) == []
    assert list(tmp_path.iterdir()) == []


def test_failed_append_leaves_whole_rows_and_the_next_one_works(tmp_path: Path) -> None:
    big = {"text": "x" * 3000}
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append([{"n": 0}])
        with full_disk(5000), pytest.raises(OSError):
            ledger.append([big, big])
        assert list(ledger.rows()) == [{"n": 0}]
        ledger.append([{"n": 1}])
    with ledger:
        assert ledger.cut_off == 0
    assert list(ledger.rows()) == [{"n": 0}, {"n": 1}]


def test_row_that_is_not_json_stores_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(TypeError):
        ledger.append([{"n": 0}, {"n": object()}])
    assert list(ledger.rows()) == []


def test_rows_are_readable_lines(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append([{"text": "a\u2028b\r\n\ud800"}])
    (line,) = ledger.path.read_text("ascii").splitlines()
    assert json.loads(line) == {"text": "a\u2028b\r\n\ud800", "crc32": "cf4c5ece"}


def test_every_acknowledged_row_survives_kill_minus_nine(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for acknowledged in killed_writers("ledger", ledger.path, times=10, longest=0.03):
        numbers = []
        for found in ledger.rows():
            assert found == row(found["number"])
            numbers.append(found["number"])
        assert numbers == list(range(len(numbers)))
        assert acknowledged <= set(numbers)
