"""Which parameters are trained, and by what optimiser: full, LoRA, QLoRA.

Full: float32 weights, and a forward pass that is autocast where the recipe says bfloat16: at learning rates near 1e-5
an update is smaller than a bfloat16 weight's last bit and would be lost.

LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT: the base is frozen in the dtype of the forward pass, adapters of
rank r beside its linear layers are float32 and trained. QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the base in
4-bit NF4 by bitsandbytes. What comes out is a plain model all the same: the adapters are merged into a base that is
read again, unquantised, from the disk.
"""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.hardware import multiplies_bfloat16
from distill.recipe import Train

if TYPE_CHECKING:
    from peft import PeftModel

ADAM_BETA1, ADAM_EPSILON = 0.9, 1e-8  # nobody turns these


@dataclass(frozen=True)
class Dtypes:
    """weights: in which the base is held. compute: of the forward pass. autocast: the same, where it is another."""

    weights: torch.dtype
    autocast: torch.dtype | None
    compute: torch.dtype


def dtypes(settings: Train, device: torch.device, sharded: bool = False) -> Dtypes:
    """A CPU without products of bfloat16 computes in float32 instead: exacter, and a hundred times faster there.

    sharded: float32 parts are gathered in the dtype of the forward pass, and autocast has nothing left to do.
    """
    asked: torch.dtype = getattr(torch, settings.dtype)
    compute = torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else asked
    weights = torch.float32 if settings.method == "full" else compute
    return Dtypes(weights, None if sharded or compute == torch.float32 else compute, compute)


def quantization(settings: Train) -> object | None:
    """What `from_pretrained` is told about 4-bit weights, or None. Errors: UserError where bitsandbytes is missing."""
    if settings.method != "qlora":
        return None
    require_bitsandbytes("train.method is qlora")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )


def require_bitsandbytes(why: str) -> None:
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError(f"{why}, which needs bitsandbytes: pip install 'distill[qlora]'")


def with_adapters(model: PreTrainedModel, settings: Train) -> "PeftModel":
    """The model with trainable adapters beside its linear layers; everything else is frozen.

    Errors: UserError where `lora_target_modules` names nothing in the model.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # PEFT asks transformers by a name that goes with its version 6
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            adapted = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"train.lora_target_modules {list(targets)} names no module of the student; it has {', '.join(linear)}"
        ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def optimizer(learner: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """AdamW on what is trained; weight decay on matrices only: gains and biases have no direction to shrink along."""
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
    """Initialise adapters whose memory is new, as PEFT does: A by Kaiming, B zero, so that it begins at the base."""
    for name, module in model.named_modules():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif ".lora_B." in name:
            nn.init.zeros_(module.weight)
