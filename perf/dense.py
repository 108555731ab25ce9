"""A dense bfloat16 student: our engine against transformers and llama.cpp, on SmolLM2-135M and Qwen2.5-Coder-0.5B.

    python perf/dense.py [--json FILE] [--smollm2 DIR] [--qwen DIR] [--work DIR] [--threads N] [--rounds N] [--new N]
        [--only ours llama.cpp-F16 llama.cpp-Q8_0 transformers] [--processor-time]

The figures are those of perf/engine.py: prompts of 512 tokens, and decoding 1, 8 and 64 sequences after 128 tokens of
prompt, greedily, each system in a process of its own, in turns for several rounds, of which the medians are taken.
llama.cpp reads the same weights as F16, which are as many bytes as ours, and as Q8_0, half as many. SmolLM2 is
downloaded where no directory is given; Qwen is measured where one is. On a machine that other processes keep busy,
`--processor-time` measures processor seconds of one thread.

In the JSON, `clock` is the time that was measured, `wall` or `processor`, of so many `threads`. `ratios` has by model
`prompt`, `decode_8` and `decode_64`, ours ÷ the better of transformers and llama.cpp with F16, `decode_1`, ours ÷
llama.cpp with F16, and `decode_1_q8_0`, ours ÷ llama.cpp with Q8_0. `shares` has by model and system the part of what
the machine's limits, measured in the same run, allow: reading the weights once a step for decode × 1, bfloat16 products
(as fast as torch multiplies them) for the rest.

    pip install -c constraints.txt -r perf/requirements.txt
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from measures import (
    NEW,
    Figures,
    in_its_own_process,
    measure_limits,
    measure_llama,
    measure_ours,
    measure_transformers,
    medians,
)
from onpolicy import smollm2

from distill.hardware import Clock

SYSTEMS = ("ours", "llama.cpp-F16", "llama.cpp-Q8_0", "transformers")
FEWEST = 16  # tokens decoded: the prompts of 64 sequences take several steps
SAME_BYTES = ("llama.cpp-F16", "transformers")  # peers whose weights are as large as ours
ROWS = {"prompt": "prompt 1 × 512", "decode_1": "decode × 1", "decode_8": "decode × 8", "decode_64": "decode × 64"}


def measure(system: str, model: Path, work: Path, threads: int, new: int, clock: Clock) -> Figures:
    """The figures of one system on one model directory, or the machine's limits."""
    if system == "limits":
        return measure_limits(threads, clock)
    if system == "ours":
        return measure_ours(model, threads, new, clock)
    if system == "transformers":
        return measure_transformers(model, threads, new, clock)
    from gguf_dense import write_dense

    kind = system.removeprefix("llama.cpp-")
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    file = write_dense(model, work / f"{model.resolve().name}-{kind}.gguf", kind)
    return measure_llama(file, vocabulary, threads, new, clock)


def parameters(model: Path) -> tuple[int, int]:
    """Parameters of the matrices that a token is multiplied by: of the layers, and of the head."""
    from safetensors import safe_open

    layers = head = embedding = 0
    for shard in model.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                shape = tensors.get_slice(name).get_shape()
                if name.startswith("lm_head"):
                    head = math.prod(shape)
                elif name.startswith("model.embed_tokens"):
                    embedding = math.prod(shape)
                elif len(shape) == 2:
                    layers += math.prod(shape)
    return layers, head or embedding


def shares(model: Path, results: Mapping[str, Figures], limits: Figures) -> dict[str, Figures]:
    """By system, of what the limits allow."""
    layers, head = parameters(model)
    products, memory = limits["bfloat16, GFLOP/s"] * 1e9, limits["memory, GB/s"] * 1e9
    allowed = {"prompt": products / (2 * layers), "decode_1": memory / (2 * (layers + head))}
    allowed |= dict.fromkeys(("decode_8", "decode_64"), products / (2 * (layers + head)))
    of: dict[str, Figures] = {}
    for system, figures in results.items():
        of[system] = {row: figures[ROWS[row]] / limit for row, limit in allowed.items()}
        if system == "llama.cpp-Q8_0":
            of[system]["decode_1"] *= (8.5 / 8) / 2  # bytes of a weight with its share of a scale, of ours
    return of


