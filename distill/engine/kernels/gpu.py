"""The GPU's column of the table: FP8 products in Triton, everything that a step needs on the device, no waiting host.

FP8 matrices stay as published and are multiplied with quantised activations (w8a8.py). Matrices in bfloat16, and all of
them in float32, are multiplied by torch. Attention over prompts is torch's, too: it works on whole blocks of queries,
for which torch brings the best kernels there are.

A tensor that `rms_norm` made for an FP8 matrix carries its quantised form as an attribute, which products with FP8
matrices take; it is lost when rows are picked out, and then they quantise for themselves.

Under Triton's interpreter (TRITON_INTERPRET=1) all of it runs on a CPU, slowly.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from distill.engine.kernels import (
    gpu_attention,
    gpu_four_bit,
    gpu_gemm,
    gpu_moe,
    gpu_rows,
    reference,
    reference_attention,
    w8a8,
)
from distill.engine.kernels.gpu_attention import decode_gqa as decode_gqa
from distill.engine.kernels.gpu_attention import index_scores as index_scores
from distill.engine.kernels.gpu_draw import draw as draw
from distill.engine.kernels.gpu_experts import ExpertBank
from distill.engine.kernels.gpu_rows import rope as rope
from distill.engine.kernels.gpu_tiles import grouped_tile
from distill.engine.kernels.ops import GroupBy, Scoring
from distill.engine.kernels.reference import activation_dtype as activation_dtype
from distill.engine.kernels.reference import attend_rows as attend_rows
from distill.engine.kernels.reference import decode_plan as decode_plan
from distill.engine.kernels.reference import delta_rule as delta_rule
from distill.engine.kernels.reference import likeliest as likeliest
from distill.engine.kernels.reference import pool_windows as pool_windows
from distill.engine.kernels.reference import session as session
from distill.engine.kernels.reference import sigmoid_gate as sigmoid_gate
from distill.engine.kernels.reference import stream_weights as stream_weights
from distill.engine.kernels.stored import FP8_BLOCK, Place, Stored
from distill.engine.kernels.w8a8 import Activations, Fp8Matrix, Packed, Quantised, dense_rows
from distill.engine.kernels.w8a8 import repack as repack

if triton.knobs.runtime.interpret:
    from distill.engine.kernels.gpu_interpreter import correct

    correct()

_FLASH_WIDTH = 256  # of a head, at most, in FlashAttention


def device() -> torch.device:
    """The GPU in use; the CPU for Triton's interpreter."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check(weight: Stored) -> None:
    """As reference.check, on the device."""
    weight.on(device()).check()


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Packed:
    """As w8a8.pack. Raises Damaged."""
    return w8a8.pack(_copied(weight), dtype)


def pack_heads(weights: Sequence[Stored], dtype: torch.dtype) -> Tensor:
    """As reference.pack_heads."""
    return reference.pack_heads([_copied(weight) for weight in weights], dtype)


def _copied(weight: Stored) -> Stored:
    """A copy, aligned as a tensor descriptor requires; a tensor in a file may begin at any address."""
    return weight.on(device(), copy=True)


def side_by_side(weights: Sequence[Packed]) -> Sequence[Packed]:
    """FP8 matrices become rows of one, where the scales' blocks allow it: a product of few rows takes hardly longer for
    more columns."""
    matrices = [weight for weight in weights if isinstance(weight, Fp8Matrix)]
    rows = [len(matrix.codes) for matrix in matrices]
    if len(matrices) < len(weights) or any(n % FP8_BLOCK for n in rows[:-1]):
        return weights
    codes, scale = (torch.cat([getattr(matrix, name) for matrix in matrices]) for name in ("codes", "scale"))
    whole = Fp8Matrix(codes, scale, matrices[0].ue8m0)
    blocks = [len(matrix.scale) for matrix in matrices]
    return [Fp8Matrix(*both, whole.ue8m0, whole) for both in zip(codes.split(rows), scale.split(blocks), strict=True)]


def expert_bank(count: int, dtype: torch.dtype, like: Sequence[Stored] = ()) -> ExpertBank:
    """As reference.expert_bank; experts in four bits stay so."""
    kind = gpu_four_bit.FourBitBank if gpu_four_bit.takes(like) else ExpertBank
    return kind(count, dtype, device())


