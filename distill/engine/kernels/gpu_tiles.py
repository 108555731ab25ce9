"""Which tile a product takes, by its shape: a committed table, so that nothing is tuned at start-up.

Few rows: the product reads weights and little else. Tiles are narrow and the sum is split until every multiprocessor of
an H100 or H200 has something to read. Many rows: tiles of 128×128, which keep the tensor cores busy and fit the
accumulators of eight warps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MULTIPROCESSORS = 132  # of an H100 SXM, H200
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


# rows of the product, at most → rows and columns of a tile, warps, stages; "torch" where it is faster (perf/RESULTS.md:
# not measured yet)
_LINEAR: dict[int, tuple[Any, ...]] = {
    16: (16, 64, 4, 5),
    32: (32, 64, 4, 5),
    64: (64, 64, 4, 5),
    256: (64, 128, 4, 4),
    1 << 62: (128, 128, 8, 4),
}
# rows an expert has on average, at most → the same
_GROUPED = {
    16: (16, 128, 4, 4),
    32: (32, 128, 4, 4),
    128: (64, 128, 4, 4),
    1 << 62: (128, 128, 8, 4),
}


def linear_tile(rows: int, columns: int, groups: int) -> Tile:
    """For [rows, groups · 128] × [groups · 128, columns]."""
    m, n, warps, stages, *by = next(tile for most, tile in _LINEAR.items() if rows <= most)
    tiles = -(-rows // m) * -(-columns // n)
    parts = max(1, min(2 * MULTIPROCESSORS // tiles, groups // _LEAST_GROUPS))
    return Tile(m, n, parts, warps, stages, *by)


def grouped_tile(pairs: int, experts: int) -> Tile:
    """For `pairs` rows shared out among experts."""
    m, n, warps, stages = next(tile for most, tile in _GROUPED.items() if pairs <= most * experts)
    return Tile(m, n, 1, warps, stages)


def mla_tile(heads: int, fp8: bool, page: int) -> Tile:
    """rows: heads; columns: keys read in one go. Three stages keep two blocks of keys in shared memory; more keys, or
    FP8 ones with fewer warps, no longer fit into registers beside 512 columns of sums."""
    if heads > 16:
        return Tile(64, 32 if page % 32 == 0 else 16, 1, 8, 3)
    return Tile(16, 32, 1, 8 if fp8 else 4, 3)


def attention_parts(programs: int, longest: int, block: int) -> int:
    """Parts that contexts are split into, where one part each gives `programs` programs."""
    return max(1, min(2 * MULTIPROCESSORS // max(programs, 1), -(-longest // (4 * block)), 64))
