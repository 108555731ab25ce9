"""What a process does that is one of several, or the only one.

Ranks that torchrun started run the same command; the first one encodes, proves, holds the run's lock and speaks, and
the others wait here for its word.
"""

from pathlib import Path

from distill import catalog
from distill.artefacts import TrainSummary
from distill.recipe import Recipe
from distill.train import data, memory
from distill.train.fit import Task, fit
from distill.train.prepare import TOKENS
from distill.train.student import configuration
from distill.train.world import World


def join(recipe: Recipe, directory: Path) -> World:
    """Become one of the processes that train together. Waits until all are there."""
    return World(recipe.train.report_to, str(directory / "checkpoints"))


def train_rank(recipe: Recipe, directory: Path, world: World | None = None) -> TrainSummary:
    """Train on the rows that were prepared in the run's directory; gives the stage's summary."""
    rows = data.load(directory / TOKENS)
    assert rows is not None, "rows are prepared before ranks train on them"
    student = catalog.load_student(recipe.student)
    weights = catalog.resolve_weights("student", recipe.student)
    shares = tuple(source.weight for source in recipe.train.data)
    world = world or join(recipe, directory)
    layout = memory.check(recipe, rows, configuration(weights, recipe.train), world.size)
    world.layout = "fsdp" if world.any(layout == "fsdp") else layout  # what is free may look different to each rank
    task = Task(recipe, student, weights, catalog.training_template(recipe), directory, shares)
    return fit(task, rows, world)


def follow(recipe: Recipe, directory: Path) -> None:
    """Train with the first rank once it says so (`train.train`), or leave when it has nothing to do."""
    world = join(recipe, directory)
    if not world.any(False):
        train_rank(recipe, directory, world)
    world.close()
