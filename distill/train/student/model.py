"""The student's model directory, in and out.

In: the base model, or one line about what is wrong with its files. `from_pretrained` only warns about weights that are
missing, and initialises them at random; here that is an error, as are weights that are not finite numbers. The gate
needs the config only, so 140 GB are loaded after the gate; and where ranks share a model, each reads its own shard of
every tensor.

Out: a directory that `transformers` (4 and 5), vLLM and llama.cpp load unchanged: weights, config, the tokenizer with
the chat template that was trained, R1's recommended sampling, and a model card (`student.card`). It is written under
another name and renamed.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from distill import model_families, model_files
from distill.backends.fallback import loaded
from distill.chat import Chat
from distill.durable import write_whole
from distill.engine.families import spec_of
from distill.errors import UserError
from distill.models import Model
from distill.recipe import Train
from distill.recipe.adapters import Lora, Qlora
from distill.train.learn import fused, recurrent
from distill.train.ranks.checkpoint import Ranks, writing
from distill.train.rows.gate import Limits
from distill.train.student import isolation, methods
from distill.train.student.card import TEMPERATURE, TOP_P

# Never sampled and never an end token, so that masking padding by its id loses nothing. In the tokenizers of Qwen and
# Llama 3; the first that a tokenizer has is used.
PADS = ("<|fim_pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED = 1 << 26  # bytes of two tensors compared at a time


def inspect(model_dir: Path, settings: Train) -> Limits:
    """Read a model directory's config and the headers of its weight files.

    Errors: UserError naming the file that is broken, or weights that the config expects and the files do not have.
    """
    if problem := model_files.first_problem(model_dir):
        raise UserError(problem)
    shapes: dict[str, list[int]] = {}
    where: dict[str, tuple[Path, str]] = {}  # by the name that it has in the student: file and name
    for path in model_files.weight_files(model_dir):
        if not path.is_file():
            raise UserError(f"{path} is missing; download it")
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118  not a dict
                    name = model_families.trained_name(stored)
                    shapes[name], where[name] = file.get_slice(stored).get_shape(), (path, stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error
    config = configuration(model_dir, settings)
    isolation.why_padded(config, settings)
    context = getattr(config, "max_position_embeddings", settings.max_length)
    if model_families.renames(config.model_type):
        loaded(model_dir, config=config, device_map="meta")
        return Limits(config.vocab_size, context)
    try:
        model = empty(model_dir, settings, torch.bfloat16)
    except Exception as error:  # whatever the wrong value leads to inside transformers
        raise UserError(f"{model_dir}/config.json describes no model that can be built: {_reason(error)}") from error
    if settings.adapter is not None:
        methods.refuse_targets(model, settings.adapter)
    expected = {name: list(tensor.shape) for name, tensor in stored_tensors(model).items()}
    for problem, names in (
        ("are missing", [name for name in expected if name not in shapes]),
        ("have another shape", [name for name in expected if name in shapes and expected[name] != shapes[name]]),
    ):
        if names:
            listed = ", ".join(sorted(names)[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
            raise UserError(f"{model_dir}: weights that config.json expects {problem}: {listed}; download them again")
    if config.tie_word_embeddings and HEAD in where and EMBEDDING in where:
        refuse_another_head(*where[HEAD], *where[EMBEDDING])
    return Limits(config.vocab_size, context)


def refuse_another_head(head: Path, head_name: str, embedding: Path, embedding_name: str) -> None:
    """A head in the file that differs from the embedding it is tied to: programs disagree about which one counts.

    Errors: UserError.
    """
    with safe_open(head, framework="pt") as first, safe_open(embedding, framework="pt") as second:
        heads, embeddings = first.get_slice(head_name), second.get_slice(embedding_name)
        rows, width = heads.get_shape()
        step = max(1, COMPARED // (4 * width))
        if [rows, width] != embeddings.get_shape() or not all(
            torch.equal(heads[i : i + step], embeddings[i : i + step]) for i in range(0, rows, step)
        ):
            raise UserError(
                f"{head} has {head_name} with values other than {embedding_name}, although config.json ties them: set "
                f"tie_word_embeddings to false in {head.parent / 'config.json'} to use it, or remove the tensor"
            )


def configuration(model_dir: Path, settings: Train) -> PretrainedConfig:
    """The base's config with the recipe's extension of its context. Errors: UserError."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model_dir)
    except Exception as error:  # whatever the wrong value leads to inside transformers
        raise UserError(f"{model_dir}/config.json cannot be used: {_reason(error)}") from error
    if (section := model_families.section(config.model_type)) is not None:
        config = getattr(config, section)
    if model_families.in_engine(config.model_type) and getattr(config, "use_sliding_window", False):
        raise UserError(
            f"{model_dir}/config.json has use_sliding_window, which training does not support; set it to false if no "
            f"row is longer than the window"
        )
    eps = getattr(config, "rms_norm_eps", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"{model_dir}/config.json: rms_norm_eps is {eps!r}; it should be a small positive number")
    if settings.max_position_embeddings:
        config.max_position_embeddings = settings.max_position_embeddings
    if settings.rope_theta:
        if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
            raise UserError(f"train.rope_theta: models of type {config.model_type!r} have no rope_theta; remove it")
        config.rope_parameters = {**config.rope_parameters, "rope_theta": settings.rope_theta}
    if model_families.in_engine(config.model_type):
        try:  # the engine evaluates the student; tests prove the training of what it computes, and of nothing else
            spec_of(config.to_dict(), f"{model_dir}/config.json")
        except ValueError as error:
            raise UserError(str(error)) from error
    return config


