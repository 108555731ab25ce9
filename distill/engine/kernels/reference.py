"""Every op in plain torch. This is the definition; other kernels are tested against it.

An op takes and returns tensors and numbers only: no spec, no module, no state beyond the page tensors it is handed. The
cut between ops follows what a hand-written kernel would want to own whole: attention reads through the page table
itself instead of being given gathered keys, and the experts of a layer are one op, so that a kernel which never
materialises what lies between fits the same slot.

Matrices are given to ops packed: `pack` and its kin turn what a checkpoint holds into whatever the kernels of the same
column want to read, and nobody else looks inside. Here that is a dense matrix in the compute dtype, so an FP8 matrix is
dequantised once: a small model would otherwise spend its time dequantising the same blocks in every step.

Legend (suffixes of tensor names): t tokens, b sequences that decode, h query heads, k key-value heads, d width of
queries and keys, e width of values, l context length, p pages of one sequence, s (token, expert) pairs sorted by
expert, x experts, f expert width, n output features, c input features, r half the rotated width. A pool of pages is
[pages, k, page_size, width].

Scores, softmax and norms are in float32 whatever the compute dtype. Fused attention calls of torch were rejected: on
CPU they fall back to slower paths for one query per sequence and for values narrower than keys, which is all MLA is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128


@dataclass(frozen=True)
class Fp8:
    """A matrix as published: float8_e4m3fn codes [n, c], float32 scales [⌈n/128⌉, ⌈c/128⌉], edge blocks partial. ue8m0:
    scales are powers of two, and so are to be those of activations, where they are quantised."""

    codes: Tensor
    scale: Tensor
    ue8m0: bool = False


Stored = Tensor | Fp8  # a matrix as the checkpoint holds it


@dataclass(frozen=True)
class Place:
    """Where a matrix (the codes of an FP8 one) lies in a file, row-major: `size` bytes. `file` keeps the descriptor
    open."""

    descriptor: int
    offset: int
    size: int
    file: Any


class Damaged(Exception):
    """A stored matrix that no healthy checkpoint holds. what: "codes" (FP8 NaN codes), "scale" (a scale that is not
    finite and positive), "values" (a number that is not finite). In a bank of experts: the number of the expert and of
    its part."""

    def __init__(self, what: Literal["codes", "scale", "values"], expert: int = 0, part: int = 0) -> None:
        super().__init__(what, expert, part)
        self.what, self.expert, self.part = what, expert, part


# Prefill computes attention for blocks of queries whose score matrix has at most so many elements (64 MiB in float32).
_SCORE_ELEMENTS = 1 << 24


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, to: Any = None) -> Tensor:
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467). to: the packed matrix or bank of experts that
    reads it, for kernels that can make what that wants on the way; the result is the same."""
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
    """Where tensors are to be for these ops."""
    return torch.device("cpu")


def session() -> AbstractContextManager[None]:
    """What every step is wrapped in."""
    return nullcontext()


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What activations are between ops when the compute dtype is `dtype`."""
    return dtype


def has_nan_codes(codes: Tensor) -> bool:
    """Whether float8_e4m3fn codes hold a NaN, which a healthy checkpoint never does."""
    return bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any())


def dense(weight: Stored, dtype: torch.dtype) -> Tensor:
    """[n, c] in `dtype`."""
    return dequantize_fp8_block(weight.codes, weight.scale, dtype) if isinstance(weight, Fp8) else weight.to(dtype)


def dequantize_fp8_block(weight_nc: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float8_e4m3fn [n, c] times its block's scale: one per 128×128 block, [⌈n/128⌉, ⌈c/128⌉], edge blocks partial.

    The product is taken in float32 and rounded to `dtype` once. (DeepSeek-V3, arXiv:2412.19437, section 3.3.2.)
    """
    n, c = weight_nc.shape
    scale_nc = scale.to(torch.float32).repeat_interleave(FP8_BLOCK, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :c]
    return (weight_nc.to(torch.float32) * scale_nc).to(dtype)


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Tensor:
    """What `linear` and `swiglu_linear` take as a weight. place: where it may be read instead. Raises Damaged."""
    check(weight)
    return dense(weight, dtype)


