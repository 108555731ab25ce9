"""Our training loop against TRL's SFTTrainer: one model, one set of traces, one machine, one run.

    python perf/train.py [--json FILE] [--work DIR] [--model DIR] [--steps N] [--seeds N] [--dtype bfloat16|float32]
                         [--only ours trl]

By default a Qwen2 of 46 M parameters whose head is as wide as Qwen2.5's (151,936), as most of a small student's work is
in its head; the real reasoning traces of the tests' data under a BPE of 4,096 that is trained on them. With --model a
pretrained model and its own tokenizer (SmolLM2-135M). Rows are packed to 2,048 tokens; the loss is on completions only.
Both train the same number of tokens with the same AdamW, from the same weights, and then the same held-out traces are
scored with transformers in float32. Every training runs in a process of its own. The first steps are not counted in the
rates.

    pip install -c constraints.txt -r perf/requirements.txt
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LENGTH = 2048
VOCABULARY, HEAD = 4096, 151_936
LEARNING_RATE, PRETRAINED = 1e-3, 2e-5  # of the model that is made here, of a pretrained one
WARM_UP = 2  # steps that are not timed
HELD_OUT = 24  # traces that are scored and not trained
DATA = Path(os.environ.get("DISTILL_TEST_DATA", "../shared/data")) / "think_traces_rg3b_dev"
SYSTEMS = ("ours", "trl")


# ---- what both are given


def conversations() -> list[list[dict[str, str]]]:
    """The traces with a closed think block and an answer."""
    from distill.chat import split_reasoning

    found = []
    for name in ("gsm8k", "mixed"):
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            reasoning, response = split_reasoning(row["response"])
            if reasoning and response:
                found.append(
                    [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["response"]}]
                )
    return found


@dataclass(frozen=True)
class Base:
    """What is trained. directory: of the model and its tokenizer. student: as a recipe names it."""

    directory: Path
    student: Path
    learning_rate: float


def base_of(args: argparse.Namespace) -> Base:
    """The model that was asked for, else the one of `prepare`."""
    if args.model:
        return Base(args.model.resolve(), args.model.resolve(), PRETRAINED)
    prepare(args.work)
    return Base(args.work / "base", args.work / "base" / "card.yaml", LEARNING_RATE)


def prepare(work: Path) -> None:
    """The tokenizer, the model and its card in `work/base`, once."""
    import torch
    import yaml
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    base = work / "base"
    if (base / "card.yaml").exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((message["content"] for row in conversations() for message in row), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    template = Path(__file__).resolve().parent.parent / "distill" / "chat" / "templates" / "chatml.jinja"
    fast.chat_template = template.read_text(encoding="utf-8")
    fast.save_pretrained(base)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=HEAD,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(base)
    card = {"name": "perf", "family": "qwen2", "weights": ".", "parameters": 0.046, "context": LENGTH, "license": "mit"}
    (base / "card.yaml").write_text(yaml.safe_dump(card))


class Clock:
    """Of steps: seconds and tokens after the first ones."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def mark(self, tokens: int) -> None:
        self.marks.append((time.perf_counter(), tokens))

    def rate(self) -> float:
        (began, before), (ended, after) = self.marks[WARM_UP - 1], self.marks[-1]
        return (after - before) / (ended - began)


def peak_memory() -> float:
    """GB: of a GPU what was allocated on it, else the process's resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e9


# ---- the two systems: each trains, and leaves its student in `out`


def train_ours(base: Base, out: Path, steps: int, seed: int, dtype: str) -> dict[str, float]:
    from distill.artefacts import RunPaths
    from distill.chat import split_reasoning
    from distill.models import Models
    from distill.prompts.prompt import Prompt
    from distill.recipe import Recipe
    from distill.traces.store import write_traces
    from distill.traces.trace import Trace
    from distill.train.learn.fit import Task, build
    from distill.train.learn.loop import Loop
    from distill.train.ranks.checkpoint import Checkpoints
    from distill.train.ranks.world import World
    from distill.train.rows.feed import StoredFeed
    from distill.train.rows.prepare import prepare as prepare_rows

    def traces() -> Iterator[Trace]:
        for number, (question, answer) in enumerate(conversations()[HELD_OUT:]):
            text = answer["content"]
            reasoning, response = split_reasoning(text)
            yield Trace(
                Prompt.from_question(question["content"], None), number, 0, text, reasoning, response, "stop", "t"
            )

    write_traces(out / "filtered" / "kept", traces())
    recipe = Recipe.model_validate(
        {
            "name": "perf",
            "teacher": "tiny-r1",
            "student": str(base.student),
            "prompts": [{"kind": "procedural", "name": "arithmetic"}],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
            "train": {
                "learning_rate": base.learning_rate,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "adam_beta2": 0.999,
                "packing": True,
                "max_length": LENGTH,
                "max_steps": steps,
                "dtype": dtype,
                "seed": seed,
                "save_steps": 10**6,
                "logging_steps": 1,
            },
        }
    )
    models, paths = Models(recipe, out), RunPaths(out)
    rows = prepare_rows(recipe, models, paths, recipe.train.row_settings(), {})
    world = World()
    built = build(Task(recipe, models, paths), world)
    loop = Loop(
        built.learner,
        StoredFeed(rows, recipe.train),
        recipe.train,
        Checkpoints(out / "checkpoints", 1),
        world,
        laid_out=built.wrapped,
    )
    clock, step = Clock(), loop.step

    def timed() -> None:
        step()
        loop.settle()  # which waits for a GPU
        clock.mark(loop.position.tokens)

    loop.step = timed  # type: ignore[method-assign]
    loop.checkpoints.save = lambda *args: None  # type: ignore[method-assign]
    loop.run()
    figures = {"tokens/s": clock.rate(), "peak memory, GB": peak_memory(), "tokens": loop.position.tokens}
    built.base.save_pretrained(out / "student")
    return figures


def train_trl(base: Base, out: Path, steps: int, seed: int, dtype: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row[:1], "completion": row[1:]} for row in conversations()[HELD_OUT:]]
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    clock = Clock()
    tokens = 0

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.mark(tokens)

    class Counting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            tokens += int((inputs["input_ids"] != tokenizer.pad_token_id).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = SFTConfig(
        output_dir=str(out / "trl"),
        packing=True,
        max_length=LENGTH,
        completion_only_loss=True,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=base.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timed()],
    )
    trainer.train()
    figures = {"tokens/s": clock.rate(), "peak memory, GB": peak_memory(), "tokens": float(tokens)}
    trainer.model.float().save_pretrained(out / "student")
    return figures


def limits(*_: Any) -> dict[str, float]:
    import torch

    from distill.hardware import memory_bandwidth, multiplies_bfloat16, product_rate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "memory, GB/s": memory_bandwidth(device=device) / 1e9,
        "products, GFLOP/s": product_rate(device=device) / 1e9,
        "multiplies bfloat16": float(device == "cuda" or multiplies_bfloat16()),
    }


# ---- what is reported


def held_out_loss(base: Base, student: Path) -> float:
    """Nats a token of the completions of the held-out traces, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from distill.chat import Chat

    chat = Chat.load(base.directory)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in conversations()[:HELD_OUT]:
            ids, prompt_tokens = chat.training_ids(row)  # type: ignore[arg-type]
            ids_1t = torch.tensor([ids[:LENGTH]])
            hidden_td = model.model(ids_1t).last_hidden_state[0, prompt_tokens - 1 : -1]
            for some_rd, targets_r in zip(hidden_td.split(128), ids_1t[0, prompt_tokens:].split(128), strict=True):
                loss = torch.nn.functional.cross_entropy(model.lm_head(some_rd), targets_r, reduction="sum")
                total, count = total + loss.item(), count + len(targets_r)
    return total / count


