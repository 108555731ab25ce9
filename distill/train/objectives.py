"""What is learnt of a batch: a model and an objective as one module, which is what DDP and FSDP wrap.

One forward pass of that module gives the sums of the objective's parts over the batch's supervised tokens: the first is
learnt, the others are logged. They are *sums*: the caller divides by the supervised tokens of the whole step, so that
every token weighs the same however a step was cut into batches and ranks (a mean of means does not do that).

The head is applied to supervised positions only, some at a time (`train.loss`).

Shapes: t tokens, s supervised, r of them in a block, k likeliest tokens, v vocabulary, d hidden.
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.train.attention import Rows
from distill.train.batches import Batch
from distill.train.loss import Criterion, cross_entropy, linear_loss
from distill.train.teaching import Teaching

LN2 = math.log(2)
LEAST = 1e-6  # of a tail: k likeliest tokens that sum to 1 leave rounding errors


class Objective(Protocol):
    """parts: names of the sums that `criterion` gives, the first of which is learnt: "loss"."""

    parts: tuple[str, ...]

    def criterion(self, batch: Batch) -> Criterion: ...


class Sft:
    """Cross-entropy of the traces' own tokens."""

    parts: tuple[str, ...] = ("loss",)

    def criterion(self, batch: Batch) -> Criterion:
        return cross_entropy(batch.targets_s)


class Logits:
    """A divergence between the teacher's distribution and the student's, mixed with the cross-entropy.

    The teacher's is known at its k likeliest tokens; all others are one event, the tail, whose mass is what is left.
    Both distributions are compared on these k + 1 events, as nats a token:

    - forward_kl: Σ p ln(p/q), the student covers what the teacher does (Hinton et al. 2015, arXiv 1503.02531)
    - reverse_kl: Σ q ln(q/p), the student leaves what the teacher leaves (Gu et al. 2023, MiniLLM, arXiv 2306.08543)
    - jsd: ½ Σ p ln(p/m) + ½ Σ q ln(q/m) with m = (p + q)/2, at most ln 2 (Agarwal et al. 2023, GKD, arXiv 2306.13649)

    Where nothing is known of the teacher but the token it chose, that token's cross-entropy stands for the divergence:
    it is one sample of the forward one, less the teacher's entropy.
    """

    parts: tuple[str, ...] = ("loss", "sft", "logits")

    def __init__(self, teaching: Teaching, divergence: str, weight: float) -> None:
        self.teaching, self.divergence, self.weight = teaching, divergence, weight

    def criterion(self, batch: Batch) -> Criterion:
        device = batch.targets_s.device
        ids_sk = torch.from_numpy(self.teaching.ids[batch.places_s].astype(np.int64)).to(device)
        logp_sk = torch.from_numpy(self.teaching.logprobs[batch.places_s]).to(device)
        targets_s = batch.targets_s

        def criterion(logits_rv: Tensor, start: int, stop: int, learning: bool) -> Tensor:
            ids_rk, logp_rk = ids_sk[start:stop], logp_sk[start:stop]
            targets_r1 = targets_s[start:stop, None]
            logits_rv.sub_(logits_rv.logsumexp(1, keepdim=True))  # from here on ln q
            nll_r1 = -logits_rv.gather(1, targets_r1)
            logq_rk = logits_rv.gather(1, ids_rk)
            value_r1, pull_rk, tail_r1 = divergence(self.divergence, logp_rk, logq_rk)
            known_r1 = logp_rk[:, :1] > -torch.inf
            value_r1 = torch.where(known_r1, value_r1, nll_r1)
            sft, logits = nll_r1.sum(), value_r1.sum()
            if learning:
                # d/dz of Σ g q over the events is q (g − ḡ): of all entries as of the tail's, and what the k differ by.
                mean_r1 = pull_rk.sum(1, keepdim=True) + tail_r1 * tail_mass(logp_rk, logq_rk)
                pull_rk = pull_rk - tail_r1 * masked(logq_rk.exp(), logp_rk)
                share_r1 = self.weight * torch.where(known_r1, tail_r1 - mean_r1, 1.0)
                chosen_r1 = torch.where(known_r1, -(1 - self.weight), -1.0).to(nll_r1.dtype)
                logits_rv.exp_().mul_(share_r1 + (1 - self.weight))
                logits_rv.scatter_add_(1, ids_rk, torch.where(known_r1, self.weight * pull_rk, 0.0))
                logits_rv.scatter_add_(1, targets_r1, chosen_r1)
            return torch.stack((self.weight * logits + (1 - self.weight) * sft, sft, logits))

        return criterion


