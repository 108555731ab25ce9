"""`distill doctor`: what this machine is, which kernels run here, and how fast a teacher would be.

The estimate of a teacher's speed is arithmetic on two measurements and the card. A step over b sequences reads every
weight that one of them needs and multiplies by those that each needs:

    bytes      = size of the weights · (1 - (1 - active/total)^b)
    operations = 2 · active · b

and takes as long as the slower of the two, divided by the share of the limits that the engine was measured to reach.
Experts that do not fit into memory come from the disk in every step; dense models have none, and have to fit.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from distill import __version__, catalog
from distill.backends.device import device_type
from distill.console import say, table
from distill.engine.families import FAMILIES
from distill.hardware import Machine, disk_rate, gpu_memory, memory_bandwidth, product_rate, this_machine
from distill.recipe import TeacherCard

HOST_LINK = 25e9  # bytes a second from the host's memory to a GPU, assumed (PCIe 4.0 × 16)
REACHED = 0.6  # share of the limits, from perf/engine.json: 58 % (64 sequences) to 76 % (one); on a GPU: a guess
USABLE = 0.9  # share of the available memory that weights may take; the rest is for cache and activations
ASSUMED_DISK = 1e9  # bytes a second, where no weights lie on this machine to try it with
BATCHES = (1, 8, 64)
SMALL = 1e8  # parameters; below, making calls takes the time, and neither limit says anything
PACKAGES = ("torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class Limits:
    """bandwidth: bytes a second; products: operations a second; memory: bytes for weights; disk: bytes a second of what
    does not fit there, and lies `elsewhere`."""

    bandwidth: float
    products: float
    disk: float
    memory: float
    elsewhere: str = "on disk"


def tokens_per_second(size: float, total: float, active: float, batch: int, limits: Limits) -> float:
    """What to expect of decoding `batch` sequences. size: bytes of the weights; total, active: parameters."""
    touched = size * (1 - (1 - active / total) ** batch)
    seconds = max(touched / limits.bandwidth, 2 * active * batch / limits.products) / REACHED
    elsewhere = max(0.0, 1 - limits.memory / size)  # share of the weights that has to come from the disk
    return batch / max(seconds, touched * elsewhere / limits.disk)


def doctor(teacher: str | None = None) -> None:
    """Print it all. teacher: only that one's speed. UserError for a name that is not in the catalog."""
    names = [teacher] if teacher else list(catalog.entries("teacher"))
    cards = [catalog.load_teacher(name) for name in names]
    machine = this_machine()
    _show_machine(machine)
    _show_software()
    found = [_weights_file(name) for name in names]
    file = next((path for path in found if path is not None and path.stat().st_size >= 1 << 28), None)
    limits = _limits(machine, file)
    columns = ("teacher", "weights", *(f"×{batch}" for batch in BATCHES), "they are")
    rows = [_row(card, path, limits, machine) for card, path in zip(cards, found, strict=True)]
    table("Tokens a second to expect, decoding 1, 8 and 64 sequences", columns, rows)
    if any("on disk" in row[-1] for row in rows):
        how = "as measured" if file else "assumed: there is no large file to try"
        say(f"The disk: {limits.disk / 1e9:.1f} GB/s, {how}.")
        say("What is on disk is read once a step: raise generate.max_batch, and set engine.memory_budget.")


def _limits(machine: Machine, file: Path | None) -> Limits:
    """Of the device that the engine would take."""
    device = device_type("auto")
    say("measuring memory and products …")
    bandwidth, products = memory_bandwidth(device=device), product_rate(device=device)
    say(f"memory is read at {bandwidth / 1e9:,.1f} GB/s, bfloat16 multiplied at {products / 1e9:,.0f} GFLOP/s")
    if device == "cpu":
        return Limits(bandwidth, products, disk_rate(file) if file else ASSUMED_DISK, USABLE * machine.available)
    return Limits(bandwidth, 2 * products, HOST_LINK, USABLE * gpu_memory(), "in host memory")  # FP8: twice the rate


def _show_machine(machine: Machine) -> None:
    import torch

    rows = [
        ("processor", machine.processor),
        ("cores", f"{machine.cores}, of which torch uses {torch.get_num_threads()}"),
        ("memory", f"{machine.memory / 2**30:.1f} GiB, {machine.available / 2**30:.1f} free"),
        ("disk here", f"{machine.disk / 1e9:,.0f} GB free"),
        ("GPU", "; ".join(machine.gpus) or "none; the local engine computes on the processor"),
    ]
    table("", ("this machine", ""), rows, text_columns=2)


def _show_software() -> None:
    from distill.engine.kernels import column_for, cpu, describe

    rows = [("distill", f"{__version__}, Python {platform.python_version()}")]
    rows += [(package, version(package)) for package in PACKAGES]
    rows.append(("engine", describe(column_for(device_type("auto")))))
    if why := cpu.why_missing():
        rows.append(("kernels", f"{why}. Without them the engine is several times slower and takes more memory"))
    else:
        rows.append(("kernels", f"in use: {cpu.instruction_set()}; here: {', '.join(cpu.instruction_sets())}"))
    table("", ("software", ""), rows, text_columns=2)


def _weights_file(teacher: str) -> Path | None:
    """The largest file of a teacher whose weights lie on this machine."""
    directory = catalog.local_weights("teacher", teacher)
    files = sorted(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size) if directory else []
    return files[-1] if files else None


def _row(card: TeacherCard, file: Path | None, limits: Limits, machine: Machine) -> tuple[str, ...]:
    total, active = card.parameters * 1e9, card.active_parameters * 1e9
    size = total * FAMILIES[card.family].published_bytes
    where = "in memory" if size <= limits.memory else f"{1 - limits.memory / size:.0%} {limits.elsewhere}"
    if size > limits.memory and not FAMILIES[card.family].has_experts:
        where = "too large for memory"
    elif size > limits.memory and file is None and size > machine.disk:
        where = "too large for the disk"
    if total < SMALL or where.startswith("too large"):
        return (card.name, _size(size), *["–"] * len(BATCHES), where)
    rates = (tokens_per_second(size, total, active, batch, limits) for batch in BATCHES)
    return (card.name, _size(size), *(f"{rate:,.2g}" if rate < 10 else f"{rate:,.0f}" for rate in rates), where)


def _size(count: float) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
