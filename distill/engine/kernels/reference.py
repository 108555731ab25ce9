"""Every op in plain torch. This is the definition; other kernels are tested against it.

An op takes and returns tensors and numbers only: no spec, no module, no state beyond the page tensors. The cut between
ops follows the unit that a hand-written kernel computes in one piece: attention reads through the page table itself
instead of taking gathered keys, and the experts of a layer are one op, so that a kernel that keeps intermediate results
in registers fits the same slot. The ops over paged caches are in reference_attention.py, recurrent
ones in reference_delta.py, those of compressed attention and hyper-connections in reference_streams.py; this module has
all of them.

Ops take matrices packed: `pack` and `pack_heads` turn a stored matrix (stored.py) into the form that the kernels of the
same column read, and no other code looks inside. Here that form is a dense matrix in the compute dtype, so an FP8
matrix is dequantised once: a small model would otherwise spend its time dequantising the same blocks in every step.

Legend (suffixes of tensor names): t tokens, b sequences that decode, h query heads, k key-value heads, d width of
queries and keys, e width of values, l context length, p pages of one sequence, s (token, expert) pairs sorted by
expert, x experts, f expert width, n output features, c input features, r half the rotated width. A pool of pages is
[pages, k, page_size, width].

Scores, softmax and norms are in float32 whatever the compute dtype. Fused attention calls of torch were rejected: on
CPU they fall back to slower paths for one query per sequence and for values narrower than keys, which is all MLA is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.kernels.reference_attention import decode_gqa as decode_gqa
from distill.engine.kernels.reference_attention import decode_mla as decode_mla
from distill.engine.kernels.reference_attention import index_scores as index_scores
from distill.engine.kernels.reference_attention import paged_write as paged_write
from distill.engine.kernels.reference_attention import prefill_gqa as prefill_gqa
from distill.engine.kernels.reference_attention import prefill_mla as prefill_mla
from distill.engine.kernels.reference_delta import delta_rule as delta_rule
from distill.engine.kernels.reference_delta import sigmoid_gate as sigmoid_gate
from distill.engine.kernels.reference_streams import attend_rows as attend_rows
from distill.engine.kernels.reference_streams import pool_windows as pool_windows
from distill.engine.kernels.reference_streams import stream_weights as stream_weights
from distill.engine.kernels.stored import Damaged, Place, Stored, all_finite

P = TypeVar("P")
E = TypeVar("E")


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, to: object = None) -> Tensor:
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467). to: the packed matrix or bank of experts that
    reads the result, for kernels that can prepare its input on the way; the result is the same."""
    return F.rms_norm(x_tc, (x_tc.shape[-1],), weight_c, eps)


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
    """Rotate all of x's last dimension, 2r wide, in place: pair i by the angle whose cos and sin are column i
    (arXiv:2104.09864). interleaved: pair i is (x[2i], x[2i+1]); otherwise it is (x[i], x[i+r])."""
    cos_t1r, sin_t1r = cos_tr[:, None], sin_tr[:, None]
    if interleaved:
        a, b = x_thd[..., 0::2], x_thd[..., 1::2]
    else:
        a, b = x_thd.chunk(2, dim=-1)
    rotated_a, rotated_b = a * cos_t1r - b * sin_t1r, b * cos_t1r + a * sin_t1r
    a.copy_(rotated_a)
    b.copy_(rotated_b)


def device() -> torch.device:
    """The device on which these ops expect their tensors."""
    return torch.device("cpu")


