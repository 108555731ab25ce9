"""Where the loop's rows come from, step by step.

The loop knows steps, gradients and checkpoints; a feed knows rows. `StoredFeed` has the rows that were encoded before
training began; `rollouts.feed.RolloutFeed` lets the student write them between the steps. Everything else of a training
is the same for both.

The rows of step k are the same on every rank and after every resume: the loop asks for step k, and for no state.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import JsonValue

from distill.recipe import Train
from distill.train.rows.batches import Batching, Order, Row
from distill.train.rows.stored import Counts, TrainingSet
from distill.train.rows.teacher import Teaching

Figures = Mapping[str, JsonValue]


class Feed(ABC):
    """The rows of a training. total: optimiser steps. counts: of the encoded rows. rollouts, rollout_tokens: what the
    student wrote for the steps so far."""

    total: int
    counts: Counts
    rollouts = 0
    rollout_tokens = 0

    @abstractmethod
    def step(self, number: int) -> list[list[Row]]:
        """The batches of optimiser step `number` (from 0), of all ranks. Steps are asked for in order, from any first
        one; a batch has at least one row. No batches: there is nothing to learn from in this step."""

    @abstractmethod
    def epoch(self, steps: int) -> float:
        """Passes over the data after this many steps."""

    @property
    def supervised_per_epoch(self) -> int:
        """Supervised tokens of one pass over the data, 0 where they are not known beforehand."""
        return 0

    def held_out(self) -> list[list[Row]]:
        """Batches whose loss is evaluated and not trained."""
        return []

    def keys(self, number: int) -> list[tuple[str, int]]:
        """The traces of a step that was asked for."""
        return [row.key for batch in self.step(number) for row in batch]

    def after(self, number: int, parts: Mapping[str, float]) -> Figures:
        """Figures of a step for the log, besides the means of its loss parts, which are given.

        Called once for every step that was trained, in order. Errors: WorkError where training should end here.
        """
        return {}

    def saved(self) -> JsonValue:
        """What must be in a checkpoint of this feed, besides the number of the step."""
        return None

    def restore(self, state: JsonValue) -> None:
        """Take over what `saved` returned; None at the beginning of a training."""
        assert state is None, "this feed has no state"

    def checkpointed(self) -> None:
        """Called on the first rank after a checkpoint was written."""
        return None


class StoredFeed(Feed):
    """Rows that were encoded before training. ranks: processes that train together. shares: as of `Order`. teaching:
    the teacher's distributions, for objectives that need them.

    rows: all rows. numbers: indices of the trained ones.
    """

    def __init__(
        self,
        rows: TrainingSet,
        settings: Train,
        ranks: int = 1,
        shares: tuple[float, ...] = (1.0,),
        teaching: Teaching | None = None,
    ) -> None:
        self.rows, self.settings, self.teaching, self.counts = rows, settings, teaching, rows.counts
        self.numbers = [i for i, held_out in enumerate(rows.held_out.tolist()) if not held_out]
        batching = Batching(
            settings.per_device_train_batch_size,
            settings.batches_per_step(ranks),
            settings.seed,
            settings.max_length if settings.packing else None,
        )
        trained = rows.lengths[self.numbers].tolist(), rows.sources[self.numbers].tolist()
        self.order = Order(trained[0], batching, trained[1], shares)
        self.total = settings.max_steps or self.order.steps(settings.num_train_epochs)

    def indices(self, number: int) -> list[list[int]]:
        """The batches of a step as indices among all rows."""
        return [[self.numbers[i] for i in batch] for batch in self.order.step(number)]

    def step(self, number: int) -> list[list[Row]]:
        """See `Feed`."""
        return self._batches(self.indices(number))

    def epoch(self, steps: int) -> float:
        """See `Feed`."""
        if not steps:
            return 0.0
        epoch = self.order.epoch_of(steps - 1)
        first, following = self.order.steps(epoch), self.order.steps(epoch + 1)
        return round(epoch + (steps - first) / (following - first), 4)

    @property
    def supervised_per_epoch(self) -> int:
        """See `Feed`. The rows of each source count as often as an epoch sees them."""
        sources, numbers = self.order.sources, np.asarray(self.numbers, np.int64)
        counts = (self.rows.supervised(numbers[sources == source]) for source in range(len(self.order.shares)))
        return round(sum(share * count for share, count in zip(self.order.shares, counts, strict=True)))

    def held_out(self) -> list[list[Row]]:
        """See `Feed`."""
        held_out, size = self.rows.held_out.nonzero()[0].tolist(), self.settings.per_device_train_batch_size
        return self._batches([held_out[i : i + size] for i in range(0, len(held_out), size)])

    def _batches(self, batches: Sequence[Sequence[int]]) -> list[list[Row]]:
        return [[self.row(i) for i in batch] for batch in batches]

    def row(self, i: int) -> Row:
        """Row number i among all, with the teacher's distributions."""
        row = self.rows[i]
        return row if self.teaching is None else self.teaching.with_row(row)
