"""FP8 training: the products of the decoder's linear layers in float8, through Accelerate's torchao backend.

`convert` replaces each linear layer of the decoder by torchao's `Float8Linear`. Parameters keep their names, their
dtype (float32) and their class, so optimiser, checkpoints, DDP, FSDP2 and the stored student do not change. Embedding,
head, norms and attention stay in bfloat16, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.1).

Scaling is torchao's `rowwise_with_gw_hp`, computed anew for each product (dynamic). Products of a forward pass and of
the gradient of its input are float8 e4m3, with one power-of-two scale per token and one per output channel (per matrix,
for the gradient); the gradient of the weight is a bfloat16 product.

- It is the nearest that torchao has to DeepSeek-V3's 1×128 tiles: an outlier costs the precision of its own token.
- A token's result does not depend on the other tokens of its batch: a step has the same loss and gradients however it
  is split into batches and ranks, as with bfloat16.
- The gradient of the weight sums over tokens, whose number is arbitrary here (rows are not padded), and float8 products
  need sums over multiples of 16.

Rejected: `tensorwise`, the fastest, whose scale is that of the largest activation of the whole batch; `rowwise`, whose
third product has one scale per channel over all tokens of a batch, and needs padding. The float8 all-gather of FSDP2
requires tensorwise scales; shards are gathered in bfloat16. Accelerate's `mixed_precision="fp8"` makes the same
conversion, but inside `prepare`, with an autocast of its own; FSDP2 is not set up by Accelerate here (`ranks.world`).

Without a GPU, the products are emulated: operands are rounded to float8 and multiplied in float32. Tests prove the path
that way, and a recipe can be tried before it is sent to a GPU.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import UserError

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

SCALING = "rowwise_with_gw_hp"
CAPABILITY = (8, 9)  # the first with FP8 products: Ada; Hopper is 9.0
REMEDY = "set train.dtype to bfloat16"


@dataclasses.dataclass(frozen=True)
class Layers:
    """Linear layers of a decoder. converted, total: their number. parameters: of the matrices of the converted ones.
    largest: parameters of the largest of these. widest: its longest dimension, over all converted."""

    converted: int
    total: int
    parameters: int
    largest: int
    widest: int


def why_missing() -> str | None:
    """Why torchao cannot be used, as a remedy; None where it can."""
    from accelerate.utils import is_torchao_available

    return None if is_torchao_available() else "torchao is not installed: pip install 'distill[float8]'"


def why_not_on(device: torch.device) -> str | None:
    """Why this device cannot train in float8; None where it can. A CPU emulates it."""
    if device.type == "cpu":
        return None
    if torch.version.hip is not None:
        return "FP8 training is supported on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability >= CAPABILITY:
        return None
    return f"this GPU has compute capability {_text(capability)} and FP8 products need {_text(CAPABILITY)}"


def require(device: torch.device) -> None:
    """Errors: UserError where torchao is missing or the device has no FP8 products."""
    if problem := why_missing():
        raise UserError(f"train.dtype is float8, and {problem}, or {REMEDY}")
    if problem := why_not_on(device):
        raise UserError(f"train.dtype is float8, and {problem}: {REMEDY}")


def describe() -> str:
    """What `train.dtype: float8` does on this machine, in one line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := why_missing() or why_not_on(device):
        return f"not here: {problem}"
    if device.type == "cpu":
        return "emulated on the processor, slower than bfloat16: to try a recipe"
    return f"FP8 products on this GPU (compute capability {_text(torch.cuda.get_device_capability())})"


def convert(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Layers:
    """Replace the linear layers of the decoder, in place, by layers that multiply in float8.

    Layers with a dimension that is not a multiple of 16 are skipped: FP8 products do not have such shapes. dtype: of
    the forward pass, to which inputs are cast; `Float8Linear` does so under the autocast of CUDA only.

    Errors: UserError where the device cannot, or no layer has such a shape.
    """
    require(device)
    from accelerate.utils import convert_model_to_fp8_ao

    decoder = model.get_decoder()
    layers = convertible(decoder)
    if not layers.converted:
        raise UserError(f"train.dtype is float8, and no linear layer of the student has dimensions of 16·n: {REMEDY}")
    convert_model_to_fp8_ao(decoder, config(emulate=device.type == "cpu"), fits)

    def cast(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) for x in inputs)

    for layer in converted_layers(decoder):
        layer.register_forward_pre_hook(cast)
    return layers


def config(emulate: bool) -> "Float8LinearConfig":
    """torchao's settings of the converted layers."""
    from torchao.float8 import Float8LinearConfig

    return dataclasses.replace(Float8LinearConfig.from_recipe_name(SCALING), emulate=emulate)


def fits(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer that can multiply in float8."""
    from accelerate.utils.ao import filter_linear_layers

    return isinstance(module, nn.Linear) and bool(filter_linear_layers(module, name, layers_to_filter=[]))


def convertible(decoder: nn.Module) -> Layers:
    """The linear layers of a decoder that has not been converted yet, and those that `convert` would replace."""
    linear = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    matrices = [module.weight for name, module in linear if fits(module, name)]
    sizes = [matrix.numel() for matrix in matrices]
    widest = max((max(matrix.shape) for matrix in matrices), default=0)
    return Layers(len(matrices), len(linear), sum(sizes), max(sizes, default=0), widest)


def converted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that multiply in float8."""
    from torchao.float8.float8_linear import Float8Linear

    return [module for module in model.modules() if isinstance(module, Float8Linear)]


def _text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
