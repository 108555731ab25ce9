"""What a recipe may say: pydantic models, unknown keys refused, defaults written out.

Every field carries one line of description (the JSON schema that editors use is made from it). A field marked `Free` is
a count or a means: it may change between two runs of the same run directory. Everything else is part of its stage's
fingerprint (`distill.run`), and changing it on a finished stage is refused.

How YAML and `--set` overrides become these models, and how mistakes are reported, is `distill.config`.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.section import Free, Section
from distill.sources import MixedKept, MixedSource, PromptSource, TraceSource


class SamplingSettings(Section):
    """How tokens are drawn."""

    temperature: float = Field(0.6, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus; 1 is off")
    top_k: int = Field(0, ge=0, description="0 is off")
    max_new_tokens: int = Field(32768, ge=1, description="completion tokens at most")


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


class Train(Section):
    """Stage 3: the student is fine-tuned. The names are those of transformers, PEFT and TRL."""

    method: Literal["full", "lora", "qlora"] = Field("full", description="which parameters are trained")
    learning_rate: float = Field(1e-5, gt=0, description="peak")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the kept traces")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps")
    per_device_train_batch_size: int = Field(
        1, ge=1, description="rows a device takes at once; with packing, times max_length tokens"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes of a device per optimiser step")
    train_batch_size: int | None = Field(
        None, ge=1, description="rows of an optimiser step on all devices together, instead of the accumulation steps"
    )
    packing: bool = Field(False, description="batches are filled to max_length; rows do not see each other")
    max_length: int = Field(32768, ge=16, description="tokens in a row")
    overlong: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="what happens to longer rows; dropped and cut tokens are counted"
    )
    max_position_embeddings: int | None = Field(
        None, ge=16, description="the context the student is extended to; null keeps the base's"
    )
    rope_theta: float | None = Field(
        None, gt=0, description="base of the rotary embedding for the extended context; null keeps the base's"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    min_lr_rate: float = Field(0.1, ge=0, le=1, description="the schedule's end, as a share of the peak")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps spent rising to the peak")
    optim: Literal["adamw_torch_fused", "adamw_8bit"] = Field(
        "adamw_torch_fused", description="adamw_8bit: a quarter of the optimiser's memory, by bitsandbytes, on a GPU"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="AdamW's second moment")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the forward pass")
    gradient_checkpointing: Annotated[bool, Free] = Field(False, description="less memory, a third more time")
    activation_offloading: Annotated[bool, Free] = Field(
        False,
        description="what gradient checkpointing keeps lies in the host's memory: long rows, large students",
    )
    lora_r: int = Field(16, ge=1, description="rank of the adapters (lora, qlora)")
    lora_alpha: int = Field(32, ge=1, description="they count lora_alpha / lora_r times")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input")
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="the layers beside which adapters stand; the head is not one of them"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="over several devices; auto: ddp where the whole training fits one, else fsdp"
    )
    num_processes: Annotated[int | None, Free] = Field(  # what it comes to is a setting (`world_size`)
        None, ge=1, description="processes that train together here; null: one on each GPU, or one"
    )
    objective: Literal["sft", "logits"] = Field(
        "sft", description="what is learnt: the traces' tokens, or the teacher's distribution at each of them"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="between the teacher's distribution and the student's (logits)"
    )
    logits_weight: float = Field(
        1.0, gt=0, le=1, description="share of the divergence in the loss; the rest is the cross-entropy (logits)"
    )
    logits_temperature: float = Field(
        1.0, gt=0, description="softens how the likeliest tokens are told apart, on both sides (logits)"
    )
    logits_top_k: int = Field(
        32, ge=1, le=1024, description="the teacher's likeliest tokens that are compared one by one; the rest together"
    )
    chat_template: Annotated[str | None, Free] = Field(  # its text is a setting, wherever it comes from
        None, description="template that overrides the student card's"
    )
    data: tuple[MixedSource, ...] = Field(
        (MixedKept(kind="kept"),), min_length=1, description="the trace sets that are mixed"
    )
    content: Literal["reasoning", "answer"] = Field(
        "reasoning", description="what the student learns to write; `answer` strips the reasoning (a control)"
    )
    val_size: float = Field(0.0, ge=0, lt=1, description="share of the prompts that are held out and scored")
    eval_steps: Annotated[int, Free] = Field(200, ge=1, description="optimiser steps between scores of held-out rows")
    seed: int = Field(0, description="data order and dropout")
    save_steps: Annotated[int, Free] = Field(200, ge=1, description="optimiser steps between checkpoints")
    save_total_limit: Annotated[int, Free] = Field(2, ge=1, description="checkpoints kept")
    logging_steps: Annotated[int, Free] = Field(10, ge=1, description="optimiser steps between log lines")
    report_to: Annotated[tuple[str, ...], Free] = Field(
        (), description="trackers of Accelerate beside log.jsonl, such as tensorboard or wandb"
    )

    @model_validator(mode="after")
    def batches_add_up(self) -> "Train":
        if self.train_batch_size is not None:
            if self.gradient_accumulation_steps != 1:
                raise ValueError("train_batch_size and gradient_accumulation_steps both size a step: set one of them")
            if self.train_batch_size % self.per_device_train_batch_size:
                raise ValueError(
                    f"train_batch_size {self.train_batch_size} is no multiple of per_device_train_batch_size "
                    f"{self.per_device_train_batch_size}"
                )
        return self

    def batches_per_step(self, processes: int) -> int:
        """Forward passes that make up an optimiser step, on all devices together."""
        if self.train_batch_size is not None:
            return self.train_batch_size // self.per_device_train_batch_size
        return self.gradient_accumulation_steps * processes

    @model_validator(mode="after")
    def offloads_what_is_kept(self) -> "Train":
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation_offloading moves what gradient_checkpointing keeps: set that, too")
        return self

    @model_validator(mode="after")
    def context_takes_the_rows(self) -> "Train":
        if self.rope_theta and not self.max_position_embeddings:
            raise ValueError("rope_theta without max_position_embeddings: say to what context the student is extended")
        return self


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


class Recipe(Section):
    """One teacher–student pair and the four stages between them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="names the run directory")
    description: str = Field("", description="one line for `distill recipes list`")
    teacher: str = Field(description="name of a teacher card, or a path")
    student: str = Field(description="name of a student card, or a path")
    seed: int = Field(0, description="of the teacher's sampling")
    price_per_hour: float | None = Field(
        None, ge=0, description="what an hour of the machine costs; the report then says what each stage did"
    )
    prompts: tuple[PromptSource, ...] = Field((), description="where the problems come from")
    traces: tuple[TraceSource, ...] = Field((), description="published traces, instead of asking the teacher")
    engine: LocalEngine = LocalEngine()
    generate: Generate = Generate()
    filter: Filter = Filter()
    train: Train = Train()
    eval: Eval

    @model_validator(mode="after")
    def traces_come_from_somewhere(self) -> "Recipe":
        if bool(self.prompts) == bool(self.traces):
            raise ValueError(
                "one of `prompts` (which the teacher answers) and `traces` (which others have published) is needed, "
                "and not both"
            )
        return self

    def generate_settings(self) -> dict[str, Any]:
        """What decides the traces, beside the teacher's weights."""
        if self.traces:
            return {key: value for i, source in enumerate(self.traces) for key, value in _keyed(f"traces.{i}", source)}
        settings = self.generate.settings() | {"seed": self.seed} | self.engine_settings()
        for i, source in enumerate(self.prompts):
            settings |= {f"prompts.{i}.{key}": value for key, value in source.settings().items()}
        return settings

    def engine_settings(self) -> dict[str, Any]:
        """What decides the numbers that the local engine computes."""
        return {f"engine.{key}": value for key, value in self.engine.settings().items()}

    def filter_settings(self) -> dict[str, Any]:
        """What decides the verdicts, beside the traces."""
        seeded = self.filter.per_prompt and self.filter.select == "random"
        return self.filter.settings() | ({"seed": self.seed} if seeded else {})