def check(weight: Stored, expert: int = 0, part: int = 0) -> None:
    """Raises Damaged."""
    if not isinstance(weight, Fp8):
        if not weight.isfinite().all():
            raise Damaged("values", expert, part)
        return
    if has_nan_codes(weight.codes):
        raise Damaged("codes", expert, part)
    check_scale(weight, expert, part)


def check_scale(weight: Fp8, expert: int = 0, part: int = 0) -> None:
    """Raises Damaged for a scale that is not finite and positive. Zero is accepted where all codes of the block are
    zeros: some quantisers divide the largest of them by 448."""
    scale = weight.scale
    if not (scale.isfinite() & (scale >= 0)).all():
        raise Damaged("scale", expert, part)
    for row, column in (scale == 0).nonzero().tolist():
        rows = slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK)
        block = weight.codes[rows, column * FP8_BLOCK : (column + 1) * FP8_BLOCK]
        if (block.contiguous().view(torch.uint8) & 0x7F).any():
            raise Damaged("scale", expert, part)


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
    to: Any = None,
) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) (arXiv:2002.05202). to: the packed matrix that reads it, as for `rms_norm`; what is
    returned may be made for that matrix alone."""
    return F.silu(F.linear(x_tc, gate_fc, gate_bias_f)) * F.linear(x_tc, up_fc, up_bias_f)


def rows_of(weight: Stored, begin: int, end: int) -> Stored:
    """Rows `begin … end-1`: in FP8 where their blocks are those of a matrix of its own, else as float32."""
    if not isinstance(weight, Fp8):
        return weight[begin:end]
    blocks = slice(begin // FP8_BLOCK, -(-end // FP8_BLOCK))
    if begin % FP8_BLOCK == 0 or blocks.stop - blocks.start == 1:
        return Fp8(weight.codes[begin:end], weight.scale[blocks], weight.ue8m0)
    return dense(weight, torch.float32)[begin:end]


def transposed(weight: Stored) -> Stored:
    """[n, c] → [c, n]."""
    if isinstance(weight, Fp8):
        return Fp8(weight.codes.T.contiguous(), weight.scale.T.contiguous(), weight.ue8m0)
    return weight.T


def side_by_side(weights: Sequence[Any]) -> Sequence[Any]:
    """Packed matrices that read the same activations, and are done with them: `linears` may then take one product."""
    return weights


def pack_heads(weights: Sequence[Stored], dtype: torch.dtype) -> Tensor:
    """One matrix a head → what `per_head` and `prefill_mla` take as a weight."""
    return torch.stack([dense(weight, dtype) for weight in weights])


def per_head(x_thc: Tensor, weight_hnc: Tensor, behind_thr: Tensor | None = None) -> Tensor:
    """Each head's x times its own weightᵀ → [t, h, n], or [t, h, n + r] with what is given to stand behind it."""
    out_thn = torch.bmm(x_thc.transpose(0, 1), weight_hnc.transpose(1, 2)).transpose(0, 1)
    return out_thn if behind_thr is None else torch.cat((out_thn, behind_thr), dim=-1)


