"""`rollouts:` of the objectives whose rows the student writes itself (`on_policy`, `grpo`).

A step samples `prompts_per_step` × `samples` completions and trains on them in `updates` optimiser steps. The settings
of the sampler are a section of their own and not `generate.sampling`: a teacher is sampled at the temperature its card
recommends, a policy at temperature 1 and without truncation, because only then are the sampled tokens drawn from the
distribution whose gradient is estimated.
"""

from math import ceil

from pydantic import Field, field_validator, model_validator

from distill.section import Section


class RolloutSampling(Section):
    """How the student's tokens are drawn during training."""

    temperature: float = Field(
        1.0, gt=0, description="softmax temperature; other values than 1 bias the gradient estimates of sampled tokens"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 is off")
    top_k: int = Field(0, ge=0, lt=2**31, description="0 is off")
    max_new_tokens: int = Field(512, ge=1, description="completion tokens at most (TRL: max_completion_length)")


class RolloutSettings(Section):
    """What the student writes per step, and how often it is used."""

    prompts_per_step: int = Field(16, ge=1, description="prompts per set of rollouts (verl: train_batch_size)")
    samples: int = Field(1, ge=1, description="completions per prompt (TRL: num_generations, verl: rollout.n)")
    sampling: RolloutSampling = Field(RolloutSampling(), description="how the student's tokens are drawn")
    updates: int = Field(
        1, ge=1, description="optimiser steps per set of rollouts, each on a part of it (TRL: steps_per_generation)"
    )
    ratio_limit: float = Field(
        2.0,
        gt=1,
        description="limit of importance ratios, trainer to engine (TRL: vllm_importance_sampling_cap)",
    )

    @property
    def rows(self) -> int:
        """Completions per set of rollouts."""
        return self.prompts_per_step * self.samples

    def set_of(self, sample: int) -> int:
        """The set, from 0, that a stored rollout belongs to, by its sample number: set · samples + number."""
        return sample // self.samples

    def set_at(self, step: int) -> int:
        """The set that an optimiser step, from 1 as in the log, is trained on."""
        return (step - 1) // self.updates

    def steps_of(self, number: int) -> tuple[int, int]:
        """The first and the last optimiser step, from 1, that a set is trained on."""
        return number * self.updates + 1, (number + 1) * self.updates

    def total_steps(self, prompts: int, epochs: float, max_steps: int | None) -> int:
        """Optimiser steps of a training: `max_steps`, else of the whole sets in the epochs, which are rounded up."""
        per_epoch = prompts // min(self.prompts_per_step, prompts)
        return max_steps or ceil(round(epochs * per_epoch, 6)) * self.updates

    @model_validator(mode="after")
    def _every_update_has_rows(self) -> "RolloutSettings":
        if self.updates > self.rows:
            raise ValueError(f"updates {self.updates} is more than the {self.rows} completions of a set; lower it")
        return self


class GroupRollouts(RolloutSettings):
    """Rollouts whose completions are compared with the others of their prompt."""

    samples: int = Field(8, description="completions per prompt, at least 2 (TRL: num_generations, verl: rollout.n)")

    @field_validator("samples")
    @classmethod
    def _groups_have_members(cls, samples: int) -> int:
        if samples < 2:
            raise ValueError("a group of one has no advantage; set it to 2 or more")
        return samples
