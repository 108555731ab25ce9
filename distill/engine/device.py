"""Where a model runs: the GPU, if there is one that multiplies FP8, else the CPU; and how much memory it has there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from distill.engine.kernels import column_for

GIB = 1 << 30
_FP8_CAPABILITY = (8, 9)  # Ada and Hopper; before them, no tensor core multiplies e4m3
_SHARE = 0.9  # of a memory; the rest is for libraries', the graphs' and the system's own


def choose_device(asked: torch.device | str | None) -> torch.device:
    """The requested device, or the best available. Errors: ValueError, with the remedy, for one that cannot be used."""
    device = torch.device(asked) if asked is not None else None
    if device is None:
        able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FP8_CAPABILITY
        return torch.device("cuda", torch.cuda.current_device()) if able else torch.device("cpu")
    column_for(device.type)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device is 'cuda' and no GPU can be used here; set it to cpu or see `distill doctor`")
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                f"device is 'cuda' and {name} (compute capability {capability[0]}.{capability[1]}) cannot multiply "
                "FP8, which needs 8.9 (Ada, Hopper) or newer; set it to cpu, or name a server that has the model"
            )
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def devices_for(asked: str | None, count: int | None) -> list[str]:
    """One device for each of `count` engines side by side; by default every GPU, or one CPU.

    Errors: ValueError for more engines than GPUs."""
    first = choose_device(asked)
    if first.type == "cpu":
        return ["cpu"] * (count or 1)
    there = torch.cuda.device_count()
    if (count or there) > there:
        raise ValueError(f"data_parallel_size is {count} and there are {there} GPUs; lower it")
    return [f"cuda:{index}" for index in range(count or there)]


def memory_of(device: torch.device) -> int | None:
    """The default memory budget of a device, bytes; None on a CPU: no limit."""
    return int(_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def host_memory() -> int:
    """The memory of this machine, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_more_than_host_memory(size: int) -> None:
    """Check that `size` bytes of experts that a GPU streams fit into the host's memory. Errors: ValueError."""
    memory = host_memory()
    if size > _SHARE * memory:
        raise ValueError(
            f"{size / GIB:.3g} GiB of experts do not fit on the GPU and not into this machine's memory of "
            f"{memory / GIB:.3g} GiB either; name a server that has the model"
        )


def refuse_too_large(
    model_dir: Path | str, sizes: Iterable[tuple[str, int]], budget: int, expert: str = "mlp.experts.{}."
) -> None:
    """Check that the weights that cannot be streamed fit into `budget` bytes: all but experts, and two layers of these.

    sizes: of the checkpoint's tensors, by name. expert: how the names of an expert's tensors begin, below their layer.
    Errors: ValueError with the command that serves the model on more GPUs.
    """
    experts: Counter[str] = Counter()
    rest = 0
    for name, size in sizes:
        layer, routed, _ = name.partition(f".{expert.partition('{}')[0]}")
        if routed:
            experts[layer] += size
        else:
            rest += size
    needed = rest + min(2, len(experts)) * max(experts.values(), default=0)
    if needed <= budget:
        return
    gpus = 1 << (int(1.2 * (rest + experts.total())) // budget).bit_length()
    raise ValueError(
        f"{model_dir}: {needed / GIB:.3g} GiB have to be on the GPU at once and {budget / GIB:.3g} GiB are free there; "
        f"serve it on more GPUs: `vllm serve {model_dir} --tensor-parallel-size {gpus}`, or `python -m "
        f"sglang.launch_server --model-path {model_dir} --tp {gpus}`"
    )