def operations(base: Base, ratio_supervised: float) -> float:
    """Operations a token, forward and back: three products for each weight, of the head for what is learnt."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.directory)
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv = hidden // heads * config.num_key_value_heads
    layer = hidden * hidden * 2 + hidden * kv * 2 + 3 * hidden * config.intermediate_size
    return 6.0 * (config.num_hidden_layers * layer + ratio_supervised * hidden * config.vocab_size)


MEASURES: dict[str, Callable[..., dict[str, float]]] = {"ours": train_ours, "trl": train_trl, "limits": limits}


def in_its_own_process(what: str, args: argparse.Namespace, seed: int = 0) -> dict[str, float]:
    out = args.work / f"{what}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    settings = ["--work", str(args.work), "--steps", str(args.steps), "--dtype", args.dtype, "--seed", str(seed)]
    settings += ["--model", str(args.model)] if args.model else []
    done = subprocess.run([sys.executable, __file__, "--measure", what, *settings], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {what} failed; TRL is installed by pip install -c constraints.txt -r perf/requirements.txt")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf-train"), help="where the model is kept")
    parser.add_argument("--model", type=Path, help="directory of a pretrained model to train in place of the small one")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of 2,048 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the forward pass")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"error: {DATA} is not there: set DISTILL_TEST_DATA to the directory of the tests' data")
    base = base_of(args)
    if args.measure:
        out = args.work / f"{args.measure}-{args.seed}"
        print(json.dumps(MEASURES[args.measure](base, out, args.steps, args.seed, args.dtype)))
        return
    results: dict[str, Any] = {"limits": in_its_own_process("limits", args), "dtype": args.dtype, "steps": args.steps}
    runs: dict[str, list[dict[str, float]]] = {system: [] for system in args.only}
    for seed in range(args.seeds):  # in turns, as a machine is now and then slower for some minutes
        for system in args.only:
            print(f"seed {seed + 1} of {args.seeds}: {system}", file=sys.stderr)
            figures = in_its_own_process(system, args, seed)
            figures["held-out loss"] = held_out_loss(base, args.work / f"{system}-{seed}" / "student")
            runs[system].append(figures)
    results["runs"] = runs
    show(results, base)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(results: dict[str, Any], base: Base) -> None:
    runs = results["runs"]
    middle = {
        system: {name: statistics.median(run[name] for run in some) for name in some[0]}
        for system, some in runs.items()
    }
    print(f"{results['dtype']}, {results['steps']} steps; limits of this machine: {results['limits']}")
    for system, figures in middle.items():
        losses = sorted(run["held-out loss"] for run in runs[system])
        spread = f"{losses[0]:.4f} to {losses[-1]:.4f}"
        print(
            f"{system:5} {figures['tokens/s']:8.0f} tokens/s  {figures['peak memory, GB']:5.2f} GB  held-out loss "
            f"{figures['held-out loss']:.4f} ({spread}) after {figures['tokens']:,.0f} tokens"
        )
    if len(middle) == 2:
        ours, trl = middle["ours"], middle["trl"]
        print(
            f"ours ÷ TRL: tokens/s {ours['tokens/s'] / trl['tokens/s']:.2f}, peak memory "
            f"{ours['peak memory, GB'] / trl['peak memory, GB']:.2f}"
        )
    if "ours" in middle:
        done = middle["ours"]["tokens/s"] * operations(base, 0.8) / 1e9
        print(f"ours: about {done:.0f} GFLOP/s, {done / results['limits']['products, GFLOP/s']:.0%} of the limit")


if __name__ == "__main__":
    main()
