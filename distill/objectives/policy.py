"""What the objectives on the student's own tokens share: the student's distribution, and its gradient, in place.

Every term of these losses is, at one position, a factor of q over the vocabulary plus a few single entries: the
gradient of ln q(y) by the logits is 1[y] − q. So one copy of the block's probabilities is all the memory there is
beside the logits.

Shapes: r rows, v vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Policy(NamedTuple):
    """The student at a block of positions. q_rv: probabilities. logq_r1: ln q of the rows' own tokens.

    entropy_r1: of the whole vocabulary, in nats.
    """

    q_rv: Tensor
    logq_r1: Tensor
    entropy_r1: Tensor


def measure(logits_rv: Tensor, targets_r1: Tensor) -> Policy:
    """The student's distributions. The logits are replaced by ln q."""
    logits_rv.sub_(logits_rv.logsumexp(1, keepdim=True))
    q_rv = logits_rv.exp()
    entropy_r1 = -torch.linalg.vecdot(q_rv, logits_rv)[:, None]  # a batched product: no third copy
    return Policy(q_rv, logits_rv.gather(1, targets_r1), entropy_r1)


def write_gradient(logits_rv: Tensor, policy: Policy, targets_r1: Tensor, pull_r1: Tensor, all_r1: Tensor) -> None:
    """Overwrite the logits with pull · 1[y] + all · q; a term pull · ln q(y) of the loss has all = −pull."""
    torch.mul(policy.q_rv, all_r1, out=logits_rv)
    logits_rv.scatter_add_(1, targets_r1, pull_r1)
