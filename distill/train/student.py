"""The student's model directory, in and out.

In: the base model, or one line about what is wrong with its files. `from_pretrained` only warns about weights that it
did not find, and makes up random ones; here that is an error. What the gate asks of a model is in its config, so 140 GB
are loaded only after the gate; and where ranks share a model, each reads its own part of every tensor.

Out: what `transformers` (and vLLM, and llama.cpp) load as it is: weights, config, the tokenizer with the very chat
template that was trained, R1's recommended sampling, and a model card (`train.card`). Written aside, renamed.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from distill.chat import Chat
from distill.errors import UserError
from distill.recipe import Train
from distill.train import attention, methods
from distill.train.card import TEMPERATURE, TOP_P
from distill.train.checkpoint import SCRATCH, Ranks, writing
from distill.train.gate import Limits

# Never sampled and never an end token, so that who pads with it and masks it by id loses nothing. In the tokenizers of
# Qwen and Llama 3; the first that a tokenizer knows is taken.
PADS = ("<|fim_pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>")


def inspect(model_dir: Path, settings: Train) -> Limits:
    """Read a model directory's config and the headers of its weight files.

    Errors: UserError naming the broken file, or the weights that its config asks for and that are not there.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model_dir} has no .safetensors file: fetch the student's weights there first")
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from error
    config = configuration(model_dir, settings)
    asked = {name: list(p.shape) for name, p in empty(model_dir, settings, torch.bfloat16).named_parameters()}
    for wrong, names in (
        ("are not there", [name for name in asked if name not in shapes]),
        ("have another shape there", [name for name in asked if name in shapes and asked[name] != shapes[name]]),
    ):
        if names:
            some = ", ".join(sorted(names)[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
            raise UserError(f"{model_dir}: config.json asks for weights that {wrong}: {some}; fetch the model again")
    return Limits(config.vocab_size, config.max_position_embeddings)


def configuration(model_dir: Path, settings: Train) -> PretrainedConfig:
    """The base's config with the recipe's extension of its context. Errors: UserError."""
    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{model_dir}/config.json cannot be used: {' '.join(str(error).split())}") from error
    if getattr(config, "use_sliding_window", False):
        raise UserError(
            f"{model_dir}/config.json has use_sliding_window: such students are not trained here; set it to false if "
            f"no row is longer than the window"
        )
    if settings.max_position_embeddings:
        config.max_position_embeddings = settings.max_position_embeddings
    if settings.rope_theta:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": settings.rope_theta}
    return config


def load(model_dir: Path, settings: Train, dtype: torch.dtype, quantization: object | None = None) -> PreTrainedModel:
    """The base model in `dtype`, on the CPU (4-bit weights: on the GPU). Its files have been inspected."""
    model, report = AutoModelForCausalLM.from_pretrained(
        model_dir,
        config=configuration(model_dir, settings),
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=attention.NAME,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], "`inspect` looks at the files first"
    return trainable(model)


def empty(model_dir: Path, settings: Train, dtype: torch.dtype) -> PreTrainedModel:
    """The base model without its weights (on torch's meta device), to be laid out over ranks and filled by `fill`."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            configuration(model_dir, settings), dtype=dtype, attn_implementation=attention.NAME
        )
    model.tie_weights()
    return trainable(model)


def fill(model: PreTrainedModel, model_dir: Path) -> None:
    """Read the weights of a model that is laid out over ranks: each rank reads its own part. All ranks together."""
    tensors: dict[str, Any] = {
        name.replace(".base_layer.", "."): p.detach()  # as PEFT calls what it put adapters beside
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(model_dir)))


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    # An embedding's padding row gets no gradient. Its id may be a real token's, and here nothing is padded.
    model.get_input_embeddings().padding_idx = None
    return model


def merged(model_dir: Path, settings: Train, adapters: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The base, read again in `dtype`, with adapters (PEFT's names → tensors) added to its weights."""
    from peft import set_peft_model_state_dict

    adapted = methods.with_adapters(load(model_dir, settings, dtype), settings)
    set_peft_model_state_dict(adapted, adapters)
    plain: PreTrainedModel = adapted.merge_and_unload()
    return plain


def save(
    directory: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    chat: Chat,
    card: str,
    ranks: Ranks | None = None,
) -> None:
    """Write the trained student to `directory`, atomically. weights: as they are stored, on the first rank; model:
    what they are of, without weights."""
    scratch = directory.with_name(f"{SCRATCH}{directory.name}")
    stops = list(chat.stop_token_ids)
    pad = padding(chat)
    model.config.eos_token_id = stops[0] if len(stops) == 1 else stops
    model.config.pad_token_id = pad
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        bos_token_id=chat.tokenizer.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=pad,
    )
    chat.tokenizer.pad_token_id = pad
    with writing(scratch, directory, ranks):
        if ranks is None or ranks.main:
            model.save_pretrained(scratch, state_dict=weights)
            for path in scratch.glob("*.safetensors"):
                path.chmod((scratch / "config.json").stat().st_mode)  # safetensors makes files for their owner alone
            chat.save(scratch)
            (scratch / "README.md").write_text(card, encoding="utf-8")


def padding(chat: Chat) -> int:
    """The pad token's id: the tokenizer's own unless it ends a turn (R1's published one does), else one of `PADS`."""
    own = chat.tokenizer.pad_token_id
    if own is not None and own not in chat.stop_token_ids:
        return int(own)
    known = chat.tokenizer.get_vocab()
    return int(next((known[pad] for pad in PADS if pad in known), chat.eos_token_id))
