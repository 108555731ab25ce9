"""Sampling for an evaluation: our engine against transformers' `generate` at its best batch size, on one machine.

    python perf/eval.py [--json FILE] [--work DIR] [--rounds N]

A random Qwen2 of 100 M parameters in bfloat16 (float32 where the processor does not multiply bfloat16) answers 30
problems 16 times each. How long an answer is, is drawn from the real ones of the tests' data (a 7B model's on MATH),
the same for both systems, and imposed on both: random weights would never end. transformers takes the samples in their
order, a batch after the other, every batch until its longest row is done; its batch sizes are tried on a part of the
samples first, and the best of them takes all. Ours gets 30 requests with 16 samples each, as `distill eval` sends them.
Every run has a process of its own. On two cores all of it takes an hour, most of it transformers'.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DATA = Path(os.environ.get("DISTILL_TEST_DATA", "../shared/data")) / "qwen25math_cot100x8" / "math_cot_100.slim.jsonl"
PROBLEMS, SAMPLES, VOCABULARY = 30, 16, 32_000
BATCHES = (1, 16, 64, 256)
TRIED = {1: 4, 16: 32, 64: 64, 256: 256}  # samples that a batch size is tried on


@cache
def lengths() -> tuple[list[int], list[list[int]]]:
    """Tokens of each problem's prompt, and of each of its samples, under a BPE that is trained on the data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()][:PROBLEMS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        (text for row in rows for text in (row["question"], *row["code"])), trainers.BpeTrainer(vocab_size=8000)
    )
    rng = random.Random(0)
    prompts = [len(tokenizer.encode(row["question"]).ids) + 40 for row in rows]  # and a template around it
    samples = [[len(tokenizer.encode(text).ids) for text in rng.choices(row["code"], k=SAMPLES)] for row in rows]
    return prompts, samples


def prompt_ids(number: int) -> list[int]:
    return random.Random(number).choices(range(2, VOCABULARY), k=lengths()[0][number])


def prepare(work: Path) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    place = work / "model"
    if not (place / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


def dtype() -> Any:
    import torch

    from distill.hardware import multiplies_bfloat16

    return torch.bfloat16 if torch.cuda.is_available() or multiplies_bfloat16() else torch.float32


def ours(place: Path, batch: int) -> dict[str, float]:
    from distill.engine import Engine, EngineOptions, Request, SamplingParams
    from distill.engine import engine as room

    prompts, wanted = lengths()
    longest = max(max(of_one) for of_one in wanted)
    room._finished = lambda state, length: (  # in place of an end token, which random weights never draw
        "stop" if length - len(state.request.prompt_ids) >= wanted[int(state.request.id)][state.sample] else None
    )
    engine = Engine.load(
        place,
        EngineOptions(
            dtype=str(dtype()).removeprefix("torch."), max_batch=batch, max_context=max(prompts) + longest + 1
        ),
    )
    params = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=longest)
    begun, tokens = time.perf_counter(), 0
    requests = [Request(str(i), tuple(prompt_ids(i)), params, 0, i, tuple(range(SAMPLES))) for i in range(PROBLEMS)]
    for done in engine.generate(requests):
        tokens += len(done.token_ids)
    took = time.perf_counter() - begun
    assert tokens == sum(map(sum, wanted)), (tokens, sum(map(sum, wanted)))
    return {"tokens": tokens, "seconds": took, "tokens/s": tokens / took}


def transformers(place: Path, batch: int, count: int) -> dict[str, float]:
    """The first `count` samples, in batches."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype()).eval()
    model.generation_config.eos_token_id = None
    jobs = [(i, length) for i, of_one in enumerate(lengths()[1]) for length in of_one][:count]

    class Lengths(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, wanted: list[int], prompt: int) -> None:
            self.wanted, self.prompt = torch.tensor(wanted), prompt

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] - self.prompt >= self.wanted

    begun = time.perf_counter()
    for first in range(0, len(jobs), batch):
        some = jobs[first : first + batch]
        rows = [prompt_ids(problem) for problem, _ in some]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        wanted = [length for _, length in some]
        made = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=0.6,
            top_p=0.95,
            top_k=0,
            max_new_tokens=max(wanted),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Lengths(wanted, width)]),
        )
        assert made.shape[1] == width + max(wanted)
    took = time.perf_counter() - begun
    tokens = sum(length for _, length in jobs)
    return {"tokens": tokens, "seconds": took, "tokens/s": tokens / took}


def in_its_own_process(what: str, args: argparse.Namespace, batch: int, count: int = PROBLEMS * SAMPLES) -> Any:
    command = [sys.executable, __file__, "--measure", what, "--batch", str(batch), "--count", str(count)]
    done = subprocess.run([*command, "--work", str(args.work)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {what} failed at a batch of {batch}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf-eval"), help="where the model is kept")
    parser.add_argument("--rounds", type=int, default=1, help="of both systems on all samples, in turns")
    parser.add_argument("--measure", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DATA.is_file():
        sys.exit(f"error: {DATA} is not there: set DISTILL_TEST_DATA to the directory of the tests' data")
    place = prepare(args.work)
    if args.measure == "ours":
        print(json.dumps(ours(place, args.batch)))
        return
    if args.measure == "transformers":
        print(json.dumps(transformers(place, args.batch, args.count)))
        return
    tried = {}
    for batch in BATCHES:
        tried[batch] = in_its_own_process("transformers", args, batch, TRIED[batch])["tokens/s"]
        print(f"transformers, batches of {batch}: {tried[batch]:.0f} tokens/s", file=sys.stderr)
    best = max(tried, key=lambda batch: tried[batch])
    rounds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(args.rounds):
        rounds["ours"].append(in_its_own_process("ours", args, args.batch)["tokens/s"])
        rounds["transformers"].append(in_its_own_process("transformers", args, best)["tokens/s"])
        print({name: round(rates[-1]) for name, rates in rounds.items()}, file=sys.stderr)
    ours_rate, theirs = (statistics.median(rates) for rates in rounds.values())
    results = {
        "dtype": str(dtype()).removeprefix("torch."),
        "transformers by batch size, tokens/s": tried,
        "best batch size": best,
        "rounds, tokens/s": rounds,
        "ours, tokens/s": ours_rate,
        "transformers, tokens/s": theirs,
        "ours ÷ transformers": ours_rate / theirs,
    }
    tokens = sum(map(sum, lengths()[1]))
    print(f"{PROBLEMS} problems × {SAMPLES}, {tokens:,} tokens, {results['dtype']}")
    print(f"ours {ours_rate:.0f} tokens/s; transformers {theirs:.0f} at its best batch size of {best}")
    print(f"ours ÷ transformers: {ours_rate / theirs:.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
