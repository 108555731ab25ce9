"""GGUF, llama.cpp's form of a model: a file becomes a Hugging Face directory, once, and everything reads that.

The directory has the weights dequantised to bfloat16, a config.json from the file's metadata, and the tokenizer and
chat template (`gguf_tokenizer`). It is a cache (`$XDG_CACHE_HOME/distill/gguf`, by default below
~/.cache), named by a hash of the file: another file is another directory, and deleting it costs one conversion.

Rejected: a reader of GGUF in the engine. Training, tokenizers, plans and fingerprints read directories too, and each
would need a second form. Rejected: the loader of transformers, which holds the whole model, ignores what it does not
know (the frequencies of Llama 3's RoPE among them), and leaves a model with a missing tensor at random values.

Nothing is guessed. A key of the architecture that is not read here is refused by name, as it might change the numbers;
so is a tensor without a place, or one that is missing or of another shape. llama.cpp stores the rows of Llama's q and k
in another order, that of interleaved rotation, which is undone. One tensor is held at a time, by pieces of rows.

Split files (`NAME-00001-of-00003.gguf`) are one model, whichever of them is named.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from distill import gguf_metadata, gguf_tokenizer
from distill.console import bytes_text, progress
from distill.durable import replacing_directories
from distill.engine.config import refuse_lfs_pointer
from distill.engine.families import FAMILIES, spec_of
from distill.engine.spec import ModelSpec
from distill.errors import UserError
from distill.fingerprint import files_hash
from distill.gguf_metadata import Metadata
from distill.lock import locked

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from torch import Tensor

SUFFIX, MAGIC = ".gguf", b"GGUF"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
ROPE_FREQUENCIES = "rope_freqs.weight"
FORMAT = 2  # of the directories: raised when the same file is converted to something else
SHARD_BYTES = 1 << 30
PIECE = 1 << 24  # elements that are dequantised at once


def cache() -> Path:
    """The directory of the converted models."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "distill" / "gguf"


def directory_of(path: Path) -> Path:
    """The Hugging Face directory of a GGUF file, converted if it is not there yet.

    Errors: UserError, one line with file and remedy, when it is broken, incomplete or of a kind that is not read.
    """
    paths = parts_of(path)
    directory = cache() / f"{files_hash(paths)}-{FORMAT}" / name_of(path)
    if not directory.is_dir():
        with locked(directory.parent, "$XDG_CACHE_HOME"):
            if not directory.is_dir():
                _convert(paths, directory)
    return directory


def name_of(path: Path) -> str:
    """The model's name: that of the file, without the number of a part."""
    split = SPLIT.fullmatch(path.name)
    return split[1] if split else path.stem


def parts_of(path: Path) -> list[Path]:
    """All files of the model that a file belongs to, in order. Errors: UserError when one of them is missing."""
    if (split := SPLIT.fullmatch(path.name)) is None:
        return [path]
    paths = [path.with_name(f"{split[1]}-{part:05}-of-{split[3]}.gguf") for part in range(1, int(split[3]) + 1)]
    if missing := [each for each in paths if not each.is_file()]:
        raise UserError(f"{missing[0]} is missing; download it ({len(missing)} of {len(paths)} parts are missing)")
    return paths


# ---- what a file says


@dataclass(frozen=True)
class _Model:
    """A model in GGUF files. stored: tensors by their names there. config: of its directory. spec: that of config."""

    where: Path
    metadata: Metadata
    stored: Mapping[str, ReaderTensor]
    config: dict[str, object]
    spec: ModelSpec


