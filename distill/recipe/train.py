"""`train:` in a recipe. The names are those of transformers, PEFT and TRL.

A training turns one base into one student. `train:` is a training, or lists several in `phases`, each from the student
of the one before. A key beside `phases` is the default of each phase and is merged into it before anything is
validated; a `Train` with phases keeps the phases alone, so that the resolved recipe writes each of them out and no key
is left that decides nothing. Rejected: anchors and merges of YAML, which `--set` cannot reach.

Variants are discriminated unions that own their fields: the objective (`distill.objectives`) and the adapter
(`distill.recipe.adapters`). A field that decides which rows there are, or what is in them, is marked `DecidesRows`: the
rows on the disk are encoded again when one of these changes, and kept when only others do.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from distill.objectives import Objective, Sft
from distill.recipe.adapters import Adapter, Qlora
from distill.recipe.sources import MixedKept, MixedOwn, MixedSource
from distill.section import Free, Later, Section, with_tuples

KEPT = (MixedKept(kind="kept"),)


class DecidesRows:
    """Marks a field that decides the encoded rows in `tokens/`."""


class Training(Section):
    """One training of a model. The names are those of transformers, PEFT and TRL."""

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
        "adamw_torch_fused",
        description="adamw_8bit: a quarter of the optimiser's memory, by bitsandbytes, not with parallel fsdp",
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
        KEPT, min_length=1, description="trace sets that are mixed; `own`, the base's own answers, in a phase only"
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

    @property
    def reads_kept(self) -> bool:
        """Whether it trains on the traces that the run kept."""
        return self.objective.reads_data and any(source.kind == "kept" for source in self.data)

    @property
    def own(self) -> MixedOwn | None:
        """The base's own answers among the data, if they are there."""
        return next((source for source in self.data if isinstance(source, MixedOwn)), None)

    @property
    def samples_prompts(self) -> bool:
        """Whether the model that is trained, or its base, answers the recipe's prompts."""
        return self.own is not None or self.objective.rollout_settings is not None

    def batches_per_step(self, processes: int) -> int:
        """Forward passes per optimiser step, over all devices."""
        if self.train_batch_size is not None:
            return self.train_batch_size // self.per_device_train_batch_size
        return self.gradient_accumulation_steps * processes

    @model_validator(mode="after")
    def _batches_add_up(self) -> Self:
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
    def _offloading_needs_checkpointing(self) -> Self:
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation_offloading requires gradient_checkpointing: true")
        return self

    @property
    def unsharded(self) -> str | None:
        """The setting whose tensors FSDP cannot shard; None without one. The 4-bit base of QLoRA is no DTensor, and the
        kernels of bitsandbytes' 8-bit optimiser refuse one."""
        if isinstance(self.adapter, Qlora):
            return "adapter.kind qlora"
        return "optim adamw_8bit" if self.optim == "adamw_8bit" else None

    @model_validator(mode="after")
    def _fsdp_shards_everything(self) -> Self:
        if self.parallel == "fsdp" and self.unsharded:
            raise ValueError(f"{self.unsharded} cannot be combined with parallel fsdp; set parallel to ddp")
        return self

    @model_validator(mode="after")
    def _float8_trains_all_weights(self) -> Self:
        if self.dtype == "float8" and self.adapter is not None:
            raise ValueError(
                "dtype float8 cannot be combined with adapter, because a layer in FP8 computes the gradients of frozen "
                "weights too; set dtype to bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _rope_theta_needs_a_context(self) -> Self:
        if self.rope_theta and not self.max_position_embeddings:
            raise ValueError("rope_theta requires max_position_embeddings, the context the student is extended to")
        return self

    @model_validator(mode="after")
    def _data_is_read(self) -> Self:
        if not self.objective.reads_data and self.data != KEPT:
            raise ValueError(f"objective {self.objective.kind} trains on rollouts alone; remove `data`")
        if not self.objective.reads_data and self.val_size:
            raise ValueError(
                f"objective {self.objective.kind} trains on rollouts alone, none is held out; remove val_size"
            )
        return self

    @model_validator(mode="after")
    def _scored_traces_keep_their_text(self) -> Self:
        if self.objective.teacher_top_k is None or not self.objective.reads_data:
            return self
        compares = f"objective {self.objective.kind} compares with the teacher's probabilities of its own text"
        if any(source.wrap for source in self.data):
            raise ValueError(
                f"{compares}, and wrap changes the text; set plain in place of wrap in `data`, or objective.kind to sft"
            )
        if self.content == "answer":
            raise ValueError(
                f"{compares}, and content answer removes its reasoning; remove `content`, or set objective.kind to sft"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_set_the_rows_of_a_step(self) -> Self:
        if self.objective.rollout_settings is None:
            return self
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} has no effect with objective {self.objective.kind}, which trains on all rollouts of a "
                    f"set; remove it, and set objective.rollouts.prompts_per_step"
                )
        return self


