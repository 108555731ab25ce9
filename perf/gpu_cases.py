"""What perf/gpu.py checks and times: each GPU kernel at given sizes, with its definition, its peers, and what it moves.

A case is built from sizes alone, so that the sizes that are checked against the definition and those that are timed run
through the same lines.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.kernels import (
    gpu,
    gpu_attention,
    gpu_draw,
    gpu_gemm,
    gpu_moe,
    gpu_rows,
    reference,
    reference_attention,
    w8a8,
)
from distill.engine.kernels.four_bit import INT4_VALUES, FourBit
from distill.engine.kernels.gpu_tiles import grouped_tile, linear_tile
from distill.engine.kernels.stored import Fp8

BFLOAT16, FLOAT32 = 1e-2, 1e-3  # relative errors by norm that are allowed


@dataclass
class Case:
    """bytes: read and written, at least. flops: at the tensor cores' rate for `fp8` or bfloat16. peers: name → the same
    by somebody else, or a reason why not."""

    kernel: str
    shape: str
    ours: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    allowed: float
    bytes: float
    flops: float = 0
    fp8: bool = False
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=gpu.device(), dtype=torch.float32 if gpu.device().type == "cpu" else dtype).to(
        dtype
    )


def random_fp8(n: int, c: int) -> Fp8:
    codes = random(n, c).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-c // 128), device=codes.device) * c**-0.5 / 100 + 1e-5
    return Fp8(codes, scale)


def dense(made: w8a8.Quantised) -> Tensor:
    return (made.codes.float().unflatten(1, (-1, 128)) * made.scale[..., None]).flatten(1)


def rows_cases(t: int, c: int, timed: bool) -> Iterator[Case]:
    x, weight, both = random(t, c), random(c), random(t, 2 * c)
    readable = (lambda made: made.codes) if timed else dense
    shape, out = f"{t} × {c}", t * c + t * c // 32
    for ue8m0 in (False, True):
        yield Case(
            "quantise" + " ue8m0" * ue8m0,
            shape,
            lambda ue8m0=ue8m0: readable(gpu_rows.quantise(x, ue8m0)),
            lambda ue8m0=ue8m0: dense(w8a8.quantise(x, ue8m0)),
            FLOAT32,
            2 * t * c + out,
        )
    yield Case(
        "rms_norm + quantise",
        shape,
        lambda: gpu_rows.rms_norm(x, weight, 1e-6, False)[0],
        lambda: reference.rms_norm(x.float(), weight.float(), 1e-6),
        BFLOAT16,
        4 * t * c + out,
    )
    gate, up = both.chunk(2, dim=1)
    yield Case(
        "silu·mul + quantise",
        shape,
        lambda: readable(quantised(gpu_rows.swiglu(gate, up, False))),
        lambda: dense(w8a8.quantise((F.silu(gate.float()) * up.float()).bfloat16())),
        BFLOAT16,
        4 * t * c + out,
    )


def quantised(made: Any) -> w8a8.Quantised:
    assert isinstance(made, w8a8.Quantised)
    return made


def linear_case(m: int, n: int, k: int) -> Case:
    weight, x = w8a8.fp8_matrix(random_fp8(n, k)), gpu_rows.quantise(random(m, k))
    plain = random(n, k)
    activations = random(m, k)
    tile = linear_tile(m, n, k // 128)
    by_torch, by_triton = replace(tile, by="torch"), replace(tile, by="triton")
    return Case(
        "linear",
        f"{m} × {k} · {n}" + (" (torch)" if tile.by == "torch" else f" ({tile.rows}×{tile.columns}×{tile.parts})"),
        lambda: gpu_gemm.linear(x, weight),
        lambda: w8a8.product(x, weight),
        BFLOAT16,
        m * k + n * k + 2 * m * n,
        2 * m * n * k,
        fp8=True,
        peers={
            "our kernel": lambda: gpu_gemm.linear(x, weight, tile=by_triton),
            "scaled_mm": lambda: gpu_gemm.linear(x, weight, tile=by_torch),
            "bfloat16": lambda: activations @ plain.T,
        },
    )


def random_int4(n: int, c: int) -> FourBit:
    codes = torch.randint(256, (n, c // 2), device=gpu.device()).to(torch.uint8)
    return FourBit(codes, random(n, c // 32).abs() * c**-0.5 / 4, INT4_VALUES)


def grouped_case(t: int, experts: int, per_token: int, c: int, f: int, int4: bool = False) -> Case:
    """The experts of a layer, from the router's choice to the sum; the limit counts those experts that were chosen.
    int4: with a scale for 32 columns (Kimi K2-Thinking's) instead of FP8."""
    make = random_int4 if int4 else random_fp8
    expert = tuple(make(*shape) for shape in ((f, c), (f, c), (c, f)))
    bank, defined = gpu.expert_bank(experts, torch.bfloat16, expert), w8a8.expert_bank(experts, torch.bfloat16)
    for _ in range(experts):
        bank.lend(expert)  # type: ignore[arg-type]
        defined.lend(expert)  # type: ignore[arg-type]
    bank.settle()
    x, logits = random(t, c), random(t, experts, dtype=torch.float32)
    chosen, weights = gpu_moe.route(logits, None, "sigmoid", "best", 1, 1, per_token, True, 2.5)
    touched = len(chosen.unique())
    pairs, tile = t * per_token, grouped_tile(t * per_token, experts)

    def expected() -> Tensor:
        defined.settle()
        return w8a8.experts(x, chosen, weights, defined, None, torch.zeros_like(x))

    return Case(
        "experts",
        f"{t} tokens, {touched} of {experts} × {c}·{f} ({'int4, ' if int4 else ''}{tile.rows}×{tile.columns})",
        lambda: gpu.experts(x, chosen, weights, bank, None, torch.zeros_like(x)),
        expected,
        BFLOAT16,
        touched * 3 * c * f * (9 if int4 else 16) // 16 + pairs * (c + 4 * f + 2 * f + 4 * c),
        6 * pairs * c * f,
        fp8=not int4,
    )


def _pages(b: int, length: int, page: int) -> tuple[Tensor, Tensor, int]:
    per = -(-length // page)
    table = torch.randperm(b * per, device=gpu.device()).view(b, per).int()
    return table, torch.full((b,), length, device=gpu.device()), b * per


def mla_case(b: int, heads: int, length: int, latent: int, rope: int, fp8: bool = False, page: int = 64) -> Case:
    table, lengths, pages = _pages(b, length, page)
    pool = random(pages, 1, page, latent + rope)
    if fp8:
        rows = [w8a8.fp8_rows(part, latent) for part in pool.flatten(0, 2).split(1 << 16)]
        pool = torch.cat(rows).view(pages, 1, page, -1)
    q, scale = random(b, heads, latent + rope), (latent + rope) ** -0.5

    def expected() -> Tensor:
        rows = w8a8.dense_rows(pool, latent, rope, torch.float32).float()
        return reference.decode_mla(q.float(), rows, table, lengths, scale, latent)

    return Case(
        "mla decode" + " fp8 cache" * fp8,
        f"{b} × {length}, {heads} heads",
        lambda: gpu.decode_mla(q, pool, table, lengths, scale, latent),
        expected,
        BFLOAT16,
        b * length * pool.shape[3] * pool.itemsize,
        2 * b * heads * length * (2 * latent + rope),
    )


def gqa_case(b: int, heads: int, shared: int, length: int, d: int, page: int = 64) -> Case:
    table, lengths, pages = _pages(b, length, page)
    k, v = random(pages, shared, page, d), random(pages, shared, page, d)
    q, scale = random(b, heads, d), d**-0.5
    whole = q[:, :, None], reference_attention.paged_gather(k, table), reference_attention.paged_gather(v, table)
    return Case(
        "gqa decode",
        f"{b} × {length}, {heads}/{shared} heads",
        lambda: gpu_attention.decode_gqa(q, k, v, table, lengths, scale),
        lambda: reference.decode_gqa(q.float(), k.float(), v.float(), table, lengths, scale),
        BFLOAT16,
        4 * b * length * shared * d,
        4 * b * heads * length * d,
        peers={"sdpa": lambda: F.scaled_dot_product_attention(*whole, scale=scale, enable_gqa=True)},
    )


def index_case(t: int, heads: int, d: int, length: int, page: int = 64) -> Case:
    table, _, pages = _pages(1, length, page)
    pool, q, weight = random(pages, 1, page, d), random(t, heads, d), random(t, heads, dtype=torch.float32)
    return Case(
        "indexer",
        f"{t} of {length}, {heads} heads",
        lambda: gpu_attention.index_scores(q, weight, pool, table[0], length).nan_to_num(neginf=0),
        lambda: reference.index_scores(q.float(), weight, pool.float(), table[0], length).nan_to_num(neginf=0),
        BFLOAT16,
        2 * length * d + 4 * t * length,
        2 * t * heads * length * d,
    )


def draw_case(b: int, vocab: int) -> Case:
    device = gpu.device()
    logits = random(b, vocab, dtype=torch.float32) * 3
    uniform = torch.rand(b, dtype=torch.float64, device=device)
    row, top_k = torch.arange(b, device=device), torch.zeros(b, dtype=torch.int64, device=device)
    warm, top_p = torch.full((b,), 0.6, device=device), torch.full((b,), 0.95, dtype=torch.float64, device=device)
    arguments = logits, row, uniform, warm, top_k, top_p
    return Case(
        "draw",
        f"{b} × {vocab}, top p 0.95",
        lambda: gpu_draw.draw(*arguments)[1],
        lambda: reference.draw(*arguments)[1],
        FLOAT32,
        4 * b * vocab,
        peers={"with a sort": lambda: logits.sort(-1, descending=True)},
    )


def small() -> Iterator[Callable[[], Case]]:
    """Sizes to check: one row, few, more than a tile; partial blocks."""
    for m in (1, 7, 129):
        yield lambda m=m: linear_case(m, 576, 512)
        yield lambda m=m: grouped_case(m, 8, 2, 256, 128)
        yield lambda m=m: grouped_case(m, 8, 2, 256, 128, int4=True)
    yield lambda: linear_case(300, 1408, 2048)
    yield lambda: linear_case(513, 2048, 512)  # by torch, and not a multiple of four
    yield lambda: mla_case(3, 16, 200, 512, 64)
    yield lambda: mla_case(2, 128, 130, 512, 64)
    yield lambda: mla_case(2, 16, 130, 512, 64, fp8=True)
    yield lambda: mla_case(2, 16, 70, 512, 64, page=1)
    yield lambda: gqa_case(3, 32, 8, 200, 128)
    yield lambda: index_case(5, 64, 128, 150)
    yield lambda: draw_case(4, 3000)


def published() -> Iterator[Callable[[], Case]]:
    """DeepSeek-V3's shapes (and heads of its tensor-parallel eighth, and those of a dense student)."""
    shapes = ((576, 7168), (1536, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168))
    for n, k in shapes:
        for m in (1, 16, 64, 256, 1024, 4096, 16384):
            if m <= 4096 or n >= 4096:
                yield lambda m=m, n=n, k=k: linear_case(m, n, k)
    for fp8 in (False, True):
        for heads in (16, 128):
            yield lambda heads=heads, fp8=fp8: mla_case(64, heads, 8192, 512, 64, fp8)
    yield lambda: mla_case(64, 128, 2048, 512, 64, page=1)
    yield lambda: gqa_case(64, 32, 8, 8192, 128)
    yield lambda: index_case(64, 64, 128, 32768)
    yield lambda: draw_case(128, 129280)


def published_experts() -> Iterator[Callable[[], Case]]:
    """A layer's experts: 11 GB each, apart so that not several of them are built side by side."""
    for t in (1, 32, 128, 256, 4096):
        yield lambda t=t: grouped_case(t, 256, 8, 7168, 2048)
        yield lambda t=t: grouped_case(t, 256, 8, 7168, 2048, int4=True)
