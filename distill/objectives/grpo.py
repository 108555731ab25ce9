"""Group relative policy optimisation: the student's answers to one prompt are compared with one another.

Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), with later corrections. Notation: q student, μ the model that sampled
(the engine), ratio = q(y)/μ(y), A advantage. Per token

    −min(min(ratio, ratio_limit) A, clamp(ratio, 1 − clip[0], 1 + clip[1]) A) + kl_weight min(ratio, ratio_limit) k3

- The behaviour policy of the ratio is the engine itself, so one ratio corrects for lag (`updates` > 1) and for the
  difference between engine and trainer. Rejected: a second ratio against a forward pass of the trainer before the first
  update, which costs that forward pass.
- The clip is asymmetric (Yu et al. 2025, DAPO, arXiv 2503.14476: "clip-higher"). Where A < 0 the ratio is bounded by
  `ratio_limit` (dual clip, Ye et al. 2020, arXiv 1912.09729; TRL's `delta`): otherwise one token that the engine found
  unlikely dominates a step.
- k3 = e^d − d − 1 with d = ln base(y) − ln q(y) estimates KL(q‖base) (Schulman 2020, "Approximating KL Divergence"). It
  is multiplied by the importance ratio, and the derivative of the product is ratio (ln q(y) − ln base(y)), whose
  expectation is the gradient of that KL. Without the ratio it is that of KL(base‖q) (DeepSeek-V3.2, arXiv 2512.02556,
  section 3.1).

Advantages are the rewards less their mean over the group (`advantages`); answers that cannot be verified are left out
of the mean and get advantage 0. A group whose rewards are equal teaches nothing and is skipped.

How the loss is normalised: the training divides the sum over tokens by N, the supervised tokens of the optimiser step.
The row's factor (`Grpo.row_weight`), by which the advantages are multiplied beforehand, turns that into

    normalise: false    1/(R · L) Σ_rows Σ_tokens, L = max_new_tokens, A = reward − mean
    normalise: true     1/R Σ_rows 1/length Σ_tokens, A = (reward − mean)/standard deviation

over the R rows of the step: those of groups that are not skipped, without answers that cannot be verified. The first is
Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): dividing by a row's length makes long wrong answers cheap, and dividing by
the deviation favours prompts that are nearly solved or nearly hopeless. The second is GRPO as published. The KL term is
not scaled by the row's factor: `kl_weight` multiplies its mean per token.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill.objectives.base import BaseObjective, Criterion, Sampled, TopK
from distill.objectives.rollout_settings import GroupRollouts
from distill.section import Section

if TYPE_CHECKING:
    from torch import Tensor

SAME = 1e-6  # rewards that differ by less are equal: they are sums of rounded terms


class Rewards(Section):
    """Weights of the terms of a completion's reward, which is their sum."""

    correct: float = Field(1.0, ge=0, description="1 for a correct answer, 0 for a wrong one")
    format: float = Field(0.0, ge=0, description="1 for a closed reasoning block with an answer after it, else 0")
    language: float = Field(0.0, ge=0, description="share of the reasoning that is in the prompt's language, 0 to 1")
    length: float = Field(
        0.0, ge=0, description="0 down to −1 over the last fifth of max_new_tokens (DAPO's soft overlong punishment)"
    )

    @model_validator(mode="after")
    def _rewards_something(self) -> "Rewards":
        if not (self.correct or self.format or self.language or self.length):
            raise ValueError("all weights are 0, so no answer is better than another; set correct: 1")
        return self


