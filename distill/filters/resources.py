"""What a run adds to the resources of its filters. The recipe imports the filters, so only this room knows it."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from distill.filters.base import Resources
from distill.grading.grade import AnswerJudge
from distill.grading.judge import JudgeModel
from distill.models import judge_of
from distill.recipe import Recipe


class RunResources(Resources):
    """The resources of the filters of a recipe. Made anew in every process that judges, from the recipe alone.

    judgements: the directory in which a judge's answers are kept; None keeps none.
    """

    def __init__(self, recipe: Recipe, judgements: Path | None = None) -> None:
        super().__init__(recipe.seed)
        self.recipe = recipe
        self._judgements = judgements

    def judge(self, user: str) -> AbstractContextManager[AnswerJudge | None]:
        """The judge of the recipe; see the base. Errors: UserError when its card or directory cannot be used."""
        settings = self.recipe.judge
        if settings is None:
            return nullcontext()
        return JudgeModel(settings, judge_of(settings), self.recipe.engine, self._judgements, f"filter-{user}")
