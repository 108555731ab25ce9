"""Attention over paged caches: grouped-query (GQA), and DeepSeek's latent form (MLA) in its two shapes.

A step is one flat batch of tokens: first the rows that decode, then the chunks of prompts. Projections run over all of
it at once; only the attention core tells the two apart.

MLA caches per token the normalised latent c (512 numbers in V3) and the rotated key part that all heads share (64). It
has two forms, equal up to rounding:
  expanded (prompts): kv_b_proj turns the latents into keys and values per head; fewer multiplications when many
    queries share the context;
  absorbed (what is generated): kv_b_proj is moved to the query and the output, q' = q_nope·W_UK and o = (P·c)·W_UV, so
    that the latents are read as they lie in the cache, once for all heads (DeepSeek-V2, arXiv:2405.04434, section
    2.1.2).

Legend: t tokens of the step, b decoding sequences, h query heads, k key-value heads, d width of q and k, n and r its
unrotated and rotated parts, e width of values, c latent, l context, p pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine.cache import PagedCache
from distill.engine.kernels import Ops
from distill.engine.spec import LATENT_NORM_EPS, ModelSpec, Rope
from distill.engine.weights import GqaWeights, Linear, MlaWeights


@dataclass(frozen=True)
class Chunk:
    """Tokens `start … end-1` of one sequence, to be computed in this step; those before are cached. Pages cover all."""

    tokens: Sequence[int]
    start: int
    end: int
    pages: Sequence[int]


@dataclass(frozen=True)
class DecodeRows:
    """The first rows of the flat batch: one token each, at the end of a context of length_b tokens."""

    count: int
    table_bp: Tensor
    length_b: Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """Rows `start … end-1` of the flat batch: the last tokens of a context of `length` tokens."""

    start: int
    end: int
    table_p: Tensor
    length: int


@dataclass(frozen=True)
class Batch:
    """One step's input, as tensors. cos and sin are [t, rotated width / 2], float32."""

    ids_t: Tensor
    page_t: Tensor
    offset_t: Tensor
    cos_tr: Tensor
    sin_tr: Tensor
    decode: DecodeRows | None
    prefill: tuple[PrefillChunk, ...]


