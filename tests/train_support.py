"""What the tests of training share: a very small random student, and traces that a small model can learn."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distill.artefacts import FilterSummary, RunPaths, Settings, TrainSummary
from distill.chat import split_reasoning
from distill.models import Models
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.run import Run
from distill.stage import Stage
from distill.traces.store import write_traces
from distill.traces.trace import Trace, content_hash

if TYPE_CHECKING:
    from distill.train.rows.stored import TrainingSet

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
OTHER: dict[str, object] = {  # sizes of a small model of any family
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
RECURRENT: dict[str, dict[str, object]] = {  # families with a recurrence or a convolution over time in some layers
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16},
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
        **{"num_local_experts": 0, "shared_intermediate_size": 64},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1},
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
JAMBA: dict[str, object] = {"mamba_d_state": 8, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
HYBRID: dict[str, object] = {  # Qwen3.5: three layers with a recurrence to one of attention
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def make_student(directory: Path, *, hidden: int = 32, layers: int = 2, context: int = 512, tied: bool = True) -> Path:
    """A random Qwen2 of a few thousand weights with a byte-level tokenizer and no chat template, and its card."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    write_tokenizer(directory)
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
    return write_card(directory, context)


def make_other(directory: Path, family: str, context: int = 512, **config: object) -> Path:
    """A random model of a family that the engine does not compute, with the tokenizer of `make_student` and a card."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(directory)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OTHER | config)).save_pretrained(directory)
    return write_card(directory, context, family)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"additional_special_tokens": [START]})
    fast.save_pretrained(directory)


def write_card(directory: Path, context: int, family: str = "qwen2") -> Path:
    """The card of a student whose weights are beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    card = {
        "name": "tiny-test",
        "family": family,
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
    """A directory with kept traces, without the record of a filter stage."""
    directory.mkdir(parents=True, exist_ok=True)
    write_traces(directory / "filtered" / "kept", traces)
    return directory


class Filtered(Stage[FilterSummary]):
    """A filter stage that keeps given traces."""

    name, outputs, products = "filter", ("filtered",), ("filtered/kept/*",)
    summary = FilterSummary

    def __init__(self, traces: Iterable[Trace]) -> None:
        self.traces = list(traces)

    def settings(self, run: Run) -> Settings:
        return run.recipe.filter_settings()

    def work(self, run: Run, begin: Callable[[], None]) -> FilterSummary:
        begin()
        prepare(run.directory, self.traces)
        count = len(self.traces)
        return FilterSummary(
            total=count,
            kept=count,
            dropped=0,
            prompts=count,
            prompts_kept=count,
            funnel=(),
            verdicts={},
            unit="tokens",
            tokens_kept=0,
            reasoning_median=None,
            reasoning_mean=None,
            kept_hash=content_hash(trace.digest for trace in self.traces),
        )

    def headline(self, summary: FilterSummary) -> str:
        return ""


def begin(directory: Path, traces: Iterable[Trace], student: Path | None = None) -> Path:
    """A run directory as the filter stage leaves it."""
    with Run(directory, make_recipe(student or directory)) as run:
        Filtered(traces).perform(run)
    return directory


def rows_of(recipe: Recipe, directory: Path) -> "TrainingSet":
    """The rows of a directory with kept traces, encoded or from the cache."""
    from distill.train.rows.prepare import prepare as prepare_rows

    return prepare_rows(recipe, Models(recipe, directory), RunPaths(directory), recipe.train.row_settings(), {})


def make_loop(student: Path, run_dir: Path, checkpoints: Path, settings: dict[str, Any] | None = None) -> Any:
    """The loop of a training in this process, before its first step. Its checkpoints are not in the run's directory."""
    from distill.train.learn.fit import Task, build
    from distill.train.learn.loop import Loop
    from distill.train.ranks.checkpoint import Checkpoints
    from distill.train.ranks.world import World
    from distill.train.rows.feed import StoredFeed

    recipe = make_recipe(student, settings)
    rows = rows_of(recipe, run_dir)
    world = World()
    built = build(Task(recipe, Models(recipe, run_dir), RunPaths(run_dir)), world)
    saved = Checkpoints(checkpoints, recipe.train.save_total_limit, world)
    return Loop(built.learner, StoredFeed(rows, recipe.train), recipe.train, saved, world, laid_out=built.wrapped)


def train_here(directory: Path, student: Path, settings: dict[str, Any] | None = None) -> TrainSummary:
    """Train in this process, as `distill train` does."""
    from distill.train import STAGE

    with Run(directory, make_recipe(student, settings)) as run:
        return STAGE.perform(run)
