"""What a run adds to the resources of its filters. The recipe imports the filters, so only this room knows it."""

from distill.filters.base import Resources
from distill.recipe import Recipe


class RunResources(Resources):
    """The resources of the filters of a recipe. Made anew in every process that judges, from the recipe alone."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.seed)
        self.recipe = recipe
