"""The student's model directory, in and out.

In: the base model in float32, or one line about what is wrong with its files. `from_pretrained` only warns about
weights that it did not find, and makes up random ones; here that is an error. What the gate asks of a model is in its
config, so 140 GB are loaded only after the gate.

Out: what `transformers` (and vLLM, and llama.cpp) load as it is: weights, config, the tokenizer with the very chat
template that was trained, R1's recommended sampling, and a model card of the run's own figures. Written aside, renamed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from distill.chat import Chat
from distill.errors import UserError
from distill.recipe import HubPrompts, Recipe, StudentCard
from distill.train.checkpoint import SCRATCH, writing

# "We recommend 0.6 … top-p 0.95 … to prevent endless repetitions": DeepSeek-R1's model card, usage recommendations.
TEMPERATURE, TOP_P = 0.6, 0.95
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Limits:
    """What a model can take: ids below `vocabulary`, rows of at most `context` tokens."""

    vocabulary: int
    context: int


def inspect(model_dir: Path) -> Limits:
    """Read a model directory's config and the headers of its weight files. Errors: UserError naming the broken file."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model_dir} has no .safetensors file: fetch the student's weights there first")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from error
    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{model_dir}/config.json cannot be used: {' '.join(str(error).split())}") from error
    return Limits(config.vocab_size, config.max_position_embeddings)


def load(model_dir: Path) -> PreTrainedModel:
    """The base model, float32, on the CPU. Errors: UserError for weights that are not those of its config."""
    transformers_logging.disable_progress_bar()  # ours is the only bar on the terminal,
    transformers_logging.set_verbosity_error()  # and what it would print of missing weights becomes one line
    model, report = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for wrong, keys in (
        ("are not there", report["missing_keys"]),
        ("have another shape there", report["mismatched_keys"]),
    ):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            some = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
            raise UserError(f"{model_dir}: config.json asks for weights that {wrong}: {some}; fetch the model again")
    # An embedding's padding row gets no gradient. Padding is masked by length here, and its id may be a real token's.
    model.get_input_embeddings().padding_idx = None
    return model


def save(
    directory: Path, model: PreTrainedModel, chat: Chat, recipe: Recipe, card: StudentCard, summary: dict[str, Any]
) -> None:
    """Write the trained student to `directory`, atomically; the weights in the recipe's `train.dtype`."""
    scratch = directory.with_name(f"{SCRATCH}{directory.name}")
    stops = list(chat.stop_token_ids)
    pad = chat.tokenizer.pad_token_id
    model.config.eos_token_id = stops[0] if len(stops) == 1 else stops
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        bos_token_id=chat.tokenizer.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=pad if pad is not None else chat.eos_token_id,
    )
    model.to(getattr(torch, recipe.train.dtype))
    with writing(scratch, directory):
        model.save_pretrained(scratch)
        for weights in scratch.glob("*.safetensors"):
            weights.chmod((scratch / "config.json").stat().st_mode)  # safetensors makes files for their owner alone
        chat.save(scratch)
        (scratch / "README.md").write_text(model_card(recipe, card, summary), encoding="utf-8")


def model_card(recipe: Recipe, card: StudentCard, summary: dict[str, Any]) -> str:
    front = {
        "base_model": card.weights if HUB_ID.fullmatch(card.weights) else card.name,
        "datasets": [source.dataset for source in recipe.prompts if isinstance(source, HubPrompts)],
        "library_name": "transformers",
        "license": card.license,
        "model_name": recipe.name,
        "tags": ["distillation", "reasoning", "sft"],
    }
    header = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    learnt = "reasoning and answer" if recipe.train.content == "reasoning" else "the answer alone"
    return f"""---
{header}---

# {recipe.name}

`{card.name}`, fine-tuned on traces of `{recipe.teacher}` ({learnt}).

| | |
|---|---|
| traces | {summary["rows"]:,} ({summary["dropped_rows"]:,} dropped for length) |
| supervised tokens | {summary["supervised_tokens"]:,} in {summary["steps"]:,} steps, {summary["epochs"]:.2f} epochs |
| loss, first → last | {summary["first_loss"]:.3f} → {summary["last_loss"]:.3f} nats a token |
| learning rate | {recipe.train.learning_rate:g}, {recipe.train.lr_scheduler_type} |

Sample at temperature {TEMPERATURE} and top-p {TOP_P} (`generation_config.json` says so), with the chat template of this
directory: it is the one that was trained.
"""
