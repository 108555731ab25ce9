"""A model larger than its memory: our engine under a budget of half the checkpoint, against what the disk allows.

    python perf/streaming.py [--json FILE] [--work DIR] [--threads N]

The checkpoint of perf/engine.py decodes 64 sequences, first with all experts in memory, then under the budget. Before
every step the files are dropped from the page cache, so that what is streamed comes from the disk. The limit is the
lesser of the rate without a budget and 64 tokens per streaming of the experts that do not fit, at the rate at which the
disk reads the file from end to end in the same run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from checkpoint import CONFIG, write_fp8
from measures import drop, peak_memory, prompt, reset_peak, seconds_to_read

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SEQUENCES, PROMPT, NEW = 64, 32, 24


def decode(directory: Path, files: list[Path], budget: int | None, cold: bool) -> dict[str, float]:
    """Tokens a second of decoding, and the memory taken beyond what the process had."""
    from distill.engine import Engine, EngineOptions, Request, SamplingParams

    before = reset_peak()
    engine = Engine.load(
        directory,
        EngineOptions(
            dtype="bfloat16",
            max_batch=SEQUENCES,
            max_step_tokens=1024,
            cache_tokens=SEQUENCES * 64,
            memory_budget=budget,
        ),
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW)
    for number in range(SEQUENCES):
        engine.add(Request(str(number), tuple(prompt(number, PROMPT, CONFIG["vocab_size"])), sampling, 0, number, (0,)))
    while engine.usage.completion_tokens < SEQUENCES:
        engine.step()
    tokens, seconds = engine.usage.completion_tokens, 0.0
    while engine.has_work:
        if cold:
            drop(files)
        begun = time.perf_counter()
        engine.step()
        seconds += time.perf_counter() - begun
    banks = [layer.mlp.experts for layer in engine._model.weights.layers if hasattr(layer.mlp, "experts")]
    streamed = sum((bank.count - bank.resident) * bank.bytes_each for bank in banks) if engine._model.stream else 0
    return {
        "tokens/s": (engine.usage.completion_tokens - tokens) / seconds,
        "peak memory, GB": (peak_memory() - before) / 1e9,
        "streamed per step, GB": streamed / 1e9,
        "resident experts of a layer": float(banks[0].resident),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf"), help="where the checkpoint is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    directory = write_fp8(args.work / "fp8")
    files = sorted(directory.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    decode(directory, files, None, cold=False)  # whatever is set up on first use
    disk = size / seconds_to_read(files)
    whole = decode(directory, files, None, cold=False)
    half = decode(directory, files, size // 2, cold=True)
    disk = max(disk, size / seconds_to_read(files))
    limit = min(whole["tokens/s"], SEQUENCES / (half["streamed per step, GB"] * 1e9 / disk))
    results = {
        "checkpoint, GB": size / 1e9,
        "disk, GB/s": disk / 1e9,
        "without a budget": whole,
        "budget of half": half,
        "limit, tokens/s": limit,
        "share of the limit": half["tokens/s"] / limit,
    }
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