@contextmanager
def as_trained(base: Model, settings: Train) -> Iterator[Model]:
    """The base as the training begins with it, for the engine: with the recipe's extension of its context, which is a
    directory of links beside another config.json while the block lasts. Errors: UserError."""
    if not settings.max_position_embeddings:
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="distill-base-") as scratch:
        for file in base.directory.iterdir():
            if file.name != "config.json":
                (Path(scratch) / file.name).symlink_to(file.resolve())
        config = configuration(base.directory, settings)
        whole = AutoConfig.from_pretrained(base.directory)
        if (section := model_families.section(whole.model_type)) is not None:
            setattr(whole, section, config)
            config = whole
        config.save_pretrained(scratch)
        yield replace(base, place=Path(scratch))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def load(model_dir: Path, settings: Train, dtype: torch.dtype, quantization: object | None = None) -> PreTrainedModel:
    """The base model in `dtype`, on the CPU (4-bit weights: on the GPU). Its files have been inspected.

    Errors: UserError for weights that are not finite.
    """
    config = configuration(model_dir, settings)
    model, report = AutoModelForCausalLM.from_pretrained(
        model_dir,
        config=config,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=isolation.implementation(config, settings),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        key_mapping={f"^{re.escape(beginning)}": "model." for beginning in model_families.beginnings()},
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], "`inspect` checks the files first"
    refuse_not_finite(model_dir, stored_tensors(model).items())
    if quantization is not None:
        methods.keep_4_bit_layout(model)
    for name, parameter in empty(model_dir, settings, dtype).named_parameters():
        if not parameter.requires_grad:  # as the family says, of which `from_pretrained` keeps nothing
            model.get_parameter(name).requires_grad_(False)
    return trainable(model)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the weight files of a model hold: its parameters, and the buffers that its config does not determine."""
    return dict(model.named_parameters()) | stored_buffers(model)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers among the `stored_tensors`."""
    return {
        f"{at}.{name}" if at else name: buffer
        for at, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def is_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps a tensor of a model in float32, whatever the dtype of the others."""
    patterns = model._keep_in_fp32_modules_strict or ()
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def refuse_not_finite(model_dir: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Errors: UserError naming the first tensor with a NaN or an infinity: it would be in every logit."""
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and not torch.isfinite(local).all():
            raise UserError(f"{model_dir}: {name} has values that are not finite numbers: download the weights again")


def empty(model_dir: Path, settings: Train, dtype: torch.dtype) -> PreTrainedModel:
    """The base model without weights (on torch's meta device), to be laid out over ranks and filled by `fill`."""
    config = configuration(model_dir, settings)
    implementation = isolation.implementation(config, settings)  # which may compute with a small model
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation
        )
    model.tie_weights()
    return trainable(model)


