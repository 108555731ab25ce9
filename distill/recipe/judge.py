"""`judge:` in a recipe: the model that grades answers which no program can compare.

It grades the prompts of task `judge`, in `filter.correct` and in benchmarks, and serves the filter `judge`, which asks
it with a prompt of its own. One judge a recipe: two would be two recipes to compare.
"""

from typing import Annotated

from pydantic import Field, model_validator

from distill.recipe.generate import Budget
from distill.recipe.rubric import Rubric
from distill.recipe.sampling import SamplingSettings
from distill.recipe.server import AnyServer, LaunchedServer
from distill.section import Free

PROMPT = """\
Compare a response with the reference answer to a question. The reference answer is right: do not solve the question
yourself. The response is right if its final answer says the same as the reference answer, whatever its wording, its
notation or its detail; it is wrong if it says something else, hedges between several answers, or gives none.

Question:
{{question}}

Reference answer:
{{answer}}

Response:
{{response}}

Is the response right? Explain briefly, and end with one line, "Judgement: Yes" or "Judgement: No"."""


class Judge(Rubric):
    """A model that judges answers."""

    teacher: str | None = Field(
        None, description="model that judges: a teacher card (name or path), or a model directory on this machine"
    )
    server: AnyServer | None = Field(
        None, description="server that has the judge, in place of the card's; null: the card's, else the local engine"
    )
    prompt: str = Field(
        PROMPT,
        description="text that the judge is asked, for prompts of task judge: {{question}} is the question, "
        "{{answer}} the gold answer and {{response}} the response without its reasoning",
    )
    sampling: SamplingSettings = Field(
        SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=4096),
        description="how the judge's tokens are drawn; max_new_tokens is reduced to half of the judge's context",
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed of the judge's sampling")
    budget: Annotated[Budget | None, Free] = Field(
        None, description="what may be spent on judgements, over all sessions; null: no limit"
    )
    max_batch: Annotated[int, Free] = Field(64, ge=1, description="judgements under way at once")

    @model_validator(mode="after")
    def is_somewhere(self) -> "Judge":
        """Errors: ValueError for a judge without a model."""
        if self.teacher is None and (self.server is None or isinstance(self.server, LaunchedServer)):
            raise ValueError("one of `teacher` and `server` (with a `url`) is needed")
        if self.budget is not None and self.budget.hours is not None:
            raise ValueError("budget: the hours of a judge are not counted; use `tokens` or `cost`")
        return self