def _keyed(prefix: str, section: Section) -> list[tuple[str, Any]]:
    return [(f"{prefix}.{key}", value) for key, value in section.settings().items()]


class TeacherCard(Section):
    """A teacher: where its weights are and what is known of it."""

    name: str
    description: str = ""
    family: Literal["deepseek_v3", "deepseek_v2", "deepseek_v32", "llama", "qwen2", "qwen3"] = Field(
        description="architecture"
    )
    weights: str = Field(description="hub id, or a directory relative to the card")
    revision: str | None = Field(None, description="commit on the hub")
    parameters: float = Field(description="total parameters, billions")
    active_parameters: float = Field(description="parameters a token passes through, billions")
    context: int = Field(description="longest sequence, tokens")
    license: str = Field(description="the hub's identifier, such as mit, apache-2.0 or llama3.1")
    source: str = Field("", description="where the card's figures come from")
    thinking: bool | None = Field(
        None, description="mode of the checkpoint's own chat template, where that has both; null is its default"
    )
    sampling: SamplingSettings = Field(SamplingSettings(), description="the publisher's recommendation")


class Architecture(Section):
    """The shape of a dense decoder, by the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = Field(None, description="where it is not hidden_size / num_attention_heads")
    tie_word_embeddings: bool = False


class StudentCard(Section):
    """A dense base model that is trained."""

    name: str
    description: str = ""
    family: Literal["qwen2", "qwen3", "llama"] = Field(description="architecture")
    weights: str = Field(description="hub id, or a directory relative to the card")
    revision: str | None = Field(None, description="commit on the hub")
    parameters: float = Field(description="billions")
    context: int = Field(description="longest sequence, tokens")
    license: str = Field(description="the hub's identifier, such as mit, apache-2.0 or llama3.1")
    source: str = Field("", description="where the card's figures come from")
    architecture: Architecture | None = Field(None, description="its shape, to plan before anything is downloaded")
    chat_template: str | None = Field(
        None, description="built-in training template (`chatml`, `llama3`); null keeps the checkpoint's own"
    )


class BenchmarkCard(Section):
    """A set of problems with known answers."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="names its folder in a run")
    description: str = ""
    prompts: PromptSource
    problems: int | None = Field(
        None, ge=1, description="how many there are: a source that has another number is refused"
    )
    prompt_suffix: str = Field("", description="text added to every question that does not end with it")
    samples: int = Field(1, ge=1, description="answers per problem")
    sampling: SamplingSettings = SamplingSettings()
    published: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="model → score (pass@1, cons@64) → percent, as published"
    )
    license: str = ""
    source: str = ""


def recipe_schema() -> str:
    """The JSON schema that editors check and complete a recipe with: `recipes/recipe.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
