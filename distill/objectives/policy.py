"""What the objectives on the student's own tokens share: the student's distribution, and its gradient, in place.

Every term of these losses is, at one position, a factor of q over the vocabulary plus a few single entries: the
gradient of ln q(y) by the logits is 1[y] − q. So one copy of the block's probabilities is all the memory there is
beside the logits, and five passes over them are the cost: softmax, its maximum, the product for the entropy with its
sum, and the gradient.

Shapes: r rows, n tokens of which ln q is wanted, v vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Policy(NamedTuple):
    """The student at a block of positions. q_rv: probabilities. logq_rn: ln q of the wanted tokens.

    entropy_r1: of the whole vocabulary, in nats.
    """

    q_rv: Tensor
    logq_rn: Tensor
    entropy_r1: Tensor


def measure(logits_rv: Tensor, ids_rn: Tensor) -> Policy:
    """The student's distributions, and ln q of some tokens. The logits are overwritten."""
    logits_rv.sub_(logits_rv.amax(1, keepdim=True))
    q_rv = logits_rv.softmax(1)
    normaliser_r1 = -q_rv.amax(1, keepdim=True).log()  # ln Σ e^logit: the largest logit is 0 now
    logq_rn = logits_rv.gather(1, ids_rn) - normaliser_r1
    entropy_r1 = normaliser_r1 - logits_rv.mul_(q_rv).sum(1, keepdim=True)
    return Policy(q_rv, logq_rn, entropy_r1)


def write_gradient(logits_rv: Tensor, q_rv: Tensor, targets_r1: Tensor, pull_r1: Tensor, all_r1: Tensor) -> None:
    """Overwrite the logits with pull · 1[y] + all · q; a term pull · ln q(y) of the loss has all = −pull."""
    torch.mul(q_rv, all_r1, out=logits_rv).scatter_add_(1, targets_r1, pull_r1)
