"""Layers with a gated delta rule in place of attention, whose memory is a recurrent state instead of cached tokens.

A sequence has one slot, the same in every such layer, which holds what its last computed token left: the last inputs of
the short convolution and a matrix a head. A slot is like a partial page: samples of one prompt share the slot that the
prompt left, and the first that writes takes a private copy (scheduler.py). Unlike a page, it holds one moment only: a
token must be computed exactly once and in order, and what was computed cannot be taken back. Hence a sequence that lost
its slot is computed again from its first token, and there are no drafts.

The rows of a step are computed in turns, the first token of each sequence, then the second of each that has one. So a
result depends neither on the rest of the batch nor on how a prompt is cut into chunks.

Legend: as in kernels/reference_delta.py; r requested rows, c hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.engine.kernels import Ops
from distill.engine.spec import ModelSpec
from distill.engine.weights import DeltaWeights


@dataclass(frozen=True)
class Turns:
    """The rows of a batch by sequence, as the op `delta_rule` takes them: int64 each."""

    row_t: Tensor
    first_s: Tensor
    slot_s: Tensor
    fresh_s: Tensor


def turns(slots: Sequence[int], positions: Sequence[int], device: torch.device) -> Turns:
    """The order of a batch whose row i is the token at positions[i] of the sequence that holds slots[i].

    A sequence may have rows in two places: its generated tokens come before its prompt's when it is computed again.
    """
    slot_t, position_t = np.array(slots, np.int64), np.array(positions, np.int64)
    row_t = np.lexsort((position_t, slot_t))
    slot_s, first_s = np.unique(slot_t[row_t], return_index=True)
    fresh_s = position_t[row_t[first_s]] == 0
    parts = (row_t, np.append(first_s, len(row_t)), slot_s, fresh_s)
    return Turns(*(torch.from_numpy(part.astype(np.int64)).to(device) for part in parts))


def delta(
    spec: ModelSpec,
    ops: Ops,
    w: DeltaWeights,
    x_tc: Tensor,
    order: Turns,
    states: tuple[Tensor, Tensor],
    onto_rc: Tensor,
    row_r: Tensor | None = None,
) -> Tensor:
    """One layer, added to `onto`, in place; updates the states [slots, …] of all sequences. row_r: the rows of `onto`,
    if they are not all."""
    linears = (w.qkv, w.write, w.decay, w.gate)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    qkv_tn, write_th, decay_th, gate_te = ops.linears(x_tc, weights, biases)
    out_te = ops.delta_rule(
        qkv_tn,
        write_th,
        decay_th,
        gate_te,
        w.conv,
        w.rate,
        w.rate_bias,
        w.norm,
        spec.norm_eps,
        *states,
        order.row_t,
        order.first_s,
        order.slot_s,
        order.fresh_s,
    )
    out_re = out_te if row_r is None else out_te.index_select(0, row_r)
    return ops.linear(out_re, w.o.weight, w.o.bias, onto_rc) if len(onto_rc) else onto_rc
