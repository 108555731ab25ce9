"""Rows of files: other kinds of files, damage and bounds, each named with what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_support import file_refused, jsonl, read

from distill.errors import UserError
from distill.prompts import rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_files_that_are_not_there_or_not_prompts(tmp_path: Path) -> None:
    file_refused(tmp_path / "none.jsonl", "no such file")
    (tmp_path / "dir.jsonl").mkdir()
    file_refused(tmp_path / "dir.jsonl", "a directory", "`kind: hub`")
    (tmp_path / "empty.jsonl").write_text("\n")
    file_refused(tmp_path / "empty.jsonl", "no rows")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    file_refused(tmp_path / "a.parquet", "not a readable Parquet file")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"x", "not a .jsonl or .parquet file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "unpack a.jsonl.gz first"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed by gzip: unpack it, gunzip -c"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\0", "compressed by zstd"),
        ("a.jsonl", b"PK\x03\x04", "a ZIP archive"),
        ("a.jsonl", b"PAR1\x15", "a Parquet file: name it .parquet"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16 text: convert it, iconv -f UTF-16 -t UTF-8"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, not the file: run `git lfs pull`",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        ("a.jsonl", b'[\n{"question": "q"}\n]', "a JSON array; write one object per line: `jq -c"),
        ("a.jsonl", b'[{"question": "q"}]', "write one object per line: `jq -c"),
        ("a.jsonl", b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("a.jsonl", b'{"question": "q", "answer": Infinity}', "Infinity is not a JSON value"),
        ("a.jsonl", b'{"question": "q", "answer": 1e999}', "1e999 is not a finite number"),
        ("a.jsonl", b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
        ("a.jsonl", b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "brackets are nested more than 100 deep"),
        ("a.jsonl", b'{"a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "brackets are nested more than 100 deep"),
        ("a.jsonl", b"[" * 99_999, "not JSON ("),
    ],
)
def test_files_of_another_kind_say_what_to_do(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    file_refused(tmp_path / name, said)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "question,answer\nq,1\n"),
        ("a.tsv", "question\tanswer\nq\t1\n"),
        ("a.json", '[{"question": "q", "answer": "1"}]'),
    ],
)
def test_the_command_that_converts_a_file_does(tmp_path: Path, cache: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="convert it: python -c") as refusal:
        read(tmp_path / name)
    code = str(refusal.value).partition('python -c "')[2].removesuffix('"')
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, env=environment)
    assert [(p.messages[0]["content"], p.answer) for p in read(tmp_path / "a.jsonl")] == [("q", "1")]


def test_brackets_inside_text_are_not_nested(tmp_path: Path) -> None:
    deep = [[[["[" * 500, '"[' * 500]]]]
    assert read(jsonl(tmp_path / "a.jsonl", {"question": "[" * 500 + "\\", "answer": deep}), task="code")[0].answer


# Bounds


def test_a_line_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROW_BYTES", 1 << 20)
    path = jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "1"}, {"question": "b" * (1 << 20), "answer": "1"})
    file_refused(path, "line 2", "longer than 1 MiB")


def test_the_text_of_a_parquet_row_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROW_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["a", "b" * (1 << 20)], "answer": ["1", "2"]}), path)
    file_refused(path, "row 2", "more than 1 MiB of text in one row")


def test_a_text_that_all_rows_of_a_parquet_file_share_is_not_held_once_for_each(tmp_path: Path) -> None:
    """2 kB on the disk, 2 GiB of text: read row by row in far less memory, list of messages or not."""
    path = tmp_path / "a.parquet"
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array(["x" * (1 << 20)]))
    turns = pa.StructArray.from_arrays([shared], ["content"])
    messages = pa.ListArray.from_arrays(list(range(1001)), turns)
    pq.write_table(pa.table({"question": shared, "messages": messages}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    code = f"""
from pathlib import Path
from distill.prompts.rows import rows_of_file
print(sum(len(row["question"] + row["messages"][0]["content"]) for _, row in rows_of_file(Path({str(path)!r}))))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    total, kilobytes = map(int, output.split())
    assert total == 2000 << 20 and kilobytes < 400 << 10


@pytest.mark.parametrize("at", [4, 40, 2000, -200])
def test_damaged_parquet_pages_are_named(tmp_path: Path, at: int) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"question {n} " + "x" * (n % 50) for n in range(3000)]
    pq.write_table(pa.table({"question": texts, "answer": texts}), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[at : at + 16 if at > 0 else None] = bytes(16 if at > 0 else -at)
    path.write_bytes(data)
    file_refused(path, "not a readable Parquet file", "download or write it again")


def test_nan_in_parquet_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [float("nan"), 2.0]}), path)
    assert [p.answer for p in read(path)] == [None, "2.0"]
    pq.write_table(pa.table({"question": ["a"], "answer": [float("inf")]}), path)
    file_refused(path, "row 1", "column answer is inf, not a finite number")
