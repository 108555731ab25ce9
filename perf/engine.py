"""Our engine against llama.cpp and transformers: one checkpoint, one machine, one run.

    python perf/engine.py [--json FILE] [--work DIR] [--threads N] [--rounds N] [--only ours llama.cpp transformers]

A machine is now and then a tenth faster or slower for some minutes, so the engines take turns for several rounds, and
the figures are medians of the rounds. Each engine runs in a process of its own and measures the same things: a prompt
of 512 tokens, 8 prompts of 512, and decoding 1, 8 and 64 sequences with 128 tokens of prompt, over the 128 tokens that
follow the prompts (their prefill is not counted). Beside them stand the machine's two limits as measured in the same
run: a plain read of memory, and bfloat16 products as fast as torch multiplies them. Before each engine loads, its files
are read from end to end, past the page cache, and dropped from it, so that loading finds them where reading did: on the
disk. The peers are installed by

    pip install -c constraints.txt -r perf/requirements.txt
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint import CONFIG, active_bytes, active_parameters, write_bfloat16, write_fp8

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.hardware import memory_bandwidth, product_rate

PROMPT, NEW = 128, 128
BATCHES = (1, 8, 64)
ENGINES = ("ours", "llama.cpp", "transformers")
REPEATS = 3  # in a round, of the prompt measurements, whose best is taken; decoding is long enough once


def prompt(number: int, length: int) -> list[int]:
    return random.Random(number).choices(range(10, CONFIG["vocab_size"]), k=length)


def best(action: Callable[[], None], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some repetitions."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(files: list[Path]) -> float:
    """Of reading files from end to end, past the page cache; afterwards they are not in it."""
    drop(files)
    begun = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(4 << 20):
                pass
    seconds = time.perf_counter() - begun
    drop(files)
    return seconds


def peak_memory() -> int:
    """The process's largest resident memory since `reset_peak`, bytes; pages of mapped files count."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def reset_peak() -> int:
    """Forget the peak; the memory in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def measure_ours(work: Path, threads: int) -> dict[str, float]:
    from distill.engine import Engine, EngineOptions, Request, SamplingParams

    torch.set_num_threads(threads)
    directory = write_fp8(work / "fp8")
    figures = {"reading the files, s": seconds_to_read(list(directory.glob("*.safetensors")))}
    before = reset_peak()
    begun = time.perf_counter()
    engine = Engine.load(
        directory, EngineOptions(dtype="bfloat16", max_batch=max(BATCHES), cache_tokens=max(BATCHES) * 272)
    )
    numbers = iter(range(10**6))

    def add(length: int, new: int) -> None:
        number = next(numbers)
        sampling = SamplingParams(temperature=0, max_new_tokens=new)
        engine.add(Request(str(number), tuple(prompt(number, length)), sampling, 0, number, (0,)))

    def finish() -> None:
        while engine.has_work:
            engine.step()

    def prefill(count: int, length: int) -> None:
        for _ in range(count):
            add(length, 1)
        finish()

    add(1, 1)
    finish()
    figures["ready and first token, s"] = time.perf_counter() - begun
    for count in (1, 8):
        seconds = best(lambda count=count: prefill(count, 512))  # type: ignore[misc]
        figures[f"prompt {count} × 512"] = count * 512 / seconds
    for count in BATCHES:
        for _ in range(count):
            add(PROMPT, NEW)
        while not _all_decode(engine, count):
            engine.step()
        tokens, begun = engine.usage.completion_tokens, time.perf_counter()
        finish()
        figures[f"decode × {count}"] = (engine.usage.completion_tokens - tokens) / (time.perf_counter() - begun)
    figures["peak memory, GB"] = (peak_memory() - before) / 1e9
    return figures


def _all_decode(engine: Any, count: int) -> bool:
    """Whether every prompt is computed, so that the steps to come are decoding alone."""
    running = engine._scheduler.running
    return len(running) == count and all(sequence.sample is not None for sequence in running)


def measure_llama(work: Path, threads: int) -> dict[str, float]:
    import llama_cpp as ll
    from gguf_form import write_q8_0

    file = write_q8_0(work / "q8_0.gguf")
    figures = {"reading the files, s": seconds_to_read([file])}
    before = reset_peak()
    silent = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(silent, None)
    ll.llama_backend_init()
    begun = time.perf_counter()
    model = ll.llama_model_load_from_file(str(file).encode(), ll.llama_model_default_params())
    assert model, f"llama.cpp cannot load {file}"
    params = ll.llama_context_default_params()
    params.n_ctx = max(BATCHES) * 272
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = max(BATCHES)
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified = False  # each sequence reads its own cache, as in llama.cpp's own batched benchmark
    context = ll.llama_init_from_model(model, params)
    memory = ll.llama_get_memory(context)
    vocabulary = CONFIG["vocab_size"]

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, whether its logits are wanted)."""
        batch = ll.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        assert ll.llama_decode(context, batch) == 0
        ll.llama_batch_free(batch)

    def prefill(count: int, length: int) -> None:
        ll.llama_memory_clear(memory, True)
        rows = [
            (token, i, sequence, i == length - 1)
            for sequence in range(count)
            for i, token in enumerate(prompt(sequence, length))
        ]
        for begin in range(0, len(rows), 512):
            decode(rows[begin : begin + 512])

    def greedy(row: int) -> int:
        import numpy

        logits = ll.llama_get_logits_ith(context, row)
        return int(numpy.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    prefill(1, 1)
    figures["ready and first token, s"] = time.perf_counter() - begun
    for count in (1, 8):
        seconds = best(lambda count=count: prefill(count, 512))  # type: ignore[misc]
        figures[f"prompt {count} × 512"] = count * 512 / seconds
    for count in BATCHES:
        prefill(count, PROMPT)
        tokens = [prompt(sequence, PROMPT)[0] for sequence in range(count)]
        begun = time.perf_counter()
        for step in range(NEW - 1):
            decode([(token, PROMPT + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [greedy(row) for row in range(count)]
        figures[f"decode × {count}"] = count * (NEW - 1) / (time.perf_counter() - begun)
    figures["peak memory, GB"] = (peak_memory() - before) / 1e9
    return figures


def measure_transformers(work: Path, threads: int) -> dict[str, float]:
    from transformers import DeepseekV3ForCausalLM

    torch.set_num_threads(threads)
    directory = write_bfloat16(work / "bfloat16")
    figures = {"reading the files, s": seconds_to_read(list(directory.glob("*.safetensors")))}
    before = reset_peak()
    begun = time.perf_counter()
    model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype="bfloat16").eval()

    def generate(count: int, length: int, new: int) -> float:
        ids = torch.tensor([prompt(number, length) for number in range(count)])
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=1,
            )  # fmt: skip
        return time.perf_counter() - begun

    generate(1, 1, 1)
    figures["ready and first token, s"] = time.perf_counter() - begun
    for count in (1, 8):
        figures[f"prompt {count} × 512"] = count * 512 / min(generate(count, 512, 1) for _ in range(REPEATS))
    for count in BATCHES:
        new = NEW if count < max(BATCHES) else 32  # a hundred seconds of it say the same
        seconds = generate(count, PROMPT, new) - generate(count, PROMPT, 1)
        figures[f"decode × {count}"] = count * (new - 1) / seconds
    figures["peak memory, GB"] = (peak_memory() - before) / 1e9
    return figures


def measure_limits(work: Path, threads: int) -> dict[str, float]:
    """GB/s of reading memory, GFLOP/s of bfloat16 products."""
    torch.set_num_threads(threads)
    return {"memory, GB/s": memory_bandwidth() / 1e9, "bfloat16, GFLOP/s": product_rate() / 1e9}


MEASURES = {
    "limits": measure_limits,
    "ours": measure_ours,
    "llama.cpp": measure_llama,
    "transformers": measure_transformers,
}


def in_its_own_process(what: str, work: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--work", str(work), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {what} failed; the peers are installed by pip install -r perf/requirements.txt")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each figure of each engine."""
    return {
        what: {name: statistics.median(one[what][name] for one in rounds) for name in figures}
        for what, figures in rounds[0].items()
    }


def show(results: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    engines = [engine for engine in ENGINES if engine in results]
    table = Table("tokens/s unless it says otherwise", *engines, *(f"ours ÷ {peer}" for peer in engines[1:]))
    for name in results[engines[0]]:
        values = [results[engine][name] for engine in engines]
        ratios = [f"{values[0] / value:.2f}" for value in values[1:]] if engines[0] == "ours" else []
        table.add_row(name, *(f"{value:,.1f}" for value in values), *ratios)
    Console(width=120).print(table)
    limits = results["limits"]
    print(f"limits: {limits['memory, GB/s']:.1f} GB/s, {limits['bfloat16, GFLOP/s']:.0f} GFLOP/s")
    if "ours" in results:
        bytes_limit = limits["memory, GB/s"] * 1e9 / active_bytes()
        flops_limit = limits["bfloat16, GFLOP/s"] * 1e9 / (2 * active_parameters())
        ours = results["ours"]
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
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.work, args.threads)))
        return
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        rounds.append({what: in_its_own_process(what, args.work, args.threads) for what in ("limits", *args.only)})
    results = medians(rounds)
    show(results)
    if args.json:
        args.json.write_text(json.dumps(results | {"rounds": rounds}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
