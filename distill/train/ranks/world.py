"""The processes that train together, and how the model is laid over them.

One process, or as many as torchrun's environment variables say (`RANK`, `WORLD_SIZE`, …), set by `distill train`
itself (`ranks.launch`), by torchrun, or by Slurm through torchrun. Three layouts:

- one: one device.
- ddp: every rank holds the whole model; gradients are averaged by torch's DDP, through Accelerate.
- fsdp: every rank holds its shard of every parameter, gradient and optimiser state (torch's `fully_shard`, FSDP2).

Accelerate selects device and backend, wraps for DDP, and sends figures to trackers. `fully_shard` is called here,
because Accelerate's own FSDP is for accelerators only and silently becomes DDP on a CPU: the tested layout would not be
the one that runs on a GPU. Weights are float32 shards and are gathered in the dtype of the forward pass.

Batches of a step are distributed round-robin: rank r takes r, r + size, …. All ranks know the step's order, so it is
not communicated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distill.train.ranks import environment

T = TypeVar("T")
Layout = Literal["one", "ddp", "fsdp"]

TIMEOUT = timedelta(hours=2)  # the other ranks wait while one encodes the traces or writes the student


class World:
    """This process among those that train together. Waits until all are there."""

    layout: Layout = "one"  # until the memory estimate has chosen

    def __init__(self, report_to: tuple[str, ...] = (), project_dir: str | None = None) -> None:
        # Gloo beside NCCL: flags and counters live on the host, and exchanging them does not wait for a GPU.
        gpus = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        joining = [InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT)] if environment.size() > 1 else []
        self.accelerator = Accelerator(
            cpu=not gpus,  # explicitly: otherwise Accelerate does not connect ranks on a CPU
            log_with=list(report_to) or None,
            project_dir=project_dir,
            kwargs_handlers=joining,
        )
        self.rank, self.size = environment.rank(), environment.size()
        assert self.accelerator.num_processes == self.size, "Accelerate did not connect to the other ranks"
        self.device: torch.device = self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this is the first rank, which writes and prints."""
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's batches of a step, and whether they count. A rank with none left repeats one with weight zero,
        because gradients are exchanged by all ranks or by none."""
        rounds = -(-len(batches) // self.size)
        places = [i * self.size + self.rank for i in range(rounds)]
        return [(batches[place], True) if place < len(batches) else (batches[0], False) for place in places]

    def lay_out(self, learner: nn.Module, layers: list[nn.Module], dtype: torch.dtype) -> nn.Module:
        """Put a learner on this rank's device in the world's layout. layers: the units that are gathered (fsdp)."""
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

        With FSDP they are exchanged after each: keeping whole gradients between them would undo the sharding.
        """
        if self.layout == "ddp" and not last:
            with cast(DistributedDataParallel, learner).no_sync():
                yield
        else:
            yield

    def reshard(self, learner: nn.Module) -> None:
        """After a forward pass without a backward pass: free what it gathered (fsdp).

        The outermost unit (embedding, last norm, head) stays gathered in the dtype of the forward pass until a backward
        pass ends: the learner's parameters would be others than those that the optimiser holds. Rejected: resharding it
        after every forward pass, which gathers it once more in every training step.
        """
        if self.layout == "fsdp":
            cast(FSDPModule, learner).reshard()

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, items: list[T]) -> list[T]:
        """The items of all ranks, those of the first rank first. Small objects: they are pickled, between processes of
        one training."""
        if self.size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is set on any rank."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.any(False)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, gathered if it is sharded. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor
