"""How tokens are drawn: in a recipe, and as a card recommends."""

from typing import Annotated

from pydantic import Field

from distill.section import Later, Section


class SamplingSettings(Section):
    """How tokens are drawn."""

    temperature: float = Field(0.6, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus; 1 is off")
    top_k: int = Field(0, ge=0, lt=2**31, description="0 is off")
    max_new_tokens: int = Field(32768, ge=1, description="completion tokens at most")
    thinking_budget: Annotated[int | None, Later] = Field(
        None,
        ge=1,
        description="tokens after which an open think block is closed, so the answer follows; null: no limit",
    )
