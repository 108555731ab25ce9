"""The files of corpus filters against a dictionary and an array in memory."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.filters import index
from distill.filters.index import Buckets, Vectors


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_buckets_are_those_of_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(index, "BUFFERED", 4)
    keys = np.random.default_rng(rows).integers(0, 6, (rows, 3), dtype=np.uint64)
    keys[::7] += np.uint64(2**64 - 9)  # beyond what a signed integer holds
    expected = defaultdict(list)
    with Buckets(tmp_path, 3) as buckets:
        for number, row in enumerate(keys):
            buckets.add(row)
            for band, key in enumerate(row):
                expected[band, int(key)].append(number)
        shared = sorted(numbers.tolist() for numbers in buckets.shared())
    assert shared == sorted(numbers for numbers in expected.values() if len(numbers) > 1)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_vectors_are_read_back_by_number(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    rows = np.random.default_rng(0).integers(0, 2**32, (10, 5), dtype=np.uint32)
    with Vectors(tmp_path_factory.mktemp("vectors") / "rows", 5) as vectors:
        for row in rows:
            vectors.add(row)
        assert np.array_equal(vectors.read(numbers), rows[numbers].reshape(len(numbers), 5))
