"""Rows → batches without padding, and which rows make up which step.

Rows are concatenated; positions restart at 0 in each, and attention stays inside a row (`learn.attention`). Nothing is
padded, so nothing has to be masked as padding, and no pad token can be mistaken for an end token.

Rollouts of one prompt share it: the batch holds the prompt once, with the first of them, and only the completions of
the others, whose tokens attend to that prompt (`Batch.prefixes`). Hidden states and gradients are the same, and a third
of the tokens of a short GRPO step is saved.

With `packing` a batch holds rows up to `max_length` tokens, chosen by best fit: every step then has about the same
cost, on every rank. Without it a batch holds a fixed number of rows, as is usual in the field.

The rows of step k are a pure function of k and the seed (`Order`): resuming needs no loader state, every rank knows the
batches of the others, and a row that made a loss explode can be named afterwards. Rejected: a DataLoader with workers.
Rows are token ids in a mapped file, and concatenating sixteen of them takes microseconds.

Shapes: t tokens of a batch, s supervised ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from distill.objectives import Sampled, TopK

Numbers = npt.NDArray[np.int64]

WINDOW = 8  # batches per window in which rows are sorted by length: more makes their lengths equal and shuffles less
PACKED_WINDOW = 8192  # rows packed together: enough to fill batches well, few enough to mix differently every epoch


@dataclass(frozen=True)
class Row:
    """One conversation as token ids. `ids[prompt_tokens:]` is supervised: the completion and its end token.

    source: number of the mixed set it came from. place: index of its first supervised token among those of all rows.
    teacher: the teacher's most likely tokens at each supervised one, int32 and float32 [supervised, k] (−∞ where not
    known); sampled: what is known of the student's own tokens, float32 [fields of `Sampled`, supervised]. Both None for
    objectives that do not need them.
    """

    key: tuple[str, int]
    ids: npt.NDArray[np.int32]
    prompt_tokens: int
    source: int = 0
    place: int = 0
    teacher: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None = None
    sampled: npt.NDArray[np.float32] | None = None

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Batch:
    """Concatenated rows. `targets_s[i]` is the token to predict at position `positions_s[i]`.

    lengths: tokens of each row, in order. prefixes: for each row the (start, length) of tokens of an earlier row that
    come before its own; length 0 for a row that is stored whole. teacher, sampled: as of `Row`, at the supervised
    tokens.
    """

    input_ids_t: torch.Tensor  # int64
    position_ids_t: torch.Tensor  # int64
    positions_s: torch.Tensor  # int64, into [t]
    targets_s: torch.Tensor  # int64
    lengths: tuple[int, ...]
    prefixes: tuple[tuple[int, int], ...]
    teacher: TopK | None = None
    sampled: Sampled | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""

        def moved(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
            return (tensor.to(device, non_blocking=True) for tensor in tensors)

        ids_t, position_ids_t, positions_s, targets_s = moved(
            (self.input_ids_t, self.position_ids_t, self.positions_s, self.targets_s)
        )
        teacher = None if self.teacher is None else TopK(*moved(self.teacher))
        sampled = None if self.sampled is None else Sampled(*moved(self.sampled))
        return Batch(ids_t, position_ids_t, positions_s, targets_s, self.lengths, self.prefixes, teacher, sampled)


def collate(rows: Sequence[Row]) -> Batch:
    """Concatenate rows and list the supervised positions. Position p predicts token p + 1 of the same row.

    Rollouts of one prompt come together and share it: the last token of the prompt predicts the first of each.
    """
    rows, prefix_lengths = _by_prompt(rows)
    lengths = tuple(len(row.ids) - prefix for row, prefix in zip(rows, prefix_lengths, strict=True))
    starts = np.cumsum((0, *lengths))
    prefixes: list[tuple[int, int]] = []
    position_ids, positions = [], []
    whole = 0  # start of the last row that is stored whole
    for row, prefix, start, length in zip(rows, prefix_lengths, starts[:-1].tolist(), lengths, strict=True):
        whole = whole if prefix else start
        prefixes.append((whole, prefix))
        position_ids.append(np.arange(prefix, prefix + length))
        predicting = np.arange(row.supervised) + start + row.prompt_tokens - prefix - 1
        if prefix:
            predicting[0] = whole + prefix - 1
        positions.append(predicting)
    ids = np.concatenate([row.ids[prefix:] for row, prefix in zip(rows, prefix_lengths, strict=True)])
    return Batch(
        input_ids_t=torch.from_numpy(ids.astype(np.int64)),
        position_ids_t=torch.from_numpy(np.concatenate(position_ids)),
        positions_s=torch.from_numpy(np.concatenate(positions)),
        targets_s=torch.from_numpy(np.concatenate([row.ids[row.prompt_tokens :] for row in rows]).astype(np.int64)),
        lengths=lengths,
        prefixes=tuple(prefixes),
        teacher=_teacher(rows),
        sampled=_sampled(rows),
    )


def _by_prompt(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The rows with those of a prompt together, and how many tokens each shares with the first of its prompt.

    Only rows with `sampled` share: a batch of traces stays as it is.
    """
    together: dict[object, list[Row]] = {}
    for number, row in enumerate(rows):
        prompt = number if row.sampled is None else row.ids[: row.prompt_tokens].tobytes()
        together.setdefault(prompt, []).append(row)
    groups = together.values()
    shared = [row.prompt_tokens if place else 0 for group in groups for place, row in enumerate(group)]
    return [row for group in groups for row in group], shared


