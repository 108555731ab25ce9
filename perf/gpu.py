"""The GPU kernels and the engine on this machine's GPU: correct, and how near to its limits.

    python perf/gpu.py [--json FILE] [--results perf/RESULTS.md] [--work DIR] [--only checks kernels engine]

First every kernel is compiled, in several processes side by side. Then each is checked against the plain op that
defines it, on fresh random numbers. Then the chip's two ceilings, a copy and a bfloat16 product by torch, and each
kernel at DeepSeek-V3's shapes beside its limit (bytes at the copy's rate, operations at the product's, twice that in
FP8) and torch's own. Then the engine on a random checkpoint of 16 B parameters (V2-Lite's shapes, V3's router, FP8),
beside its limit and transformers' `generate` in bfloat16.

Needs torch ≥ 2.11, triton, transformers and safetensors; no network. Without a GPU all of it runs at tiny sizes in
Triton's interpreter: a rehearsal, whose times mean nothing and are not printed.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
REHEARSAL = not torch.cuda.is_available()
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"

import gpu_cases  # noqa: E402  after the environment is set
from gpu_cases import Case  # noqa: E402

from distill.engine.kernels import gpu  # noqa: E402

DEVICE = gpu.device()
PARTS = ("checks", "kernels", "engine")
COMPILERS = 10  # processes, of 0.6 GB of the device each
_BUSY = 2_000_000  # cycles, about a millisecond


def seconds(action: Callable[[], Any], budget: float = 0.15) -> float:
    """Of one call on the device, the cache cleared before it: the median of some. The device is kept busy until all of
    it is queued, as a graph would have it, so that the host's time for launches does not count."""
    if REHEARSAL:
        begun = time.perf_counter()
        action()
        return time.perf_counter() - begun
    for _ in range(2):
        action()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begun < budget and len(times) < 50):
        flush.zero_()
        torch.cuda._sleep(_BUSY)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a bfloat16 product."""
    size, n = (1 << 20, 256) if REHEARSAL else (4 << 30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * size / seconds(lambda: target.copy_(source))
    a, b = (gpu_cases.random(n, n) for _ in range(2))
    return {"copy, B/s": copy, "bfloat16, FLOP/s": 2 * n**3 / seconds(lambda: a @ b, 1.0)}


def check(case: Case) -> dict[str, Any]:
    ours, expected = case.ours().double(), case.expected().double()
    error = float((ours - expected).norm() / expected.norm())
    return {"kernel": case.kernel, "shape": case.shape, "error": error, "allowed": case.allowed}


def measure(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    took = seconds(case.ours)
    rate = limits["bfloat16, FLOP/s"] * (2 if case.fp8 else 1)
    least = max(case.bytes / limits["copy, B/s"], case.flops / rate)
    row = {
        "kernel": case.kernel,
        "shape": case.shape,
        "µs": took * 1e6,
        "GB/s": case.bytes / took / 1e9,
        "TFLOP/s": case.flops / took / 1e12,
        "of its limit": least / took,
        "of the copy": case.bytes / limits["copy, B/s"] / took,
        "of bfloat16": case.flops / limits["bfloat16, FLOP/s"] / took,
    }
    for name, peer in case.peers.items():
        try:
            row[f"× {name}"] = seconds(peer) / took
        except (RuntimeError, ValueError) as error:  # torch has no kernel for the shape: the page of results says so
            row[f"no {name}"] = str(error).strip().partition("\n")[0][:100]
    return row


def builders() -> tuple[list[Callable[[], Case]], list[Callable[[], Case]]]:
    """Builders of the cases that are checked, and of the cases that are timed."""
    if REHEARSAL:
        fixed = [lambda case=case: case for case in gpu_cases.rows_cases(16, 512, True)]
        return checked(), [*fixed, *gpu_cases.small()]
    fixed = [lambda case=case: case for t in (16, 4096) for case in gpu_cases.rows_cases(t, 7168, True)]
    return checked(), [*fixed, *gpu_cases.published(), *gpu_cases.published_experts()]


def checked() -> list[Callable[[], Case]]:
    return [*(lambda case=case: case for case in gpu_cases.rows_cases(129, 576, False)), *gpu_cases.small()]


def compile_all() -> None:
    """Fills Triton's cache; a kernel that fails says so when it is checked or timed."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--compile"]
    processes = [subprocess.Popen([*command, str(number)], stdout=subprocess.DEVNULL) for number in range(COMPILERS)]
    for process in processes:
        process.wait()
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)


def compile_share(number: int) -> None:
    """The large cases are in the last process's share, one after the other."""
    large = list(gpu_cases.published_experts())
    checks, timed = builders()
    rest = [*checks, *timed][: -len(large)]
    for build in large if number == COMPILERS - 1 else rest[number :: COMPILERS - 1]:
        case = build()
        try:
            case.ours()
            torch.cuda.synchronize()
        except Exception as error:  # not this process's to judge
            print(f"{case.kernel} {case.shape}: {type(error).__name__}: {error}", file=sys.stderr)


