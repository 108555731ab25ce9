"""The processes that train together, and how the model is laid over them.

One process, or as many as an environment of torchrun's variables says (`RANK`, `WORLD_SIZE`, …), whoever set them:
`distill train` itself (`train.launch`), torchrun, or Slurm through torchrun. Three layouts:

- one: one device.
- ddp: every rank holds the whole model; gradients are averaged by torch's DDP, through Accelerate.
- fsdp: every rank holds its part of every parameter, gradient and optimiser state (torch's `fully_shard`, FSDP2).

Accelerate finds device and backend, wraps for DDP, and talks to trackers. `fully_shard` is called here, because
Accelerate's own FSDP is for accelerators only and quietly becomes DDP on a CPU: what is tested there would not be what
runs on a GPU. Weights are float32 shards and are gathered in the dtype of the forward pass.

Batches of a step are dealt out like cards: rank r takes r, r + size, …. All ranks know the step's order, so nothing
about it is sent.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

Layout = Literal["one", "ddp", "fsdp"]

PATIENCE = timedelta(hours=2)  # while one rank encodes the traces or writes the student, the others wait


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class World:
    """This process among those that train together."""

    layout: Layout = "one"  # until it is known what fits

    def __init__(self, report_to: tuple[str, ...] = (), project_dir: str | None = None) -> None:
        # Gloo beside NCCL: flags and counters live on the host, and a GPU is not waited for to exchange them.
        gpus = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        joining = [InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)] if size() > 1 else []
        self.accelerator = Accelerator(
            cpu=not gpus,  # which Accelerate has to be told: else ranks on a CPU are strangers to each other
            log_with=list(report_to) or None,
            project_dir=project_dir,
            kwargs_handlers=joining,
        )
        assert self.accelerator.num_processes == size(), "Accelerate does not know of the other ranks"
        self.device: torch.device = self.accelerator.device
        self.rank, self.size = rank(), size()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, batches: list[list[int]]) -> list[tuple[list[int], bool]]:
        """This rank's batches of a step, and whether they count: a rank that has none left repeats one as nothing,
        since gradients are exchanged by all ranks or not at all."""
        rounds = -(-len(batches) // self.size)
        places = [i * self.size + self.rank for i in range(rounds)]
        return [(batches[place], True) if place < len(batches) else (batches[0], False) for place in places]

    def lay_out(self, learner: nn.Module, layers: list[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Put a learner on this rank's device in the world's layout. layers: what is gathered at a time (fsdp)."""
        if self.layout == "fsdp":
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(learner, mesh=mesh, mp_policy=policy)
            return learner
        wrapped: nn.Module = self.accelerator.prepare_model(learner)
        assert (wrapped is not learner) == (self.layout == "ddp"), "Accelerate wraps for DDP, and for nothing else"
        return wrapped

    @contextmanager
    def accumulating(self, learner: nn.Module, last: bool) -> Iterator[None]:
        """Around one batch's forward and backward pass: with DDP gradients are exchanged after the step's last one.

        With FSDP after each: whole gradients would have to be kept between them, which is what sharding is to avoid.
        """
        if self.layout == "ddp" and not last:
            with learner.no_sync():  # type: ignore[operator]
                yield
        else:
            yield

    def summed(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self.any(False)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, its parts gathered if it is sharded. All ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor
