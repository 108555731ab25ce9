"""`eval:` in a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from distill.section import Free, Section


class Eval(Section):
    """Stage 4: scores of the base, the student and the teacher, side by side."""

    benchmarks: tuple[str, ...] = Field(description="names from the catalog, or paths of cards")
    models: tuple[Literal["base", "student", "teacher"], ...] = Field(
        ("base", "student", "teacher"), description="who is scored"
    )
    samples: Annotated[int | None, Free] = Field(None, ge=1, description="answers per problem; null takes the card's")
    limit: Annotated[int | None, Free] = Field(None, ge=1, description="problems at most")
    max_new_tokens: int | None = Field(
        None, ge=1, description="of an answer; null takes the card's; another number is another benchmark"
    )
    sources: dict[str, str] = Field(
        default_factory=dict, description="benchmark → a .jsonl or .parquet file with its problems, instead of the hub"
    )
    published: str | None = Field(
        None, description="whose published scores stand beside the student's, as cards name it"
    )
    seed: int = Field(1, description="of the sampling")
    max_batch: Annotated[int, Free] = Field(128, ge=1, description="sequences decoded at once by the local engine")
