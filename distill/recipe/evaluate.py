"""`eval:` in a recipe."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from distill.grading.sandbox.levels import Level
from distill.section import Free, Later, Section

T = TypeVar("T")


def _each_once(names: tuple[T, ...]) -> tuple[T, ...]:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice; name each once")
    return names


class Eval(Section):
    """Stage 4: the scores of the base, the student and the teacher on the same problems."""

    benchmarks: Annotated[tuple[str, ...], AfterValidator(_each_once), Free] = Field(
        min_length=1, description="names from the catalog, or paths of cards"
    )
    models: Annotated[tuple[Literal["base", "student", "teacher"], ...], AfterValidator(_each_once), Free] = Field(
        ("base", "student", "teacher"), min_length=1, description="models that are scored"
    )
    samples: Annotated[int | None, Free] = Field(None, ge=1, description="answers per problem; null: the card's")
    limit: Annotated[int | None, Free] = Field(
        None, ge=1, description="maximum number of problems, of several sources in turns; null: all"
    )
    temperature: Annotated[float | None, Later] = Field(
        None, ge=0, description="of the answers; 0 is greedy; null: the card's"
    )
    top_p: Annotated[float | None, Later] = Field(
        None, gt=0, le=1, description="nucleus of the answers; 1 is off; null: the card's"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum tokens per answer, reduced to what the model's context has room for; null: the card's",
    )
    sources: Annotated[dict[str, str | tuple[str, ...]], Free] = Field(
        default_factory=dict,
        description="benchmark → a file with its problems (as `path` of a prompt source), or a list of files, instead "
        "of the hub; for a benchmark of several sources as many files, or one with all problems",
    )
    sandbox: Annotated[Level, Free] = Field(
        "full", description="isolation that programs need at least, in benchmarks of code"
    )
    published: Annotated[str | None, Free] = Field(
        None, description="model whose published scores are compared with the student's, as the cards name it"
    )
    seed: int = Field(1, ge=-(2**63), lt=2**63, description="seed of the sampling")
    max_batch: Annotated[int, Free] = Field(128, ge=1, description="sequences decoded at once by the local engine")
