"""`train:` in a recipe. The names are those of transformers, PEFT and TRL.

Variants are discriminated unions that own their fields: the objective (`distill.objectives`) and the adapter
(`distill.recipe.adapters`). A field that decides which rows there are, or what is in them, is marked `DecidesRows`: the
rows on the disk are encoded again when one of these changes, and kept when only others do.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from distill.objectives import Objective, Sft
from distill.recipe.adapters import Adapter
from distill.recipe.sources import MixedKept, MixedSource
from distill.section import Free, Section


class DecidesRows:
    """Marks a field that decides the encoded rows in `tokens/`."""


class Train(Section):
    """Stage 3: the student is fine-tuned. The names are those of transformers, PEFT and TRL."""

    objective: Objective = Field(Sft(kind="sft"), description="what the student learns of each trace")
    adapter: Adapter | None = Field(None, description="adapters that are trained and merged; null trains all weights")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="number of optimiser steps, instead of num_train_epochs")
    per_device_train_batch_size: int = Field(
        1, ge=1, description="rows per forward pass on a device; with packing, in units of max_length tokens"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes of a device per optimiser step")
    train_batch_size: int | None = Field(
        None, ge=1, description="rows per optimiser step over all devices, instead of gradient_accumulation_steps"
    )
    packing: bool = Field(False, description="fill batches to max_length; rows do not attend to each other")
    max_length: Annotated[int, DecidesRows] = Field(32768, ge=16, description="maximum tokens per row")
    overlong: Annotated[Literal["drop", "truncate", "raise"], DecidesRows] = Field(
        "drop", description="what to do with longer rows; dropped and truncated tokens are counted"
    )
    max_position_embeddings: Annotated[int | None, DecidesRows] = Field(
        None, ge=16, description="context length the student is extended to; null keeps that of the base"
    )
    rope_theta: float | None = Field(
        None, gt=0, description="RoPE base for the extended context; null keeps that of the base"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    min_lr_rate: float = Field(0.1, ge=0, le=1, description="final learning rate as a share of the peak")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps in which the rate rises to the peak")
    optim: Literal["adamw_torch_fused", "adamw_8bit"] = Field(
        "adamw_torch_fused", description="adamw_8bit: a quarter of the optimiser's memory, by bitsandbytes, on a GPU"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, applied to matrices only")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="AdamW's decay rate of the second moment")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are clipped")
    dtype: Literal["float32", "bfloat16", "float8"] = Field(
        "bfloat16",
        description="dtype of the forward pass and the student; float8: bfloat16 with FP8 products in the decoder's "
        "linear layers (extra `float8`; a GPU of compute capability 8.9 or later)",
    )
    gradient_checkpointing: Annotated[bool, Free] = Field(
        False, description="recompute activations in the backward pass: less memory, a third more time"
    )
    activation_offloading: Annotated[bool, Free] = Field(
        False,
        description="keep the activations of gradient_checkpointing in host memory: for long rows and large students",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="layout over several devices; auto: ddp where the whole training fits one, else fsdp"
    )
    num_processes: Annotated[int | None, Free] = Field(  # what it comes to is a setting (`world_size`)
        None, ge=1, description="processes that train together on this machine; null: one per GPU, or one"
    )
    chat_template: Annotated[str | None, Free] = Field(  # its text is a setting, wherever it comes from
        None, description="chat template that replaces the student card's: a built-in name or a .jinja file"
    )
    data: Annotated[tuple[MixedSource, ...], DecidesRows] = Field(
        (MixedKept(kind="kept"),), min_length=1, description="trace sets that are mixed"
    )
    content: Annotated[Literal["reasoning", "answer"], DecidesRows] = Field(
        "reasoning", description="what the student learns to write; `answer` strips the reasoning (a control)"
    )
    val_size: Annotated[float, DecidesRows] = Field(
        0.0, ge=0, lt=1, description="share of the prompts that are held out and scored"
    )
    eval_steps: Annotated[int, Free] = Field(
        200, ge=1, description="optimiser steps between evaluations of held-out rows"
    )
    seed: Annotated[int, DecidesRows] = Field(
        0, ge=0, lt=2**32, description="seed of data order, held-out prompts and dropout"
    )
    save_steps: Annotated[int, Free] = Field(200, ge=1, description="optimiser steps between checkpoints")
    save_total_limit: Annotated[int, Free] = Field(
        2, ge=1, description="number of checkpoints kept; from 2 on, a damaged one costs only the steps since the last"
    )
    logging_steps: Annotated[int, Free] = Field(10, ge=1, description="optimiser steps between log lines")
    report_to: Annotated[tuple[str, ...], Free] = Field(
        (), description="Accelerate trackers besides log.jsonl, such as tensorboard or wandb"
    )

    def row_settings(self) -> dict[str, JsonValue]:
        """The settings that decide the encoded rows: the `DecidesRows` fields, and what the objective needs."""
        top_k = self.objective.teacher_top_k
        return self.marked(DecidesRows) | ({} if top_k is None else {"teacher.top_k": top_k})

    def batches_per_step(self, processes: int) -> int:
        """Forward passes per optimiser step, over all devices."""
        if self.train_batch_size is not None:
            return self.train_batch_size // self.per_device_train_batch_size
        return self.gradient_accumulation_steps * processes

    @model_validator(mode="after")
    def _batches_add_up(self) -> "Train":
        if self.train_batch_size is not None:
            if self.gradient_accumulation_steps != 1:
                raise ValueError(
                    "train_batch_size and gradient_accumulation_steps both set the rows of a step; set only one of them"
                )
            if self.train_batch_size % self.per_device_train_batch_size:
                raise ValueError(
                    f"train_batch_size {self.train_batch_size} is not a multiple of per_device_train_batch_size "
                    f"{self.per_device_train_batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _offloading_needs_checkpointing(self) -> "Train":
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation_offloading requires gradient_checkpointing: true")
        return self

    @model_validator(mode="after")
    def _float8_trains_all_weights(self) -> "Train":
        if self.dtype == "float8" and self.adapter is not None:
            raise ValueError(
                "dtype float8 cannot be combined with adapter, because a layer in FP8 computes the gradients of frozen "
                "weights too; set dtype to bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _rope_theta_needs_a_context(self) -> "Train":
        if self.rope_theta and not self.max_position_embeddings:
            raise ValueError("rope_theta requires max_position_embeddings, the context the student is extended to")
        return self
