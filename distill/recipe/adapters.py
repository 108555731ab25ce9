"""Adapters that are trained in place of all weights: `train.adapter` in a recipe. The names are those of PEFT.

How a model gets them is `distill.train.student.methods`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distill.section import Section


class Lora(Section):
    """Low-rank adapters beside the linear layers of a frozen base (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"]
    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: int = Field(32, ge=1, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the adapters")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", min_length=1, description="the linear layers that get adapters; the head never does"
    )

    tag: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"

    def describe(self) -> str:
        """The adapters in half a line, for the model card."""
        return f"{self.label}, rank {self.r}, alpha {self.alpha}, merged"


class Qlora(Lora):
    """LoRA on a base in 4-bit NF4 (Dettmers et al. 2023, arXiv 2305.14314); needs `pip install 'distill[qlora]'`."""

    kind: Literal["qlora"]  # type: ignore[assignment]  # a discriminator is one value per class

    tag: ClassVar[str] = "qlora"
    label: ClassVar[str] = "QLoRA"


Adapter = Annotated[Lora | Qlora, Field(discriminator="kind")]