def build_batch(
    decode: Sequence[Chunk], prefill: Sequence[Chunk], page_size: int, rope: Rope, device: torch.device
) -> Batch:
    """Lay chunks out as one flat batch: `decode` (one token each), then `prefill`, in order."""
    ids: list[int] = [chunk.tokens[chunk.start] for chunk in decode]
    positions: list[int] = [chunk.start for chunk in decode]
    pages: list[int] = [chunk.pages[chunk.start // page_size] for chunk in decode]
    prefills = []
    for chunk in prefill:
        row = len(ids)
        ids += chunk.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        pages += [chunk.pages[i // page_size] for i in range(chunk.start, chunk.end)]
        table = torch.tensor(chunk.pages[: -(-chunk.end // page_size)], device=device)
        prefills.append(PrefillChunk(row, len(ids), table, chunk.end))
    position_t = torch.tensor(positions, device=device)
    angle_tr = position_t[:, None].float() * torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
    return Batch(
        ids_t=torch.tensor(ids, device=device),
        page_t=torch.tensor(pages, device=device),
        offset_t=position_t % page_size,
        cos_tr=angle_tr.cos() * rope.magnitude,
        sin_tr=angle_tr.sin() * rope.magnitude,
        decode=_decode_rows(decode, page_size, device) if decode else None,
        prefill=tuple(prefills),
    )


def _decode_rows(decode: Sequence[Chunk], page_size: int, device: torch.device) -> DecodeRows:
    used = [-(-chunk.end // page_size) for chunk in decode]
    widest = max(used)
    table = [[*row.pages[:n], *[0] * (widest - n)] for row, n in zip(decode, used, strict=True)]
    lengths = torch.tensor([row.end for row in decode], device=device)
    return DecodeRows(len(decode), torch.tensor(table, device=device), lengths)


def _linear(ops: Ops, x_tc: Tensor, w: Linear) -> Tensor:
    return ops.linear(x_tc, w.weight, w.bias)


def gqa(spec: ModelSpec, ops: Ops, w: GqaWeights, layer: int, x_tc: Tensor, batch: Batch, cache: PagedCache) -> Tensor:
    """Grouped-query attention (arXiv:2305.13245) of one layer, [t, hidden] → [t, hidden]; writes the cache."""
    q_thd = _linear(ops, x_tc, w.q).unflatten(-1, (spec.num_heads, spec.head_dim))
    k_tkd = _linear(ops, x_tc, w.k).unflatten(-1, (spec.num_kv_heads, spec.head_dim))
    v_tkd = _linear(ops, x_tc, w.v).unflatten(-1, (spec.num_kv_heads, spec.head_dim))
    if w.q_norm is not None and w.k_norm is not None:
        q_thd = ops.rms_norm(q_thd.flatten(0, 1), w.q_norm, spec.norm_eps).view_as(q_thd)
        k_tkd = ops.rms_norm(k_tkd.flatten(0, 1), w.k_norm, spec.norm_eps).view_as(k_tkd)
    q_thd = ops.rope(q_thd, batch.cos_tr, batch.sin_tr, spec.rope.interleaved)
    k_tkd = ops.rope(k_tkd, batch.cos_tr, batch.sin_tr, spec.rope.interleaved)
    cache.write(layer, batch.page_t, batch.offset_t, k_tkd, v_tkd)
    k_pool, v_pool = cache.pools[layer]
    parts = []
    if (rows := batch.decode) is not None:
        q_bhd = q_thd[: rows.count]
        parts.append(ops.decode_gqa(q_bhd, k_pool, v_pool, rows.table_bp, rows.length_b, spec.softmax_scale))
    for chunk in batch.prefill:
        q_chunk = q_thd[chunk.start : chunk.end]
        parts.append(ops.prefill_gqa(q_chunk, k_pool, v_pool, chunk.table_p, chunk.length, spec.softmax_scale))
    return _linear(ops, torch.cat(parts).flatten(1), w.o)


def mla(spec: ModelSpec, ops: Ops, w: MlaWeights, layer: int, x_tc: Tensor, batch: Batch, cache: PagedCache) -> Tensor:
    """Multi-head latent attention of one layer, [t, hidden] → [t, hidden]; writes the cache."""
    dims = spec.mla
    assert dims is not None
    to_q = x_tc if w.q_a is None else ops.rms_norm(_linear(ops, x_tc, w.q_a), w.q_norm, LATENT_NORM_EPS)
    q_thd = _linear(ops, to_q, w.q).unflatten(-1, (spec.num_heads, spec.head_dim))
    qn_thn, qr_thr = q_thd.split((dims.nope_dim, dims.rope_dim), dim=-1)
    qr_thr = ops.rope(qr_thr, batch.cos_tr, batch.sin_tr, spec.rope.interleaved)

    c_tc, kr_tr = _linear(ops, x_tc, w.kv_a).split((dims.kv_lora_rank, dims.rope_dim), dim=-1)
    c_tc = ops.rms_norm(c_tc, w.kv_norm, LATENT_NORM_EPS)
    kr_t1r = ops.rope(kr_tr[:, None], batch.cos_tr, batch.sin_tr, spec.rope.interleaved)
    cache.write(layer, batch.page_t, batch.offset_t, torch.cat((c_tc[:, None], kr_t1r), dim=-1))
    (pool,) = cache.pools[layer]

    parts = []
    if (rows := batch.decode) is not None:
        qc_bhc = ops.per_head(qn_thn[: rows.count], w.absorb_q)
        q_bhd = torch.cat((qc_bhc, qr_thr[: rows.count]), dim=-1)
        out_bhc = ops.decode_mla(q_bhd, pool, rows.table_bp, rows.length_b, spec.softmax_scale, dims.kv_lora_rank)
        parts.append(ops.per_head(out_bhc, w.expand_v))
    if batch.prefill:
        q_thd = torch.cat((qn_thn, qr_thr), dim=-1)
    for chunk in batch.prefill:
        q_chunk = q_thd[chunk.start : chunk.end]
        parts.append(
            ops.prefill_mla(q_chunk, pool, chunk.table_p, chunk.length, w.expand_k, w.expand_v, spec.softmax_scale)
        )
    return _linear(ops, torch.cat(parts).flatten(1), w.o)