def arena(size: int) -> Tensor:
    """Memory on the device for the experts of a layer that are not resident."""
    return torch.empty(size, dtype=torch.uint8, device=device())


def _format(to: object) -> bool | None:
    """Whether the matrix that will read activations wants scales that are powers of two; None: it reads them as they
    are."""
    return to.ue8m0 if isinstance(to, Fp8Matrix) or (isinstance(to, ExpertBank) and to.fp8) else None


def rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, to: object = None) -> Tensor:
    """As reference.rms_norm; the result may carry its quantised form."""
    out_tc, quantised = gpu_rows.rms_norm(x_tc, weight_c, eps, _format(to))
    if quantised is not None:
        out_tc.quantised = quantised  # type: ignore[attr-defined]  # see the module's docstring
    return out_tc


def _quantised(x: Tensor | Quantised, ue8m0: bool) -> Quantised:
    if isinstance(x, Quantised):
        return x
    made: Quantised | None = getattr(x, "quantised", None)
    return made or gpu_rows.quantise(x, ue8m0)


def linear(x: Activations, weight: Packed, bias_n: Tensor | None = None, onto_tn: Tensor | None = None) -> Tensor:
    """As w8a8.linear."""
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor)
        return reference.linear(x, weight, bias_n, onto_tn)
    return gpu_gemm.linear(_quantised(x, weight.ue8m0), weight, bias_n, onto_tn)


