"""What the tests of training share: a very small random student, and traces that a small model can learn."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from distill.chat import split_reasoning
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.traces.store import write_traces
from distill.traces.trace import Trace

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def make_student(directory: Path, *, hidden: int = 32, layers: int = 2, context: int = 512, tied: bool = True) -> Path:
    """A random Qwen2 of a few thousand weights with a byte-level tokenizer and no chat template, and its card."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"additional_special_tokens": [START]})
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=272,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    card = {
        "name": "tiny-test",
        "family": "qwen2",
        "weights": ".",
        "parameters": 1e-5,
        "context": context,
        "license": "mit",
        "chat_template": "chatml",
    }
    (directory / "card.yaml").write_text(yaml.safe_dump(card))
    return directory


def trace(question: str, text: str, sample: int = 0) -> Trace:
    reasoning, response = split_reasoning(text)
    return Trace(Prompt.from_question(question, None), sample, 0, text, reasoning, response, "stop", "t")


def sums(count: int) -> list[Trace]:
    """Traces of different lengths that share a form: a small model's loss falls on them within a few steps."""
    return [
        trace(f"{a}+{b}?", f"<think>\n{'I add. ' * (i % 4)}{a} + {b} = {a + b}\n</think>\n\nThe answer is {a + b}.")
        for i, (a, b) in enumerate((i * 7 % 50, i * 11 % 40) for i in range(count))
    ]


def make_recipe(student: Path, train: dict[str, Any] | None = None) -> Recipe:
    small = {"per_device_train_batch_size": 4, "max_length": 256, "dtype": "float32", "learning_rate": 3e-3}
    return Recipe.model_validate(
        {
            "name": "test",
            "teacher": "tiny-r1",
            "student": f"{student}/card.yaml",
            "prompts": [{"kind": "procedural", "name": "arithmetic"}],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
            "train": small | (train or {}),
        }
    )


def prepare(directory: Path, traces: Iterable[Trace]) -> Path:
    """A run directory as the filter stage leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    write_traces(directory / "filtered" / "kept", traces)
    return directory


def make_loop(student: Path, run_dir: Path, checkpoints: Path, settings: dict[str, Any] | None = None) -> Any:
    """The loop of a training in this process, before its first step. Its checkpoints are not in the run's directory."""
    from distill.train.checkpoint import Checkpoints
    from distill.train.fit import Task, build
    from distill.train.loop import Loop
    from distill.train.objectives import Sft
    from distill.train.prepare import prepare as prepare_rows
    from distill.train.world import World

    recipe = make_recipe(student, settings)
    rows = prepare_rows(recipe, run_dir, repr(settings))
    world = World()
    task = Task(recipe, None, student, "chatml", run_dir)  # type: ignore[arg-type]
    built = build(task, Sft(), world)
    saved = Checkpoints(checkpoints, recipe.train.save_total_limit, world)
    return Loop(built.learner, rows, recipe.train, saved, world, laid_out=built.wrapped)


def train_here(directory: Path, student: Path, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    from distill.run import Run
    from distill.train import train

    with Run(directory, make_recipe(student, settings)) as run:
        return train(run)
