"""The work of one process among those that train together, or of the only one.

Ranks that torchrun started run the same command; the first one encodes, proves, holds the run's lock and prints, and
the others wait here until it is done.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.artefacts import RunPaths, TrainSummary
from distill.fingerprint import digest
from distill.models import Models
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.train.learn.fit import Task, fit
from distill.train.ranks import memory
from distill.train.ranks.world import Layout, World
from distill.train.rows import stored
from distill.train.rows.stored import TrainingSet
from distill.train.student.model import configuration

if TYPE_CHECKING:
    from distill.train.rollouts.questions import Questions


def join(recipe: Recipe, directory: Path) -> World:
    """Become one of the processes that train together. Waits until all are there."""
    return World(recipe.train.report_to, str(RunPaths(directory).checkpoints))


def train_rank(
    recipe: Recipe, directory: Path, world: World | None = None, questions: "Questions | None" = None
) -> TrainSummary:
    """Train on the rows that were prepared in the run's directory; returns the stage's summary. questions: of a
    training with rollouts, where this process has read them already.

    Errors: UserError when the training does not fit into memory; WorkError as `fit`.
    """
    paths = RunPaths(directory)
    models = Models(recipe, directory)
    if questions is None and recipe.train.objective.rollout_settings is not None:
        from distill.train.rollouts.questions import questions_of

        questions = questions_of(recipe, models.base.chat)
    world = world or join(recipe, directory)
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
    largest: TrainingSet | tuple[int, int] | None = prepared(recipe, paths)
    engines = None
    if questions is not None:
        from distill.train.rollouts import setup

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        largest = questions.largest_batch(recipe.train)
        engines = setup.engines_beside(recipe, models, questions, device, processes)
    assert largest is not None, "an objective reads traces or rollouts"
    return memory.check(recipe, largest, configuration(models.base.directory, recipe.train), processes, engines)


def follow(recipe: Recipe, directory: Path) -> None:
    """Train with the first rank once it has prepared the rows, or leave when it has nothing to do."""
    world = join(recipe, directory)
    if not world.any(False):
        train_rank(recipe, directory, world)
    world.close()