def run_checks() -> list[dict[str, Any]]:
    torch.manual_seed(time.time_ns() % 2**31)
    rows = []
    for build in checked():
        rows.append(check(build()))
        verdict = "" if rows[-1]["error"] < rows[-1]["allowed"] else "  WRONG"
        print(f"{rows[-1]['kernel']:24} {rows[-1]['shape']:44} error {rows[-1]['error']:.1e}{verdict}")
    return rows


def run_kernels(limits: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for build in builders()[1]:
        case = build()
        rows.append(measure(case, limits))
        print(line(rows[-1]), flush=True)
        del case
        gc.collect()
    return rows


def line(row: dict[str, Any]) -> str:
    if REHEARSAL:
        return f"{row['kernel']:24} {row['shape']}"
    peers = "  ".join(f"{row[key]:.2f} {key}" for key in row if key.startswith("× "))
    why = "  ".join(f"{key}: {row[key]}" for key in row if key.startswith("no "))
    numbers = f"{row['µs']:9.1f} µs {row['GB/s']:7.0f} GB/s {row['TFLOP/s']:7.1f} TFLOP/s {row['of its limit']:6.0%}"
    return f"{row['kernel']:24} {row['shape']:44} {numbers}  {peers}  {why}".rstrip()


def markdown(results: dict[str, Any]) -> str:
    """The page that RESULTS.md is."""
    limits, machine = results["limits"], results["machine"]
    lines = [
        "# The GPU path, measured",
        "",
        f"`python perf/gpu.py` on {machine['chip']}, {machine['date']}: torch {machine['torch']}, triton "
        f"{machine['triton']}. A copy moves {limits['copy, B/s'] / 1e9:,.0f} GB/s, torch multiplies bfloat16 at "
        f"{limits['bfloat16, FLOP/s'] / 1e12:,.0f} TFLOP/s.",
        "",
    ]
    if "kernels" in results:
        names = sorted({key for row in results["kernels"] for key in row if key.startswith("× ")})
        lines += [
            "| kernel | shape | µs | GB/s | TFLOP/s | of its limit | " + " | ".join(names) + " |",
            "|---" * (6 + len(names)) + "|",
        ]
        for row in results["kernels"]:
            peers = " | ".join(f"{row[name]:.2f}" if name in row else "" for name in names)
            lines.append(
                f"| {row['kernel']} | {row['shape']} | {row['µs']:.1f} | {row['GB/s']:,.0f} | {row['TFLOP/s']:.1f} | "
                f"{row['of its limit']:.0%} | {peers} |"
            )
        lines.append("")
        for row in results["kernels"]:
            lines += [f"{row['kernel']} {row['shape']}: {key}, {row[key]}\n" for key in row if key.startswith("no ")]
    if "engine" in results:
        lines += ["| engine | tokens/s | of its limit | × transformers |", "|---|---|---|---|"]
        for row in results["engine"]:
            share = f"{row['of its limit']:.0%}" if "of its limit" in row else ""
            peer = f"{row['× transformers']:.1f}" if "× transformers" in row else ""
            lines.append(f"| {row['what']} | {row['tokens/s']:,.0f} | {share} | {peer} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--results", type=Path, help="write the page of results there (needs a GPU)")
    parser.add_argument("--work", type=Path, default=Path("build/perf"), help="where the checkpoint is kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is not None:
        with torch.inference_mode():
            compile_share(args.compile)
        return
    import triton

    chip = "no GPU (interpreter)" if REHEARSAL else torch.cuda.get_device_name()
    machine = {"chip": chip, "date": str(date.today()), "torch": torch.__version__, "triton": triton.__version__}
    results: dict[str, Any] = {"machine": machine | {"python": platform.python_version()}, "limits": ceilings()}
    print(f"{chip}, torch {torch.__version__}, triton {triton.__version__}")
    if not REHEARSAL and set(args.only) & {"checks", "kernels"}:
        compile_all()
    with torch.inference_mode():
        if "checks" in args.only:
            results["checks"] = run_checks()
        if "kernels" in args.only:
            results["kernels"] = run_kernels(results["limits"])
        if "engine" in args.only:
            import gpu_engine

            results["engine"] = gpu_engine.measure(args.work, results["limits"], REHEARSAL)
    wrong = [row for row in results.get("checks", ()) if not row["error"] < row["allowed"]]
    if not REHEARSAL:
        print("\n" + markdown(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if args.results and not REHEARSAL:
        args.results.write_text(markdown(results), encoding="utf-8")
    print(f"{len(results.get('checks', ())) - len(wrong)} kernels are right, {len(wrong)} are wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