def linears(x_tc: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """As reference.linears; one product for matrices that were packed side by side."""
    wholes = [weight.whole if isinstance(weight, Fp8Matrix) else None for weight in weights]
    whole = wholes[0]
    if whole is None or any(other is not whole for other in wholes) or any(bias is not None for bias in biases):
        return [linear(x_tc, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return list(
        linear(x_tc, whole).split([len(weight.codes) for weight in weights if isinstance(weight, Fp8Matrix)], dim=1)
    )


def per_head(x_thc: Tensor, weight_hnc: Tensor, behind_thr: Tensor | None = None) -> Tensor:
    """As reference.per_head; each head's product is written where it belongs."""
    (t, h, _), n, r = x_thc.shape, weight_hnc.shape[1], 0 if behind_thr is None else behind_thr.shape[2]
    out = torch.empty(t, h, n + r, dtype=x_thc.dtype, device=x_thc.device)
    torch.bmm(x_thc.transpose(0, 1), weight_hnc.transpose(1, 2), out=out[..., :n].transpose(0, 1))
    if behind_thr is not None:
        out[..., n:] = behind_thr
    return out


def swiglu_linear(
    x_tc: Tensor,
    gate: Packed,
    up: Packed,
    gate_bias_f: Tensor | None = None,
    up_bias_f: Tensor | None = None,
    to: object = None,
) -> Activations:
    """As reference.swiglu_linear; quantised where `to` is an FP8 matrix."""
    gate_tf, up_tf = linears(x_tc, (gate, up), (gate_bias_f, up_bias_f))
    return gpu_rows.swiglu(gate_tf, up_tf, _format(to))


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank,
    shared: tuple[Packed, Packed, Packed] | None,
    onto_tc: Tensor,
    limit: float | None = None,
) -> Tensor:
    """As w8a8.experts."""
    tile = grouped_tile(experts_tk.numel(), bank.count)
    places = gpu_moe.slots(experts_tk, bank.count, tile.rows)
    x = _quantised(x_tc, bank.ue8m0) if bank.fp8 else F.pad(x_tc, (0, bank.c - x_tc.shape[1]))
    both_s2f = bank.product(x, places.pair_s, experts_tk.shape[1], bank.gate_up, places.expert_b, tile)
    gate_sf, up_sf = _limited(both_s2f.chunk(2, dim=1), limit)
    hidden = gpu_rows.swiglu(gate_sf, up_sf, _format(bank), places.pair_s)
    y_sc = bank.product(hidden, None, 1, bank.down, places.expert_b, tile)
    gpu_moe.combine(y_sc, places.slot_p, weights_tk, onto_tc)
    if shared is not None:
        gate, up, down = shared
        gate_tf, up_tf = _limited(linears(x_tc, (gate, up), (None, None)), limit)
        linear(gpu_rows.swiglu(gate_tf, up_tf, _format(down)), down, None, onto_tc)
    return onto_tc


def _limited(gate_and_up: Sequence[Tensor], limit: float | None) -> tuple[Tensor, Tensor]:
    """As reference.limited, in place."""
    gate_tf, up_tf = gate_and_up
    return (gate_tf, up_tf) if limit is None else (gate_tf.clamp_(max=limit), up_tf.clamp_(-limit, limit))


def route(
    logits_tx: Tensor,
    bias_x: Tensor | None,
    scoring: Scoring,
    group_by: GroupBy,
    groups: int,
    groups_kept: int,
    per_token: int,
    normalise: bool,
    scale: float,
    given_tk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As reference.route; what the kernel does not compute is the reference."""
    how = (scoring, group_by, groups, groups_kept, per_token, normalise, scale)
    if scoring == "sqrtsoftplus" or given_tk is not None:
        return reference.route(logits_tx, bias_x, *how, given_tk)
    return gpu_moe.route(logits_tx, bias_x, *how)


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    """As w8a8.paged_write."""
    if pool.dtype != torch.uint8:
        reference.paged_write(pool, page_t, offset_t, x_tkd)
        return
    latent = w8a8.latent_width(x_tkd.shape[2], pool.shape[3])
    gpu_attention.write_fp8(pool, page_t, offset_t, x_tkd[:, 0], latent)


_composed = partial(reference.write_latents, rms_norm=rms_norm, rope=rope, paged_write=paged_write)


def write_latents(
    pool: Tensor, page_t: Tensor, offset_t: Tensor, x_td: Tensor, norm_c: Tensor, eps: float, cos_tr: Tensor,
    sin_tr: Tensor, interleaved: bool,
) -> None:  # fmt: skip
    """As reference.write_latents."""
    write = _composed if pool.dtype == torch.uint8 else gpu_attention.write_latents
    write(pool, page_t, offset_t, x_td, norm_c, eps, cos_tr, sin_tr, interleaved)


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    """As w8a8.decode_mla."""
    return gpu_attention.decode_mla(q_bhd, pool, table_bp, length_b, scale, e)


def prefill_gqa(q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float) -> Tensor:
    """As reference.prefill_gqa, by torch's attention."""
    k_kld, v_kle = (reference_attention.paged_gather(pool, table_p[None])[0, :, :length] for pool in (k_pool, v_pool))
    return _attend(q_thd, k_kld, v_kle, scale)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k_hnc: Tensor, expand_v_hec: Tensor, scale: float
) -> Tensor:
    """As w8a8.prefill_mla, by torch's attention."""
    h, n, latent = expand_k_hnc.shape
    row_lw = reference_attention.paged_gather(pool, table_p[None])[0, 0, :length]
    row_ld = dense_rows(row_lw, latent, q_thd.shape[2] - n, q_thd.dtype)
    c_lc, kr_lr = row_ld.tensor_split((latent,), dim=-1)
    k_hld = torch.cat((torch.matmul(c_lc, expand_k_hnc.transpose(1, 2)), kr_lr.expand(h, -1, -1)), dim=-1)
    return _attend(q_thd, k_hld, torch.matmul(c_lc, expand_v_hec.transpose(1, 2)), scale)


def _attend(q_thd: Tensor, k_kld: Tensor, v_kle: Tensor, scale: float) -> Tensor:
    """As reference_attention.attend_causal."""
    t, length = len(q_thd), k_kld.shape[1]
    if q_thd.shape[2] > _FLASH_WIDTH:  # the kernel that takes these takes no grouped heads
        group = q_thd.shape[1] // k_kld.shape[0]
        k_kld, v_kle = (x.repeat_interleave(group, 0) for x in (k_kld, v_kle))
    out_1hte = F.scaled_dot_product_attention(
        q_thd.transpose(0, 1)[None],
        k_kld[None],
        v_kle[None],
        attn_mask=None if t == length else causal_lower_right(t, length),
        is_causal=t == length,
        scale=scale,
        enable_gqa=q_thd.shape[1] != k_kld.shape[0],
    )
    return out_1hte[0].transpose(0, 1)
