"""The tensors of a checkpoint: trained parameters, optimiser state, the random states of every rank.

    rank-00000-000.safetensors   the first rank's shards, and everything that is equal on all ranks
    rank-00001-000.safetensors   the second rank's shards; …-001 and so on beyond 2 GiB

A tensor has a plain name (`model.…`, `optimizer.….exp_avg`, `random.0`), by which other programs can read it. Sharded
parameters (FSDP) are split along their first dimension; the header of each file says which rows of which whole tensor
it holds. Loading reads the rows that this rank holds, from whichever files have them, so that a training may resume on
another number of processes; no tensor is gathered, and a shard never leaves its rank. Plain numbers of an optimiser's
state are stored as tensors named `number.…`. Parameters that are not trained are those of the base, and are not stored.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

FILE_BYTES = 2 << 30  # per file: on the way to the disk a file is once more in memory
SHARDS = "shards"  # the key of the header's entry
NUMBER = "number."  # before the name of what is a plain number in the optimiser's state


class Piece(NamedTuple):
    """A whole tensor, or some rows of it. shape: of the whole tensor. start: the first row that `local` holds."""

    local: Tensor
    shape: tuple[int, ...]
    start: int


class State:
    """The tensors of one training on this rank. learner: the module itself, not its wrapper."""

    def __init__(self, learner: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, size: int = 1) -> None:
        self.learner, self.optimizer, self.rank, self.size = learner, optimizer, rank, size

    def save(self, directory: Path) -> None:
        """Write this rank's files. Errors: OSError and SafetensorError when the disk is full."""
        tensors: dict[str, Tensor] = {}
        shards: dict[str, dict[str, object]] = {}
        number = size = 0

        def flush() -> None:
            file = directory / f"rank-{self.rank:05d}-{number:03d}.safetensors"
            save_file(tensors, file, metadata={SHARDS: json.dumps(shards)})
            tensors.clear()
            shards.clear()

        for name, tensor in self._tensors():
            piece = piece_of(tensor)
            if not isinstance(tensor, DTensor) and self.rank and not name.startswith("random."):
                continue  # equal on all ranks
            if size and size + piece.local.nbytes > FILE_BYTES:
                flush()
                number, size = number + 1, 0
            tensors[name] = piece.local.cpu().contiguous()
            about = {"shape": piece.shape, "start": piece.start, "dtype": str(piece.local.dtype).removeprefix("torch.")}
            shards[name] = about
            size += piece.local.nbytes
        flush()

    def load(self, directory: Path) -> None:
        """Read this rank's rows into model, optimiser and random generators."""
        with ExitStack() as stack:
            stored = Stored(directory, stack)
            for name, p in self._parameters():
                state = self.optimizer.state[p]
                prefix = f"optimizer.{name}."
                for key in stored.names:
                    if key.startswith(prefix) and "." not in (entry := key.removeprefix(prefix)):
                        state[entry] = self._empty_like(p, *stored.about(key))
                    if key.startswith(NUMBER + prefix) and "." not in (entry := key.removeprefix(NUMBER + prefix)):
                        state[entry] = stored.whole(key).item()
            for name, tensor in self._tensors():
                if not name.startswith(("random.", NUMBER)):
                    stored.read(name, piece_of(tensor))
            # A rank beyond those that saved keeps the numbers of its seed.
            if (key := f"random.{self.rank}") in stored.names:
                torch.set_rng_state(stored.whole(key))
            if (key := f"random.cuda.{self.rank}") in stored.names and torch.cuda.is_available():
                torch.cuda.set_rng_state(stored.whole(key))

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters, which are those that the optimiser holds; a tied weight once."""
        trained = [(name, p) for name, p in self.learner.named_parameters() if p.requires_grad]
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        strange = [name for name, p in trained if id(p) not in held]
        assert not strange, f"{strange[0]} is not what the optimiser updates: a forward pass has left it gathered"
        return trained

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield f"random.{self.rank}", torch.get_rng_state()
        if torch.cuda.is_available():
            yield f"random.cuda.{self.rank}", torch.cuda.get_rng_state()
        for name, p in self._parameters():
            yield name, p.detach()
            for entry, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{name}.{entry}", value
                elif isinstance(value, int | float):
                    yield f"{NUMBER}optimizer.{name}.{entry}", torch.tensor(value)

    def _empty_like(self, p: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for an entry of the optimiser's state: laid out like its parameter, or of a shape of its own."""
        if shape == tuple(p.shape):
            return torch.zeros_like(p, dtype=dtype)
        device = "cpu" if shape == () and not self._on_device() else p.device
        return torch.zeros(shape, dtype=dtype, device=device)

    def _on_device(self) -> bool:
        """Whether the optimiser keeps its step count on the device of its parameters, as a fused one does."""
        return any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)


def piece_of(tensor: Tensor) -> Piece:
    """The rows of a tensor that this rank holds. torch shards dimension 0 as `torch.chunk` does."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor, tuple(tensor.shape), 0)
    assert tuple(tensor.placements) == (Shard(0),), f"a layout that is not saved: {tensor.placements}"
    rows, mesh = tensor.shape[0], tensor.device_mesh
    start = min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))
    local = tensor.to_local()
    assert start + local.shape[0] <= rows
    return Piece(local, tuple(tensor.shape), start)


class TensorRows(Protocol):
    """A lazily read tensor of `safe_open`, which has no types of its own."""

    def get_shape(self) -> list[int]:
        """Its shape."""

    def __getitem__(self, rows: slice) -> Tensor: ...


class TensorFile(Protocol):
    """A file opened by `safe_open`."""

    def metadata(self) -> dict[str, str]:
        """The header's free entries."""

    def get_tensor(self, name: str) -> Tensor:
        """Read a tensor."""

    def get_slice(self, name: str) -> TensorRows:
        """A tensor that is not read yet."""


class Stored:
    """The tensors in the files of a checkpoint, opened while the stack lasts."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._about: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._shards: dict[str, list[tuple[TensorFile, int]]] = {}
        for path in sorted(directory.glob("rank-*.safetensors")):
            file: TensorFile = stack.enter_context(safe_open(path, framework="pt"))
            for name, about in json.loads(file.metadata()[SHARDS]).items():
                self._about[name] = tuple(about["shape"]), getattr(torch, about["dtype"])
                self._shards.setdefault(name, []).append((file, about["start"]))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._about)

    def about(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of the whole tensor, and dtype."""
        return self._about[name]

    def whole(self, name: str) -> Tensor:
        """A tensor that is in one file."""
        ((file, _),) = self._shards[name]
        return file.get_tensor(name)

    def read(self, name: str, piece: Piece) -> None:
        """Fill the rows of `piece`."""
        assert self._about[name][0] == piece.shape, f"{name}: {self._about[name][0]} stored, {piece.shape} expected"
        if not piece.shape:
            piece.local.copy_(self.whole(name))
            return
        first, end, filled = piece.start, piece.start + piece.local.shape[0], 0
        for file, start in self._shards[name]:
            rows = file.get_slice(name)
            low, high = max(first, start), min(end, start + rows.get_shape()[0])
            if low < high:
                piece.local[low - first : high - first].copy_(rows[low - start : high - start])
                filled += high - low
        assert filled == end - first, f"{name}: {filled} of {end - first} rows are stored"
