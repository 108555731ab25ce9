"""What produces an engine's numbers, as named facts.

Two engines whose facts agree draw the same tokens from the same prompts (up to near-ties where a library multiplies
matrices), so the facts are part of what identifies traces and scores. They are compared and hashed key by key; a
sentence in their place would turn every change of wording into another identity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from distill.engine.kernels import cpu

Products = Literal["fixed order", "library"]


@dataclass(frozen=True)
class Numerics:
    """The facts. None: does not apply.

    kernels: the column of the table of ops ("cpu", "cuda", "reference", "w8a8").
    instruction_set: of the CPU kernels ("avx512_bf16", "avx2", …).
    matrix_products: "fixed order" where a row's sums do not depend on the batch; "library" where they may.
    weights: the form of the published matrices ("fp8-e4m3 block 128", "bfloat16", …), which is also how they are used.
    activations: their precision between ops.
    quantised_activations: the form that products with FP8 weights give them.
    cache: precision of cached keys and values, or latents.
    """

    kernels: str
    instruction_set: str | None
    matrix_products: Products
    weights: str
    activations: str
    quantised_activations: str | None
    cache: str

    @classmethod
    def of(cls, column: str, weights: str, dtype: str, cache: str) -> Numerics:
        """The facts for a column of the table of ops. weights: as `ModelWeights.stored`; cache: "fp8" or a dtype."""
        fp8_products = column in ("cuda", "w8a8") and weights.startswith("fp8")
        return cls(
            kernels=column,
            instruction_set=cpu.instruction_set() if column == "cpu" else None,
            matrix_products="fixed order" if column == "cpu" else "library",
            weights=weights,
            activations=dtype,
            quantised_activations="fp8-e4m3 1x128" if fp8_products else None,
            cache=cache,
        )

    def to_json(self) -> dict[str, str]:
        """The facts that apply, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}
