"""What engines are measured by: prompts, decoding, loading and memory, the same for ours, llama.cpp and transformers.

A prompt of 512 tokens, 8 prompts of 512, and decoding 1, 8 and 64 sequences with 128 tokens of prompt, over the tokens
that follow the prompts (their prefill is not counted). Before an engine loads, its files are read from end to end, past
the page cache, and dropped from it, so that loading finds them where reading did: on the disk. Each measurement belongs
in a process of its own (`in_its_own_process`).

clock: what counts seconds, `time.perf_counter` or, with one thread on a machine that other processes keep busy,
`time.process_time`. Reading files is always measured by the former.
"""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.hardware import Clock, fastest, memory_bandwidth, product_rate

if TYPE_CHECKING:
    from distill.engine import Engine

PROMPT, NEW = 128, 128
BATCHES = (1, 8, 64)
REPEATS = 3  # in a round, of the prompt measurements, whose best is taken; decoding is long enough once
Figures = dict[str, float]


def prompt(number: int, length: int, vocabulary: int) -> list[int]:
    """Token ids of prompt `number`, random."""
    return random.Random(number).choices(range(10, vocabulary), k=length)


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


def has_amx() -> bool:
    """Whether the processor has AMX for bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and re.search(r"^flags\s*:.*\bamx_bf16\b", cpuinfo.read_text(), re.MULTILINE) is not None


def measure_ours(directory: Path, threads: int, new: int = NEW, clock: Clock = time.perf_counter) -> Figures:
    """Our engine on a model directory."""
    from distill.engine import Engine, EngineOptions, Request, SamplingParams

    torch.set_num_threads(threads)
    figures = {"reading the files, s": seconds_to_read(list(directory.glob("*.safetensors")))}
    before = reset_peak()
    begun = clock()
    engine = Engine.load(
        directory, EngineOptions(dtype="bfloat16", max_batch=max(BATCHES), cache_tokens=max(BATCHES) * 272)
    )
    numbers, vocabulary = iter(range(10**6)), engine.spec.vocab_size

    def add(length: int, new: int) -> None:
        number = next(numbers)
        sampling = SamplingParams(temperature=0, max_new_tokens=new)
        engine.add(Request(str(number), tuple(prompt(number, length, vocabulary)), sampling, 0, number, (0,)))

    def finish() -> None:
        while engine.has_work:
            engine.step()

    def prefill(count: int, length: int) -> None:
        for _ in range(count):
            add(length, 1)
        finish()

    add(1, 1)
    finish()
    figures["ready and first token, s"] = clock() - begun
    for count in (1, 8):
        seconds = fastest(partial(prefill, count, 512), REPEATS, clock)
        figures[f"prompt {count} × 512"] = count * 512 / seconds
    for count in BATCHES:
        for _ in range(count):
            add(PROMPT, new)
        while not _all_decode(engine, count):
            engine.step()
        tokens, begun = engine.usage.completion_tokens, clock()
        while len(engine._scheduler.running) == count:
            engine.step()
        figures[f"decode × {count}"] = (engine.usage.completion_tokens - tokens) / (clock() - begun)
        finish()
    figures["peak memory, GB"] = (peak_memory() - before) / 1e9
    return figures


def _all_decode(engine: "Engine", count: int) -> bool:
    """Whether every prompt is computed, so that the steps to come are decoding alone."""
    running = engine._scheduler.running
    return len(running) == count and all(sequence.sample is not None for sequence in running)


def measure_llama(
    file: Path,
    vocabulary: int,
    threads: int,
    new: int = NEW,
    clock: Clock = time.perf_counter,
    amx_buffers: bool = True,
) -> Figures:
    """llama.cpp on a GGUF file. amx_buffers: with its own buffers for AMX, where the processor has that."""
    import llama_cpp as ll

    figures = {"reading the files, s": seconds_to_read([file])}
    before = reset_peak()
    silent = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(silent, None)
    ll.llama_backend_init()
    begun = clock()
    options = ll.llama_model_default_params()
    options.use_extra_bufts = amx_buffers
    model = ll.llama_model_load_from_file(str(file).encode(), options)
    assert model, f"llama.cpp cannot load {file}"
    params = ll.llama_context_default_params()
    params.n_ctx = max(BATCHES) * 272
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = max(BATCHES)
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified = False  # each sequence reads its own cache, as in llama.cpp's own batched benchmark
    context = ll.llama_init_from_model(model, params)
    memory = ll.llama_get_memory(context)

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
            for i, token in enumerate(prompt(sequence, length, vocabulary))
        ]
        for begin in range(0, len(rows), 512):
            decode(rows[begin : begin + 512])

    def greedy(row: int) -> int:
        logits = ll.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    prefill(1, 1)
    figures["ready and first token, s"] = clock() - begun
    for count in (1, 8):
        seconds = fastest(partial(prefill, count, 512), REPEATS, clock)
        figures[f"prompt {count} × 512"] = count * 512 / seconds
    for count in BATCHES:
        prefill(count, PROMPT)
        tokens = [prompt(sequence, PROMPT, vocabulary)[0] for sequence in range(count)]
        begun = clock()
        for step in range(new - 1):
            decode([(token, PROMPT + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [greedy(row) for row in range(count)]
        figures[f"decode × {count}"] = count * (new - 1) / (clock() - begun)
    figures["peak memory, GB"] = (peak_memory() - before) / 1e9
    return figures


def measure_transformers(directory: Path, threads: int, new: int = NEW, clock: Clock = time.perf_counter) -> Figures:
    """transformers in bfloat16 on a model directory, with `generate`."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    figures = {"reading the files, s": seconds_to_read(list(directory.glob("*.safetensors")))}
    before = reset_peak()
    begun = clock()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16").eval()

    def generate(count: int, length: int, tokens: int) -> float:
        ids = torch.tensor([prompt(number, length, model.config.vocab_size) for number in range(count)])
        begun = clock()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=1,
            )  # fmt: skip
        return clock() - begun

    generate(1, 1, 1)
    figures["ready and first token, s"] = clock() - begun
    for count in (1, 8):
        figures[f"prompt {count} × 512"] = count * 512 / min(generate(count, 512, 1) for _ in range(REPEATS))
    for count in BATCHES:
        tokens = new if count < max(BATCHES) else min(new, 32)  # a hundred seconds of it say the same
        seconds = generate(count, PROMPT, tokens) - generate(count, PROMPT, 1)
        figures[f"decode × {count}"] = count * (tokens - 1) / seconds
    figures["peak memory, GB"] = (peak_memory() - before) / 1e9
    return figures


def measure_limits(threads: int, clock: Clock = time.perf_counter) -> Figures:
    """GB/s of reading memory, GFLOP/s of bfloat16 products."""
    torch.set_num_threads(threads)
    return {"memory, GB/s": memory_bandwidth(clock=clock) / 1e9, "bfloat16, GFLOP/s": product_rate(clock=clock) / 1e9}


def in_its_own_process(script: str, what: str, *options: str) -> Figures:
    """Run `script --measure what` with further options; the figures that it prints as JSON."""
    done = subprocess.run([sys.executable, script, "--measure", what, *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {what} failed; the peers are installed by pip install -r perf/requirements.txt")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def medians(rounds: Sequence[Mapping[str, Figures]]) -> dict[str, Figures]:
    """Of each figure of each engine."""
    return {
        what: {name: statistics.median(one[what][name] for one in rounds) for name in figures}
        for what, figures in rounds[0].items()
    }
