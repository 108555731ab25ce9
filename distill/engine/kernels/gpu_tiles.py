"""Which tile a product takes, by its shape: a committed table, so that nothing is tuned at start-up. It is written from
what perf/gpu_sweep.py measured on an H200.

Few rows: the product reads weights and little else. Tiles are narrow and the sum is split until every multiprocessor of
an H100 or H200 has something to read. Many rows: tiles of 128×128 by four warps, which keep the tensor cores busy.
Where rows and columns are many, torch's `scaled_mm` is 1.3 to 1.5 times as fast and takes over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GQA_STAGES = 2  # blocks of keys and values that are read ahead
MULTIPROCESSORS = 132  # of an H100 SXM, H200
_SHARED_FOR_KEYS = 160 << 10  # bytes of a multiprocessor's 227 KiB that the blocks may take
_LEAST_GROUPS = 4  # of 128 channels, for which a part of a sum is worth a program


@dataclass(frozen=True)
class Tile:
    """rows × columns of the result that a program computes; parts that a sum is split into; stages: loads in flight.
    by: "triton", our kernel, or "torch", its `scaled_mm`, where that was measured to be faster."""

    rows: int
    columns: int
    parts: int
    warps: int
    stages: int
    by: Literal["triton", "torch"] = "triton"


# rows of the product, at most → rows and columns of a tile, warps, stages
_LINEAR = {
    16: (16, 128, 4, 4),
    32: (32, 128, 4, 4),
    64: (64, 128, 4, 4),
    256: (64, 128, 4, 4),
    1 << 62: (128, 128, 4, 3),
}
# rows an expert has on average, at most → the same
_GROUPED = {
    16: (16, 128, 4, 3),
    32: (32, 128, 4, 4),
    1 << 62: (64, 128, 4, 4),
}
# rows, at most → numbers of a result, from which on torch is faster
_BY_TORCH = {64: 1 << 21, 1 << 62: 1 << 19}


def linear_tile(rows: int, columns: int, groups: int) -> Tile:
    """For [rows, groups · 128] × [groups · 128, columns]."""
    m, n, warps, stages = next(tile for most, tile in _LINEAR.items() if rows <= most)
    tiles = -(-rows // m) * -(-columns // n)
    parts = max(1, min(2 * MULTIPROCESSORS // tiles, groups // _LEAST_GROUPS))
    # torch wants the scales of four groups side by side.
    large = rows * columns >= next(least for most, least in _BY_TORCH.items() if rows <= most)
    by_torch = large and rows >= 64 and columns % 16 == groups % 4 == 0
    return Tile(m, n, parts, warps, stages, "torch" if by_torch else "triton")


def grouped_tile(pairs: int, experts: int) -> Tile:
    """For `pairs` rows shared out among experts."""
    m, n, warps, stages = next(tile for most, tile in _GROUPED.items() if pairs <= most * experts)
    return Tile(m, n, 1, warps, stages)


def mla_tile(heads: int, fp8: bool, page: int) -> Tile:
    """rows: heads; columns: keys read in one go, which a page holds in whole."""
    if heads <= 16:
        return Tile(16, 32, 1, 4, 3)
    columns = next((keys for keys in (64, 32) if page % keys == 0), 16)
    return Tile(64, columns, 1, 8, 2 if columns == 64 and not fp8 else 3)


def gqa_keys(bytes_each: int) -> int:
    """Keys read in one go, each of `bytes_each` together with its value: fewer where heads are wide."""
    keys = 64
    while keys > 16 and GQA_STAGES * keys * bytes_each > _SHARED_FOR_KEYS:
        keys //= 2
    return keys


def attention_parts(programs: int, longest: int, block: int) -> int:
    """Parts that contexts are split into, where one part each gives `programs` programs."""
    return max(1, min(2 * MULTIPROCESSORS // max(programs, 1), -(-longest // (4 * block)), 64))
