"""Which parameters are trained, and by which optimiser: all of them, or LoRA or QLoRA adapters.

All: float32 weights, and a forward pass under autocast if the recipe says bfloat16: at learning rates near 1e-5 an
update is smaller than the last bit of a bfloat16 weight and would be lost. With float8 the linear layers of the decoder
multiply in FP8 (`student.float8`), and everything else is as with bfloat16.

LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT: the base is frozen in the dtype of the forward pass; adapters of
rank r beside its linear layers are float32 and trained. QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the base in
4-bit NF4 by bitsandbytes. The student is a plain model in either case: the adapters are merged into the base, which is
read from the disk again, unquantised.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.errors import UserError
from distill.hardware import multiplies_bfloat16
from distill.recipe import Train
from distill.recipe.adapters import Lora, Qlora

if TYPE_CHECKING:
    from peft import PeftModel

ADAM_BETA1, ADAM_EPSILON = 0.9, 1e-8  # constants: nobody tunes these


@dataclass(frozen=True)
class Dtypes:
    """weights: dtype of the stored base. compute: of the forward pass. autocast: `compute`, if it differs from
    `weights`, else None. float8: whether the linear layers of the decoder multiply in FP8."""

    weights: torch.dtype
    autocast: torch.dtype | None
    compute: torch.dtype
    float8: bool = False


def stored_dtype(settings: Train) -> torch.dtype:
    """The dtype of the student's files, and of the forward pass outside of FP8 products."""
    return torch.float32 if settings.dtype == "float32" else torch.bfloat16


def dtypes(settings: Train, device: torch.device, sharded: bool = False) -> Dtypes:
    """The dtypes of a training. A CPU without bfloat16 matrix products computes in float32, a hundred times faster.

    sharded: float32 shards are gathered in the dtype of the forward pass, so autocast is not needed.
    """
    compute = torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else stored_dtype(settings)
    weights = torch.float32 if settings.adapter is None else compute
    autocast = None if sharded or compute == torch.float32 else compute
    return Dtypes(weights, autocast, compute, settings.dtype == "float8" and settings.adapter is None)


def quantization(settings: Train) -> object | None:
    """The 4-bit configuration for `from_pretrained`, or None. Errors: UserError when bitsandbytes is missing."""
    if not isinstance(settings.adapter, Qlora):
        return None
    require_bitsandbytes("train.adapter.kind is qlora")
    from transformers import BitsAndBytesConfig

    config: object = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=stored_dtype(settings),
    )
    return config


def keep_4_bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking a base on a CPU at its first evaluation: its scales would be rounded, so that
    the training before and after had other weights, and `dequantize_4bit` does not read the new layout."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_bitsandbytes(why: str) -> None:
    """Errors: UserError when bitsandbytes is not installed. why: the setting that needs it."""
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError(f"{why}, which needs bitsandbytes: pip install 'distill[qlora]'")


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers of a model's decoder, as PEFT takes them: Conv1D is GPT-2's."""
    decoder, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and m in decoder and m is not head]


def named_by(target: str, name: str) -> bool:
    """Whether an entry of `target_modules` names a module: by its whole name, or by the end of it."""
    return name == target or name.endswith(f".{target}")


def last_parts(names: Iterable[str]) -> str:
    """The last parts of the names of modules, each once, for a message."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def refuse_targets(model: PreTrainedModel, adapter: Lora | Qlora) -> None:
    """Errors: UserError for entries of `target_modules` that name anything but linear layers of the decoder.

    PEFT ignores names that it does not find, the head is multiplied without its adapter (`learn.loss`), and the engine
    has none beside the embedding.
    """
    if adapter.target_modules == "all-linear":
        return
    linear = linear_layers(model)
    allowed, names = set(linear), [name for name, _ in model.named_modules()]
    refused = []
    for target in adapter.target_modules:
        named = {name for name in names if named_by(target, name)}
        if not named or named - allowed:
            refused.append(repr(target))
    if refused:
        raise UserError(
            f"train.adapter.target_modules: {', '.join(refused)}: no linear layer of the student's decoder, which has "
            f"{last_parts(linear)}; name some of these, or set it to all-linear"
        )


def with_adapters(model: PreTrainedModel, adapter: Lora | Qlora) -> "PeftModel":
    """The model with trainable adapters beside its linear layers; everything else is frozen.

    Errors: UserError as of `refuse_targets`, and for layers that PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    refuse_targets(model, adapter)
    targets, has = adapter.target_modules, last_parts(linear_layers(model))
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # PEFT uses a name that transformers 6 will remove
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            adapted = get_peft_model(model, config)
    except ValueError as error:  # in some recurrent families a layer is computed without its adapter
        reason = " ".join(str(error).split())
        raise UserError(f"train.adapter.target_modules: {reason} The student's decoder has {has}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def optimizer(learner: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """AdamW on the trained parameters, with weight decay on matrices only: gains and biases are scales, not maps."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (ADAM_BETA1, settings.adam_beta2)
    if settings.optim == "adamw_8bit":
        require_bitsandbytes("train.optim is adamw_8bit")
        from bitsandbytes.optim import AdamW8bit

        eight: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.learning_rate, betas=betas, eps=ADAM_EPSILON)
        return eight
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=ADAM_EPSILON, fused=True)


def start_adapters(model: nn.Module) -> None:
    """Initialise adapters in new memory as PEFT does: A by Kaiming, B zero, so that training begins at the base."""
    for name, module in model.named_modules():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif ".lora_B." in name:
            nn.init.zeros_(module.weight)
