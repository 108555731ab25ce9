"""Hardware of this machine: processor, memory, disk, devices; and the rates of its memory and its matrix products.

The limits of a container count: the cores that a process may use and the memory that its control group allows are often
fewer than those of the machine. The two measurements are the limits that perf/ compares everything with.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Clock = Callable[[], float]  # seconds, from any point on

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


@dataclass(frozen=True)
class Machine:
    """A machine. memory and available: bytes, at most the control group's limit; disk: free bytes in the current
    directory; gpus: one line each."""

    processor: str
    cores: int
    memory: int
    available: int
    disk: int
    gpus: tuple[str, ...]


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    total, available = memory()
    return Machine(processor(), cores(), total, available, shutil.disk_usage(Path.cwd()).free, gpus())


def description() -> str:
    """Processor, cores that this process may use, and NVIDIA GPUs that it sees, in one line. Does not import torch."""
    listed = _listed_gpus() or []
    seen = Counter(listed[: _allowed(listed)])
    usable, threads = cores(), os.environ.get("OMP_NUM_THREADS", "")
    used = f"{threads} of {usable}" if threads.isdigit() and int(threads) < usable else f"{usable}"
    gpus = [f"{number} × {name}" for name, number in seen.items()]
    return ", ".join([processor(), f"{used} {'core' if usable == 1 else 'cores'}", *gpus])


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, or the quota of its control group (version 2) if that is less."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        usable = min(usable, max(1, int(quota) // int(period)))
    return usable


def memory(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """(total, available) bytes, at most what the control group allows."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        total, available = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError):  # not Linux
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = total
    limit, used = _first_line(cgroup / "memory.max"), _first_line(cgroup / "memory.current")
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, total - (int(used) if used.isdigit() else 0))
    return total, max(available, 0)


def gpus() -> tuple[str, ...]:
    """Name and memory of each GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in properties)


def gpu_count() -> int:
    """Number of NVIDIA or AMD GPUs that another program sees in this environment.

    A torch that was built without CUDA sees none; they are counted with `nvidia-smi` then, as far as
    CUDA_VISIBLE_DEVICES allows. Does not initialize CUDA, which would occupy memory of the first GPU.
    """
    import torch

    if seen := torch.cuda.device_count():
        return seen
    listed = _listed_gpus()
    allowed = _allowed(listed)
    return len(listed or ()) if allowed is None else allowed


def _allowed(listed: list[str] | None) -> int | None:
    """Number of GPUs that CUDA_VISIBLE_DEVICES allows; None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    devices = [device.strip() for device in visible.split(",")]
    hidden = (number for number, device in enumerate(devices) if device in ("", "-1"))
    allowed = next(hidden, len(devices))  # CUDA ignores what follows an invalid device
    return allowed if listed is None else min(allowed, len(listed))


def _listed_gpus() -> list[str] | None:
    """Names of the GPUs that `nvidia-smi` lists; None where it cannot be run."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)


def memory_bandwidth(size: int = 1 << 30, device: str = "cpu", clock: Clock = time.perf_counter) -> float:
    """Bytes per second of reading `size` bytes of memory with torch's threads; on a GPU, of copying them, where each
    byte counts twice. The fastest of three."""
    import torch

    data = torch.ones(size // 4, dtype=torch.int32, device=device)
    if device == "cpu":
        return data.nbytes / fastest(lambda: data.max().item(), clock=clock)
    copy = torch.empty_like(data)
    return 2 * data.nbytes / fastest(lambda: copy.copy_(data)[:1].item(), clock=clock)


def product_rate(rows: int = 2048, size: int = 4096, device: str = "cpu", clock: Clock = time.perf_counter) -> float:
    """Operations per second of torch's bfloat16 product [rows, size] × [size, size]; the fastest of three. A CPU
    without bfloat16 products is measured in float32, in which it would compute."""
    import torch

    dtype = torch.float32 if device == "cpu" and not multiplies_bfloat16() else torch.bfloat16
    a, b = (torch.ones(n, size, dtype=dtype, device=device) for n in (rows, size))
    # Reading a number waits for a GPU.
    return 2 * rows * size * size / fastest(lambda: torch.mm(a, b)[0, 0].item(), clock=clock)


def give_memory_back(mapped: int, kept: int = 512 << 20) -> None:
    """Have the C library map each block of at least `mapped` bytes separately, so that freeing it returns the memory,
    and keep up to `kept` bytes of smaller freed blocks.

    glibc before 2.38 does not reuse a freed aligned block for a request of the same size, and torch requests only
    aligned ones: large blocks of a heap that grows between them are never filled again. Small blocks are joined with
    their neighbours and are. Mapping blocks anew each time costs a third of a training step where it is not needed.
    """
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, mapped)
        library.mallopt(M_TRIM_THRESHOLD, kept)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def trim_heap() -> None:
    """Have the C library give the freed blocks that it has kept back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products. Without them torch converts: such a product takes
    three (AVX-512) to a hundred times as long as one of float32."""
    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gpu_memory() -> int:
    """Bytes of memory of the first GPU."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def disk_rate(file: Path, size: int = 1 << 30) -> float:
    """Bytes per second of reading the first `size` bytes of a file, past the page cache where the system allows it."""
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        done, begun = 0, time.perf_counter()
        while done < size and (block := stream.read(min(4 << 20, size - done))):
            done += len(block)
    return done / max(time.perf_counter() - begun, 1e-9)


def fastest(action: Callable[[], object], times: int = 3, clock: Clock = time.perf_counter) -> float:
    """Seconds that an action takes, the shortest of several times."""
    seconds = []
    for _ in range(times):
        begun = clock()
        action()
        seconds.append(clock() - begun)
    return min(seconds)


def _first_line(file: Path) -> str:
    """The first line of a file; nothing where it is missing or unreadable."""
    try:
        return file.read_text(encoding="utf-8").strip().partition("\n")[0]
    except OSError:
        return ""