def session() -> AbstractContextManager[None]:
    """The context in which every step runs."""
    return nullcontext()


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations between ops when the compute dtype is `dtype`."""
    return dtype


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Tensor:
    """The form in which `linear` and `swiglu_linear` take a weight. place: where its numbers may be read instead.

    Raises Damaged.
    """
    weight.check()
    return weight.dense(dtype)


def repack(packed_nc: Tensor, numbers_nc: Tensor) -> None:
    """Replace the numbers of a packed matrix in place: what `pack` makes of a `Plain` matrix of that shape, on any
    device. Raises Damaged, and the matrix then holds the damaged numbers."""
    packed_nc.copy_(numbers_nc)
    if not all_finite(packed_nc):
        raise Damaged("values")


def check(weight: Stored) -> None:
    """Raises Damaged for a stored matrix with numbers that no healthy checkpoint holds."""
    weight.check()


def linear(x_tc: Tensor, weight_nc: Tensor, bias_n: Tensor | None = None, onto_tn: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, with x in its own precision (activations are not quantised); added to `onto`, in place, if
    that is given."""
    out_tn = F.linear(x_tc, weight_nc, bias_n)
    return out_tn if onto_tn is None else onto_tn.add_(out_tn)


def linears(x_tc: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The products of one x with several matrices, which may have been packed side by side. Results may be columns of
    one tensor."""
    return [linear(x_tc, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def swiglu_linear(
    x_tc: Tensor,
    gate_fc: Tensor,
    up_fc: Tensor,
    gate_bias_f: Tensor | None = None,
    up_bias_f: Tensor | None = None,
    to: object = None,
) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) (arXiv:2002.05202). to: the packed matrix that reads the result, as for
    `rms_norm`; the result may then fit that matrix alone."""
    return F.silu(F.linear(x_tc, gate_fc, gate_bias_f)) * F.linear(x_tc, up_fc, up_bias_f)


def side_by_side(weights: Sequence[P]) -> Sequence[P]:
    """Packed matrices that read the same activations, arranged so that `linears` may compute them as one product."""
    return weights


def pack_heads(weights: Sequence[Stored], dtype: torch.dtype) -> Tensor:
    """One matrix a head → the form in which `per_head` and `prefill_mla` take a weight."""
    return torch.stack([weight.dense(dtype) for weight in weights])


def per_head(x_thc: Tensor, weight_hnc: Tensor, behind_thr: Tensor | None = None) -> Tensor:
    """Each head's x times its own weightᵀ → [t, h, n], or [t, h, n + r] with `behind` appended to it."""
    out_thn = torch.bmm(x_thc.transpose(0, 1), weight_hnc.transpose(1, 2)).transpose(0, 1)
    return out_thn if behind_thr is None else torch.cat((out_thn, behind_thr), dim=-1)


class Bank(ABC, Generic[E]):
    """The experts of a layer, (gate [f, c], up [f, c], down [c, f]) each, whose packed form is an E.

    They are lent as stored. `settle` packs the resident ones for good; the others are packed into an arena when they
    are needed. queued: whether `fill` returns at once, its work being in order with that of ops called later.
    """

    queued = False

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.count, self._dtype = count, dtype
        self._lent: list[tuple[Stored, Stored, Stored] | None] = []
        self.packed: dict[int, E] = {}
        self.resident = count

    def lend(self, expert: tuple[Stored, Stored, Stored], places: tuple[Place, ...] | None = None) -> None:
        """Add the next expert, whose memory must not change. places: where its matrices may be read instead."""
        self._lent.append(expert)

    @property
    def bytes_each(self) -> int:
        """Bytes of one packed expert."""
        last = self._lent[-1]
        assert last is not None
        return sum(prod(matrix.shape) for matrix in last) * self._dtype.itemsize

    def settle(self, resident: int | None = None) -> None:
        """Pack the first `resident` experts (None: all), and check the numbers of all. Raises Damaged."""
        self.resident = self.count if resident is None else resident
        for index, expert in enumerate(self._lent):
            assert expert is not None
            for part, matrix in enumerate(expert):
                matrix.check(index, part)
            if index < self.resident:
                self.packed[index] = self._pack(index)
                self._lent[index] = None

    def fill(self, arena: dict[int, E], chosen: Sequence[int] | None = None, background: bool = False) -> None:
        """Pack the experts that are not resident into `arena`; chosen: only these. background: on one thread, beside
        other ops."""
        arena.clear()
        wanted = range(self.resident, self.count) if chosen is None else [i for i in chosen if i >= self.resident]
        arena.update((index, self._pack(index)) for index in wanted)

    def install(self, arena: dict[int, E]) -> None:
        """From now on the experts that `fill` packed are read from `arena`."""
        self.packed = {i: self.packed[i] for i in range(self.resident)} | arena

    def _pack(self, index: int) -> E:
        expert = self._lent[index]
        assert expert is not None
        return self.packed_form(*expert)

    @abstractmethod
    def packed_form(self, gate: Stored, up: Stored, down: Stored) -> E:
        """An expert as `experts` reads it."""


class ExpertBank(Bank[tuple[Tensor, Tensor]]):
    """Experts in the compute dtype: gate and up as one matrix [2f, c], and down [c, f]."""

    def packed_form(self, gate: Stored, up: Stored, down: Stored) -> tuple[Tensor, Tensor]:
        """See Bank."""
        return torch.cat((gate.dense(self._dtype), up.dense(self._dtype))), down.dense(self._dtype).clone()


def expert_bank(count: int, dtype: torch.dtype, like: Sequence[Stored] = ()) -> ExpertBank:
    """An empty bank for `count` experts. like: gate, up and down of one, for columns whose
    banks differ by its form."""
    return ExpertBank(count, dtype)


def arena(size: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Memory of `size` bytes in which a bank packs the experts that are not resident."""
    return {}


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank,
    shared: tuple[Tensor, Tensor, Tensor] | None,
    onto_tc: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Σ over a token's k experts of weight · down(silu(gate·x) · up·x), added in the order of experts' numbers, then
    the shared expert (gate, up, down) if there is one; added to `onto`, in place. limit: gate·x is at most this, up·x
    is within ± this.

    Tokens are sorted by expert, so that each expert multiplies one contiguous slice once. A scatter-add back was
    rejected: it sums in whatever order threads arrive. Padding every expert to the same number of tokens was rejected:
    real routing is uneven, and the waste grows with it.
    """
    order_s = torch.argsort(experts_tk.flatten(), stable=True)
    counts = torch.bincount(experts_tk.flatten(), minlength=bank.count).tolist()
    x_sc = x_tc.index_select(0, order_s // experts_tk.shape[1])
    y_sc = torch.empty_like(x_sc)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            gate_up_2fc, down_cf = bank.packed[expert]
            gate_sf, up_sf = limited((x_sc[rows] @ gate_up_2fc.T).chunk(2, dim=-1), limit)
            torch.mm(F.silu(gate_sf) * up_sf, down_cf.T, out=y_sc[rows])
            start += count
    back_s = torch.empty_like(order_s)
    back_s[order_s] = torch.arange(order_s.numel(), device=order_s.device)
    y_tkc = y_sc.index_select(0, back_s).unflatten(0, experts_tk.shape)
    routed_tc = (y_tkc * weights_tk[..., None]).sum(1).to(x_tc.dtype)
    if shared is not None:
        gate_tf, up_tf = limited([linear(x_tc, weight) for weight in shared[:2]], limit)
        routed_tc += linear(F.silu(gate_tf) * up_tf, shared[2])
    return onto_tc.add_(routed_tc)


def limited(gate_and_up: Sequence[Tensor], limit: float | None) -> tuple[Tensor, Tensor]:
    """Gate at most `limit`, up within ± `limit`; None: as they are."""
    gate_tf, up_tf = gate_and_up
    return (gate_tf, up_tf) if limit is None else (gate_tf.clamp(max=limit), up_tf.clamp(-limit, limit))


def route(
    logits_tx: Tensor,
    bias_x: Tensor | None,
    scoring: Literal["sigmoid", "softmax", "sqrtsoftplus"],
    group_by: Literal["best", "best two"],
    groups: int,
    groups_kept: int,
    per_token: int,
    normalise: bool,
    scale: float,
    given_tk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The routers of DeepSeek-V2 (arXiv:2405.04434, section 2.1.3: softmax, a group is worth its best expert, no bias)
    and V3 (arXiv:2412.19437, section 2.1.2: sigmoid, its best two) → experts [t, per_token] int64, weights float32.
    sqrtsoftplus: √ln(1 + eˣ). given: the experts, of which only the weights are then computed.

    The bias moves the choice and never the weight. Experts outside the `groups_kept` best groups cannot be chosen. A
    token with a NaN among its scores has no best experts: it gets the first `per_token` with weights of NaN.
    """
    logits_tx = logits_tx.float()
    if scoring == "sqrtsoftplus":
        scores_tx = F.softplus(logits_tx).sqrt()
    else:
        scores_tx = logits_tx.sigmoid() if scoring == "sigmoid" else logits_tx.softmax(-1)
    choice_tx = scores_tx if bias_x is None else scores_tx + bias_x
    undefined_t1 = choice_tx.isnan().any(-1, keepdim=True)
    if groups > 1:
        choice_tgx = choice_tx.unflatten(-1, (groups, -1))
        counted = 1 if group_by == "best" else 2
        best_tg = choice_tgx.topk(counted, dim=-1).values.sum(-1).topk(groups_kept, dim=-1).indices
        dropped_tg = torch.ones_like(choice_tgx[..., 0], dtype=torch.bool).scatter_(-1, best_tg, False)
        choice_tx = choice_tgx.masked_fill(dropped_tg[..., None], float("-inf")).flatten(-2)
    experts_tk = choice_tx.topk(per_token, dim=-1).indices if given_tk is None else given_tk
    weights_tk = scores_tx.gather(-1, experts_tk)
    if normalise:
        weights_tk = weights_tk / (weights_tk.sum(-1, keepdim=True) + 1e-20)
    first_k = torch.arange(per_token, device=logits_tx.device)
    if given_tk is None:
        experts_tk = torch.where(undefined_t1, first_k, experts_tk)
    return experts_tk, (weights_tk * scale).masked_fill(undefined_t1, float("nan"))


def write_latents(
    pool: Tensor, page_t: Tensor, offset_t: Tensor, x_td: Tensor, norm_c: Tensor, eps: float, cos_tr: Tensor,
    sin_tr: Tensor, interleaved: bool,
    rms_norm: Callable[..., Tensor] = rms_norm, rope: Callable[..., None] = rope,
    paged_write: Callable[..., None] = paged_write,
) -> None:  # fmt: skip
    """Store [latent | shared part of the keys] of each token, the latent normalised and the rest rotated. x is
    overwritten. rms_norm, rope, paged_write: the ops of a column that composes this op of its own."""
    c_tc, kr_tr = x_td.split((len(norm_c), x_td.shape[1] - len(norm_c)), dim=-1)
    c_tc.copy_(rms_norm(c_tc, norm_c, eps))
    rope(kr_tr[:, None], cos_tr, sin_tr, interleaved)
    paged_write(pool, page_t, offset_t, x_td[:, None])


def draw(
    logits_rv: Tensor,
    row_b: Tensor,
    uniform_b: Tensor,
    temperature_b: Tensor,
    top_k_b: Tensor,
    top_p_b: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw a token from row row_b[b] with a uniform in [0, 1) → tokens, int64, and their raw log-probabilities.

    float32 logits; temperature 0 is greedy (the first of equals), top_k 0 and top_p 1 are off; uniform and top_p are
    float64. The draw inverts the cumulative distribution in vocabulary order, over the tokens that pass a threshold:
    divide by the temperature, keep the top k, of those the smallest set whose mass reaches top p. Tokens tied with the
    last one kept are all kept.

    A row that holds NaN or +inf, or nothing but -inf, has no distribution: its token is 0, its log-probability NaN.
    """
    logits_bv = logits_rv.index_select(0, row_b)
    normaliser_b1 = logits_bv.logsumexp(-1, keepdim=True)
    greedy_b = temperature_b == 0
    # Greedy rows are drawn at temperature 1 and then overruled: one vectorised path, no splitting of the batch.
    divisor_b = torch.where(greedy_b, torch.ones_like(temperature_b), temperature_b)
    probs_bv = ((logits_bv - logits_bv.amax(-1, keepdim=True)) / divisor_b[:, None]).exp()
    probs_bv = probs_bv.masked_fill(probs_bv < _threshold(probs_bv, top_k_b, top_p_b)[:, None], 0.0)
    cumulative_bv = probs_bv.cumsum(-1, dtype=torch.float64)
    total_b = cumulative_bv[:, -1]
    aim_b = torch.minimum(
        uniform_b * total_b, total_b.nextafter(torch.zeros_like(total_b))
    )  # below it, if it rounds up
    token_b = torch.searchsorted(cumulative_bv, aim_b[:, None], right=True)[:, 0]
    token_b = torch.where(greedy_b, logits_bv.argmax(-1), token_b)
    undefined_b = ~normaliser_b1[:, 0].isfinite()
    token_b = token_b.masked_fill(undefined_b, 0)
    logprob_b = (logits_bv.gather(-1, token_b[:, None]) - normaliser_b1)[:, 0]
    return token_b, logprob_b.masked_fill(undefined_b, float("nan"))


def likeliest(logits_rv: Tensor, normaliser_r1: Tensor, top_k: int, given_rm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the `top_k` likeliest tokens and the given ones, [r, k + m], each once.

    They are in the order of their log-probabilities, logits − normaliser. given_rm: int64, −1 for none. In places past
    the last token of a row the log-probability is −∞ and the id 0. float32 logits.
    """
    top = logits_rv.topk(top_k, dim=-1)
    id_rk, logprob_rk = top.indices, top.values - normaliser_r1
    if given_rm is not None:
        known_rm = (given_rm[:, :, None] == id_rk[:, None, :]).any(-1)
        known_rm |= (given_rm[:, :, None] == given_rm[:, None, :]).tril(-1).any(-1)  # by one before it
        at_rm = given_rm.clamp(min=0)
        given_logprob_rm = logits_rv.gather(-1, at_rm) - normaliser_r1
        given_logprob_rm.masked_fill_(known_rm | (given_rm < 0), -torch.inf)
        both_rk = torch.cat((logprob_rk, given_logprob_rm), dim=-1)
        logprob_rk, order_rk = both_rk.sort(dim=-1, descending=True, stable=True)
        id_rk = torch.cat((id_rk, at_rm), dim=-1).gather(-1, order_rk)
    return id_rk.masked_fill(logprob_rk == -torch.inf, 0).int(), logprob_rk


def _threshold(probs_bv: Tensor, top_k_b: Tensor, top_p_b: Tensor) -> Tensor:
    """The smallest unnormalised probability that top k, then top p, let through: [b]. A threshold needs the largest few
    only, and more of them only if they do not reach top p; a sort would need the whole vocabulary."""
    vocab = probs_bv.shape[1]
    k_b = torch.where(top_k_b == 0, vocab, top_k_b.clamp(max=vocab))
    looked_at = min(vocab, max(64, int(top_k_b.max())))
    total_b = probs_bv.sum(-1, dtype=torch.float64)
    while True:
        top_bm = probs_bv.topk(looked_at, dim=-1).values
        before_bm = top_bm.cumsum(-1, dtype=torch.float64) - top_bm
        within_k_bm = torch.arange(looked_at, device=probs_bv.device) < k_b[:, None]
        mass_b = torch.where(k_b < vocab, (top_bm * within_k_bm).sum(-1, dtype=torch.float64), total_b)
        kept_bm = within_k_bm & (before_bm < (top_p_b * mass_b)[:, None])
        kept_bm[:, 0] = True  # whatever top p is
        # A row is settled once the last candidate looked at is dropped, or if nothing limits it.
        open_b = kept_bm[:, -1] & (top_p_b < 1)
        if looked_at == vocab or not open_b.any():
            break
        looked_at = min(vocab, 8 * looked_at)
    smallest_b = top_bm.masked_fill(~kept_bm, float("inf")).amin(-1)
    unlimited_b = (k_b == vocab) & (top_p_b == 1)
    return torch.where(unlimited_b, torch.zeros_like(smallest_b), smallest_b)


def decode_plan(layers: Sequence[object]) -> None:
    """A function that computes all layers for rows that decode at once (`ops.DecodePlan`, from an `ops.DecodeLayer` or
    `ops.DenseLayer` each). None, as here: they are computed op by op."""
    return None
