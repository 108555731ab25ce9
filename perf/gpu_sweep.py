"""Which tiles are fastest: what the table of distill/engine/kernels/gpu_tiles.py is written from.

    python perf/gpu_sweep.py [--json FILE] [--only linear experts mla draw]

Every candidate is compiled first, in several processes side by side, then timed at DeepSeek-V3's shapes beside torch's
`scaled_mm`. A tile that the device has no room for is left out. Needs a GPU.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu as measured
import gpu_cases

from distill.engine.kernels import gpu, gpu_attention, gpu_draw, gpu_gemm, gpu_rows, w8a8
from distill.engine.kernels.gpu_tiles import Tile, grouped_tile, linear_tile, mla_tile

SHAPES = ((1536, 7168), (24576, 1536), (7168, 16384), (4096, 7168))
WORKERS = 14
PARTS = ("linear", "mla", "draw", "experts")


@dataclass
class Trial:
    """run: one call with a tile. now: the table's tile. by_torch: the same by torch, where it can."""

    what: str
    now: Tile
    candidates: list[Tile]
    run: Callable[[Tile], Any]
    by_torch: Callable[[], Any] | None
    bytes: float
    flops: float


def linear_candidates(m: int, n: int, k: int) -> Iterator[Tile]:
    now = linear_tile(m, n, k // 128)
    if m <= 64:
        heights = (16,) if m <= 16 else (32, 64)
        for rows, columns, (warps, stages) in product(heights, (32, 64, 128), ((4, 4), (4, 6), (8, 4))):
            if warps == 8 and columns < 128:
                continue
            tiles = -(-m // rows) * -(-n // columns)
            for want in (264, 528):
                parts = max(1, min(want // tiles, k // 128 // 4))
                yield Tile(rows, columns, parts, warps, stages)
    else:
        for rows, columns, warps, stages in (
            (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (128, 64, 4, 4), (128, 64, 8, 4),
            (128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 8, 5), (256, 64, 8, 3), (256, 128, 8, 3),
        ):  # fmt: skip
            tiles = -(-m // rows) * -(-n // columns)
            for parts in {1, now.parts, max(1, min(264 // tiles, 8))}:
                yield Tile(rows, columns, parts, warps, stages)


def linear_trial(m: int, n: int, k: int) -> Trial:
    weight, x = w8a8.fp8_matrix(gpu_cases.random_fp8(n, k)), gpu_rows.quantise(gpu_cases.random(m, k))
    now = linear_tile(m, n, k // 128)
    return Trial(
        f"linear {m} × {k} · {n}",
        now,
        list(dict.fromkeys(linear_candidates(m, n, k))),
        lambda tile: gpu_gemm.linear(x, weight, tile=tile),
        lambda: gpu_gemm.linear(x, weight, tile=replace(now, by="torch")),
        m * k + n * k + 2 * m * n,
        2 * m * n * k,
    )


def experts_trial(t: int, bank_of: Callable[[], Any]) -> Trial:
    """8 experts a token, routed evenly."""
    bank = bank_of()
    x = gpu_cases.random(t, 7168)
    chosen = torch.rand(t, bank.count, device=x.device).argsort(1)[:, :8].int()
    weights = torch.full((t, 8), 0.125, device=x.device)
    touched, pairs = len(chosen.unique()), t * 8

    def run(tile: Tile) -> Any:
        gpu.grouped_tile = lambda pairs, experts: tile  # type: ignore[assignment]
        return gpu.experts(x, chosen, weights, bank, None, torch.zeros_like(x))

    few = [(16, c, w, s) for c in (64, 128) for w, s in ((4, 3), (4, 4), (4, 6), (8, 4))]
    some = [(rows, 128, w, s) for rows in (32, 64) for w, s in ((4, 3), (4, 4), (4, 5), (8, 4))]
    many = [(64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3)]
    return Trial(
        f"experts {t} tokens",
        grouped_tile(pairs, bank.count),
        [Tile(r, c, 1, w, s) for r, c, w, s in (few if t <= 32 else few + some if t <= 256 else some + many)],
        run,
        None,
        touched * 3 * 7168 * 2048 + pairs * (5 * 7168 + 6 * 2048),
        6 * pairs * 7168 * 2048,
    )


def mla_trial(heads: int, fp8: bool) -> Trial:
    case = gpu_cases.mla_case(64, heads, 8192, 512, 64, fp8)

    def run(tile: Tile) -> Any:
        gpu_attention.mla_tile = lambda heads, fp8, page: tile  # type: ignore[assignment]
        return case.ours()

    tiles = [Tile(16, c, 1, w, s) for c, w, s in product((32, 64), (4, 8), (2, 3))]
    if heads == 128:
        tiles = [Tile(64, c, 1, 8, s) for c, s in product((16, 32, 64), (2, 3, 4))]
        tiles.append(Tile(64, 32, 1, 4, 2))
    what = f"mla {heads} heads" + " fp8" * fp8
    return Trial(what, mla_tile(heads, fp8, 64), tiles, run, None, case.bytes, case.flops)


def draw_trial() -> Trial:
    """columns: of a block."""
    case = gpu_cases.draw_case(128, 129280)

    def run(tile: Tile) -> Any:
        gpu_draw._BLOCK, gpu_draw._WARPS = tile.columns, tile.warps
        return case.ours()

    tiles = [Tile(1, block, 1, warps, 1) for block, warps in product((2048, 4096, 8192, 16384), (8, 16, 32))]
    return Trial("draw", tiles[7], tiles, run, None, case.bytes, 1)


def bank(experts: int) -> Any:
    made = gpu.expert_bank(experts, torch.bfloat16)
    expert = tuple(gpu_cases.random_fp8(*shape) for shape in ((2048, 7168), (2048, 7168), (7168, 2048)))
    for _ in range(experts):
        made.lend(expert)  # type: ignore[arg-type]
    made.settle()
    return made


def trials(only: list[str], experts: int = 256) -> Iterator[Callable[[], Trial]]:
    if "linear" in only:
        for m in (1, 16, 64, 256, 1024, 4096):
            for n, k in SHAPES:
                if n != (1536 if m > 256 else 4096):
                    yield lambda m=m, n=n, k=k: linear_trial(m, n, k)
    if "mla" in only:
        for heads, fp8 in ((16, False), (128, False), (16, True), (128, True)):
            yield lambda heads=heads, fp8=fp8: mla_trial(heads, fp8)
    if "draw" in only:
        yield draw_trial
    if "experts" in only:
        kept: list[Any] = []

        def once() -> Any:
            if not kept:
                kept.append(bank(experts))
            return kept[0]

        for t in (1, 32, 128, 256, 4096):
            yield lambda t=t: experts_trial(t, once)


def compile_share(number: int, only: list[str]) -> None:
    """Every WORKERSth candidate; few experts are enough for it."""
    for build in trials(only, experts=16):
        trial = build()
        for tile in trial.candidates[number::WORKERS]:
            try:
                trial.run(tile)
                torch.cuda.synchronize()
            except Exception as error:  # it will fail again where it is timed
                del error
        del trial


def timed(trial: Trial) -> dict[Tile, float]:
    """Seconds of a call with each tile that the device has room for."""
    times: dict[Tile, float] = {}
    for tile in dict.fromkeys([trial.now, *trial.candidates]):
        try:
            times[tile] = measured.seconds(partial(trial.run, tile), 0.02)
        except Exception as error:
            if "out of resource" not in str(error):
                print(f"{trial.what} {tile}: {type(error).__name__}: {str(error)[:200]}")
    if trial.by_torch is not None:
        try:
            times[replace(trial.now, by="torch")] = measured.seconds(trial.by_torch, 0.02)
        except (RuntimeError, ValueError) as error:  # not every shape
            print(f"{trial.what}: torch: {str(error)[:60]}")
    return times


def name(tile: Tile) -> str:
    return tile.by if tile.by == "torch" else f"{tile.rows}×{tile.columns}×{tile.parts}/{tile.warps}/{tile.stages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU to time tiles on")
    if args.compile is not None:
        compile_share(args.compile, args.only)
        return
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--only", *args.only, "--compile"]
    for process in [subprocess.Popen([*command, str(number)], stderr=subprocess.DEVNULL) for number in range(WORKERS)]:
        process.wait()
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    limits, results = measured.ceilings(), []
    for build in trials(args.only):
        trial = build()
        times = timed(trial)
        line = f"{trial.what:28}"
        for tile in [*sorted(times, key=lambda tile: times[tile])[:4], trial.now]:
            if tile in times:
                line += f"  {name(tile)} {times[tile] * 1e6:.1f}"
        best = min(times.values())
        rate, moved = trial.flops / best / limits["bfloat16, FLOP/s"], trial.bytes / best / limits["copy, B/s"]
        print(f"{line}  [{rate:.2f} of bfloat16, {moved:.2f} of the copy]", flush=True)
        results.append({"what": trial.what, "µs": [[vars(tile), took * 1e6] for tile, took in times.items()]})
        del trial
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps({"limits": limits, "trials": results}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
