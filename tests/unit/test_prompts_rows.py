"""Rows of files: other kinds of files, damage and bounds, each named with what to do."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_support import file_refused, jsonl, read

from distill.errors import UserError
from distill.prompts import columns, streams, text_rows
from distill.prompts.rows import rows_of_file


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
        ("a.txt", b"x", "expected .jsonl, .json, .csv, .tsv (also as .gz or .zst), .parquet, or a directory of save"),
        ("a.zip", b"x", "unpack a.zip first"),
        ("a.gz", b"x", "not a prompt or trace file"),
        ("a.parquet.gz", b"x", "Parquet is compressed inside: unpack the file"),
        ("a.arrow", b"x", "name the directory that holds the .arrow file"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed by gzip: name it a.jsonl.gz"),
        ("a.csv", b"\x1f\x8b\x08", "compressed by gzip: name it a.csv.gz"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\0", "compressed by zstd: name it a.jsonl.zst"),
        ("a.jsonl.gz", b"\x28\xb5\x2f\xfd\0", "compressed by zstd: name it a.jsonl.zst"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        ("a.json.zst", b"[]", "not compressed by zstd (its first bytes are not those of such a file)"),
        ("a.jsonl.gz", b"", "not compressed by gzip (it is empty)"),
        ("a.jsonl", b"PK\x03\x04", "a ZIP archive"),
        ("a.jsonl", b"PAR1\x15", "a Parquet file: name it .parquet"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16 text: convert it, iconv -f UTF-16 -t UTF-8"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, not the file: run `git lfs pull`",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        ("a.jsonl", b'[\n{"question": "q"}\n]', "a JSON array; name the file a.json, or write one object"),
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


def test_brackets_inside_text_are_not_nested(tmp_path: Path) -> None:
    deep = [[[["[" * 500, '"[' * 500]]]]
    assert read(jsonl(tmp_path / "a.jsonl", {"question": "[" * 500 + "\\", "answer": deep}), task="code")[0].answer


# Bounds


def test_a_line_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ROW_BYTES", 1 << 20)
    path = jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "1"}, {"question": "b" * (1 << 20), "answer": "1"})
    file_refused(path, "line 2", "longer than 1 MiB")


def test_the_text_of_a_parquet_row_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "ROW_BYTES", 1 << 20)
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


# CSV


def csv_file(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_csv_quotes_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufeffquestion,answer\r\n"one\nline, ""two""",1\r\n\r\nplain,\r\n007,"NA"'
    path = csv_file(tmp_path / "a.csv", text)
    assert list(rows_of_file(path)) == [
        (f"{path}, row 1 (line 2)", {"question": 'one\nline, "two"', "answer": "1"}),
        (f"{path}, row 2 (line 5)", {"question": "plain", "answer": None}),
        (f"{path}, row 3 (line 6)", {"question": "007", "answer": "NA"}),
    ]
    assert [(p.messages[0]["content"], p.answer) for p in read(path)][1:] == [("plain", None), ("007", "NA")]
    tabs = csv_file(tmp_path / "a.tsv", "question\tanswer\na,b\t1\n")
    assert [(p.messages[0]["content"], p.answer) for p in read(tabs)] == [("a,b", "1")]
    index = csv_file(tmp_path / "b.csv", ",question,answer\n0,q,1\n")  # as pandas writes its index
    assert [p.answer for p in read(index)] == ["1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty; the first line names the columns, such as question,answer"),
        ("\n\n", "empty; the first line names the columns"),
        ("question,answer\n", "no rows"),
        ("question,answer\nq,1\nr\n", "row 2 (line 3): 1 value, and the header has 2 columns"),
        ("question,answer\nq,1\n\nr,2,3\n", "row 2 (line 4): 3 values, and the header has 2 columns"),
        ('question,answer\n"q"x,1\n', "row 1 (line 2): not CSV ("),
        ('question,answer\nq,1\n"r,2\ns,3\n', "row 2 (line 3): not CSV (unexpected end of data)"),
        ("question,question\nq,1\n", "the header names column 'question' twice"),
        ("question;answer\nq;1\n", "separated by semicolons: write it with commas"),
        ("question\tanswer\nq\t1\n", "separated by tabs: name it .tsv"),
        ("problem,solution\nq,1\n", "no column question; the columns are problem, solution"),
        ("question,solution\nq,1\n", "no column answer; the columns are question, solution"),
        ("question,answer\n,1\n", "row 1 (line 2): column question is empty"),
        ("question,answer\na\0b,1\n", "row 1 (line 2): column question holds the control character U+0000"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    file_refused(csv_file(tmp_path / "a.csv", text), said)


def test_csv_in_another_encoding_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("question,answer\nq,1\né,2\n".encode("latin-1"))
    file_refused(tmp_path / "a.csv", "line 3: not UTF-8")


def test_a_csv_row_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "ROW_BYTES", 1 << 10)
    path = csv_file(tmp_path / "a.csv", 'question,answer\nq,1\n"' + "open\n" * 1000)
    file_refused(path, "line 3: more than 0 MiB in one row; close the quote")