class _WeightsReader(HuggingFaceStorageReader):
    """Reads `model_files.weight_files` alone: torch's reads every .safetensors file, and the last one of a name."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fs = _WeightFiles()


class _WeightFiles(FileSystem):
    def ls(self, path: str | PathLike[str]) -> list[str]:
        return list(map(str, model_files.weight_files(Path(path))))


def fill(model: PreTrainedModel, model_dir: Path) -> None:
    """Read the weights of a model that is laid out over ranks: each rank reads its own shards. All ranks together.

    Errors: UserError for weights that are not finite.
    """
    tensors = {
        name.replace(".base_layer.", "."): p.detach()  # PEFT's name of a layer with adapters
        for name, p in stored_tensors(model).items()
        if ".lora_" not in name
    }
    stored = {model_families.trained_name(name): name for name in model_files.shapes(model_dir) or {}}
    if other := sorted(tensors.keys() - stored.keys()):
        raise UserError(
            f"train.parallel: fsdp reads weights by their names, and {model_dir} has no {other[0]} (transformers "
            f"converts it on loading); set it to ddp"
        )
    load_distributed(
        {stored[name]: tensor for name, tensor in tensors.items()},
        storage_reader=_WeightsReader(str(model_dir)),
    )
    refuse_not_finite(model_dir, tensors.items())


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model's decoder, whatever its family names them."""
    lists = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    longest: nn.ModuleList = max(lists, key=len, default=nn.ModuleList())
    return list(longest)


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Give every row of the embeddings a gradient, and the layers the forms that they have in training.

    torch skips the padding row, whose id may be a real token's.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    recurrent.install(model)
    fused.install(model)
    return model


def merged(
    model_dir: Path, settings: Train, adapter: Lora | Qlora, tensors: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """The base, read again in `dtype`, with adapters (PEFT's names → tensors) added to its weights."""
    from peft import set_peft_model_state_dict

    adapted = methods.with_adapters(load(model_dir, settings, dtype), adapter)
    set_peft_model_state_dict(adapted, tensors)
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
    """Write the trained student to `directory`, atomically. weights: as they are stored, on the first rank. model: the
    same architecture without weights. Errors: WorkError when the disk is full."""
    with writing(directory, ranks) as scratch:
        if ranks is None or ranks.main:
            write(scratch, model, weights, chat)
            (scratch / "README.md").write_text(card, encoding="utf-8")


def write(directory: Path, model: PreTrainedModel, weights: dict[str, Tensor], chat: Chat) -> None:
    """Write weights, configs and tokenizer into an existing directory."""
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
    model.save_pretrained(directory, state_dict=weights)
    for path in directory.glob("*.safetensors"):
        path.chmod((directory / "config.json").stat().st_mode)  # safetensors creates files readable by the owner only
    spell_for_transformers_4(directory / "config.json")
    own = chat.tokenizer.pad_token
    chat.tokenizer.pad_token_id = pad
    chat.save(directory)
    chat.tokenizer.pad_token = own


def spell_for_transformers_4(path: Path) -> None:
    """Add the keys that transformers 4 (and vLLM and SGLang with it) reads in place of those of transformers 5.

    Without `rope_theta` it takes 10,000, and the model's positions are wrong from the first token on, silently.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype"] = config["dtype"]
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:  # some families have none, or one for each kind of layer
        config["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def padding(chat: Chat) -> int:
    """The pad token's id: the tokenizer's own unless it ends a turn (as R1's published one), else one of `PADS`."""
    own = chat.tokenizer.pad_token_id
    if own is not None and own not in chat.stop_token_ids:
        return int(own)
    known = chat.tokenizer.get_vocab()
    return int(next((known[pad] for pad in PADS if pad in known), chat.eos_token_id))
