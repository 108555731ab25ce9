"""The work of one process among those that train together, or of the only one.

Ranks that torchrun started run the same command; the first one encodes, proves, holds the run's lock and prints, and
the others wait here until it is done.
"""

from pathlib import Path

from distill.artefacts import RunPaths, TrainSummary
from distill.fingerprint import digest
from distill.models import Models
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.train.learn.fit import Task, fit
from distill.train.ranks import memory
from distill.train.ranks.world import World
from distill.train.rows import stored
from distill.train.rows.stored import TrainingSet
from distill.train.student.model import configuration


def join(recipe: Recipe, directory: Path) -> World:
    """Become one of the processes that train together. Waits until all are there."""
    return World(recipe.train.report_to, str(RunPaths(directory).checkpoints))


def train_rank(recipe: Recipe, directory: Path, world: World | None = None) -> TrainSummary:
    """Train on the rows that were prepared in the run's directory; returns the stage's summary.

    Errors: UserError when the training does not fit into memory; WorkError as `fit`.
    """
    paths = RunPaths(directory)
    models = Models(recipe, directory)
    rows: TrainingSet | None = None
    if recipe.train.objective.reads_data:
        rows = stored.load(paths.tokens)
        assert rows is not None, "rows are prepared before ranks train on them"
    world = world or join(recipe, directory)
    largest: TrainingSet | tuple[int, int] | None = rows
    engines = None
    if recipe.train.objective.rollout_settings is not None:
        from distill.train.rollouts import setup

        largest = setup.largest_batch(recipe, models)
        engines = setup.engines_beside(recipe, models, world)
    assert largest is not None, "an objective reads traces or rollouts"
    layout = memory.check(recipe, largest, configuration(models.base.directory, recipe.train), world.size, engines)
    world.layout = "fsdp" if world.any(layout == "fsdp") else layout  # free memory may look different to each rank
    record = StageRecord.read(paths.record("train"), "run `distill train` again")
    shares = tuple(source.weight for source in recipe.train.data)
    return fit(Task(recipe, models, paths, digest(record.settings), shares), rows, world)


def follow(recipe: Recipe, directory: Path) -> None:
    """Train with the first rank once it has prepared the rows, or leave when it has nothing to do."""
    world = join(recipe, directory)
    if not world.any(False):
        train_rank(recipe, directory, world)
    world.close()