# JSON arrays


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no rows"),
        ("", "not a JSON array of objects"),
        ('{"question": "q"}', "not a JSON array of objects; a file with one object per line is named a.jsonl"),
        ('[{"question": "q"}, 5]', "row 2: not a JSON object"),
        ('[{"question": "q"}, {"question": }]', "row 2: not JSON ("),
        ('[{"question": "q"},]', "row 2: not JSON ("),
        ('[{"question": "q"}', "row 1: the file ends here; the array is cut off"),
        ('[{"question": "q"} {"question": "r"}]', "row 1: '{' follows it, not a comma"),
        ('[{"question": "q"}] x', "text after the end of the array"),
        ('[{"a": 1, "a": 2}]', "row 1: not JSON (duplicate key 'a')"),
        ('[{"question": "q", "answer": Infinity}]', "row 1: not JSON (Infinity is not a JSON value)"),
        ("[" * 99_999, "row 1: not JSON (brackets are nested more than 100 deep)"),
        ('[{"a": ' + "[" * 101 + "]" * 101 + "}]", "row 1: not JSON (brackets are nested more than 100 deep)"),
    ],
)
def test_json_that_is_no_array_of_objects(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as refusal:
        read(tmp_path / "a.json", answer=None)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_json_array_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"question": "a", "answer": "1"}, {"question": "' + "b" * 2000 + '", "answer": "1"}]')
    monkeypatch.setattr(text_rows, "ROW_BYTES", 1000)
    file_refused(path, "row 2: longer than")
    monkeypatch.setattr(text_rows, "ARRAY_BYTES", 1000)
    file_refused(path, "an array of more than", "write one object per line (.jsonl)")


# Compression


def compressed(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else bytes(pa.compress(data, "zstd", asbytes=True)))
    return path


LINES = b"".join(b'{"question": "question %d", "answer": "%d"}\n' % (n, n * 7919) for n in range(5000))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_compressed_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = compressed(tmp_path / f"a.jsonl{suffix}", LINES)
    assert len(read(path)) == 5000
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    file_refused(path, "damaged compressed file", "download or write it again")
    array = tmp_path / f"a.json{suffix}"
    array.write_bytes(path.read_bytes())
    file_refused(array, "damaged compressed file")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_with_a_flipped_byte_is_refused(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path / f"a.jsonl{suffix}", LINES)
    data = bytearray(path.read_bytes())
    data[-3 if suffix == ".gz" else len(data) // 2] ^= 0xFF  # gzip: in the length that ends the file
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged compressed file|not JSON"):
        read(path)


def test_gzip_files_that_were_appended_to_one_another_are_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[: LINES.index(b"\n") + 1]) + gzip.compress(LINES[LINES.index(b"\n") + 1 :]))
    assert len(read(path)) == 5000


# Directories of save_to_disk


def test_saved_data_sets_are_files_too(tmp_path: Path, cache: Path) -> None:
    import datasets

    rows = {"question": ["a", "b"], "answer": ["1", "2"]}
    one, two = datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict({"question": ["c"], "answer": ["3"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=two).save_to_disk(tmp_path / "single")
    assert [p.answer for p in read(tmp_path / "one")] == ["1", "2"]
    assert [p.answer for p in read(tmp_path / "both", split="test")] == ["3"]
    assert [p.answer for p in read(tmp_path / "single")] == ["3"]
    file_refused(tmp_path / "both", "it has several splits; set `split` to one of train, test")
    file_refused(tmp_path / "both", "no split dev; set `split` to one of train, test", split="dev")
    file_refused(tmp_path / "one", "it has no splits; remove `split: train`", split="train")
    file_refused(tmp_path / "one", "no column problem; the columns are question, answer", question="problem")
    file_refused(jsonl(tmp_path / "a.jsonl", {"question": "q"}), "a file has no split", split="train")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"nonsense")
    file_refused(tmp_path / "one")


def test_column_names_are_listed_on_one_line(tmp_path: Path) -> None:
    header = ",".join(['"a\nb"', "x" * 500, *(f"c{n}" for n in range(40))])
    path = csv_file(tmp_path / "a.csv", f"{header}\n{',' * 41}\n")
    file_refused(path, "the columns are a b, " + "x" * 39 + "…, c0, c1", " and 12 more: name the right one")
