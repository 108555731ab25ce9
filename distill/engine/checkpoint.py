"""The files of a model directory: tensors by name, checked, memory-mapped.

Files are safetensors, one or sharded with an index. The safetensors library judges whether a file is whole; the tensors
are then views of one mapping per file. Mapped pages that were looked at count as memory in use, and mapping them costs
more than reading them, so the kernels read large matrices from their `place` in the file, piece by piece.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.engine.config import INDEX, SINGLE, index_of, read_json, refuse_lfs_pointer, shown
from distill.engine.kernels.pages import discard
from distill.engine.kernels.stored import Place

STORED = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
NUMBERS = ("F32", "BF16", "F16", "F8_E4M3")  # what a tensor is that nothing else is asked of
_SCALES = (*NUMBERS, "F8_E8M0")
_OF_SCALES = ("_scale_inv", ".scale")
_READ_AHEAD = 128 << 10  # bytes of one request: operating systems cut larger ones off


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in its file: bytes `begin … end-1`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _File:
    """One mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_lfs_pointer(path)
        try:
            safe_open(path, framework="pt")
            self._stream = path.open("rb", buffering=0)  # open as long as this object lives
            self.descriptor = self._stream.fileno()
            header = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
            entries = json.loads(os.pread(self.descriptor, header, 8))
            # A private mapping, never written to: torch warns about read-only memory.
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a complete safetensors file ({reason}); download it again") from error
        self.entries = {
            name: _Entry(e["dtype"], tuple(e["shape"]), *(8 + header + offset for offset in e["data_offsets"]))
            for name, e in entries.items()
            if name != "__metadata__"
        }

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        dtype = STORED[entry.dtype]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        count = (entry.end - entry.begin) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.begin).view(entry.shape)


class Checkpoint:
    """The tensors of a model directory. Errors: ValueError, one line with file, tensor and remedy, where one is
    broken."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        index, single = index_of(model_dir), model_dir / SINGLE
        if index is not None:
            path_of = _from_index(index)
            files = {path: _File(path) for path in sorted(set(path_of.values()))}
        elif single.is_file():
            files = {single: _File(single)}
            path_of = dict.fromkeys(files[single].entries, single)
        else:
            raise ValueError(
                f"{model_dir}: neither {SINGLE} nor {INDEX} is there; download the weights, as safetensors"
            )
        self._file_of = {name: files[path] for name, path in path_of.items()}
        self._files = list(files.values())
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(entry.end - entry.begin for file in self._files for entry in file.entries.values())

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Names and bytes of all tensors."""
        for name, file in self._file_of.items():
            if (entry := file.entries.get(name)) is not None:
                yield name, entry.end - entry.begin

    def where(self, name: str) -> str:
        """File and tensor, as messages begin."""
        return f"{self._file_of[name].path}: tensor {name}"

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype of a tensor, as files name it, and its shape."""
        if name not in self._file_of:
            raise ValueError(f"{self.model_dir}: tensor {name} is missing; config.json and weights do not match")
        entry = self._file_of[name].entries.get(name)
        if entry is None:
            raise ValueError(f"{self.where(name)} cannot be read: the file does not hold it; download the file again")
        return entry.dtype, entry.shape

    def leave(self, name: str) -> None:
        """Note that a tensor has a place in the model, and need not be read."""
        self._read.add(name)

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: Collection[str] | None = None) -> Tensor:
        """The tensor as stored, a view of the mapped file. dtypes: those accepted, as files name them; by default those
        of numbers."""
        self.form(name)
        self._read.add(name)
        file = self._file_of[name]
        entry = file.entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"{self.where(name)} has shape {list(entry.shape)}, config.json makes it {list(shape)}; "
                "config.json and weights do not match"
            )
        dtype = STORED.get(entry.dtype)
        if dtype and entry.begin % dtype.itemsize:
            raise ValueError(f"{self.where(name)} is not aligned; write the file anew with the safetensors library")
        if dtypes is None:
            dtypes = _SCALES if name.endswith(_OF_SCALES) else NUMBERS
        if entry.dtype not in dtypes:
            *first, last = dtypes if dtypes is not _SCALES else NUMBERS
            raise ValueError(
                f"{self.where(name)} is {entry.dtype}; supported are {', '.join(first)}{' and ' if first else ''}{last}"
            )
        return file.tensor(name)

    def place(self, name: str) -> Place:
        """Where the tensor is in its file, for kernels that read it rather than map it."""
        file = self._file_of[name]
        entry = file.entries[name]
        return Place(file.descriptor, entry.begin, entry.end - entry.begin, file)

    def forget(self, name: str) -> None:
        """Give back the memory of a tensor that was looked at as a whole. What is looked at again is mapped again."""
        mapped = self._file_of[name].tensor(name)
        discard(mapped.data_ptr(), mapped.nbytes)

    def unread(self) -> Iterator[str]:
        """Names of tensors that were not read, sorted."""
        yield from sorted(set(self._file_of) - self._read)

    @contextmanager
    def read_ahead(self, prefixes: Sequence[str]) -> Iterator[None]:
        """While the context lasts, read tensors whose names have these prefixes into the page cache, in this order, if
        all of them fit there well."""
        stop = threading.Event()
        reader = threading.Thread(target=self._read_ahead, args=(prefixes, stop), name="read-ahead", daemon=True)
        memory = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
        if hasattr(os, "posix_fadvise") and self.bytes < memory // 2:
            reader.start()
        try:
            yield
        finally:
            stop.set()
            if reader.is_alive():
                reader.join()

    def _read_ahead(self, prefixes: Sequence[str], stop: threading.Event) -> None:
        for prefix in prefixes:
            names = [name for name in self._file_of if name.startswith(prefix) and name in self._file_of[name].entries]
            places = sorted((self.place(name) for name in names), key=lambda place: (place.descriptor, place.offset))
            done = {place.descriptor: 0 for place in places}  # a request may reach into the next tensor
            for place in places:
                end = place.offset + place.size
                for begin in range(max(place.offset, done[place.descriptor]), end, _READ_AHEAD):
                    if stop.is_set():
                        return
                    os.posix_fadvise(place.descriptor, begin, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
                    done[place.descriptor] = begin + _READ_AHEAD


def _from_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: not a safetensors index ('weight_map' is missing); download it again")
    path_of: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ValueError(f"{index}: the file of tensor {name} is {shown(shard)}, not a name; download it again")
        path_of[name] = index.parent / shard
    missing = sorted({path.name for path in path_of.values() if not path.is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{index.parent / missing[0]}: shard is missing{more}; download it (the index names it)")
    return path_of
