"""Our engine against llama.cpp and transformers: one checkpoint, one machine, one run.

    python perf/engine.py [--json FILE] [--work DIR] [--threads N] [--rounds N] [--only ours llama.cpp transformers]
        [--isa NAME NAME …]

A machine is now and then a tenth faster or slower for some minutes, so the engines take turns for several rounds, and
the figures are medians of the rounds. Each engine runs in a process of its own and measures the same things: a prompt
of 512 tokens, 8 prompts of 512, and decoding 1, 8 and 64 sequences with 128 tokens of prompt, over the 128 tokens that
follow the prompts (their prefill is not counted). Beside them stand the machine's two limits as measured in the same
run: a plain read of memory, and bfloat16 products as fast as torch multiplies them. Before each engine loads, its files
are read from end to end, past the page cache, and dropped from it, so that loading finds them where reading did: on the
disk. With `--isa avx512_bf16 amx` our engine runs once a round with each of these instruction sets of its kernels, in
turns, and the table has the first ÷ the others. On a processor with AMX, llama.cpp is loaded without its buffers for it
(`use_extra_bufts = False`), since with them it aborts on this model; the run says so. The peers are installed by

    pip install -c constraints.txt -r perf/requirements.txt
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from checkpoint import CONFIG, active_bytes, active_parameters, write_bfloat16, write_fp8
from measures import (
    Figures,
    has_amx,
    in_its_own_process,
    measure_limits,
    measure_llama,
    measure_ours,
    measure_transformers,
    medians,
)

ENGINES = ("ours", "llama.cpp", "transformers")
OURS = "ours, "  # and an instruction set
VARIABLE = "DISTILL_INSTRUCTION_SET"


def _llama(work: Path, threads: int) -> Figures:
    from gguf_form import write_q8_0

    without = has_amx()
    if without:  # they take no absorbed matrices: llama.cpp aborts while it loads latent attention
        print("llama.cpp is loaded without its buffers for AMX, with which it aborts on this model", file=sys.stderr)
    return measure_llama(write_q8_0(work / "q8_0.gguf"), CONFIG["vocab_size"], threads, amx_buffers=not without)


MEASURES = {
    "limits": lambda work, threads: measure_limits(threads),
    "ours": lambda work, threads: measure_ours(write_fp8(work / "fp8"), threads),
    "llama.cpp": _llama,
    "transformers": lambda work, threads: measure_transformers(write_bfloat16(work / "bfloat16"), threads),
}


def measured(what: str, options: tuple[str, ...]) -> Figures:
    """The figures of an engine, or of ours with an instruction set, or the limits; in a process of its own."""
    if not what.startswith(OURS):
        return in_its_own_process(__file__, what, *options)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = what.removeprefix(OURS)
    try:
        return in_its_own_process(__file__, "ours", *options)
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def show(results: dict[str, Figures]) -> None:
    """Print the table of figures, ratios to the first column, and our shares of the limits."""
    from rich.console import Console
    from rich.table import Table

    engines = [engine for engine in results if engine != "limits"]
    first = engines[0]
    table = Table("tokens/s unless it says otherwise", *engines, *(f"{first} ÷ {peer}" for peer in engines[1:]))
    for name in results[first]:
        values = [results[engine][name] for engine in engines]
        ratios = [f"{values[0] / value:.2f}" for value in values[1:]]
        table.add_row(name, *(f"{value:,.1f}" for value in values), *ratios)
    Console(width=120).print(table)
    if has_amx() and "llama.cpp" in engines:
        print("llama.cpp ran without its buffers for AMX, with which it aborts on this model")
    limits = results["limits"]
    print(f"limits: {limits['memory, GB/s']:.1f} GB/s, {limits['bfloat16, GFLOP/s']:.0f} GFLOP/s")
    bytes_limit = limits["memory, GB/s"] * 1e9 / active_bytes()
    flops_limit = limits["bfloat16, GFLOP/s"] * 1e9 / (2 * active_parameters())
    for engine in engines:
        if not engine.startswith("ours"):
            continue
        ours = results[engine]
        print(f"{engine}:")
        print(f"decode × 1 is {ours['decode × 1'] / bytes_limit:.0%} of what the memory allows ({bytes_limit:.0f})")
        print(f"decode × 64 is {ours['decode × 64'] / flops_limit:.0%} of what the products allow ({flops_limit:.0f})")
        print(f"a prompt of 512 is {ours['prompt 1 × 512'] / flops_limit:.0%} of the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf"), help="where the checkpoints are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--isa", nargs="+", metavar="NAME", help="instruction sets of our kernels, to measure in turns")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.work, args.threads)))
        return
    ours = [OURS + name for name in args.isa] if args.isa else ["ours"]
    engines = [*(ours if "ours" in args.only else []), *(engine for engine in ENGINES[1:] if engine in args.only)]
    rounds: list[dict[str, Figures]] = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        options = ("--work", str(args.work), "--threads", str(args.threads))
        rounds.append({what: measured(what, options) for what in ("limits", *engines)})
    results = medians(rounds)
    show(results)
    if args.json:
        args.json.write_text(json.dumps(results | {"rounds": rounds}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
