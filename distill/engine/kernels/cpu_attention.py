"""The ops of cpu.py that read and write paged caches. Pools are float32 or bfloat16 and contiguous.

Page numbers and lengths are checked by the kernels: IndexError for one that is outside the pool or the table.

Legend: as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import call, threads
from distill.engine.kernels.cpu_packing import Packed, with_rows
from distill.engine.kernels.cpu_structs import DecodeArgs, IndexArgs, PrefillArgs, WriteArgs, address


def paged_write(pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor) -> None:
    """As reference.paged_write, for a contiguous pool of float32 or bfloat16."""
    x_tkd = with_rows(x_tkd)
    t, heads, width = x_tkd.shape
    assert pool.is_contiguous() and pool.shape[1] == heads and pool.shape[3] == width
    call(
        "paged_write",
        WriteArgs(
            pool=address(pool),
            page=address(page_t),
            offset=address(offset_t),
            x=address(x_tkd),
            x_row=x_tkd.stride(0),
            x_head=x_tkd.stride(1),
            pages=len(pool),
            rows=t,
            heads=heads,
            width=width,
            page_size=pool.shape[2],
            wide=pool.dtype == torch.float32,
        ),
    )


def _decode(q: Tensor, k: Tensor, v: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    q = q.contiguous()
    b, h, d = q.shape
    assert table_bp.shape[0] == length_b.shape[0] == b and table_bp.stride(1) == 1 and length_b.is_contiguous()
    out = torch.empty(b, h, e)
    call(
        "decode",
        DecodeArgs(
            q=address(q),
            k=address(k),
            v=address(v),
            table=address(table_bp),
            length=address(length_b),
            out=address(out),
            table_stride=table_bp.stride(0),
            table_width=table_bp.shape[1],
            pages=len(k),
            rows=b,
            heads=h,
            kv_heads=k.shape[1],
            d=d,
            e=e,
            k_width=k.shape[3],
            v_width=v.shape[3],
            page_size=k.shape[2],
            wide=k.dtype == torch.float32,
            threads=threads(),
            scale=scale,
        ),
    )
    return out


def decode_gqa(
    q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float
) -> Tensor:
    """As reference.decode_gqa."""
    return _decode(q_bhd, k_pool, v_pool, table_bp, length_b, scale, v_pool.shape[3])


def decode_mla(q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int) -> Tensor:
    """As reference.decode_mla."""
    return _decode(q_bhd, pool, pool, table_bp, length_b, scale, e)


def prefill_gqa(q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float) -> Tensor:
    """As reference.prefill_gqa."""
    return _prefill(q_thd, k_pool, v_pool, None, None, table_p, length, v_pool.shape[3], scale)


def prefill_mla(
    q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k: Packed, expand_v: Packed, scale: float
) -> Tensor:
    """As reference.prefill_mla."""
    return _prefill(q_thd, pool, None, expand_k, expand_v, table_p, length, expand_v.n, scale)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    expand_k: Packed | None,
    expand_v: Packed | None,
    table_p: Tensor,
    length: int,
    e: int,
    scale: float,
) -> Tensor:
    q = q.contiguous()
    t, h, d = q.shape
    assert table_p.is_contiguous()
    out = torch.empty(t, h, e)
    call(
        "prefill",
        PrefillArgs(
            q=address(q),
            k=address(k),
            v=address(v),
            table=address(table_p),
            uk=None if expand_k is None else expand_k.address,
            uv=None if expand_v is None else expand_v.address,
            out=address(out),
            table_width=table_p.numel(),
            pages=len(k),
            rows=t,
            length=length,
            heads=h,
            kv_heads=k.shape[1],
            d=d,
            e=e,
            k_width=k.shape[3],
            v_width=0 if v is None else v.shape[3],
            page_size=k.shape[2],
            wide=k.dtype == torch.float32,
            threads=threads(),
            scale=scale,
        ),
    )
    return out


def index_scores(q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int) -> Tensor:
    """As reference.index_scores."""
    q_thd, weight_th = q_thd.contiguous(), weight_th.contiguous()
    t, h, d = q_thd.shape
    assert table_p.is_contiguous()
    out_tl = torch.empty(t, length)
    call(
        "index_scores",
        IndexArgs(
            q=address(q_thd),
            weight=address(weight_th),
            keys=address(pool),
            table=address(table_p),
            out=address(out_tl),
            table_width=table_p.numel(),
            pages=len(pool),
            rows=t,
            length=length,
            heads=h,
            d=d,
            page_size=pool.shape[2],
            wide=pool.dtype == torch.float32,
            threads=threads(),
            unused=0,
        ),
    )
    return out_tl
