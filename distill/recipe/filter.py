"""`filter:` in a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.section import Free, Section


class Filter(Section):
    """Stage 2: which traces are kept. `null` or false turns a filter off, so that each can be ablated."""

    format: bool = Field(True, description="exactly one closed <think> block with text after it")
    finish: bool = Field(True, description="the trace ended by itself, not at the token limit")
    correct: bool = Field(
        True, description="the answer equals the gold one; unverifiable is dropped too, counted apart"
    )
    min_tokens: int | None = Field(None, ge=1, description="shortest completion, in teacher tokens")
    max_tokens: int | None = Field(None, ge=1, description="longest completion, in teacher tokens")
    dedup: bool = Field(True, description="one of several identical answers to one prompt")
    per_prompt: int | None = Field(None, ge=1, description="keep at most so many traces a prompt")
    select: Literal["first", "shortest", "random"] = Field("first", description="which of them")
    grade_timeout: float = Field(
        5.0, gt=0, description="processor seconds before a grading worker is killed: unverifiable"
    )
    workers: Annotated[int, Free] = Field(2, ge=1, description="grading processes")

    @model_validator(mode="after")
    def some_length_passes(self) -> "Filter":
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is larger than max_tokens: nothing would be kept")
        return self
