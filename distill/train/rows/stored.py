"""The encoded rows in a run's `tokens/`: made once, mapped into memory, verified before they are trained on.

A row is token ids and the length of its prompt. That length is the loss mask, because the supervised part is the end of
the row: the completion and the token that closes it. No -100 is stored, so no pass over a mask can get it wrong.

800,000 traces of a reasoning model are 26 GB of ids, so they lie in a file that is mapped, not read: all ranks of a
machine share its pages. The directory is a cache. `rows.json` carries the fingerprint of everything it was made from
and a hash of every file; with another fingerprint, or with a damaged file, the rows are encoded again.

    tokens/ids.bin         int32, the rows one after the other
    tokens/index.parquet   for every row: its trace, its source, lengths of row and prompt, whether it is held out
    tokens/teacher-*.npy   the teacher's distributions, for objectives that need them (`rows.teacher`)
    tokens/rows.json       fingerprint, counts, the proofs of the integrity gate, the hashes; written last
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distill.artefacts import Artefact
from distill.errors import UserError
from distill.integrity import FileRecord, first_damage, record_files
from distill.train.rows.batches import Row

IDS, INDEX, RECORD = "ids.bin", "index.parquet", "rows.json"
COLUMNS = ("id", "sample", "source", "start", "length", "prompt_tokens", "held_out", "truncated")


@dataclass
class Counts:
    """Rows and tokens, before and after encoding. truncated_tokens: cut off. plain_rows: without a think block.
    wrapped_rows: whose reasoning was put between think tags; undivided_rows: dropped because it was not found."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    held_out_rows: int = 0
    plain_rows: int = 0
    wrapped_rows: int = 0
    undivided_rows: int = 0


class RowsRecord(Artefact):
    """`rows.json`. proved: the lines of the integrity gate. files: the other files of the directory."""

    fingerprint: str
    counts: Counts
    proved: tuple[str, ...]
    files: dict[str, FileRecord]


@dataclass
class TrainingSet:
    """Rows on the disk, ordered by source and key. Indexing returns a `Row`, whose ids are read on use.

    Of every row: key (prompt id, sample), start (in ids), length and prompt_tokens (tokens), source, held_out,
    truncated.
    """

    ids: npt.NDArray[np.int32]
    keys: list[tuple[str, int]]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    prompt_tokens: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int16]
    held_out: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    counts: Counts
    proved: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        supervised = self.lengths - self.prompt_tokens
        self.places = np.cumsum(supervised) - supervised

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Row:
        start = int(self.starts[i])
        ids = self.ids[start : start + int(self.lengths[i])]
        return Row(self.keys[i], ids, int(self.prompt_tokens[i]), int(self.sources[i]), int(self.places[i]))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def end(self) -> int:
        """The id of the token that closes a row; truncated rows have none."""
        return int(self[int(np.argmin(self.truncated))].ids[-1])

    def supervised(self, rows: Iterable[int]) -> int:
        """Number of supervised tokens of these rows."""
        chosen = np.fromiter(rows, dtype=np.int64)
        return int((self.lengths[chosen] - self.prompt_tokens[chosen]).sum())

    def tokens(self, rows: Iterable[int]) -> int:
        """Number of tokens of these rows."""
        return int(self.lengths[np.fromiter(rows, dtype=np.int64)].sum())


def store(rows: TrainingSet, directory: Path, fingerprint: str) -> None:
    """Write the record of a directory whose other files are written: from now on it counts as whole."""
    files = record_files(directory, (path for path in directory.iterdir() if path.name != RECORD))
    RowsRecord(fingerprint=fingerprint, counts=rows.counts, proved=rows.proved, files=files).write(directory / RECORD)


def load(directory: Path, fingerprint: str | None = None) -> TrainingSet | None:
    """The rows of a directory made from the same things (from anything, without a fingerprint); else None.

    The index is verified, the ids are not: `damage` reads all files.
    """
    record = _record(directory)
    if record is None or fingerprint not in (None, record.fingerprint):
        return None
    if any(record.files[name].damage(directory / name) for name in (INDEX,)):
        return None
    if not (directory / IDS).is_file() or (directory / IDS).stat().st_size != record.files[IDS].size:
        return None
    return from_index(directory, pq.read_table(directory / INDEX), record.counts, record.proved)


def damage(directory: Path, fingerprint: str) -> str | None:
    """What is wrong with rows that could be used otherwise, as "PATH is missing"; None where all files are whole, or
    the directory holds other rows or none. Reads all files."""
    if not directory.is_dir():
        return None
    record = _record(directory)
    if record is None:
        return f"{directory / RECORD} is {'damaged' if (directory / RECORD).exists() else 'missing'}"
    if record.fingerprint != fingerprint:
        return None
    return first_damage(directory, record.files)


def _record(directory: Path) -> RowsRecord | None:
    try:
        record = RowsRecord.read_if_there(directory / RECORD, "the rows are encoded again")
    except UserError:
        return None
    return record if record is not None and {IDS, INDEX} <= record.files.keys() else None


def from_index(directory: Path, index: pa.Table, counts: Counts, proved: Sequence[str] = ()) -> TrainingSet:
    """The rows that an index (`COLUMNS`) describes, their ids mapped. Errors: ValueError when the two disagree."""
    column = {name: index[name].to_numpy() for name in index.column_names if name != "id"}
    ids = np.memmap(directory / IDS, dtype=np.int32, mode="r")
    if len(ids) != column["length"].sum():
        raise ValueError(f"{directory / IDS} has another length than its index says")
    return TrainingSet(
        ids=ids,
        keys=list(zip(index["id"].to_pylist(), column["sample"].tolist(), strict=True)),
        starts=column["start"],
        lengths=column["length"],
        prompt_tokens=column["prompt_tokens"],
        sources=column["source"],
        held_out=column["held_out"].astype(bool),
        truncated=column["truncated"].astype(bool),
        counts=counts,
        proved=tuple(proved),
    )