def _teacher(rows: Sequence[Row]) -> TopK | None:
    """The teacher's distributions of rows that have them, as wide as the widest."""
    given = [row.teacher for row in rows if row.teacher is not None]
    if not given:
        return None
    assert len(given) == len(rows), "all rows of a batch come with the teacher's distributions, or none"
    width = max(ids.shape[1] for ids, _ in given)
    total = sum(len(ids) for ids, _ in given)
    ids_sk = np.zeros((total, width), np.int64)
    logprobs_sk = np.full((total, width), -np.inf, np.float32)
    start = 0
    for ids, logprobs in given:
        stop = start + len(ids)
        ids_sk[start:stop, : ids.shape[1]], logprobs_sk[start:stop, : ids.shape[1]] = ids, logprobs
        start = stop
    return TopK(torch.from_numpy(ids_sk), torch.from_numpy(logprobs_sk))


def _sampled(rows: Sequence[Row]) -> Sampled | None:
    """What is known of the student's own tokens."""
    given = [row.sampled for row in rows if row.sampled is not None]
    if not given:
        return None
    assert len(given) == len(rows), "all rows of a batch come with what was sampled, or none"
    return Sampled(*torch.from_numpy(np.concatenate(given, axis=1)))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity`: the longest first, each into the fullest bin that still takes it.

    Best-fit decreasing (Johnson 1974) needs at most 11/9 of the optimal number of bins, plus one. Returns the item
    numbers of each bin. The bins' free space is kept as bits of one integer, in which the smallest sufficient space is
    found without scanning the bins: n items cost O(n · capacity / 64).
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free space → bins with exactly that much
    rooms = 0  # bit r is set where a bin has free space r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        assert 0 < length <= capacity, (length, capacity)
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
                rooms ^= 1 << room
            bins[number].append(item)
        else:
            room, number = capacity, len(bins)
            bins.append([item])
        if left := room - length:
            with_room.setdefault(left, []).append(number)
            rooms |= 1 << left
    return bins


@dataclass(frozen=True)
class Batching:
    """How rows become batches and batches become steps. per_step: batches per step, over all ranks.

    packing: tokens per bin, of which a batch has batch_size; None: a batch has batch_size rows.
    """

    batch_size: int
    per_step: int
    seed: int
    packing: int | None = None


class Order:
    """The rows of every optimiser step, from the seed alone.

    Every epoch is another permutation. Unpacked rows are sorted by length inside windows of a few batches, so that the
    rows of a batch have similar lengths; then the batches are shuffled, so that lengths do not come in waves.

    shares: how often an epoch sees the rows of each source (`Row.source`), by default once. With 2.25 an epoch sees all
    rows twice and a quarter of them a third time, another quarter in each epoch: nine times in four epochs.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batching: Batching,
        sources: Sequence[int] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batching = batching
        self.sources = np.zeros(len(lengths), dtype=np.int64) if sources is None else np.asarray(sources)
        self.shares = tuple(shares)
        self._epoch = lru_cache(maxsize=2)(self._batches)
        self._starts = [0]  # the first step of every epoch so far; packed epochs differ in their number of steps

    def step(self, number: int) -> list[list[int]]:
        """The batches (lists of row indices) of optimiser step `number`, from 0. The last step of an epoch may have
        fewer.

        The batch with the most tokens comes first: ranks that take batches in turns then have similar work at a time.
        """
        epoch = self.epoch_of(number)
        place = (number - self._starts[epoch]) * self.batching.per_step
        batches = self._epoch(epoch)[place : place + self.batching.per_step]
        return sorted(batches, key=lambda batch: -int(self.lengths[batch].sum()))

    def epoch_of(self, number: int) -> int:
        """The epoch that step `number` belongs to, from 0."""
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + self._steps(len(self._starts) - 1))
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def steps(self, epochs: float) -> int:
        """Number of steps in this many epochs, a fraction of a step rounded up."""
        whole = int(epochs)
        while len(self._starts) <= whole:
            self._starts.append(self._starts[-1] + self._steps(len(self._starts) - 1))
        part = round(epochs - whole, 6)
        return self._starts[whole] + (int(np.ceil(part * self._steps(whole))) if part else 0)

    def _steps(self, epoch: int) -> int:
        return -(-len(self._epoch(epoch)) // self.batching.per_step)

    def _batches(self, epoch: int) -> list[list[int]]:
        draw = np.random.default_rng([self.batching.seed, epoch])
        order = draw.permutation(self._rows(epoch))
        batches = self._packed(order) if self.batching.packing else self._sorted(order)
        draw.shuffle(batches)
        return batches

    def _rows(self, epoch: int) -> Numbers:
        """The rows of an epoch; some several times, as the shares demand."""
        parts = []
        for source, share in enumerate(self.shares):
            rows = np.flatnonzero(self.sources == source)
            draw = np.random.default_rng([self.batching.seed, source])
            turn = draw.permutation(rows)  # the same in every epoch: shares of rows come one after the other
            first, last = (round(len(rows) * share * number) for number in (epoch, epoch + 1))
            parts.append(turn[np.arange(first, last) % max(len(rows), 1)])
        return np.concatenate(parts)

    def _sorted(self, order: Numbers) -> list[list[int]]:
        batches: list[list[int]] = []
        for window in cut(order, WINDOW * self.batching.batch_size):
            by_length = window[np.argsort(self.lengths[window], kind="stable")]
            batches.extend(batch.tolist() for batch in cut(by_length, self.batching.batch_size))
        return batches

    def _packed(self, order: Numbers) -> list[list[int]]:
        assert self.batching.packing is not None
        bins: list[list[int]] = []
        for window in cut(order, PACKED_WINDOW):
            packed = best_fit(self.lengths[window].tolist(), self.batching.packing)
            bins.extend([int(window[i]) for i in items] for items in packed)
        if self.batching.batch_size == 1:
            return bins
        shuffled = np.random.default_rng(len(bins)).permutation(len(bins))  # else the emptiest bins share a batch
        return [[row for i in group for row in bins[i]] for group in cut(shuffled, self.batching.batch_size)]


def cut(array: Numbers, size: int) -> Iterator[Numbers]:
    """Consecutive pieces of `size` elements; the last may be shorter."""
    for start in range(0, len(array), size):
        yield array[start : start + size]
