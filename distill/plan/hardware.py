"""Machines by name: `8xH100`, `1x24GB`, `4x8x80GB` (nodes, GPUs per node, the GPU)."""

import re
from dataclasses import dataclass

from distill.config import did_you_mean
from distill.errors import UserError

# GB of memory, and dense bfloat16 operations per second with float32 accumulation, from the makers' data sheets.
GPUS: dict[str, tuple[float, float]] = {
    "A10": (24, 125e12),
    "RTX3090": (24, 71e12),
    "RTX4090": (24, 165e12),
    "L40S": (48, 362e12),
    "A100-40": (40, 312e12),
    "A100": (80, 312e12),
    "H100": (80, 989e12),
    "H200": (141, 989e12),
    "B200": (180, 2250e12),
}
WITHOUT_FP8 = frozenset({"A10", "RTX3090", "A100-40", "A100"})  # Ampere: compute capability 8.0 and 8.6
ASSUMED = {
    24: "RTX4090",
    40: "A100-40",
    48: "L40S",
    80: "A100",
    141: "H200",
}  # the GPU of a name that gives only a size
NAME = re.compile(r"(?:(?P<nodes>0*[1-9]\d*)x)?(?P<count>0*[1-9]\d*)x(?P<gpu>[\w-]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Hardware:
    """A machine. name: as the user wrote it. memory: bytes. rate: bfloat16 operations per second; both per device."""

    name: str
    devices: int
    gpu: str
    memory: float
    rate: float

    @property
    def has_fp8(self) -> bool:
        """Whether the GPU has FP8 products."""
        return self.gpu not in WITHOUT_FP8


def parse(name: str) -> Hardware:
    """The machine that a name describes. Errors: UserError when it describes none."""
    match = NAME.fullmatch(name.replace("×", "x").replace(" ", ""))
    if not match:
        raise UserError(
            f"hardware {name!r}: expected a name like 8xH100, 1x24GB, or 4x8x80GB for four nodes of eight GPUs"
        )
    gpu, known = match["gpu"], {key.lower(): key for key in GPUS}
    if size := re.fullmatch(r"(\d+)gb?", gpu, re.IGNORECASE):
        if int(size[1]) not in ASSUMED:
            raise UserError(
                f"hardware {name!r}: unknown size; name the GPU, or one of {', '.join(map(str, ASSUMED))} GB"
            )
        gpu = ASSUMED[int(size[1])]
    elif gpu.lower() not in known:
        hint = did_you_mean(gpu, list(GPUS))
        raise UserError(f"hardware {name!r}: unknown GPU {gpu}{hint}; known GPUs: {', '.join(GPUS)}")
    gpu = known[gpu.lower()]
    memory, rate = GPUS[gpu]
    return Hardware(name, int(match["nodes"] or 1) * int(match["count"]), gpu, memory * 1e9, rate)
