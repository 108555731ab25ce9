"""`generate:` and `engine:` in a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from distill.recipe.sampling import SamplingSettings
from distill.section import Free, Section


class Generate(Section):
    """Stage 1: the teacher answers the prompts."""

    samples: Annotated[int, Free] = Field(1, ge=1, description="answers per prompt")
    sampling: SamplingSettings = SamplingSettings()
    prompt_suffix: str = Field("", description="text added to every question, such as R1's request for \\boxed{}")
    logprobs: int | None = Field(None, ge=0, description="store the k most likely tokens at every position")
    max_batch: Annotated[int, Free] = Field(128, ge=1, description="sequences decoded at once by the local engine")


class LocalEngine(Section):
    """The engine that runs models on this machine: the teacher, and whatever is scored."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Free] = Field(  # what it comes to is a setting (`device_type`)
        "auto", description="auto: a GPU that multiplies FP8, else the CPU; a run stays on what it began on"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of activations and cache; weights are used as they are published"
    )
    memory_budget: Annotated[float | None, Free] = Field(
        None,
        gt=0,
        description="GiB for weights, cache, activations; experts past it are streamed; null: no limit, a GPU's memory",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="fp8 halves the cached latents on a GPU")
    data_parallel_size: Annotated[int | None, Free] = Field(
        None, ge=1, description="whole models side by side, sharing the prompts; null: one on each GPU, or one"
    )
    num_speculative_tokens: Annotated[int, Free] = Field(
        0, ge=0, description="drafts at a time by the teacher's multi-token-prediction layer; the text is the same"
    )
