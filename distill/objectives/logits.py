"""Distillation from the teacher's next-token distributions: a divergence, mixed with the cross-entropy.

The teacher's distribution is known at its k most likely tokens; all other tokens are one event, the tail, which has the
remaining mass. Teacher p and student q are compared on these k + 1 events, in nats per token:

- forward_kl: Σ p ln(p/q), the student covers the modes of the teacher (Hinton et al. 2015, arXiv 1503.02531)
- reverse_kl: Σ q ln(q/p), the student avoids what the teacher avoids (Gu et al. 2023, MiniLLM, arXiv 2306.08543)
- jsd: ½ Σ p ln(p/m) + ½ Σ q ln(q/m) with m = (p + q)/2, at most ln 2 (Agarwal et al. 2023, GKD, arXiv 2306.13649)

A temperature T is applied to the distributions within the top k, p^(1/T) and q^(1/T), and that part is scaled by T²,
which keeps the magnitude of its gradient (Hinton et al., section 2.1), and by the mass of the top k, as in the chain
rule, so that it is the plain divergence at T = 1. The mass of the top k against the tail is compared at temperature 1,
because the tail's tokens are not known one by one.

At a position where only the teacher's chosen token is known, the cross-entropy of that token replaces the divergence:
it is a one-sample estimate of the forward KL, up to the teacher's entropy.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.objectives.base import BaseObjective, Criterion, Sampled, TopK

if TYPE_CHECKING:
    from torch import Tensor


class Logits(BaseObjective):
    """Learn the teacher's distributions. Needs the teacher's weights, or traces that carry `top_logprobs`."""

    kind: Literal["logits"]
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="divergence between the teacher's and the student's distribution"
    )
    weight: float = Field(
        1.0, gt=0, le=1, description="weight of the divergence in the loss; the cross-entropy has the rest"
    )
    temperature: float = Field(
        1.0, gt=0, description="softmax temperature applied to the teacher's and the student's top-k"
    )
    top_k: int = Field(
        32, ge=1, le=1024, description="the teacher's most likely tokens that are compared; the others are one event"
    )

    tag: ClassVar[str] = "logit-distillation"
    parts: ClassVar[Mapping[str, str]] = {"loss": "loss", "sft": "cross-entropy", "logits": "divergence"}

    @property
    def teacher_top_k(self) -> int:
        """`top_k`."""
        return self.top_k

    def criterion(self, targets_s: "Tensor", teacher: TopK | None, sampled: Sampled | None = None) -> Criterion:
        """weight · divergence + (1 − weight) · cross-entropy, and the two of them."""
        import torch

        from distill.objectives.divergences import divergence

        assert teacher is not None, "the rows of this objective come with the teacher's distributions"
        ids_sk, logp_sk = teacher
        weight = self.weight

        def mixed(logits_rv: "Tensor", start: int, stop: int, learning: bool) -> "Tensor":
            ids_rk, logp_rk = ids_sk[start:stop], logp_sk[start:stop]
            targets_r1 = targets_s[start:stop, None]
            known_r1 = logp_rk[:, :1] > -torch.inf
            logits_rv.sub_(logits_rv.logsumexp(1, keepdim=True))  # from here on ln q
            nll_r1 = -logits_rv.gather(1, targets_r1)
            logq_rk = logits_rv.gather(1, ids_rk)
            value_r1, gradient_rk, tail_r1 = divergence(self.divergence, logp_rk, logq_rk, self.temperature)
            sft, logits = nll_r1.sum(), torch.where(known_r1, value_r1, nll_r1).sum()
            if learning:
                all_r1 = weight * torch.where(known_r1, tail_r1, 1.0) + (1 - weight)
                chosen_r1 = torch.where(known_r1, weight - 1.0, -1.0).to(nll_r1.dtype)
                logits_rv.exp_().mul_(all_r1)
                logits_rv.scatter_add_(1, ids_rk, torch.where(known_r1, weight * gradient_rk, 0.0))
                logits_rv.scatter_add_(1, targets_r1, chosen_r1)
            return torch.stack((weight * logits + (1 - weight) * sft, sft, logits))

        return mixed
