"""A part whose bytes were changed is named or reads the same, whichever bit it was; and other readers can read it."""

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from store_support import trace

from distill.errors import UserError
from distill.traces import sealed
from distill.traces.parts import row_count
from distill.traces.sealed import Damage, Sealed
from distill.traces.store import TraceStore, read_traces, write_traces
from distill.traces.trace import Verdict

SAMPLED = 400  # bits in the fast test


@pytest.fixture
def part(tmp_path: Path) -> Path:
    write_traces(tmp_path, [trace(n) for n in range(3)], {trace(0).key: [Verdict("f", True, "ok", {"n": 1})]})
    return tmp_path / "part-00000.parquet"


def outcome(read: Callable[[], object]) -> object:
    """What reading gives; None when it refuses with one line that names the file."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and "part-00000.parquet: damaged (" in str(error)
        return None


def readers(directory: Path) -> list[Callable[[], object]]:
    return [
        lambda: list(read_traces(directory)),
        lambda: list(read_traces(directory, ids=False)),
        lambda: TraceStore(directory).keys(),
        lambda: list(TraceStore(directory).figures()),
        lambda: row_count(directory),
    ]


def check_bits(part: Path, bits: list[int]) -> None:
    whole = part.read_bytes()
    expected = [read() for read in readers(part.parent)]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        part.write_bytes(damaged)
        found = [outcome(read) for read in readers(part.parent)]
        assert found[0] is None, f"bit {bit} was not noticed"
        assert all(one in (None, right) for one, right in zip(found, expected, strict=True)), f"bit {bit}"


def test_sampled_bits(part: Path) -> None:
    size = part.stat().st_size
    bits = random.Random(0).sample(range(8 * size), SAMPLED)
    check_bits(part, [*bits, *range(8 * size - 64, 8 * size)])  # the last: the footer's length and PAR1


@pytest.mark.slow
def test_every_bit(part: Path) -> None:
    check_bits(part, list(range(8 * part.stat().st_size)))


def test_a_part_cut_off_anywhere_or_replaced_is_named(part: Path) -> None:
    whole = part.read_bytes()
    for content in (b"", b"PAR1", b"x" * 5000, whole * 2, *(whole[:end] for end in range(0, len(whole), 97))):
        part.write_bytes(content)
        assert [outcome(read) for read in readers(part.parent)] == [None] * 5


def test_parquet_without_a_seal_is_named(part: Path) -> None:
    pq.write_table(pq.read_table(part), part)
    with pytest.raises(UserError, match="its seal is missing"):
        list(read_traces(part.parent))


def test_blocks_are_checked_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of an undamaged block can be read beside a damaged one, and any range comes back as it was written."""
    monkeypatch.setattr(sealed, "BLOCK", 64)
    write_traces(tmp_path, [trace(n, size=2000) for n in range(3)])
    path = tmp_path / "part-00000.parquet"
    whole = path.read_bytes()
    file, rng = Sealed(path), random.Random(0)
    for _ in range(200):
        start, size = rng.randrange(len(whole) + 10), rng.randrange(400)
        file.seek(start)
        assert file.read(size) == whole[start : start + size] and file.tell() == min(
            start + size, max(len(whole), start)
        )
    file.seek(-8, 2)
    assert file.read() == whole[-8:]
    damaged = bytearray(whole)
    damaged[200] ^= 1
    path.write_bytes(damaged)
    file = Sealed(path)
    assert file.read(192) == whole[:192]
    with pytest.raises(Damage, match="bytes 192 to 256"):
        file.read(1)


def test_other_readers_open_a_sealed_part(part: Path) -> None:
    import pyarrow.dataset

    assert pq.ParquetFile(part, page_checksum_verification=True).read().num_rows == 3
    assert pyarrow.dataset.dataset(part.parent).to_table().num_rows == 3
