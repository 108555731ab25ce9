"""Attention of rows that decode, on the GPU, over the paged cache: latent (MLA), grouped (GQA), and the sparse indexer.

One query reads a long context, so the context is cut into parts that multiprocessors read side by side; each leaves its
softmax's sum, as a logarithm, and a partial result, and a second kernel joins them in order (FlashDecoding). How many
parts there are depends on shapes only; a part past the end of a context is empty and weighs nothing.

Latent attention reads a cached row once for up to 64 heads, as keys (all of it) and as values (the latent): 242
operations a byte with 128 heads, which is where an H200 has as much of both. Sparse attention is the same kernel: the
rows that the indexer chose are a table of pages of one token, and the kernel's look-ups are the gather.

The FP8 cache holds a token's latent as e4m3 codes with a float32 scale for each 128, then the rotated part in bfloat16:
656 bytes instead of 1152 for 512 + 64, laid out as FlashMLA's (other widths are padded to 16 bytes, up to which the
compiler takes rows to be aligned). Codes become bfloat16 on their way into a product.

Scores, softmax and sums are float32; exponentials are of base 2, the logarithm's factor is in the scale.

Legend: as in reference.py; j parts of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distill.engine.kernels.gpu_rows import quantise_groups
from distill.engine.kernels.gpu_tiles import GQA_STAGES, attention_parts, gqa_keys, mla_tile
from distill.engine.kernels.stored import FP8_BLOCK
from distill.engine.kernels.w8a8 import fp8_row_bytes

_LOG2_E = 1.4426950408889634
_KEYS = 64  # of the indexer, read in one go
_COLUMNS = 512


@triton.jit
def _range_of_part(length, part, PARTS, KEYS: tl.constexpr):
    each = tl.cdiv(tl.cdiv(length, PARTS), KEYS) * KEYS
    return part * each, tl.minimum((part + 1) * each, length)


@triton.jit
def _rows_of(table_ptr, position, end, PAGE: tl.constexpr):
    """The place in the pool, page · PAGE + offset, of each position below `end`."""
    page = tl.load(table_ptr + position // PAGE, mask=position < end, other=0).to(tl.int64)
    return page * PAGE + position % PAGE


@triton.jit
def _scaled(codes, scale, KEYS: tl.constexpr, LATENT: tl.constexpr, dtype):
    """Latents from codes [keys, latent] and their scales [keys, latent / 128]."""
    groups = tl.reshape(codes, (KEYS, LATENT // 128, 128)).to(tl.float32) * scale[:, :, None]
    return tl.reshape(groups, (KEYS, LATENT)).to(dtype)


@triton.jit(do_not_specialize=["table_stride", "PARTS"])
def _mla(
    q_ptr, pool_ptr, rope_ptr, scale_ptr, pool, rope, table_ptr, length_ptr, part_ptr, log_ptr, H, table_stride, scale,
    PARTS, PAGE: tl.constexpr, WIDTH: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    FP8: tl.constexpr, WHOLE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    ALL_LATENT: tl.constexpr, ALL_ROPE: tl.constexpr,
):  # fmt: skip
    """pool_ptr, rope_ptr, scale_ptr: where a cached row's three parts begin, the row being WIDTH bytes. WHOLE: pages
    are of whole blocks of KEYS, and the descriptors `pool` and `rope` read those."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    begin, end = _range_of_part(tl.load(length_ptr + row).to(tl.int32), part, PARTS, KEYS)
    c, r = tl.arange(0, ALL_LATENT), tl.arange(0, ALL_ROPE)
    q_at = q_ptr + (row * H + head[:, None]) * (LATENT + ROPE)
    q_c = tl.load(q_at + c[None, :], mask=(head < H)[:, None] & (c < LATENT)[None, :], other=0.0)
    q_r = tl.load(q_at + LATENT + r[None, :], mask=(head < H)[:, None] & (r < ROPE)[None, :], other=0.0)
    latent_width: tl.constexpr = WIDTH // (pool_ptr.dtype.element_ty.primitive_bitwidth // 8)
    rope_width: tl.constexpr = WIDTH // (rope_ptr.dtype.element_ty.primitive_bitwidth // 8)
    table_ptr += row * table_stride

    top = tl.full((HEADS,), float("-inf"), tl.float32)
    weight, out = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS, ALL_LATENT), tl.float32)
    page = tl.load(table_ptr + begin // PAGE, mask=begin < end, other=0).to(tl.int32)
    for first in range(begin, end, KEYS):
        position = first + tl.arange(0, KEYS)
        seen = position < end
        if WHOLE:
            start = page * PAGE + first % PAGE
            at = start.to(tl.int64) + tl.arange(0, KEYS)
            kv, k_r = pool.load([start, 0]), rope.load([start, 0])
            # Of the next block, so that its rows can be asked for while this one is computed.
            page = tl.load(table_ptr + (first + KEYS) // PAGE, mask=first + KEYS < end, other=0).to(tl.int32)
        else:
            at = _rows_of(table_ptr, position, end, PAGE)
            inside = seen[:, None] & (c < LATENT)[None, :]
            kv = tl.load(pool_ptr + at[:, None] * latent_width + c[None, :], mask=inside, other=0.0)
            inside = seen[:, None] & (r < ROPE)[None, :]
            k_r = tl.load(rope_ptr + at[:, None] * rope_width + r[None, :], mask=inside, other=0.0)
        if FP8:
            scale_at = scale_ptr + at[:, None] * (WIDTH // 4) + tl.arange(0, LATENT // 128)[None, :]
            kv = _scaled(kv, tl.load(scale_at, mask=seen[:, None], other=0.0), KEYS, LATENT, q_c.dtype)
        scores = tl.dot(q_c, kv.T, input_precision="ieee")
        scores = tl.dot(q_r, k_r.T, scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        shrink, p = tl.exp2(top - highest), tl.exp2(scores - highest[:, None])
        weight = weight * shrink + tl.sum(p, axis=1)
        out = tl.dot(p.to(kv.dtype), kv, out * shrink[:, None], input_precision="ieee")
        top = highest
    _store_part(part_ptr, log_ptr, (row * H + head) * PARTS + part, head < H, c, LATENT, top, weight, out)


@triton.jit
def _store_part(part_ptr, log_ptr, at, real, column, WIDTH: tl.constexpr, top, weight, out):
    """An empty part leaves a logarithm of -inf and zeros."""
    empty = weight == 0.0
    out = out / tl.where(empty, 1.0, weight)[:, None]
    tl.store(log_ptr + at, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, weight))), mask=real)
    tl.store(
        part_ptr + at[:, None].to(tl.int64) * WIDTH + column[None, :],
        out,
        mask=real[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["table_stride", "PARTS"])
def _gqa(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, part_ptr, log_ptr, H, K, table_stride, scale,
    PARTS, PAGE: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, ALL_D: tl.constexpr, ALL_E: tl.constexpr,
):  # fmt: skip
    """SHARED: query heads that share one of keys and values; HEADS: their number as a product wants it."""
    row, part, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    within = tl.arange(0, HEADS)
    head, real = group * SHARED + within, within < SHARED
    begin, end = _range_of_part(tl.load(length_ptr + row).to(tl.int32), part, PARTS, KEYS)
    d, e = tl.arange(0, ALL_D), tl.arange(0, ALL_E)
    q_at = q_ptr + (row * H + head[:, None]) * D + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)

    top = tl.full((HEADS,), float("-inf"), tl.float32)
    weight, out = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS, ALL_E), tl.float32)
    for first in range(begin, end, KEYS):
        position = first + tl.arange(0, KEYS)
        seen = position < end
        page = tl.load(table_ptr + row * table_stride + position // PAGE, mask=seen, other=0).to(tl.int64)
        at = ((page * K + group) * PAGE + position % PAGE)[:, None]
        k = tl.load(k_ptr + at * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_ptr + at * E + e[None, :], mask=seen[:, None] & (e < E)[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, k.T, input_precision="ieee") * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        shrink, p = tl.exp2(top - highest), tl.exp2(scores - highest[:, None])
        weight = weight * shrink + tl.sum(p, axis=1)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = highest
    _store_part(part_ptr, log_ptr, (row * H + head) * PARTS + part, real, e, E, top, weight, out)


@triton.jit(do_not_specialize=["PARTS"])
def _join(part_ptr, log_ptr, out_ptr, E, PARTS, ALL_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, ALL_PARTS)
    logs = tl.load(log_ptr + at * PARTS + part, mask=part < PARTS, other=float("-inf"))
    top = tl.max(logs, axis=0)
    total = tl.sum(tl.exp2(logs - top), axis=0)
    out = tl.zeros((BLOCK,), tl.float32)
    for j in range(PARTS):
        weight = tl.exp2(tl.load(log_ptr + at * PARTS + j) - top) / total
        out += weight * tl.load(part_ptr + (at * PARTS + j) * E + e, mask=e < E, other=0.0)
    tl.store(out_ptr + at * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def _index(
    q_ptr, weight_ptr, pool_ptr, table_ptr, score_ptr, T, L, H, D,
    PAGE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, position = tl.program_id(0).to(tl.int64), tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    last = L - T + row
    at = _rows_of(table_ptr, position, L, PAGE)
    key = tl.load(pool_ptr + at[:, None] * D + d[None, :], mask=(position < L)[:, None] & (d < D)[None, :], other=0.0)
    q_at = q_ptr + (row * H + h[:, None]) * D + d[None, :]
    q = tl.load(q_at, mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
    weight = tl.load(weight_ptr + row * H + h, mask=h < H, other=0.0)
    products = tl.maximum(tl.dot(key, q.T, input_precision="ieee"), 0.0)
    score = tl.sum(products * weight[None, :], axis=1)
    tl.store(score_ptr + row * L + position, tl.where(position <= last, score, float("-inf")), mask=position < L)


@triton.jit
def _write_fp8(x_ptr, pool_ptr, page_ptr, offset_ptr, x_stride, PAGE, WIDTH: tl.constexpr, LATENT: tl.constexpr,
    ROPE: tl.constexpr, GROUPS: tl.constexpr, ALL_ROPE: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(page_ptr + token).to(tl.int64) * PAGE + tl.load(offset_ptr + token)
    c, group, r = tl.arange(0, GROUPS * 128), tl.arange(0, GROUPS), tl.arange(0, ALL_ROPE)
    x = tl.load(x_ptr + token * x_stride + c, mask=c < LATENT, other=0.0).to(tl.float32)
    codes, scale = quantise_groups(x, False, GROUPS)
    tl.store(pool_ptr + at * WIDTH + c, codes, mask=c < LATENT)
    scale_ptr = pool_ptr.to(tl.pointer_type(tl.float32)) + at * (WIDTH // 4) + LATENT // 4
    tl.store(scale_ptr + group, scale, mask=group * 128 < LATENT)
    rope_ptr = pool_ptr.to(tl.pointer_type(tl.bfloat16)) + (at + 1) * (WIDTH // 2) - ROPE
    rotated = tl.load(x_ptr + token * x_stride + LATENT + r, mask=r < ROPE, other=0.0)
    tl.store(rope_ptr + r, rotated.to(tl.bfloat16), mask=r < ROPE)


@triton.jit
def _write_latents(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, pool_ptr, page_ptr, offset_ptr, x_stride, eps, PAGE, LATENT, R,
    INTERLEAVED: tl.constexpr, ALL_LATENT: tl.constexpr, ALL_R: tl.constexpr,
):  # fmt: skip
    """The arithmetic is that of gpu_rows' norm and rotation."""
    token, c, r = tl.program_id(0).to(tl.int64), tl.arange(0, ALL_LATENT), tl.arange(0, ALL_R)
    at = tl.load(page_ptr + token).to(tl.int64) * PAGE + tl.load(offset_ptr + token)
    x_ptr, pool_ptr = x_ptr + token * x_stride, pool_ptr + at * (LATENT + 2 * R)
    x = tl.load(x_ptr + c, mask=c < LATENT, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < LATENT, other=0.0).to(tl.float32)
    y = (x * tl.rsqrt(tl.sum(x * x, axis=0) / LATENT + eps) * weight).to(x_ptr.dtype.element_ty)
    tl.store(pool_ptr + c, y.to(pool_ptr.dtype.element_ty), mask=c < LATENT)
    cos = tl.load(cos_ptr + token * R + r, mask=r < R, other=0.0)
    sin = tl.load(sin_ptr + token * R + r, mask=r < R, other=0.0)
    first, second = (LATENT + 2 * r, LATENT + 2 * r + 1) if INTERLEAVED else (LATENT + r, LATENT + R + r)
    a = tl.load(x_ptr + first, mask=r < R, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + second, mask=r < R, other=0.0).to(tl.float32)
    kind = x_ptr.dtype.element_ty
    tl.store(pool_ptr + first, (a * cos - b * sin).to(kind).to(pool_ptr.dtype.element_ty), mask=r < R)
    tl.store(pool_ptr + second, (b * cos + a * sin).to(kind).to(pool_ptr.dtype.element_ty), mask=r < R)


def write_latents(
    pool: Tensor, page_t: Tensor, offset_t: Tensor, x_td: Tensor, norm_c: Tensor, eps: float, cos_tr: Tensor,
    sin_tr: Tensor, interleaved: bool,
) -> None:  # fmt: skip
    """As reference.write_latents, in one launch; x is not changed."""
    (t, d), (_, heads, page, width), latent = x_td.shape, pool.shape, len(norm_c)
    assert heads == 1 and width == d and x_td.stride(1) == 1 and pool.is_contiguous() and cos_tr.is_contiguous()
    r = (d - latent) // 2
    if t:
        _write_latents[t,](
            x_td, norm_c, cos_tr, sin_tr, pool, page_t, offset_t, x_td.stride(0), eps, page, latent, r, interleaved,
            triton.next_power_of_2(latent), triton.next_power_of_2(r),
        )  # fmt: skip


def write_fp8(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_td: Tensor, latent: int) -> None:
    """Store tokens' [latent | rotated part] in a pool of bytes [pages, 1, page_size, row's bytes]."""
    (t, d), (_, heads, page, width) = x_td.shape, pool.shape
    assert heads == 1 and latent % FP8_BLOCK == 0 and width == fp8_row_bytes(latent, d - latent) and x_td.stride(1) == 1
    codes = pool.view(torch.float8_e4m3fn)
    groups, rope = triton.next_power_of_2(latent // FP8_BLOCK), d - latent
    _write_fp8[t,](
        x_td, codes, page_t, offset_t, x_td.stride(0), page, width, latent, rope, groups, triton.next_power_of_2(rope)
    )


def decode_mla(
    q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int, longest: int | None = None
) -> Tensor:
    """As reference.decode_mla; `pool` may be one of bytes (`write_fp8`). longest: no context is longer, if known."""
    q_bhd = q_bhd.contiguous()
    (b, h, d), (_, _, page, width), fp8 = q_bhd.shape, pool.shape, pool.dtype == torch.uint8
    assert table_bp.stride(1) == 1 and pool.is_contiguous()
    tile = mla_tile(h, fp8, page)
    parts = attention_parts(b * triton.cdiv(h, tile.rows), longest or table_bp.shape[1] * page, tile.columns)
    part, log = _parts(b, h, parts, e, q_bhd.device)
    if fp8:
        rows = pool.view(-1, width)
        latents, rotated = rows[:, :e].view(torch.float8_e4m3fn), rows[:, width - 2 * (d - e) :].view(torch.bfloat16)
        scales = rows[:, e : e + e // 32].view(torch.float32)
    else:
        rows = pool.view(-1, d)
        latents, rotated, scales = rows[:, :e], rows[:, e:], rows
    # Descriptors take widths that are powers of two, rows at multiples of 16 bytes, and contiguous keys.
    row_bytes, before = width * pool.itemsize, rotated.data_ptr() - pool.data_ptr()
    whole = page % tile.columns == 0 and row_bytes % 16 == before % 16 == 0
    whole = whole and e & (e - 1) == 0 and (d - e) & (d - e - 1) == 0 and d - e >= 16
    described = [
        TensorDescriptor.from_tensor(view, [tile.columns, view.shape[1]]) if whole else view
        for view in (latents, rotated)
    ]
    _mla[b, parts, triton.cdiv(h, tile.rows)](
        q_bhd, latents, rotated, scales, *described, table_bp, length_b, part, log, h, table_bp.stride(0),
        scale * _LOG2_E, parts, page, row_bytes, e, d - e, fp8, whole, tile.rows, tile.columns,
        triton.next_power_of_2(e), max(16, triton.next_power_of_2(d - e)), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _joined(part, log, q_bhd.dtype)


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float,
    longest: int | None = None,
) -> Tensor:  # fmt: skip
    """As reference.decode_gqa."""
    q_bhd = q_bhd.contiguous()
    (b, h, d), (_, k, page, _), e = q_bhd.shape, k_pool.shape, v_pool.shape[3]
    assert table_bp.stride(1) == 1 and k_pool.is_contiguous() and v_pool.is_contiguous()
    all_d, all_e = (max(16, triton.next_power_of_2(width)) for width in (d, e))
    keys = gqa_keys((all_d + all_e) * k_pool.itemsize)
    parts = attention_parts(b * k, longest or table_bp.shape[1] * page, keys)
    part, log = _parts(b, h, parts, e, q_bhd.device)
    _gqa[b, parts, k](
        q_bhd, k_pool, v_pool, table_bp, length_b, part, log, h, k, table_bp.stride(0), scale * _LOG2_E,
        parts, page, h // k, d, e, max(16, triton.next_power_of_2(h // k)), keys, all_d, all_e, num_warps=4,
        num_stages=GQA_STAGES,
    )  # fmt: skip
    return _joined(part, log, q_bhd.dtype)


def _parts(b: int, h: int, parts: int, e: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(b, h, parts, e, device=device), torch.empty(b, h, parts, device=device)


def _joined(part_bhje: Tensor, log_bhj: Tensor, dtype: torch.dtype) -> Tensor:
    b, h, parts, e = part_bhje.shape
    out_bhe = torch.empty(b, h, e, dtype=dtype, device=part_bhje.device)
    columns = min(_COLUMNS, triton.next_power_of_2(e))
    _join[b * h, triton.cdiv(e, columns)](part_bhje, log_bhj, out_bhe, e, parts, triton.next_power_of_2(parts), columns)
    return out_bhe


def index_scores(q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int) -> Tensor:
    """As reference.index_scores."""
    q_thd, weight_th = q_thd.contiguous(), weight_th.contiguous()
    (t, h, d), page = q_thd.shape, pool.shape[2]
    assert pool.is_contiguous() and table_p.is_contiguous()
    score_tl = torch.empty(t, length, device=q_thd.device)
    _index[t, triton.cdiv(length, _KEYS)](
        q_thd, weight_th, pool, table_p, score_tl, t, length, h, d, page,
        max(16, triton.next_power_of_2(h)), max(16, triton.next_power_of_2(d)), _KEYS, num_warps=4,
    )  # fmt: skip
    return score_tl
