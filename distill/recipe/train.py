"""`train:` in a recipe. The names are those of transformers, PEFT and TRL."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.recipe.sources import MixedKept, MixedSource
from distill.section import Free, Section


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