def ratios(results: Mapping[str, Figures]) -> Figures:
    """Ours ÷ the better of the peers with as many bytes; for one sequence, ours ÷ each form of llama.cpp."""
    peers = [results[peer] for peer in SAME_BYTES if peer in results]
    if "ours" not in results or not peers:
        return {}
    made = {row: results["ours"][name] / max(peer[name] for peer in peers) for row, name in ROWS.items()}
    for key, system in (("decode_1", "llama.cpp-F16"), ("decode_1_q8_0", "llama.cpp-Q8_0")):
        if system in results:
            made[key] = results["ours"]["decode × 1"] / results[system]["decode × 1"]
    return made


def show(name: str, results: Mapping[str, Figures], of: Mapping[str, Figures], compared: Figures) -> None:
    """Print a table of a model's figures, with shares of the limits, and of the ratios."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for system in results:
        table.add_column(system.replace("-", " "), justify="right")
    table.add_column("ours ÷ better", justify="right")
    keys = {figure: row for row, figure in ROWS.items()}
    for figure in next(iter(results.values())):
        row = keys.get(figure)
        cells = [
            f"{figures[figure]:,.{0 if figures[figure] >= 100 else 1}f}" + (f" {of[system][row]:.0%}" if row else "")
            for system, figures in results.items()
        ]
        table.add_row(figure, *cells, f"{compared[row]:.2f}" if row in compared else "")
    Console(width=80).print(table)


def main() -> None:
    """Measure, print tables, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--smollm2", type=Path, help="directory of SmolLM2-135M-Instruct (default: downloaded)")
    parser.add_argument("--qwen", type=Path, help="directory of Qwen2.5-Coder-0.5B-Instruct, in bfloat16")
    parser.add_argument("--work", type=Path, default=Path("build/perf/dense"), help="where the GGUF files are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=NEW, help="tokens decoded after a prompt")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of wall time")
    parser.add_argument("--measure", choices=("limits", *SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.new < FEWEST:
        parser.error(f"--new is {args.new}; it must be at least {FEWEST}, so that no sequence ends before all decode")
    if args.processor_time:
        args.threads = 1
    if args.measure:
        clock = time.process_time if args.processor_time else time.perf_counter
        print(json.dumps(measure(args.measure, args.model, args.work, args.threads, args.new, clock)))
        return
    models = {"smollm2-135m": args.smollm2 or smollm2(args.work / "smollm2")}
    if args.qwen:
        models["qwen2.5-coder-0.5b"] = args.qwen
    ratios_of: dict[str, Figures] = {}
    shares_of: dict[str, dict[str, Figures]] = {}
    medians_of: dict[str, dict[str, Figures]] = {}
    rounds_of: dict[str, list[dict[str, Figures]]] = {}
    clock_name = "processor" if args.processor_time else "wall"
    for name, model in models.items():
        options = ["--model", str(model), "--work", str(args.work), "--threads", str(args.threads)]
        options += ["--new", str(args.new), *(["--processor-time"] if args.processor_time else [])]
        rounds: list[dict[str, Figures]] = []
        for number in range(args.rounds):
            print(f"{name}: round {number + 1} of {args.rounds}", file=sys.stderr)
            rounds.append({what: in_its_own_process(__file__, what, *options) for what in ("limits", *args.only)})
        results = medians(rounds)
        limits = results.pop("limits")
        of, compared = shares(model, results, limits), ratios(results)
        show(name, results, of, compared)
        print("tokens/s, and the share of what the limits allow; seconds and GB where a row says so")
        print(f"limits: {limits['memory, GB/s']:.1f} GB/s, {limits['bfloat16, GFLOP/s']:.0f} GFLOP/s; ", end="")
        print(f"{clock_name} time, threads: {args.threads}")
        ratios_of[name], shares_of[name] = compared, of
        medians_of[name], rounds_of[name] = results | {"limits": limits}, rounds
        if args.json:
            report = {"clock": clock_name, "threads": args.threads, "ratios": ratios_of, "shares": shares_of}
            report |= {"medians": medians_of, "rounds": rounds_of}
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
