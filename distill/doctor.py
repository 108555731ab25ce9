"""`distill doctor`: this machine, the kernels that run here, and the decoding speed to expect of each teacher.

The forecast is arithmetic on two measurements and the card. A step over b sequences reads every weight that at least
one of them needs and multiplies by the weights that each needs:

    bytes      = size of the weights · (1 - (1 - active/total)^b)
    operations = 2 · active · b

It takes as long as the slower of the two, divided by the share of these limits that the engine reaches. Experts that do
not fit into memory are read from the disk in every step; a dense model has none, so all of it has to fit.

On a CPU the rate of products is that of the engine's own kernels and not torch's: on processors with AMX torch
multiplies bfloat16 ten times as fast as kernels that do not use it, and a forecast from torch's rate promises that.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from distill import __version__, catalog
from distill.backends.device import device_type
from distill.console import bytes_text, say, table
from distill.grading.sandbox import levels as sandbox_levels
from distill.hardware import Machine, disk_rate, fastest, gpu_memory, memory_bandwidth, product_rate, this_machine
from distill.model_families import has_experts, published_bytes
from distill.recipe import TeacherCard

HOST_LINK = 25e9  # bytes per second from host memory to a GPU, assumed (PCIe 4.0 × 16)
REACHED = 0.6  # share of the limits, from perf/engine.json: 58 % (64 sequences) to 76 % (one); on a GPU: an assumption
USABLE = 0.9  # share of the available memory that weights may take; the rest is for cache and activations
ASSUMED_DISK = 1e9  # bytes per second, where no weights are on this machine to measure with
BATCHES = (1, 8, 64)
SMALL = 1e8  # parameters; below, calls take most of the time, and neither limit matters
PACKAGES = ("torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class Limits:
    """Limits of a device. bandwidth: bytes per second; products: operations per second; memory: bytes for weights;
    disk: bytes per second of the weights that do not fit and stay `elsewhere`."""

    bandwidth: float
    products: float
    disk: float
    memory: float
    elsewhere: str = "on disk"


def tokens_per_second(size: float, total: float, active: float, batch: int, limits: Limits) -> float:
    """Forecast of decoding `batch` sequences. size: bytes of the weights; total, active: parameters."""
    touched = size * (1 - (1 - active / total) ** batch)
    seconds = max(touched / limits.bandwidth, 2 * active * batch / limits.products) / REACHED
    elsewhere = max(0.0, 1 - limits.memory / size)  # share of the weights that has to come from the disk
    return batch / max(seconds, touched * elsewhere / limits.disk)


def doctor(teacher: str | None = None) -> None:
    """Print machine, software and forecasts. teacher: a forecast of that one only. Errors: UserError for an unknown
    name."""
    names = [teacher] if teacher else list(catalog.entries("teacher"))
    cards = [catalog.load_teacher(name) for name in names]
    machine = this_machine()
    _show_machine(machine)
    _show_software()
    files = [_weights_file(name) for name in names]
    file = next((path for path in files if path is not None and path.stat().st_size >= 1 << 28), None)
    limits = _limits(machine, file)
    columns = ("teacher", "weights", *(f"×{batch}" for batch in BATCHES), "where")
    rows = [_row(card, path, limits, machine) for card, path in zip(cards, files, strict=True)]
    table("Expected tokens per second, decoding 1, 8 and 64 sequences", columns, rows)
    if any("on disk" in row[-1] for row in rows):
        how = "measured" if file else "assumed, as no teacher's weights are on this machine to measure with"
        say(f"Disk: {limits.disk / 1e9:.1f} GB/s, {how}.")
        say("Weights on disk are read once per step: raise generate.max_batch, and set engine.memory_budget.")


def _limits(machine: Machine, file: Path | None) -> Limits:
    """The limits of the device that the engine would use."""
    device = device_type("auto")
    say("measuring memory and products …")
    bandwidth, products = memory_bandwidth(device=device), product_rate(device=device)
    say(f"memory is read at {bandwidth / 1e9:,.1f} GB/s, bfloat16 multiplied at {products / 1e9:,.0f} GFLOP/s by torch")
    if device == "cpu":
        own = kernel_rate()
        say(f"the engine's kernels multiply at {own / 1e9:,.0f} GFLOP/s, which the forecast is made with")
        return Limits(bandwidth, own, disk_rate(file) if file else ASSUMED_DISK, USABLE * machine.available)
    return Limits(bandwidth, 2 * products, HOST_LINK, USABLE * gpu_memory(), "in host memory")  # FP8: twice the rate


def kernel_rate(rows: int = BATCHES[-1], size: int = 2048) -> float:
    """Operations per second of the engine's own product [rows, size] × [size, size] with bfloat16 weights on this CPU;
    the fastest of three."""
    import torch

    from distill.engine.kernels import column_for, ops_for
    from distill.engine.kernels.stored import Plain

    ops = ops_for(column_for("cpu"))
    weight = ops.pack(Plain(torch.ones(size, size, dtype=torch.bfloat16)), torch.float32)
    x_tc = torch.ones(rows, size)
    return 2 * rows * size * size / fastest(lambda: ops.linear(x_tc, weight))


def _show_machine(machine: Machine) -> None:
    import torch

    rows = [
        ("processor", machine.processor),
        ("cores", f"{machine.cores}, of which torch uses {torch.get_num_threads()}"),
        ("memory", f"{machine.memory / 2**30:.1f} GiB, {machine.available / 2**30:.1f} free"),
        ("disk", f"{machine.disk / 1e9:,.0f} GB free in this directory"),
        ("GPU", "; ".join(machine.gpus) or "none; the local engine runs on the processor"),
    ]
    table("", ("this machine", ""), rows, text_columns=2)


def _show_software() -> None:
    from distill.engine.kernels import column_for, cpu, describe
    from distill.train.student import float8

    rows = [("distill", f"{__version__}, Python {platform.python_version()}")]
    rows += [(package, version(package)) for package in PACKAGES]
    rows.append(("engine", describe(column_for(device_type("auto")))))
    if why := cpu.why_missing():
        rows.append(("kernels", f"{why}. Without them the engine is several times slower and needs more memory"))
    else:
        rows.append(("kernels", f"in use: {cpu.instruction_set()}; here: {', '.join(cpu.instruction_sets())}"))
    rows.append(("float8", float8.describe()))
    table("", ("software", ""), [*rows, *sandbox_levels.describe()], text_columns=2)


def _weights_file(teacher: str) -> Path | None:
    """The largest weight file of a teacher; None where its weights are not on this machine."""
    directory = catalog.local_weights("teacher", teacher)
    files = sorted(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size) if directory else []
    return files[-1] if files else None


def _row(card: TeacherCard, file: Path | None, limits: Limits, machine: Machine) -> tuple[str, ...]:
    if card.weights is None:
        return (card.name, *["–"] * (1 + len(BATCHES)), "behind a server only")
    total, active = card.parameters * 1e9, card.active_parameters * 1e9
    size = total * published_bytes(card.family)
    where = "in memory" if size <= limits.memory else f"{1 - limits.memory / size:.0%} {limits.elsewhere}"
    if size > limits.memory and not has_experts(card.family):
        where = "too large for memory"
    elif size > limits.memory and file is None and size > machine.disk:
        where = "too large for the disk"
    if total < SMALL or where.startswith("too large"):
        return (card.name, bytes_text(size), *["–"] * len(BATCHES), where)
    rates = (tokens_per_second(size, total, active, batch, limits) for batch in BATCHES)
    return (card.name, bytes_text(size), *(f"{rate:,.2g}" if rate < 10 else f"{rate:,.0f}" for rate in rates), where)
