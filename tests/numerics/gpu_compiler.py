"""Compiles every GPU kernel for Hopper, on any machine, and says what each takes: one JSON line a kernel.

The kernels' own callers are called, with tensors that nobody fills; only launching is replaced. So what is compiled is
what a GPU would be given: the same types, alignments, tiles and numbers of warps.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from distill.engine.kernels import gpu, gpu_attention, gpu_draw, gpu_gemm, gpu_moe, gpu_rows, w8a8
from distill.engine.kernels.four_bit import E2M1_VALUES, INT4_VALUES, FourBit
from distill.engine.kernels.stored import Fp8

BFLOAT16 = torch.bfloat16


class Hopper:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
    def launch(*args: Any, **options: Any) -> None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        key = compiled.hash
        if key not in seen:
            seen.add(key)
            print(json.dumps(figures(compiled)), flush=True)

    return launch


def figures(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "LOCAL"))
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    return {
        "kernel": compiled.metadata.name.lstrip("_"),
        "warps": compiled.metadata.num_warps,
        "what": current,
        "registers": registers,
        "spilled": local + stack,
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma" in compiled.asm["ptx"],
        "tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
        "mma": "mma.sync" in compiled.asm["ptx"],
    }


seen: set[str] = set()
current = ""
driver.set_active(Hopper())
jit.KernelInterface.__getitem__ = compile_only


def empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def fp8(n: int, c: int) -> w8a8.Fp8Matrix:
    return w8a8.Fp8Matrix(
        empty(n, c, dtype=torch.float8_e4m3fn), empty(-(-n // 128), c // 128, dtype=torch.float32), False
    )


def four_bit(n: int) -> list[FourBit]:
    """A square matrix of zeros in each of the published forms."""
    codes, ones = torch.zeros(n, n // 2, dtype=torch.uint8), torch.ones(n, n // 16)
    return [
        FourBit(codes, ones[:, : n // 32].bfloat16(), INT4_VALUES),
        FourBit(codes, ones[:, : n // 32].to(torch.float8_e8m0fnu), E2M1_VALUES),
        FourBit(codes, ones.to(torch.float8_e4m3fn), E2M1_VALUES),
    ]


def main() -> None:
    global current
    for ue8m0 in (False, True):
        gpu_rows.quantise(empty(4, 7168), ue8m0)
        gpu_rows.rms_norm(empty(4, 7168), empty(7168), 1e-6, ue8m0)
        gpu_rows.swiglu(*empty(4, 2 * 2048).chunk(2, dim=1), ue8m0)
    gpu_rows.rope(empty(4, 128, 192)[..., 128:], *empty(2, 4, 32, dtype=torch.float32), True)
    for m in (1, 32, 64, 256, 8192):
        current = f"{m} rows"
        x = gpu_rows.quantise(empty(m, 2048))
        for n in (576, 7168):
            gpu_gemm.linear(x, fp8(n, 2048))
        gpu_gemm.linear(x, fp8(7168, 2048), None, empty(m, 7168))
        gpu_gemm.linear(x, fp8(7168, 2048), empty(7168))
    bank = gpu.expert_bank(16, BFLOAT16)
    zeros = {name: Fp8(torch.zeros(256, 256).to(torch.float8_e4m3fn), torch.ones(2, 2)) for name in "gud"}
    for _ in range(16):
        bank.lend((zeros["g"], zeros["u"], zeros["d"]))
    bank.settle()
    for t in (16, 128, 512, 4096):
        current = f"{t} tokens of 16 experts"
        logits = empty(t, 256, dtype=torch.float32)
        gpu_moe.route(logits, empty(256, dtype=torch.float32), "sigmoid", "best two", 8, 4, 8, True, 2.5)
        chosen, weights = torch.zeros(t, 8, dtype=torch.int32), empty(t, 8, dtype=torch.float32)
        gpu.experts(empty(t, 256), chosen, weights, bank, None, empty(t, 256))
    for form in four_bit(256):
        bank = gpu.expert_bank(16, BFLOAT16, (form, form, form))
        for _ in range(16):
            bank.lend((form, form, form))
        bank.settle()
        for t in (16, 128, 4096):
            current = f"{form.name}, {t} tokens of 16 experts"
            chosen, weights = torch.zeros(t, 8, dtype=torch.int32), empty(t, 8, dtype=torch.float32)
            gpu.experts(empty(t, 256), chosen, weights, bank, None, empty(t, 256))
    table, lengths = torch.zeros(4, 512, dtype=torch.int32), torch.ones(4, dtype=torch.int64)
    for heads in (16, 128):
        current = f"{heads} heads"
        q = empty(4, heads, 576)
        gpu_attention.decode_mla(q, empty(512, 1, 64, 576), table, lengths, 0.1, 512)
        gpu_attention.decode_mla(q, empty(512, 1, 64, 656, dtype=torch.uint8), table, lengths, 0.1, 512)
        gpu_attention.decode_mla(q, empty(512, 1, 1, 576), table, lengths, 0.1, 512)
    current = "32/8 heads"
    pools = empty(512, 8, 64, 128), empty(512, 8, 64, 128)
    gpu_attention.decode_gqa(empty(4, 32, 128), *pools, table, lengths, 0.1)
    for width, dtype in ((256, BFLOAT16), (512, BFLOAT16), (512, torch.float32)):
        current = f"heads of {width}, {dtype}"
        pools = empty(512, 1, 64, width, dtype=dtype), empty(512, 1, 64, width, dtype=dtype)
        gpu_attention.decode_gqa(empty(4, 8, width, dtype=dtype), *pools, table, lengths, 0.1)
    of_heads = empty(4, 64, dtype=torch.float32)
    gpu_attention.index_scores(empty(4, 64, 128), of_heads, empty(512, 1, 64, 128), table[0], 300)
    gpu_attention.write_fp8(empty(512, 1, 64, 656, dtype=torch.uint8), lengths, lengths, empty(4, 576), 512)
    angles = empty(2, 4, 32, dtype=torch.float32)
    gpu_attention.write_latents(
        empty(512, 1, 64, 576), lengths, lengths, empty(4, 3648)[:, 3072:], empty(512), 1e-6, *angles, True
    )
    current = "draws"
    uniform = empty(4, dtype=torch.float64)
    gpu_draw.draw(empty(4, 129280, dtype=torch.float32), lengths, uniform, uniform.float(), lengths, uniform)


if __name__ == "__main__":
    sys.exit(main())
