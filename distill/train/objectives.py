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

    With a temperature T the k likeliest are told apart as softened distributions among themselves, p^(1/T) and q^(1/T),
    and that part counts T² times, which keeps its gradient's scale (Hinton et al., section 2.1); how much they have
    together, against the tail, is compared as it is. Softening the tail would need the mass of each token in it.

    Where nothing is known of the teacher but the token it chose, that token's cross-entropy stands for the divergence:
    it is one sample of the forward one, less the teacher's entropy.
    """

    parts: tuple[str, ...] = ("loss", "sft", "logits")

    def __init__(self, teaching: Teaching, divergence: str, weight: float, temperature: float = 1.0) -> None:
        self.teaching, self.divergence, self.weight, self.temperature = teaching, divergence, weight, temperature

    def criterion(self, batch: Batch) -> Criterion:
        device = batch.targets_s.device
        ids_sk = torch.from_numpy(self.teaching.ids[batch.places_s].astype(np.int64)).to(device)
        logp_sk = torch.from_numpy(self.teaching.logprobs[batch.places_s]).to(device)
        targets_s, weight = batch.targets_s, self.weight

        def criterion(logits_rv: Tensor, start: int, stop: int, learning: bool) -> Tensor:
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

        return criterion


def divergence(name: str, logp_rk: Tensor, logq_rk: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Between two distributions on k events and the tail: its value [r, 1] and its gradient by the student's logits, as
    q times a number [r, 1] at every token, and what is added to that at the k [r, k].

    Events with ln p = −∞ are not there: their mass is the tail's.
    """
    there_rk = logp_rk > -torch.inf
    logp_rk, logq_rk = (x_rk.masked_fill(~there_rk, -torch.inf) for x_rk in (logp_rk, logq_rk))
    if temperature == 1.0:
        value_r1, pull_re = compare(name, with_tail(logp_rk), with_tail(logq_rk))
        pull_rk, tail_r1 = pull_re[:, :-1], pull_re[:, -1:] / with_tail(logq_rk)[:, -1:].exp()
        # d/dz of a function of the events' masses is q (g − ḡ): g is one number for the whole tail, others at the k.
        return value_r1, pull_rk - tail_r1 * logq_rk.exp(), tail_r1 - pull_re.sum(1, keepdim=True)

    together = [x_rk.logsumexp(1, keepdim=True) for x_rk in (logp_rk, logq_rk)]
    value_r1, pull_r2 = compare(name, *(with_tail(x_r1) for x_r1 in together))
    both_r2 = pull_r2 / with_tail(together[1]).exp()
    known_r1, tail_r1 = both_r2[:, :1], both_r2[:, 1:]
    soft_rk = [(x_rk / temperature).log_softmax(1) for x_rk in (logp_rk, logq_rk)]
    soft_r1, pull_rk = compare(name, *soft_rk)
    apart_rk = temperature * (pull_rk - soft_rk[1].exp() * pull_rk.sum(1, keepdim=True))
    gradient_rk = (known_r1 - tail_r1) * logq_rk.exp() + apart_rk
    return value_r1 + temperature**2 * soft_r1, gradient_rk, tail_r1 - pull_r2.sum(1, keepdim=True)


def compare(name: str, lnp_re: Tensor, lnq_re: Tensor) -> tuple[Tensor, Tensor]:
    """A divergence of two distributions on e events: its value [r, 1], and q times its derivative by q [r, e].

    What is impossible in both does not count.
    """
    there_re = lnp_re > -torch.inf
    p_re, q_re = lnp_re.exp(), lnq_re.exp()
    lnp_re, lnq_re = (torch.where(there_re, x_re, 0.0) for x_re in (lnp_re, lnq_re))
    match name:
        case "forward_kl":
            value_re, pull_re = p_re * (lnp_re - lnq_re), -p_re
        case "reverse_kl":
            value_re, pull_re = q_re * (lnq_re - lnp_re), q_re * (lnq_re - lnp_re + 1)
        case "jsd":
            lnm_re = torch.logaddexp(lnp_re, lnq_re) - LN2
            value_re = (p_re * (lnp_re - lnm_re) + q_re * (lnq_re - lnm_re)) / 2
            pull_re = q_re * (lnq_re - lnm_re) / 2
        case _:
            raise AssertionError(name)
    return value_re.sum(1, keepdim=True), pull_re


def with_tail(logp_rk: Tensor) -> Tensor:
    """The tail as one more event, [r, k + 1]; never less than float32 can tell from nothing."""
    return torch.cat((logp_rk, (1 - logp_rk.exp().sum(1, keepdim=True)).clamp_min(LEAST).log()), 1)


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
