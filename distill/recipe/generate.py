"""`generate:` and `engine:` in a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.recipe.sampling import SamplingSettings
from distill.section import Free, Section


class Budget(Section):
    """What a run may spend on samples. At its end the finished samples are kept, and a raised budget goes on."""

    cost: float | None = Field(
        None, gt=0, description="money: of tokens at the `price` of the server or the card, else at `price_per_hour`"
    )
    tokens: int | None = Field(None, ge=1, description="tokens of prompts and completions")
    hours: float | None = Field(None, gt=0, description="hours of sampling")

    @model_validator(mode="after")
    def bounds_something(self) -> "Budget":
        """Errors: ValueError for a budget without a limit."""
        if self.cost is None and self.tokens is None and self.hours is None:
            raise ValueError("one of `cost`, `tokens` and `hours` is needed")
        return self


class Generate(Section):
    """Stage 1: the teacher answers the prompts."""

    samples: Annotated[int, Free] = Field(1, ge=1, description="answers per prompt")
    max_prompts: Annotated[int | None, Free] = Field(
        None, ge=1, lt=2**63, description="number of prompts, of all sources together; null: all that they have"
    )
    sampling: SamplingSettings = SamplingSettings()
    prompt_suffix: str = Field(
        "", description="text appended to every question, such as R1's request for a \\boxed{} answer"
    )
    logprobs: int | None = Field(
        None, ge=1, description="number of most likely tokens stored with every token of an answer; null stores none"
    )
    budget: Annotated[Budget | None, Free] = Field(
        None, description="what may be spent on the samples, over all sessions of the run; null: no limit"
    )
    max_batch: Annotated[int, Free] = Field(
        128, ge=1, description="sequences decoded at once by the local engine; requests under way at a server"
    )


class LocalEngine(Section):
    """The engine that runs models on this machine: the teacher, and the models that are evaluated."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Free] = Field(  # the device chosen is a setting (`device_type`)
        "auto", description="auto: a GPU that multiplies FP8, else the CPU; a run stays on the kind it began on"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="precision of activations and cache; weights keep their published precision"
    )
    memory_budget: Annotated[float | None, Free] = Field(
        None,
        gt=0,
        description="GiB for weights, cache and activations; experts that do not fit are streamed from disk; "
        "null: no limit on a CPU, most of the free memory on a GPU",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="precision of the cache; fp8 halves the cached latents, on a GPU"
    )
    data_parallel_size: Annotated[int | None, Free] = Field(
        None, ge=1, description="copies of the model that share the prompts; null: one for each GPU, or one on a CPU"
    )
    num_speculative_tokens: Annotated[int, Free] = Field(
        0,
        ge=0,
        description="tokens drafted at a time by the teacher's multi-token-prediction layer; the text stays the same",
    )