def _read(paths: Sequence[Path]) -> _Model:
    readers = [_reader(path) for path in paths]
    first, metadata = paths[0], Metadata.of(readers[0], paths[0])
    _check_split(readers, paths)
    stored: dict[str, ReaderTensor] = {}
    for reader, path in zip(readers, paths, strict=True):
        for tensor in reader.tensors:
            if tensor.name in stored:
                raise UserError(f"{path}: tensor {tensor.name} is in two parts; download them again")
            if (kind := tensor.tensor_type.name) not in TYPES:
                raise UserError(
                    f"{path}: tensor {tensor.name} is stored as {kind}, which is not read; supported are "
                    f"{', '.join(TYPES)}: use another quantisation of the model, or its hub id"
                )
            stored[tensor.name] = tensor
    if "token_embd.weight" not in stored:
        raise UserError(f"{first}: tensor token_embd.weight is missing; download the file again")
    frequencies = _values(stored[ROPE_FREQUENCIES]) if ROPE_FREQUENCIES in stored else None
    shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in stored.items()}
    config = gguf_metadata.config_of(metadata, shapes, _is_tied(stored), frequencies)
    try:
        spec = spec_of(json.loads(json.dumps(config)), str(first))
    except ValueError as error:
        raise UserError(str(error)) from error
    return _Model(first, metadata, stored, config, spec)


def _reader(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading GGUF needs the gguf package: pip install 'distill[gguf]'") from error
    try:
        refuse_lfs_pointer(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path}: not a GGUF file (it does not begin with {MAGIC.decode()}); download it again")
    try:
        return GGUFReader(path)
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        # What a broken file leads to inside the library: slices past the end, unknown numbers of types.
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path}: not a complete GGUF file ({reason}); download it again") from error


def _check_split(readers: Sequence[GGUFReader], paths: Sequence[Path]) -> None:
    for number, (reader, path) in enumerate(zip(readers, paths, strict=True)):
        metadata = Metadata.of(reader, path)
        part, count = metadata.int("split.no", 0), metadata.int("split.count", 0) or 1
        if (part, count) != (number, len(paths)):
            raise UserError(
                f"{path}: part {part + 1} of {count} by its content, {number + 1} of {len(paths)} by its name; "
                f"give every part the name that it was published with"
            )
    expected = Metadata.of(readers[0], paths[0]).int("split.tensors.count", 0)
    tensors = sum(len(reader.tensors) for reader in readers)
    if expected and expected != tensors:
        raise UserError(f"{paths[0]}: {tensors} of its {expected} tensors are there; download all parts again")


def _is_tied(stored: Mapping[str, ReaderTensor]) -> bool:
    """Whether head and embedding are the same numbers: there is no head, or it is stored as the embedding is."""
    head, embedding = stored.get("output.weight"), stored["token_embd.weight"]
    return head is None or (
        head.tensor_type == embedding.tensor_type
        and head.data.shape == embedding.data.shape
        and bool((head.data == embedding.data).all())
    )


