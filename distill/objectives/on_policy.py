"""On-policy distillation: the student writes, and learns at each of its tokens what the teacher would have said there.

Generalised knowledge distillation (Agarwal et al. 2023, GKD, arXiv 2306.13649); Qwen3 (arXiv 2505.09388, section 4.5)
and Lu et al. 2025 (Thinking Machines, "On-Policy Distillation") report it. Notation: p teacher, q student, y the
sampled token, μ the model that sampled it (the engine: earlier weights, other kernels).

`estimator: exact`: a divergence of whole next-token distributions, on the events "each of the student's and of the
teacher's likeliest tokens" and "all other tokens", in nats per token:

- reverse_kl: Σ q ln(q/p)
- forward_kl: Σ p ln(p/q)
- jsd: β Σ p ln(p/m) + (1 − β) Σ q ln(q/m) with m = β p + (1 − β) q

`estimator: sampled`: the policy gradient of the reverse KL at the sampled token, −w A ∇ln q(y), with the advantage
A = −(ln q(y) − ln p(y)) and the importance weight w = min(q(y)/μ(y), ratio_limit), both without gradient. Its
expectation over y is the gradient of the reverse KL over the whole vocabulary, because E_q[∇ln q] = 0; its logged value
w (ln q(y) − ln p(y)) estimates the reverse KL. It needs one number of the teacher per token. Neither estimator
differentiates through the prefix (discount 0), as in both sources.

Importance weights are truncated for the bias–variance trade of IMPALA (Espeholt et al. 2018, arXiv 1802.01561,
section 4.1) and of truncated importance sampling between engine and trainer (Yao et al. 2025, TIS, "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training"). They belong to the *sampled* token. An exact divergence is
already an expectation over the next token, so there is no action to reweight: weighting it by q(y)/μ(y), whose
expectation given the prefix is 1, would add variance and remove no bias. What a lag changes is how often a prefix is
visited. That would take the product of the ratios of all earlier tokens, whose variance grows exponentially with their
number; neither IMPALA nor PPO corrects for it. Here it does not move the optimum either: a divergence is zero at
teacher = student whatever wrote the prefix (Ross et al. 2011, DAgger, arXiv 1011.0686). So the exact estimator has
weight 1 everywhere, and `clipped` counts truncated weights of sampled tokens only.

What is known of the teacher decides at each position:

    row          known                                 loss
    student's    more than the row's own token         the divergence (`exact`) or the sampled estimator (`sampled`)
    student's    the row's own token only              the sampled estimator
    student's    nothing; `sampled`: not the token     none, counted as `unscored`
    teacher's    anything                              the divergence, as in `logits`
    teacher's    nothing                               the token's cross-entropy, as in `logits`

`student_share` is GKD's λ: the share of rows that the student writes; the others are the teacher's traces.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill.objectives.base import BaseObjective, Criterion, Sampled, TopK
from distill.objectives.rollout_settings import RolloutSettings

if TYPE_CHECKING:
    from torch import Tensor


class OnPolicy(BaseObjective):
    """Learn the teacher's distributions at the student's own tokens. Needs a teacher that scores given text."""

    kind: Literal["on_policy"]
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = Field(
        "reverse_kl", description="divergence between the teacher's and the student's distribution"
    )
    beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in jsd's mixture (GKD's and TRL's beta)")
    estimator: Literal["exact", "sampled"] = Field(
        "exact",
        description="exact: the divergence on the likeliest tokens; sampled: policy gradient on the sampled token",
    )
    top_k: int = Field(
        32,
        ge=2,
        le=1024,
        description="likeliest tokens compared, of the student and of the teacher each; the others are one event",
    )
    student_share: float = Field(
        1.0, le=1, description="share of rows that the student writes, the others are traces (GKD's λ, TRL's lmbda)"
    )
    teachers: dict[str, str] = Field(
        {}, description="further teachers by the task of the prompts: {code: CARD}; other tasks ask the recipe's"
    )
    rollouts: RolloutSettings = Field(RolloutSettings(), description="what the student writes per step")

    tag: ClassVar[str] = "on-policy-distillation"
    parts: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "kl": "divergence from the teacher",
        "entropy": "entropy of the student",
        "mismatch": "difference between trainer and engine",
        "clipped": "truncated importance weights",
        "unscored": "tokens without a teacher",
    }

    @property
    def teacher_top_k(self) -> int:
        """`top_k`, also for the traces beside rows of the sampled estimator, whose loss is the divergence; 1 without
        traces, because that estimator reads the row's own token only."""
        return self.top_k if self.estimator == "exact" or self.reads_data else 1

    @property
    def rollout_top_k(self) -> int:
        """How many of the teacher's most likely tokens the student's rows need."""
        return self.top_k if self.estimator == "exact" else 1

    @property
    def task_teachers(self) -> Mapping[str, str]:
        """`teachers`."""
        return self.teachers

    @property
    def rollout_settings(self) -> RolloutSettings:
        """`rollouts`."""
        return self.rollouts

    @property
    def reads_data(self) -> bool:
        """With a share of rows that the student does not write."""
        return self.student_share < 1

    @field_validator("student_share")
    @classmethod
    def _student_writes(cls, share: float) -> float:
        if share <= 0:
            raise ValueError("without rows of the student's, use train.objective: {kind: logits}")
        return share

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "OnPolicy":
        if self.estimator == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(f"estimator: sampled estimates reverse_kl; divergence is {self.divergence}")
        if self.divergence != "jsd" and self.beta != 0.5:
            raise ValueError(f"beta is a setting of divergence: jsd; divergence is {self.divergence}")
        if self.teachers and self.student_share < 1:
            raise ValueError("teachers: the traces of student_share below 1 are all scored by the recipe's teacher")
        return self

    def criterion(self, targets_s: "Tensor", teacher: TopK | None, sampled: Sampled | None = None) -> Criterion:
        """The sums of the loss over all rows, and its parts.

        kl: the divergence at all scored positions, without importance weights. entropy: over the whole vocabulary.
        mismatch: |ln q(y) − ln μ(y)|, clipped: number of truncated weights, unscored: number of tokens without a
        teacher. Tokens of the teacher's traces add nothing to these three, and the log divides them by all supervised
        tokens, theirs too. teacher, sampled: None for rows of the teacher's.
        """
        import torch

        from distill.objectives.divergences import divergence
        from distill.objectives.policy import measure, write_gradient

        limit = self.rollouts.ratio_limit

        def on_policy(logits_rv: "Tensor", start: int, stop: int, learning: bool) -> "Tensor":
            targets_r1 = targets_s[start:stop, None]
            ids_rk = targets_r1[:, :0] if teacher is None else teacher.ids_sk[start:stop]
            q_rv, logq_rn, entropy_r1 = measure(logits_rv, torch.cat((targets_r1, ids_rk), 1))
            logq_r1, logq_rk = logq_rn[:, :1], logq_rn[:, 1:]
            nothing_r1 = torch.zeros_like(logq_r1)
            own_r1, logmu_r1 = nothing_r1.bool(), logq_r1
            if sampled is not None:
                own_r1 = sampled.own_s[start:stop, None] > 0
                logmu_r1 = torch.where(own_r1, sampled.logprobs_s[start:stop, None], logq_r1)
            chosen_r1 = exact_r1 = nothing_r1.bool()
            logp_r1 = value_r1 = tail_r1 = nothing_r1
            if teacher is not None:
                logp_rk = teacher.logprobs_sk[start:stop]
                known_rk = logp_rk > -torch.inf
                match_rk = known_rk & (ids_rk == targets_r1)
                chosen_r1 = match_rk.any(1, keepdim=True)
                several_r1 = (known_rk & ~match_rk).any(1, keepdim=True) & (self.estimator == "exact")
                exact_r1 = torch.where(own_r1, several_r1, known_rk.any(1, keepdim=True))
                logp_r1 = torch.where(match_rk, logp_rk, 0.0).sum(1, keepdim=True)
                value_r1, gradient_rk, tail_r1 = divergence(self.divergence, logp_rk, logq_rk, beta=self.beta)

            estimated_r1 = own_r1 & ~exact_r1 & chosen_r1
            copied_r1 = ~own_r1 & ~exact_r1
            ratio_r1 = (logq_r1 - logmu_r1).exp()
            excess_r1 = logq_r1 - logp_r1  # −A
            pull_r1 = torch.where(estimated_r1, ratio_r1.clamp_max(limit) * excess_r1, nothing_r1)
            kl_r1 = torch.where(exact_r1, value_r1, torch.where(estimated_r1, excess_r1, nothing_r1))
            loss_r1 = torch.where(exact_r1, value_r1, torch.where(copied_r1, -logq_r1, pull_r1))
            if learning:
                pull_r1 = torch.where(copied_r1, -1.0, pull_r1)
                write_gradient(logits_rv, q_rv, targets_r1, pull_r1, torch.where(exact_r1, tail_r1, -pull_r1))
                if teacher is not None:
                    logits_rv.scatter_add_(1, ids_rk, torch.where(exact_r1, gradient_rk, 0.0))
            return torch.stack(
                [
                    loss_r1.sum(),
                    kl_r1.sum(),
                    entropy_r1.sum(),
                    (logq_r1 - logmu_r1).abs().sum(),
                    (estimated_r1 & (ratio_r1 > limit)).sum().float(),
                    (own_r1 & ~exact_r1 & ~chosen_r1).sum().float(),
                ]
            )

        return on_policy