class Grpo(BaseObjective):
    """Learn from rewards. Needs prompts with gold answers, or other rewards than `correct`; no teacher."""

    kind: Literal["grpo"]
    rewards: Rewards = Field(Rewards(), description="weights of the terms of the reward")
    clip: tuple[float, ...] = Field(
        (0.2, 0.28), description="how far below and above 1 the ratio has a gradient (TRL: epsilon, epsilon_high)"
    )
    kl_weight: float = Field(0.0, ge=0, description="weight of the KL divergence from the base (TRL: beta)")
    normalise: bool = Field(
        False, description="divide by the group's standard deviation and by the row's length; false is Dr. GRPO"
    )
    rollouts: GroupRollouts = Field(GroupRollouts(), description="what the student writes per step")

    tag: ClassVar[str] = "grpo"
    parts: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "kl": "KL from the base",
        "entropy": "entropy of the student",
        "mismatch": "difference between trainer and engine",
        "clipped": "clipped ratios",
    }

    @property
    def rollout_settings(self) -> GroupRollouts:
        """`rollouts`."""
        return self.rollouts

    @property
    def needs_reference(self) -> bool:
        """With a KL term."""
        return self.kl_weight > 0

    @field_validator("clip")
    @classmethod
    def _clip_is_a_range(cls, clip: tuple[float, ...]) -> tuple[float, ...]:
        if len(clip) != 2 or not 0 < clip[0] < 1 or clip[1] <= 0:
            raise ValueError("write two positive numbers, the first below 1, such as [0.2, 0.28]")
        return clip

    @model_validator(mode="after")
    def _limit_is_above_the_clip(self) -> "Grpo":
        if self.rollouts.ratio_limit <= (upper := 1 + self.clip[1]):
            raise ValueError(f"rollouts.ratio_limit {self.rollouts.ratio_limit:g} must be above 1 + clip[1], {upper:g}")
        return self

    def row_weight(self, length: int, supervised: int, rows: int) -> float:
        """The factor of a row's advantages. length: its supervised tokens. supervised, rows: counts of the optimiser
        step over all devices, without skipped groups."""
        return supervised / (rows * (length if self.normalise else self.rollouts.sampling.max_new_tokens))

    def criterion(self, targets_s: "Tensor", teacher: TopK | None, sampled: Sampled | None = None) -> Criterion:
        """The clipped surrogate with its KL term, and the parts.

        kl: k3 against the base, 0 without `kl_weight`. entropy: over the whole vocabulary. mismatch: |ln ratio|.
        clipped: number of tokens whose surrogate has no gradient because of the clip or the limit.
        """
        import torch

        from distill.objectives.policy import measure, write_gradient

        assert sampled is not None, "the rows of this objective are the student's own"
        limit, (below, above), weight = self.rollouts.ratio_limit, self.clip, self.kl_weight

        def surrogate(logits_rv: "Tensor", start: int, stop: int, learning: bool) -> "Tensor":
            targets_r1 = targets_s[start:stop, None]
            logmu_r1, a_r1, reference_r1, _ = (x_s[start:stop, None] for x_s in sampled)
            q_rv, logq_r1, entropy_r1 = measure(logits_rv, targets_r1)
            change_r1 = logq_r1 - logmu_r1
            ratio_r1 = change_r1.exp()
            bounded_r1 = ratio_r1.clamp_max(limit)
            loss_r1 = -torch.minimum(bounded_r1 * a_r1, ratio_r1.clamp(1 - below, 1 + above) * a_r1)
            clipped_r1 = torch.where(a_r1 > 0, ratio_r1 > 1 + above, (ratio_r1 < 1 - below) | (ratio_r1 > limit))
            clipped_r1 = clipped_r1 & (a_r1 != 0)
            pull_r1 = torch.where(clipped_r1, 0.0, -ratio_r1 * a_r1)
            k3_r1 = torch.zeros_like(loss_r1)
            if weight:
                d_r1 = reference_r1 - logq_r1
                k3_r1 = d_r1.expm1() - d_r1
                loss_r1 = loss_r1 + weight * bounded_r1 * k3_r1
                pull_r1 = pull_r1 - weight * bounded_r1 * d_r1
            if learning:
                write_gradient(logits_rv, q_rv, targets_r1, pull_r1, -pull_r1)
            parts = (loss_r1, k3_r1, entropy_r1, change_r1.abs(), clipped_r1.to(loss_r1.dtype))
            return torch.stack([part_r1.sum() for part_r1 in parts])

        return surrogate


def advantages(rewards: Sequence[float | None], normalise: bool) -> list[float] | None:
    """Each member's reward less the group's mean; None if all are equal, so that the group teaches nothing.

    rewards: None for a member that cannot be verified; it is left out of mean and deviation, and its advantage is 0.
    normalise: divide by the standard deviation of the group (with n − 1, as TRL and verl).
    """
    known = [reward for reward in rewards if reward is not None]
    if not known or max(known) - min(known) < SAME:
        return None
    mean, scale = fmean(known), stdev(known) if normalise else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
