"""What a checkpoint holds in tensors: the trained parameters, the optimiser's state, the random states of every rank.

torch's distributed checkpoint writes it: each rank its own shards, what is the same on all of them once. Loading reads
into the tensors that are there, so nothing is held twice, and a shard never leaves its rank. Everything has a plain
name (`model.…`, `optimizer.….exp_avg`, `random.0`), by which the format could be read without this package. Parameters
that are not trained are the base's, and are not stored.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


@contextmanager
def alone_is_meant() -> Iterator[None]:
    """torch warns of a single process that saves, in case it should have been several."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


class State:
    """Of one training on this rank. learner: the module itself, not its wrapper."""

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, size: int = 1) -> None:
        self.learner, self.optimizer, self.rank, self.size = learner, optimizer, rank, size

    def save(self, directory: Path) -> None:
        """Write it; all ranks together. Errors: OSError and RuntimeError of a disk that is full."""
        try:
            with alone_is_meant():
                dcp.save(self._tensors(), checkpoint_id=directory, no_dist=self.size == 1)
        except dcp.api.CheckpointException as error:
            raise RuntimeError(next(str(e[0]) for e in error.failures.values())) from error

    def load(self, directory: Path) -> None:
        """Read it into model, optimiser and random generators; all ranks together."""
        stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
        for name, p in self._parameters():
            state = self.optimizer.state[p]
            for key, about in stored.items():
                prefix, _, entry = key.rpartition(".")
                if prefix == f"optimizer.{name}" and isinstance(about, TensorStorageMetadata):
                    shape, dtype = about.size, about.properties.dtype
                    device = "cpu" if shape == () and not self._on_device() else p.device
                    state[entry] = (
                        torch.zeros_like(p, dtype=dtype)
                        if shape == p.shape
                        else torch.zeros(shape, dtype=dtype, device=device)
                    )
        tensors = self._tensors()
        with alone_is_meant():
            dcp.load(tensors, checkpoint_id=directory, no_dist=self.size == 1)
        torch.set_rng_state(tensors[f"random.{self.rank}"].cpu())
        if (key := f"random.cuda.{self.rank}") in tensors:
            torch.cuda.set_rng_state(tensors[key].cpu())

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained; a tied weight once."""
        return [(name, p) for name, p in self.learner.named_parameters() if p.requires_grad]

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {f"random.{self.rank}": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors[f"random.cuda.{self.rank}"] = torch.cuda.get_rng_state()
        for name, p in self._parameters():
            tensors[name] = p.detach()
            for entry, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{entry}"] = value
        return tensors

    def _on_device(self) -> bool:
        """Whether the optimiser keeps its count of steps beside its parameters, as a fused one does."""
        return any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
