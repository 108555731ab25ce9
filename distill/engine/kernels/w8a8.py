"""The ops whose activations are quantised, in plain torch: the definition of what the GPU computes.

DeepSeek's FP8 checkpoints were trained with both sides of a product in e4m3: weights with a scale for each 128×128
block, activations with one for each token and 128 channels (DeepSeek-V3, arXiv:2412.19437, section 3.3.2; V3.1 and
later: scales that are powers of two, `ue8m0`). The sums of 128 products are exact enough in the tensor cores'
accumulators; they are scaled and added up in float32. Matrices that are published in bfloat16 are multiplied as in
reference.py, and so is everything if the compute dtype is float32.

Widths are padded with zeros to whole groups of 128 when a matrix is packed and when activations are quantised, so that
no kernel meets a partial group along the sum.

Legend: as in reference.py; g groups of 128 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.kernels import reference
from distill.engine.kernels.stored import FP8_BLOCK, Fp8, Place, Stored

E4M3_MAX = 448.0
LEAST_AMAX = 1e-4  # of a group, so that zeros have a scale


@dataclass(frozen=True)
class Quantised:
    """codes: float8_e4m3fn [t, g·128]; scale: float32 [t, g], by which codes are multiplied."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Fp8Matrix:
    """A packed FP8 matrix [n, c]: codes [n, g·128], scale [⌈n/128⌉, g]. ue8m0: the scales of what it is multiplied with
    are powers of two. whole: the matrix whose rows these are, with those of others that read the same activations."""

    codes: Tensor
    scale: Tensor
    ue8m0: bool
    whole: Fp8Matrix | None = None

    @property
    def nbytes(self) -> int:
        """The memory that codes and scales take."""
        return self.codes.nbytes + self.scale.nbytes


Packed = Tensor | Fp8Matrix
Activations = Tensor | Quantised


def quantise(x_tc: Tensor, ue8m0: bool = False) -> Quantised:
    """One scale for each row and 128 columns: s = max(amax, 1e-4) / 448, rounded up to a power of two for ue8m0."""
    groups = -(-x_tc.shape[1] // FP8_BLOCK)
    x_tgb = F.pad(x_tc.float(), (0, groups * FP8_BLOCK - x_tc.shape[1])).unflatten(1, (groups, FP8_BLOCK))
    amax_tg = x_tgb.abs().amax(-1).clamp(min=LEAST_AMAX)
    scale_tg = amax_tg / torch.full_like(amax_tg, E4M3_MAX)  # by a number, a GPU multiplies by a rounded reciprocal
    if ue8m0:
        scale_tg = power_of_two_above(scale_tg)
    return Quantised((x_tgb / scale_tg[..., None]).to(torch.float8_e4m3fn).flatten(1), scale_tg)


def power_of_two_above(x: Tensor) -> Tensor:
    """The least power of two that is not below a positive, normal float32: by its bits, hence exactly."""
    return ((x.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def product(x: Quantised, weight: Fp8Matrix) -> Tensor:
    """x · weightᵀ → float32 [t, n]."""
    out_tn = x.scale.new_zeros(len(x.codes), len(weight.codes))
    scale_ng = weight.scale.repeat_interleave(FP8_BLOCK, 0)[: len(weight.codes)]
    for g in range(x.scale.shape[1]):
        at = slice(g * FP8_BLOCK, (g + 1) * FP8_BLOCK)
        sums_tn = x.codes[:, at].float() @ weight.codes[:, at].float().T
        out_tn += sums_tn * x.scale[:, g, None] * scale_ng[None, :, g]
    return out_tn


def pack(weight: Stored, dtype: torch.dtype, place: Place | None = None) -> Packed:
    """As reference.pack; FP8 matrices stay FP8 in bfloat16. Raises Damaged."""
    quantised = weight.for_fp8_products(dtype)
    if quantised is None:
        return reference.pack(weight, dtype, place)
    quantised.check()
    return fp8_matrix(quantised)


def repack(packed: Packed, numbers_nc: Tensor) -> None:
    """As reference.repack."""
    assert isinstance(packed, Tensor)
    reference.repack(packed, numbers_nc)


def fp8_matrix(weight: Fp8) -> Fp8Matrix:
    """Codes padded with zeros to whole groups of 128 columns."""
    padding = -weight.codes.shape[1] % FP8_BLOCK
    codes = weight.codes.contiguous()
    if padding:
        codes = F.pad(codes.view(torch.uint8), (0, padding)).view(torch.float8_e4m3fn)
    return Fp8Matrix(codes, weight.scale.contiguous(), weight.ue8m0)


def linear(x: Activations, weight: Packed, bias_n: Tensor | None = None, onto_tn: Tensor | None = None) -> Tensor:
    """As reference.linear, with x quantised where the weight is FP8 (x may be quantised already)."""
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor)
        return reference.linear(x, weight, bias_n, onto_tn)
    dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
    out_tn = product(quantise(x, weight.ue8m0) if isinstance(x, Tensor) else x, weight)
    if bias_n is not None:
        out_tn += bias_n
    return out_tn.to(dtype) if onto_tn is None else onto_tn.copy_(onto_tn + out_tn)


def linears(x: Activations, weights: Sequence[Packed], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """As reference.linears."""
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def swiglu_linear(
    x_tc: Tensor,
    gate: Packed,
    up: Packed,
    gate_bias_f: Tensor | None = None,
    up_bias_f: Tensor | None = None,
    to: Packed | None = None,
) -> Tensor:
    """As reference.swiglu_linear. to: the matrix that reads the result; kernels may return it quantised for that."""
    gate_tf, up_tf = linear(x_tc, gate, gate_bias_f), linear(x_tc, up, up_bias_f)
    return (F.silu(gate_tf.float()) * up_tf.float()).to(x_tc.dtype)


def fp8_row_bytes(latent: int, rope: int) -> int:
    """Bytes of a token's row in an FP8 cache of latents: codes, float32 scales, the rotated part in bfloat16, and zeros
    between the last two up to a multiple of 16, the width of a GPU's load."""
    return -(-(latent + 4 * (latent // FP8_BLOCK) + 2 * rope) // 16) * 16


def latent_width(width: int, row_bytes: int) -> int:
    """The latent part of `width` numbers per token, from the bytes of a row (`fp8_row_bytes`)."""
    return -(-(2 * width - row_bytes) // 124) * FP8_BLOCK  # 128 of them save 124 bytes, and zeros are fewer than 16


def fp8_rows(x_td: Tensor, latent: int) -> Tensor:
    """[t, latent | rotated part] → bytes [t, row's bytes], as `fp8_row_bytes` lists them. latent: a multiple of 128."""
    made, rope = quantise(x_td[:, :latent]), x_td.shape[1] - latent
    parts = made.codes, made.scale.contiguous(), x_td[:, latent:].to(torch.bfloat16).contiguous()
    codes, scale, rotated = (part.view(torch.uint8) for part in parts)
    padding = fp8_row_bytes(latent, rope) - sum(part.shape[1] for part in (codes, scale, rotated))
    return torch.cat((codes, F.pad(scale, (0, padding)), rotated), dim=1)


def dense_rows(row_lw: Tensor, latent: int, rope: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `fp8_rows`, in `dtype`; rows that are not bytes are returned unchanged."""
    if row_lw.dtype != torch.uint8:
        return row_lw
    groups = latent // FP8_BLOCK
    cuts = latent, latent + 4 * groups, row_lw.shape[-1] - 2 * rope
    codes, scale, _, rotated = (part.contiguous() for part in row_lw.tensor_split(cuts, dim=-1))
    values = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (groups, FP8_BLOCK))
    values = (values * scale.view(torch.float32)[..., None]).flatten(-2)
    return torch.cat((values.to(dtype), rotated.view(torch.bfloat16).to(dtype)), dim=-1)


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    """As reference.paged_write; a pool of bytes is an FP8 cache of latents."""
    if pool.dtype == torch.uint8:
        x_tkd = fp8_rows(x_tkd[:, 0], latent_width(x_tkd.shape[2], pool.shape[3]))[:, None]
    reference.paged_write(pool, page_t, offset_t, x_tkd)


write_latents = partial(reference.write_latents, paged_write=paged_write)


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    """As reference.decode_mla; `pool` may be an FP8 cache of latents."""
    rows = dense_rows(pool, e, q_bhd.shape[2] - e, q_bhd.dtype)
    return reference.decode_mla(q_bhd, rows, table_bp, length_b, scale, e)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k_hnc: Tensor, expand_v_hec: Tensor, scale: float
) -> Tensor:
    """As reference.prefill_mla; `pool` may be an FP8 cache of latents."""
    rows = dense_rows(pool, expand_k_hnc.shape[2], q_thd.shape[2] - expand_k_hnc.shape[1], q_thd.dtype)
    return reference.prefill_mla(q_thd, rows, table_p, length, expand_k_hnc, expand_v_hec, scale)


class ExpertBank(reference.Bank[tuple[Packed, Packed, Packed]]):
    """Experts in FP8 stay FP8: gate and up [f, c] each, down [c, f]."""

    def packed_form(self, gate: Stored, up: Stored, down: Stored) -> tuple[Packed, Packed, Packed]:
        """See reference.Bank."""
        return pack(gate, self._dtype), pack(up, self._dtype), pack(down, self._dtype)


def expert_bank(count: int, dtype: torch.dtype, like: Sequence[Stored] = ()) -> ExpertBank:
    """As reference.expert_bank."""
    return ExpertBank(count, dtype)


def experts(
    x_tc: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    bank: ExpertBank,
    shared: tuple[Packed, Packed, Packed] | None,
    onto_tc: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Each expert's output is rounded to the compute dtype; they are weighted and added up in float32."""
    y_tkc = x_tc.new_zeros(*experts_tk.shape, x_tc.shape[1])
    for expert in range(bank.count):
        t, k = (experts_tk == expert).nonzero(as_tuple=True)
        if len(t):
            gate, up, down = bank.packed[expert]
            y_tkc[t, k] = linear(_limited_swiglu(x_tc[t], gate, up, limit), down)
    out_tc = (y_tkc.float() * weights_tk[..., None]).sum(1)
    if shared is not None:
        out_tc += linear(_limited_swiglu(x_tc, *shared[:2], limit), shared[2])
    return onto_tc.copy_(onto_tc + out_tc)


def _limited_swiglu(x_tc: Tensor, gate: Packed, up: Packed, limit: float | None) -> Tensor:
    gate_tf, up_tf = reference.limited([linear(x_tc, gate), linear(x_tc, up)], limit)
    return (F.silu(gate_tf.float()) * up_tf.float()).to(x_tc.dtype)