def _places(model: _Model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor of the file → its name in the directory, and its shape there."""
    spec, names = model.spec, FAMILIES[model.spec.family].names
    c, f, head = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * head, spec.num_kv_heads * head
    places: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": (names.embed, (spec.vocab_size, c)),
        "output_norm.weight": (names.norm, (c,)),
    }
    if not spec.tied_embeddings:
        places["output.weight"] = (names.head, (spec.vocab_size, c))
    linears = (
        ("attn_q", names.gqa.q, (q, c), spec.qkv_bias),
        ("attn_k", names.gqa.k, (kv, c), spec.qkv_bias),
        ("attn_v", names.gqa.v, (kv, c), spec.qkv_bias),
        ("attn_output", names.gqa.o, (c, q), spec.o_bias),
        ("ffn_gate", names.dense + names.mlp.gate, (f, c), spec.mlp_bias),
        ("ffn_up", names.dense + names.mlp.up, (f, c), spec.mlp_bias),
        ("ffn_down", names.dense + names.mlp.down, (c, f), spec.mlp_bias),
    )
    for layer in range(spec.num_layers):
        at, to = f"blk.{layer}.", names.layer.format(layer)
        places[at + "attn_norm.weight"] = (to + names.attention_norm, (c,))
        places[at + "ffn_norm.weight"] = (to + names.mlp_norm, (c,))
        if spec.qk_norm:
            places[at + "attn_q_norm.weight"] = (to + names.gqa.q_norm, (head,))
            places[at + "attn_k_norm.weight"] = (to + names.gqa.k_norm, (head,))
        for theirs, ours, shape, bias in linears:
            places[f"{at}{theirs}.weight"] = (f"{to}{ours}.weight", shape)
            if bias:
                places[f"{at}{theirs}.bias"] = (f"{to}{ours}.bias", shape[:1])
    return places


def _check_tensors(model: _Model, places: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Errors: UserError for a tensor that is missing, has another shape, or has no place."""
    for name, (_, shape) in places.items():
        if name not in model.stored:
            raise UserError(f"{model.where}: tensor {name} is missing; download the file again")
        stored = tuple(reversed(model.stored[name].shape.tolist()))
        if stored != shape:
            raise UserError(
                f"{model.where}: tensor {name} has shape {list(stored)}, its metadata makes it {list(shape)}; download "
                f"the file again"
            )
    known = {*places, ROPE_FREQUENCIES, "output.weight"}
    if extra := [name for name in model.stored if name not in known]:
        raise UserError(
            f"{model.where}: tensor {extra[0]} has no place in a model of family {model.spec.family}; use the hub id "
            f"of the model"
        )


# ---- the directory


def _convert(paths: Sequence[Path], directory: Path) -> None:
    model = _read(paths)
    places = _places(model)
    _check_tensors(model, places)
    size = 2 * sum(prod(shape) for _, shape in places.values())
    with replacing_directories(directory) as (new,):
        with progress(f"convert {model.where.name} ({bytes_text(size)})", len(places), "tensors") as advance:
            names: dict[str, str] = {}
            shards = list(_shards(places))
            for number, shard in enumerate(shards, 1):
                file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
                tensors: dict[str, Tensor] = {}
                for name in shard:
                    tensors[places[name][0]] = _tensor(model, name)
                    advance(1)
                _save(tensors, new / file)
                names |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            _write_json(new / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": names})
        _write_json(new / "config.json", model.config)
        _write_json(new / "generation_config.json", gguf_metadata.generation_config(model.metadata))
        if license_ := model.metadata.text("general.license", ""):
            (new / "README.md").write_text(f"---\nlicense: {license_}\n---\n", encoding="utf-8")
        gguf_tokenizer.save(paths[0], new)


def _shards(places: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[list[str]]:
    """The tensors, in groups of at most `SHARD_BYTES`, or one."""
    shard: list[str] = []
    size = 0
    for name, (_, shape) in places.items():
        bytes_ = 2 * prod(shape)
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += bytes_
    yield shard


def _tensor(model: _Model, name: str) -> Tensor:
    """A tensor dequantised to bfloat16, its rows in the order of transformers."""
    import torch
    from gguf.quants import dequantize

    stored = model.stored[name]
    data = stored.data if stored.data.ndim > 1 else stored.data[None]
    step = max(1, PIECE // max(1, stored.n_elements // len(data)))
    pieces = [
        torch.from_numpy(dequantize(data[start : start + step], stored.tensor_type).copy()).to(torch.bfloat16)
        for start in range(0, len(data), step)
    ]
    tensor = torch.cat(pieces).view(tuple(reversed(stored.shape.tolist())))
    if not torch.isfinite(tensor).all():
        raise UserError(f"{model.where}: tensor {name} holds numbers that are not finite; download the file again")
    stores = FAMILIES[model.spec.family].gguf
    assert stores is not None, "other families are refused before"
    if not stores.interleaved or not (at := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)):
        return tensor
    heads = model.spec.num_heads if at[1] == "q" else model.spec.num_kv_heads
    return _rotated_by_halves(tensor, heads)


def _rotated_by_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows in the order in which a head's first half is rotated with its second. rows: in that of llama.cpp, in which
    neighbours are rotated with each other."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _values(tensor: ReaderTensor) -> list[float]:
    from gguf.quants import dequantize

    values: list[float] = dequantize(tensor.data, tensor.tensor_type).reshape(-1).tolist()
    return values


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
