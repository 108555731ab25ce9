"""A record notices whatever changes a file, and says what."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill import integrity
from distill.integrity import FileRecord, first_damage, record_files


def test_a_record_is_the_size_the_time_and_the_hash_of_each_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integrity, "CHUNK", 4)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    expected = tuple(hashlib.sha256(part).hexdigest()[:32] for part in (b"0123", b"4567", b"89"))
    assert FileRecord.of(path) == FileRecord(10, path.stat().st_mtime_ns, expected)


@given(content=st.binary(min_size=1, max_size=40), data=st.data())
def test_any_changed_bit_is_damage_although_size_and_time_are_kept(tmp_path_factory, content: bytes, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrity, "CHUNK", 16)
        path = tmp_path_factory.mktemp("bits") / "file"
        path.write_bytes(content)
        record = FileRecord.of(path)
        assert record.damage(path) is None
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        os.utime(path, ns=(record.mtime_ns, record.mtime_ns))
        assert record.looks_unchanged(path)
        assert (
            record.damage(path)
            == f"has changed between bytes {bit // 128 * 16} and {min(bit // 128 * 16 + 16, len(content))}"
        )


def test_missing_shorter_and_copied_files(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    record = FileRecord.of(path)
    os.utime(path, ns=(1, 1))
    assert not record.looks_unchanged(path)
    assert record.damage(path) is None, "a copy has another time and the same content"
    path.write_bytes(b"012")
    assert record.damage(path) == "has 3 bytes instead of 10"
    path.unlink()
    assert not record.looks_unchanged(path)
    assert record.damage(path) == "is missing"


def test_records_of_a_tree_name_the_first_damaged_file(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for name in ("a/one", "two"):
        (tmp_path / name).write_text(name)
    records = record_files(tmp_path, [tmp_path / "two", tmp_path / "a" / "one"])
    assert list(records) == ["a/one", "two"]
    assert first_damage(tmp_path, records) is None
    (tmp_path / "two").unlink()
    assert first_damage(tmp_path, records) == f"{tmp_path / 'two'} is missing"


def test_a_record_goes_through_json(tmp_path: Path):
    path = tmp_path / "file"
    path.touch()
    record = FileRecord.of(path)
    assert FileRecord.from_row(record.to_row()) == record
    for row in (None, [], {}, {"size": 1, "mtime_ns": "x", "chunks": []}, {"size": 1, "mtime_ns": 1, "chunks": [1]}):
        with pytest.raises(ValueError, match="not a file's record"):
            FileRecord.from_row(row)