class ExpertBank:
    """The experts of a layer, (gate [f, c], up [f, c], down [c, f]) each. They are lent as stored; `settle` packs some
    for good, the others are packed into an arena when they are needed. queued: whether `fill` returns at once, its work
    being in order with that of ops called later."""

    queued = False

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.count, self._dtype = count, dtype
        self._lent: list[tuple[Stored, Stored, Stored] | None] = []
        self.packed: dict[int, tuple[Tensor, Tensor]] = {}  # gate and up as one [2f, c], and down
        self.resident = count

    def lend(self, expert: tuple[Stored, Stored, Stored], places: tuple[Place, ...] | None = None) -> None:
        """The next expert, in memory that stays as it is. places: where its matrices may be read instead."""
        self._lent.append(expert)

    @property
    def bytes_each(self) -> int:
        """What one packed expert takes."""
        last = self._lent[-1]
        assert last is not None
        return sum((m.codes if isinstance(m, Fp8) else m).numel() for m in last) * self._dtype.itemsize

    def settle(self, resident: int | None = None) -> None:
        """Pack the first `resident` experts (None: all), and look at the numbers of all. Raises Damaged."""
        self.resident = self.count if resident is None else resident
        for index, expert in enumerate(self._lent):
            assert expert is not None
            for part, matrix in enumerate(expert):
                check(matrix, index, part)
            if index < self.resident:
                self.packed[index] = self._pack(index)
                self._lent[index] = None

    def fill(
        self, arena: dict[int, tuple[Tensor, Tensor]], chosen: Sequence[int] | None = None, background: bool = False
    ) -> None:
        """Pack the experts that are not resident into `arena`; `chosen`: only these of them. background: beside other
        ops, on one thread."""
        arena.clear()
        wanted = range(self.resident, self.count) if chosen is None else [i for i in chosen if i >= self.resident]
        arena.update((index, self._pack(index)) for index in wanted)

    def install(self, arena: dict[int, tuple[Tensor, Tensor]]) -> None:
        """From now on the experts that `fill` packed are read from `arena`."""
        self.packed = {i: self.packed[i] for i in range(self.resident)} | arena

    def _pack(self, index: int) -> tuple[Tensor, Tensor]:
        expert = self._lent[index]
        assert expert is not None
        gate_fc, up_fc, down_cf = (dense(matrix, self._dtype) for matrix in expert)
        return torch.cat((gate_fc, up_fc)), down_cf.clone()


def expert_bank(count: int, dtype: torch.dtype) -> ExpertBank:
    """An empty bank for `count` experts."""
    return ExpertBank(count, dtype)


