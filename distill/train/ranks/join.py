"""The work of one process among those that train together, or of the only one.

Ranks that torchrun started run the same command. The first one encodes, proves, holds the run's lock, prints, and in a
recipe with phases also samples and filters. The others wait in `follow` for what it announces: the number of the
training to join, as often as there is one, then the end. A training is not announced before its files are complete, so
that the others read no more than their recipe and the run directory. Rejected: announcing every phase in order, with a
flag for those that are finished. An error between two phases would have to announce those that are left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from distill.artefacts import RunPaths, TrainSummary
from distill.fingerprint import digest
from distill.models import Models
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.train.learn.fit import Task, fit
from distill.train.ranks import environment, memory
from distill.train.ranks.world import Layout, World
from distill.train.rows import stored
from distill.train.rows.stored import TrainingSet
from distill.train.student.model import configuration

if TYPE_CHECKING:
    from distill.train.rollouts.questions import Questions

END = -1
WAIT = timedelta(days=365)  # a phase may sample its own answers for days before it trains


def train_rank(recipe: Recipe, directory: Path, questions: "Questions | None" = None) -> TrainSummary:
    """Train on the rows that were prepared in the run's directory; returns the stage's summary. questions: of a
    training with rollouts, where this process has read them already.

    Errors: UserError when the training does not fit into memory; WorkError as `fit`.
    """
    paths = RunPaths(directory)
    models = Models(recipe, directory)
    if questions is None and recipe.train.objective.rollout_settings is not None:
        from distill.train.rollouts.questions import questions_of

        questions = questions_of(recipe, models.base.chat)
    world = World(recipe.train.report_to, str(paths.checkpoints))
    fitting = layout(recipe, models, paths, questions, world.size)
    world.layout = "fsdp" if world.any(fitting == "fsdp") else fitting  # free memory may look different to each rank
    record = StageRecord.read(paths.record("train"), "run `distill train` again")
    shares = tuple(source.weight for source in recipe.train.data)
    task = Task(recipe, models, paths, digest(record.settings), shares, questions)
    return fit(task, prepared(recipe, paths), world)


def prepared(recipe: Recipe, paths: RunPaths) -> TrainingSet | None:
    """The encoded rows of a run; None for an objective that reads no traces."""
    if not recipe.train.objective.reads_data:
        return None
    rows = stored.load(paths.tokens)
    assert rows is not None, "rows are prepared before ranks train on them"
    return rows


def layout(
    recipe: Recipe, models: Models, paths: RunPaths, questions: "Questions | None", processes: int = 1
) -> Layout:
    """The layout in which a training fits into memory. Errors: UserError when it does in none."""
    rows, engines = prepared(recipe, paths), None
    largest = None if rows is None else memory.largest_batch(rows, recipe.train)
    if questions is not None:
        from distill.train.rollouts import setup

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        written = questions.largest_batch(recipe.train)
        largest = written if largest is None else (max(largest[0], written[0]), max(largest[1], written[1]))
        engines = setup.engines_beside(recipe, models, questions, device, processes)
    assert largest is not None, "an objective reads traces or rollouts"
    return memory.check(recipe, largest, configuration(models.base.directory, recipe.train), processes, engines)


class Announcements:
    """What the first rank tells those that torchrun started with it. Waits until all are there."""

    def __init__(self) -> None:
        World()  # joins them; each training has one of its own
        self._group = dist.new_group(backend="gloo", timeout=WAIT)
        self._training = False

    def begin(self, number: int) -> None:
        """Announce a training."""
        self._exchange(number)
        self._training = True

    def finish(self) -> None:
        """Note that all ranks are done with the training: they wait again."""
        self._training = False

    def end(self) -> None:
        """Announce that no training is left. After one that failed nobody waits for it: the others failed in it too."""
        if not self._training:
            self._exchange(END)

    def receive(self) -> int | None:
        """The number of the next training; None when none is left."""
        number = self._exchange(END)
        return None if number == END else number

    def _exchange(self, number: int) -> int:
        value = torch.tensor([number])
        dist.broadcast(value, src=0, group=self._group)
        return int(value)


@contextmanager
def leading() -> Iterator[Announcements | None]:
    """Around all trainings of a command, on the first rank: what the others wait for. None without torchrun."""
    if not environment.several():
        yield None
        return
    announcements = Announcements()
    try:
        yield announcements
    finally:
        announcements.end()


def follow(training: Callable[[int], tuple[Recipe, Path]]) -> None:
    """Train with the first rank whatever it announces. training: recipe and run directory by number."""
    announcements = Announcements()
    while (number := announcements.receive()) is not None:
        train_rank(*training(number))
    dist.destroy_process_group()