def divergence(name: str, logp_rk: Tensor, logq_rk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Between two distributions on k events and the tail: its value [r, 1], and how it pulls at the student's: q times
    its derivative by q at each event [r, k], and its derivative at the tail [r, 1].

    Events with ln p = −∞ are not there: their mass is the tail's.
    """
    p_rk, q_rk = logp_rk.exp(), masked(logq_rk.exp(), logp_rk)
    p_r1, q_r1 = tail_mass(logp_rk, logp_rk), tail_mass(logp_rk, logq_rk)
    lnp_rk, lnq_rk = masked(logp_rk, logp_rk), masked(logq_rk, logp_rk)
    lnp_r1, lnq_r1 = p_r1.log(), q_r1.log()
    match name:
        case "forward_kl":
            value_r1 = (p_rk * (lnp_rk - lnq_rk)).sum(1, keepdim=True) + p_r1 * (lnp_r1 - lnq_r1)
            return value_r1, -p_rk, -p_r1 / q_r1
        case "reverse_kl":
            value_r1 = (q_rk * (lnq_rk - lnp_rk)).sum(1, keepdim=True) + q_r1 * (lnq_r1 - lnp_r1)
            return value_r1, q_rk * (lnq_rk - lnp_rk + 1), lnq_r1 - lnp_r1 + 1
        case "jsd":
            lnm_rk = masked(torch.logaddexp(lnp_rk, lnq_rk) - LN2, logp_rk)
            lnm_r1 = torch.logaddexp(lnp_r1, lnq_r1) - LN2
            value_rk = p_rk * (lnp_rk - lnm_rk) + q_rk * (lnq_rk - lnm_rk)
            value_r1 = value_rk.sum(1, keepdim=True) + p_r1 * (lnp_r1 - lnm_r1) + q_r1 * (lnq_r1 - lnm_r1)
            return value_r1 / 2, q_rk * (lnq_rk - lnm_rk) / 2, (lnq_r1 - lnm_r1) / 2
    raise AssertionError(name)


def masked(values_rk: Tensor, logp_rk: Tensor) -> Tensor:
    """The values of the events that are there, 0 for the others."""
    return torch.where(logp_rk > -torch.inf, values_rk, 0.0)


def tail_mass(logp_rk: Tensor, logq_rk: Tensor) -> Tensor:
    """What the events that are there leave of a distribution, [r, 1]; never less than float32 can tell from nothing."""
    return (1 - masked(logq_rk.exp(), logp_rk).sum(1, keepdim=True)).clamp_min(LEAST)


class Learner(nn.Module):
    """A decoder whose head is one linear layer (Qwen2, Qwen3, Llama), with an objective.

    autocast: the dtype of the forward pass where the weights are float32; None where the weights' own dtype is it.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast

    def forward(self, batch: Batch) -> Tensor:
        """The sums of the objective's parts, float32 [parts]."""
        device = batch.input_ids_t.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden_td = self.model.get_decoder()(
                input_ids=batch.input_ids_t[None],
                position_ids=batch.position_ids_t[None],
                rows=Rows(batch.lengths, device),
                use_cache=False,
            ).last_hidden_state[0]
            hidden_sd = hidden_td.index_select(0, batch.positions_s)
            head = self.model.get_output_embeddings()
            return linear_loss(hidden_sd, head.weight, head.bias, self.objective.criterion(batch)).clone()