def arena(size: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Where a bank packs what is not resident, `size` bytes."""
    return {}


def packed_bytes(packed: Tensor) -> int:
    """The memory that a packed matrix takes."""
    return packed.nbytes


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank,
    shared: tuple[Tensor, Tensor, Tensor] | None,
    onto_tc: Tensor,
) -> Tensor:
    """Σ over a token's k experts of weight · down(silu(gate·x) · up·x), added in the order of experts' numbers, then
    the shared expert (gate, up, down) if there is one; added to `onto`, in place.

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
            gate_sf, up_sf = (x_sc[rows] @ gate_up_2fc.T).chunk(2, dim=-1)
            torch.mm(F.silu(gate_sf) * up_sf, down_cf.T, out=y_sc[rows])
            start += count
    back_s = torch.empty_like(order_s)
    back_s[order_s] = torch.arange(order_s.numel(), device=order_s.device)
    y_tkc = y_sc.index_select(0, back_s).unflatten(0, experts_tk.shape)
    routed_tc = (y_tkc * weights_tk[..., None]).sum(1).to(x_tc.dtype)
    if shared is not None:
        routed_tc += linear(swiglu_linear(x_tc, *shared[:2]), shared[2])
    return onto_tc.add_(routed_tc)


def route(
    logits_tx: Tensor,
    bias_x: Tensor | None,
    scoring: Literal["sigmoid", "softmax"],
    group_by: Literal["best", "best two"],
    groups: int,
    groups_kept: int,
    per_token: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The routers of DeepSeek-V2 (arXiv:2405.04434, section 2.1.3: softmax, a group is worth its best expert, no bias)
    and V3 (arXiv:2412.19437, section 2.1.2: sigmoid, its best two) → experts [t, per_token] int64, weights float32.

    The bias moves the choice and never the weight. Experts outside the `groups_kept` best groups cannot be chosen. A
    token with a NaN among its scores has no best experts: it gets the first `per_token` with weights of NaN.
    """
    logits_tx = logits_tx.float()
    scores_tx = logits_tx.sigmoid() if scoring == "sigmoid" else logits_tx.softmax(-1)
    choice_tx = scores_tx if bias_x is None else scores_tx + bias_x
    undefined_t1 = choice_tx.isnan().any(-1, keepdim=True)
    if groups > 1:
        choice_tgx = choice_tx.unflatten(-1, (groups, -1))
        counted = 1 if group_by == "best" else 2
        best_tg = choice_tgx.topk(counted, dim=-1).values.sum(-1).topk(groups_kept, dim=-1).indices
        dropped_tg = torch.ones_like(choice_tgx[..., 0], dtype=torch.bool).scatter_(-1, best_tg, False)
        choice_tx = choice_tgx.masked_fill(dropped_tg[..., None], float("-inf")).flatten(-2)
    experts_tk = choice_tx.topk(per_token, dim=-1).indices
    weights_tk = scores_tx.gather(-1, experts_tk)
    if normalise:
        weights_tk = weights_tk / (weights_tk.sum(-1, keepdim=True) + 1e-20)
    first_k = torch.arange(per_token, device=logits_tx.device)
    experts_tk = torch.where(undefined_t1, first_k, experts_tk)
    return experts_tk, (weights_tk * scale).masked_fill(undefined_t1, float("nan"))


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    """Store token t of x in `pool`, in the pool's dtype, at page page_t[t], place offset_t[t]. In place."""
    pool[page_t, :, offset_t] = x_tkd.to(pool.dtype)


def write_latents(
    pool: Tensor, page_t: Tensor, offset_t: Tensor, x_td: Tensor, norm_c: Tensor, eps: float, cos_tr: Tensor,
    sin_tr: Tensor, interleaved: bool,
    rms_norm: Callable[..., Tensor] = rms_norm, rope: Callable[..., None] = rope,
    paged_write: Callable[..., None] = paged_write,
) -> None:  # fmt: skip
    """Store [latent | shared part of the keys] of each token, the latent normalised and the rest rotated. x is used up.
    The last three: of another column, to be put together in the same way."""
    c_tc, kr_tr = x_td.split((len(norm_c), x_td.shape[1] - len(norm_c)), dim=-1)
    c_tc.copy_(rms_norm(c_tc, norm_c, eps))
    rope(kr_tr[:, None], cos_tr, sin_tr, interleaved)
    paged_write(pool, page_t, offset_t, x_td[:, None])


def paged_gather(pool: Tensor, table_bp: Tensor) -> Tensor:
    """The pages of each sequence side by side: [b, k, p·page_size, width]. The tail past a sequence's end is junk."""
    pages, heads, page_size, width = pool.shape
    rows_bkp = table_bp[:, None, :] * heads + torch.arange(heads, device=table_bp.device)[:, None]
    flat = pool.view(pages * heads, page_size * width).index_select(0, rows_bkp.flatten())
    return flat.view(table_bp.shape[0], heads, table_bp.shape[1] * page_size, width)


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float
) -> Tensor:
    """One query per row over its first length_b cached tokens → [b, h, e]. Query head i reads kv head i·k//h."""
    parts = [
        _attend_one(q_bhd[rows], paged_gather(k_pool, table_gp), paged_gather(v_pool, table_gp), length_b[rows], scale)
        for rows, table_gp in _groups(table_bp, length_b, k_pool.shape[2])
    ]
    return torch.cat(parts)


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    """Absorbed MLA: all heads share one cached row per token, and its first e numbers are the values → [b, h, e]."""
    parts = []
    for rows, table_gp in _groups(table_bp, length_b, pool.shape[2]):
        kv_gkld = paged_gather(pool, table_gp)
        parts.append(_attend_one(q_bhd[rows], kv_gkld, kv_gkld[..., :e], length_b[rows], scale))
    return torch.cat(parts)


def _groups(table_bp: Tensor, length_b: Tensor, page_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Neighbouring rows and their table, cut where a row has less than half or more than twice the pages of the first.

    Gathered caches are padded to the longest of a group, so padding never does much more than double the work if rows
    come sorted by length. One group for all would let one long sequence make every short one pay.
    """
    used = [-(-length // page_size) for length in length_b.tolist()]
    start = 0
    while start < len(used):
        end = start + 1
        while end < len(used) and used[start] <= 2 * used[end] and used[end] <= 2 * used[start]:
            end += 1
        yield slice(start, end), table_bp[start:end, : max(used[start:end])]
        start = end


def _attend_one(q_bhd: Tensor, k_bkld: Tensor, v_bkle: Tensor, length_b: Tensor, scale: float) -> Tensor:
    b, h, d = q_bhd.shape
    k, length = k_bkld.shape[1:3]
    scores = torch.bmm(q_bhd.reshape(b * k, h // k, d) * scale, k_bkld.flatten(0, 1).transpose(1, 2))
    past_end_bl = torch.arange(length, device=q_bhd.device) >= length_b[:, None]
    scores = scores.view(b, h, length).float().masked_fill_(past_end_bl[:, None], float("-inf"))
    probs = scores.softmax(-1).to(v_bkle.dtype).view(b * k, h // k, length)
    return torch.bmm(probs, v_bkle.flatten(0, 1)).view(b, h, v_bkle.shape[-1])


def prefill_gqa(q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float) -> Tensor:
    """The last t of a sequence's `length` cached tokens attend to themselves and all before → [t, h, e]."""
    k_kld = paged_gather(k_pool, table_p[None])[0, :, :length]
    v_kle = paged_gather(v_pool, table_p[None])[0, :, :length]
    return attend_causal(q_thd, k_kld, v_kle, scale)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k_hnc: Tensor, expand_v_hec: Tensor, scale: float
) -> Tensor:
    """The same with keys and values of every head written out from the cached latents: fewer operations than the
    absorbed form where many queries share a context. A cached row is the latent, then the key part all heads share."""
    h, latent = expand_k_hnc.shape[0], expand_k_hnc.shape[2]
    c_lc, kr_lr = paged_gather(pool, table_p[None])[0, 0, :length].tensor_split((latent,), dim=-1)
    kn_hln = torch.matmul(c_lc, expand_k_hnc.transpose(1, 2))
    v_hle = torch.matmul(c_lc, expand_v_hec.transpose(1, 2))
    k_hld = torch.cat((kn_hln, kr_lr.expand(h, -1, -1)), dim=-1)
    return attend_causal(q_thd, k_hld, v_hle, scale)


def attend_causal(q_thd: Tensor, k_kld: Tensor, v_kle: Tensor, scale: float) -> Tensor:
    """The last t of l positions attend to themselves and everything before → [t, h, e]. Query head i reads i·k//h."""
    t, h, d = q_thd.shape
    k, length = k_kld.shape[:2]
    position_l = torch.arange(length, device=q_thd.device)
    out_the = q_thd.new_empty(t, h, v_kle.shape[-1])
    block = max(1, _SCORE_ELEMENTS // (h * length))
    for start in range(0, t, block):
        q = q_thd[start : start + block]
        rows = q.shape[0]
        q_kgd = q.view(rows, k, h // k, d).permute(1, 2, 0, 3).reshape(k, -1, d) * scale
        scores = torch.bmm(q_kgd, k_kld.transpose(1, 2)).float().view(h, rows, length)
        first = length - t + start
        future_tl = position_l > position_l[first : first + rows, None]
        probs = scores.masked_fill_(future_tl, float("-inf")).softmax(-1).to(v_kle.dtype)
        out = torch.bmm(probs.view(k, -1, length), v_kle).view(h, rows, -1)
        out_the[start : start + rows] = out.transpose(0, 1)
    return out_the


def index_scores(q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int) -> Tensor:
    """Σ over heads of weight · relu(q · key) of the last t of `length` cached tokens with those before them and
    themselves → [t, l] float32, -inf for tokens that are yet to come. (DeepSeek-V3.2-Exp, equation 1.)"""
    key_ld = paged_gather(pool, table_p[None])[0, 0, :length]
    score_tl = q_thd.new_empty(len(q_thd), length, dtype=torch.float32)
    for row, (q_hd, weight_h) in enumerate(zip(q_thd, weight_th, strict=True)):
        score_tl[row] = weight_h.float() @ F.relu((q_hd @ key_ld.T).float())
    position_l = torch.arange(length, device=q_thd.device)
    return score_tl.masked_fill_(position_l > position_l[length - len(q_thd) :, None], float("-inf"))


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


def decode_plan(layers: list[dict[str, Any]]) -> None:
    """What computes all layers with latent attention for rows that decode, in one go: called with hidden states [b, c],
    the layers' pools, cos and sin, page_b, offset_b, table_bp and length_b → hidden states. None: op by op, as here.
    The dictionaries are those of fused.py."""
    return None
