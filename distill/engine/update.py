"""Other weights for a loaded model, in place: a student that is being trained samples from what it has learned so far.

Loading notes where the numbers of every published tensor are (`ModelWeights.held`), so names, shapes and order have one
source, the reader. Each tensor is then packed straight into the memory that the old one takes: memory grows by one
tensor in the dtype of the kernels at most, and CUDA graphs and pointers in kernels' arguments stay valid. The result is
bit for bit what loading a directory with these weights gives.

Between two sets of rollouts nobody reads the weights, and the training is at its peak of memory. `release_weights`
gives the pages of a CPU back until then; writing to them anew takes a tenth of the time of packing.

One exception to "in place": CPU kernels with compute dtype float32 keep bfloat16 matrices in bfloat16. When their new
numbers are float32, a matrix gets new memory, once; rounding the weights instead would be silently wrong.

Rejected: loading a new engine from files (writes and reads every weight, captures every graph again); packing a second
model and copying it (twice the memory and four times the traffic); checking all tensors before the first is replaced
(each would have to be gathered twice).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.engine.families import FAMILIES
from distill.engine.kernels import cpu_packing
from distill.engine.kernels.pages import discard
from distill.engine.kernels.stored import Damaged, all_finite
from distill.engine.model import Model
from distill.engine.weights import Held

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


HALF_WAY = "the last update of the weights failed half-way; repeat it with good weights, or load the model again"
RELEASED = "the weights were released; update them before anything is computed"


def refuse_update(model: Model, queued: int) -> None:
    """Errors: ValueError for a model whose weights cannot be replaced, and while requests are queued."""
    if queued:
        raise ValueError(
            f"the weights cannot be updated or released while {queued} requests are queued; finish or abort them"
        )
    if not FAMILIES[model.spec.family].trains:
        trained = ", ".join(name for name, family in FAMILIES.items() if family.trains)
        raise ValueError(f"weights of the family {model.spec.family} cannot be updated; only dense ones can: {trained}")
    if not model.weights.stored.startswith(("float", "bfloat")):
        form = "FP8" if model.weights.stored.startswith("fp8") else "quantised"
        raise ValueError(
            f"the model was loaded from {form} weights, which cannot be updated; load it from bfloat16 or float32 ones"
        )


def update_weights(model: Model, tensor: Callable[[str], Tensor]) -> str:
    """Replace every weight; see `Engine.update`. Returns what `ModelWeights.stored` would be. Errors: ValueError."""
    stored = ""
    for name, held in model.weights.held.items():
        given = tensor(name).detach()
        _check_form(name, given, held)
        stored = stored or str(given.dtype).removeprefix("torch.")  # of the first, the embedding, as in the reader
        try:
            with torch.inference_mode():
                _replace(model, held, given)
        except Damaged:
            raise ValueError(
                f"tensor {name} holds numbers that are not finite (NaN or infinity); the training diverged: lower its "
                "learning rate or continue from an earlier checkpoint"
            ) from None
    return stored


def release_weights(model: Model) -> None:
    """Give the memory of the weights back to the system, until they are replaced. On a GPU nothing happens."""
    for held in model.weights.held.values():
        for matrix in (*held.matrices, *held.tensors):
            if isinstance(matrix, cpu_packing.Packed):
                matrix.discard()
            elif isinstance(matrix, Tensor) and matrix.device.type == "cpu":
                discard(matrix.data_ptr(), matrix.nbytes)


def _check_form(name: str, given: Tensor, held: Held) -> None:
    if tuple(given.shape) != held.shape:
        raise ValueError(
            f"tensor {name} has shape {list(given.shape)}, the loaded model's is {list(held.shape)}; give weights of "
            "the model that was loaded"
        )
    if given.dtype not in _DTYPES:
        raise ValueError(
            f"tensor {name} is {str(given.dtype).removeprefix('torch.')}; supported are float32, bfloat16 and float16"
        )


def _replace(model: Model, held: Held, given: Tensor) -> None:
    """Raises Damaged."""
    for matrix in held.matrices:
        model.ops.repack(matrix, given)
    for tensor in held.tensors:
        tensor.copy_(given if held.form is None else held.form(given.float()))
        if not all_finite(tensor):
            raise Damaged("values")
