"""Short hashes of what a stage rests on: two runs of a stage may only be joined when they are the same.

Standard library only: a finished stage must be recognised at once, before torch is imported.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from distill.errors import UserError

READ = {".json", ".safetensors", ".jinja", ".model", ".txt"}  # configuration, weights, template, tokenizer
WHOLE = 64 << 20  # files up to this many bytes are hashed whole
PIECES, PIECE = 64, 1 << 20  # larger ones: this many evenly spaced pieces of this many bytes


def weights_hash(model_dir: Path) -> str:
    """16 hex digits over a model directory's configuration, tokenizer and weights.

    A weight file above 64 MiB is sampled: two trainings of one model differ nearly everywhere, and reading 140 GB to
    learn that nothing changed would take minutes at every start.
    """
    return files_hash(sorted(p for p in model_dir.iterdir() if p.suffix in READ))


def files_hash(paths: Sequence[Path]) -> str:
    """16 hex digits over names and contents of files, sampled as in `weights_hash`. Errors: OSError."""
    return _hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@cache
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Once in a process: several phases of a training, and several stages, have the same models."""
    total = hashlib.sha256()
    for path, size, _ in files:
        total.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                total.update(file.read())
                continue
            for piece in range(PIECES):
                file.seek((size - PIECE) * piece // (PIECES - 1))
                total.update(file.read(PIECE))
    return total.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """16 hex digits over a file, which is read whole. UserError when it is not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a path is relative to where the command runs")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def path_hash(path: Path) -> str:
    """`file_hash`, or 16 hex digits over the names and contents of a directory's files, hidden ones left out."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return digest([[file.relative_to(path).as_posix(), file_hash(file)] for file in files])


def digest(value: Any) -> str:
    """16 hex digits over a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
