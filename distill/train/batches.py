"""Rows → batches without padding, and which rows make up which step.

Rows are laid end to end; positions restart at 0 in each, and attention stays inside a row (`train.attention`). Nothing
is padded, so nothing has to be masked as padding, and no pad token can be mistaken for an end token.

With `packing` a batch takes rows up to `max_length` tokens, chosen by best fit: every step then does about the same
work, on every rank. Without it a batch takes a number of rows, as the field counts batches.

Which rows make up step k is a pure function of k and the seed (`Order`): resuming needs no state of a loader, every
rank knows what the others do, and a row that made a loss explode is named after the fact. Rejected: a DataLoader with
workers. Rows are token ids in a mapped file, and laying sixteen of them end to end costs microseconds.

Shapes: t tokens of a batch, s supervised ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

WINDOW = 8  # batches of a window in which rows are sorted by length: more makes batches more alike and shuffles less
PACKED_WINDOW = 8192  # rows packed together: many enough to fill batches, few enough to mix them anew every epoch


@dataclass(frozen=True)
class Row:
    """One conversation as token ids. `ids[prompt_tokens:]` is supervised: the completion and its end token.

    source: which of the mixed sets it came from. place: of its first supervised token among those of all rows.
    """

    key: tuple[str, int]
    ids: np.ndarray  # int32 [length]
    prompt_tokens: int
    source: int = 0
    place: int = 0

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Batch:
    """Rows end to end. `targets_s[i]` is what the model must say at position `positions_s[i]`.

    lengths: tokens of each row, in their order. places_s: of the supervised tokens among those of all rows, for what is
    stored beside the ids, such as a teacher's log-probabilities.
    """

    input_ids_t: torch.Tensor  # int64
    position_ids_t: torch.Tensor  # int64
    positions_s: torch.Tensor  # int64, into [t]
    targets_s: torch.Tensor  # int64
    lengths: tuple[int, ...]
    places_s: np.ndarray  # int64

    def to(self, device: torch.device) -> "Batch":
        names = ("input_ids_t", "position_ids_t", "positions_s", "targets_s")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(rows: Sequence[Row]) -> Batch:
    """Lay rows end to end and list the supervised positions. Position p predicts token p + 1 of the same row."""
    lengths = tuple(len(row.ids) for row in rows)
    starts = np.cumsum((0, *lengths))
    ids_t = np.concatenate([row.ids for row in rows]).astype(np.int64)
    targets_at = np.concatenate(
        [np.arange(start + row.prompt_tokens, start + len(row.ids)) for start, row in zip(starts, rows, strict=False)]
    )
    return Batch(
        input_ids_t=torch.from_numpy(ids_t),
        position_ids_t=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        positions_s=torch.from_numpy(targets_at - 1),
        targets_s=torch.from_numpy(ids_t[targets_at]),
        lengths=lengths,
        places_s=np.concatenate([np.arange(row.place, row.place + row.supervised) for row in rows]),
    )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity`: the longest first, each into the fullest bin that still takes it.

    Best-fit decreasing (Johnson 1974) needs at most 11/9 of the fewest possible bins, and one more. Returns the item
    numbers of each bin. The remaining rooms are bits of one integer, in which the smallest room that is enough is found
    without looking at the bins: n items cost O(n · capacity / 64).
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room → bins that have just so much
    rooms = 0  # bit r is set where some bin has room r
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
    """How rows become batches and batches become steps. per_step: batches of a step, on all ranks together.

    packing: tokens of a batch's bins, or None: then batches are counted in rows.
    """

    batch_size: int
    per_step: int
    seed: int
    packing: int | None = None


class Order:
    """Which rows make up which optimiser step, for ever, from the seed alone.

    Every epoch is a permutation of its own. Unpacked rows are sorted by length inside windows of a few batches, so that
    the rows of a batch are of like length; then the batches are shuffled, so that lengths do not come in waves.

    shares: how often an epoch sees the rows of each source (`Row.source`), by default once. Of 2.25, all rows twice,
    and another quarter of them in every epoch: four epochs see each row nine times.
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
        self._starts = [0]  # the first step of every epoch that was asked for; packed epochs differ in their length

    def step(self, number: int) -> list[list[int]]:
        """The batches (lists of row indices) of optimiser step `number`, from 0. An epoch's last may have fewer.

        The one with the most tokens comes first: ranks that take them in turns have about the same to do at a time.
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
        """Steps of so many epochs, a part of one rounded up."""
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

    def _rows(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, some of them several times where the shares say so."""
        parts = []
        for source, share in enumerate(self.shares):
            rows = np.flatnonzero(self.sources == source)
            draw = np.random.default_rng([self.batching.seed, source])
            turn = draw.permutation(rows)  # the same in every epoch: shares of rows come one after the other
            first, last = (round(len(rows) * share * number) for number in (epoch, epoch + 1))
            parts.append(turn[np.arange(first, last) % max(len(rows), 1)])
        return np.concatenate(parts)

    def _sorted(self, order: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        for window in cut(order, WINDOW * self.batching.batch_size):
            by_length = window[np.argsort(self.lengths[window], kind="stable")]
            batches.extend(batch.tolist() for batch in cut(by_length, self.batching.batch_size))
        return batches

    def _packed(self, order: np.ndarray) -> list[list[int]]:
        assert self.batching.packing is not None
        bins: list[list[int]] = []
        for window in cut(order, PACKED_WINDOW):
            packed = best_fit(self.lengths[window].tolist(), self.batching.packing)
            bins.extend([int(window[i]) for i in items] for items in packed)
        if self.batching.batch_size == 1:
            return bins
        shuffled = np.random.default_rng(len(bins)).permutation(len(bins))  # or the emptiest bins share a batch
        return [[row for i in some for row in bins[i]] for some in cut(shuffled, self.batching.batch_size)]


def cut(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