class Phase(Training):
    """One of several trainings, each from the student of the one before. It takes every key of `train` but `phases`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="names the directory in `phases/` of the run")

    @model_validator(mode="after")
    def _one_set_of_own_answers(self) -> Self:
        if sum(source.kind == "own" for source in self.data) > 1:
            raise ValueError("data has several sources of kind own; keep one, and raise its `samples` or `weight`")
        return self

    @model_validator(mode="after")
    def _own_answers_have_no_teacher(self) -> Self:
        if self.own is not None and self.objective.teacher_top_k is not None:
            raise ValueError(
                f"objective {self.objective.kind} reads the teacher's probabilities, and data of kind own is rejection "
                f"sampling without a teacher: set the objective to sft, or remove that source"
            )
        return self

    def training(self, data: tuple[MixedSource, ...]) -> "Train":
        """The phase as the only training of a recipe. data: in place of its own."""
        fields = {name: getattr(self, name) for name in Training.model_fields}
        return Train.model_construct(**fields | {"data": data})


class Train(Training):
    """Stage 3: the student is fine-tuned, once or in phases."""

    phases: Annotated[tuple[Phase, ...], Later] = Field(
        (), description="trainings one after the other; the other keys of `train` are the defaults of each"
    )

    @property
    def trainings(self) -> "tuple[Training, ...]":
        """The trainings in order: the phases, or this one."""
        return self.phases or (self,)

    def keyed(self) -> "list[tuple[str, Training]]":
        """The trainings with their keys in the recipe, `train` or `train.phases.1`."""
        keys = [f"train.phases.{number}" for number in range(len(self.phases))] or ["train"]
        return list(zip(keys, self.trainings, strict=True))

    @property
    def template(self) -> str | None:
        """The chat template that the recipe gives the student; a phase without one keeps that of the phase before."""
        return next((each.chat_template for each in reversed(self.trainings) if each.chat_template), None)

    def settings(self) -> dict[str, JsonValue]:
        """As the base; with phases their names and the settings of each, `phases.1.learning_rate`."""
        if not self.phases:
            return super().settings()
        settings: dict[str, JsonValue] = {"phases": [phase.name for phase in self.phases]}
        for number, phase in enumerate(self.phases):
            settings |= {f"phases.{number}.{key}": value for key, value in phase.settings().items() if key != "name"}
        return settings

    @model_validator(mode="wrap")
    @classmethod
    def _defaults_of_phases(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Merge the keys beside `phases` into each phase. They are validated first, so that a mistake in one is
        reported once, with its own key."""
        if not isinstance(values, Mapping):
            return handler(values)
        values = {key: with_tuples(value) for key, value in values.items()}
        phases = values.pop("phases", ())
        if not isinstance(phases, tuple) or not phases:
            return handler(values | {"phases": phases})
        handler(values)
        if idle := [key for key in values if all(isinstance(phase, Mapping) and key in phase for phase in phases)]:
            raise ValueError(f"every phase sets {' and '.join(idle)} itself; remove it here, or set it in a phase")
        return handler({"phases": tuple({**values, **p} if isinstance(p, Mapping) else p for p in phases)})

    @model_validator(mode="after")
    def _phases_have_names_of_their_own(self) -> Self:
        names = [phase.name for phase in self.phases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two phases are named {twice[0]}; give each its own name")
        return self

    @model_validator(mode="after")
    def _own_answers_need_a_phase(self) -> Self:
        if self.own is not None:
            raise ValueError("data of kind own needs a phase: write `phases: [{name: …, data: …}]`")
        return self

    @model_serializer(mode="wrap")
    def _phases_alone(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.phases:
            return {"phases": [{"name": phase["name"]} | phase for phase in values["phases"]]}
        return values
