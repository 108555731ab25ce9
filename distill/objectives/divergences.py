"""Divergences of distributions on k tokens and a tail, with their gradients by the student's logits.

Shapes: r rows, k teacher tokens, e events (k, or k + 1 with the tail). p: the teacher. q: the student.
"""

import math

import torch
from torch import Tensor

LN2 = math.log(2)
SMALLEST_TAIL = 1e-6  # mass of the tail: k probabilities that sum to 1 leave rounding errors


def divergence(
    name: str, logp_rk: Tensor, logq_rk: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [r, 1], and its gradient by the student's logits in two parts: q times a factor [r, 1] at every
    token of the vocabulary, and a term [r, k] that is added at the k tokens.

    Tokens with ln p = −∞ are not among the k: their mass belongs to the tail. beta: the teacher's weight in the mixture
    of the generalised JSD.

    temperature: T, of the distributions within the k tokens. By the chain rule a divergence on the events is that of
    the masses (P, 1 − P) and (Q, 1 − Q) of the k tokens, and that within them, weighted by their mass: by P for
    forward_kl, by Q for reverse_kl, and for jsd each of its two parts by its own. Tempered is the second term, times
    T²: with the events p̃ = (P softmax(ln p / T), 1 − P) and q̃ the result is T² D(p̃, q̃) + (1 − T²) D(P, Q), which at
    T = 1 is D(p, q).
    """
    present_rk = logp_rk > -torch.inf
    logp_rk, logq_rk = (x_rk.masked_fill(~present_rk, -torch.inf) for x_rk in (logp_rk, logq_rk))
    if temperature == 1.0:
        value_r1, pull_re = compare(name, with_tail(logp_rk), with_tail(logq_rk), beta=beta)
        pull_rk, tail_r1 = pull_re[:, :-1], pull_re[:, -1:] / with_tail(logq_rk)[:, -1:].exp()
        # The gradient of a function of the events' masses is q (g − ḡ): g is the same for all tokens of the tail.
        return value_r1, pull_rk - tail_r1 * logq_rk.exp(), tail_r1 - pull_re.sum(1, keepdim=True)

    mass_r1 = [x_rk.logsumexp(1, keepdim=True) for x_rk in (logp_rk, logq_rk)]
    soft_rk = [(x_rk / temperature).log_softmax(1) for x_rk in (logp_rk, logq_rk)]
    coarse_r2 = [with_tail(x_r1) for x_r1 in mass_r1]
    events_re = [torch.cat((m + x, c[:, 1:]), 1) for m, x, c in zip(mass_r1, soft_rk, coarse_r2, strict=True)]
    coarse_r1, coarse_pull_r2 = compare(name, *coarse_r2, beta=beta)
    value_r1, pull_re = compare(name, *events_re, beta=beta)
    pull_rk, square = pull_re[:, :-1], temperature**2
    pull_r2 = square * torch.cat((pull_rk.sum(1, keepdim=True), pull_re[:, -1:]), 1) + (1 - square) * coarse_pull_r2
    both_r2 = pull_r2 / coarse_r2[1].exp()
    known_r1, tail_r1 = both_r2[:, :1], both_r2[:, 1:]
    within_rk = temperature * (pull_rk - soft_rk[1].exp() * pull_rk.sum(1, keepdim=True))
    gradient_rk = (known_r1 - tail_r1) * logq_rk.exp() + within_rk
    return square * value_r1 + (1 - square) * coarse_r1, gradient_rk, tail_r1 - pull_r2.sum(1, keepdim=True)


def compare(name: str, lnp_re: Tensor, lnq_re: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of two distributions on e events [r, 1], and q times its derivative by q [r, e].

    Events that are impossible under p contribute nothing. The generalised JSD is β KL(p‖m) + (1 − β) KL(q‖m) with
    m = β p + (1 − β) q; its derivative by q is (1 − β) ln(q/m), since (β p + (1 − β) q)/m = 1.
    """
    present_re = lnp_re > -torch.inf
    p_re, q_re = lnp_re.exp(), lnq_re.exp()
    lnp_re, lnq_re = (torch.where(present_re, x_re, 0.0) for x_re in (lnp_re, lnq_re))
    match name:
        case "forward_kl":
            value_re, pull_re = p_re * (lnp_re - lnq_re), -p_re
        case "reverse_kl":
            value_re, pull_re = q_re * (lnq_re - lnp_re), q_re * (lnq_re - lnp_re + 1)
        case "jsd":
            lnm_re = torch.logaddexp(lnp_re + math.log(2 * beta), lnq_re + math.log(2 - 2 * beta)) - LN2
            value_re = beta * (p_re * (lnp_re - lnm_re)) + (1 - beta) * (q_re * (lnq_re - lnm_re))
            pull_re = (1 - beta) * (q_re * (lnq_re - lnm_re))
        case _:
            raise AssertionError(name)
    return value_re.sum(1, keepdim=True), pull_re


def with_tail(logp_rk: Tensor) -> Tensor:
    """Append the tail as one more event, [r, k + 1]; its mass is at least `SMALLEST_TAIL`."""
    return torch.cat((logp_rk, (1 - logp_rk.exp().sum(1, keepdim=True)).clamp_min(SMALLEST_TAIL).log()), 1)
