"""A judge model's opinion of the response, for what no program and no gold answer can say.

The filter asks the recipe's judge (`judge:`) with a prompt of its own, so that it can look for something else than a
right answer: a helpful one, one in the right language, one without an excuse. A judgement without a verdict drops the
trace under a reason of its own; a request that fails is no verdict, and ends the stage.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from pydantic import Field

from distill.filters.base import Candidate, Example, Judging, Resources, StreamFilter
from distill.grading.grade import Grade
from distill.recipe.rubric import Rubric
from distill.traces.trace import Verdict

K = TypeVar("K")

PROMPT = """\
Judge whether a response to a request is good enough to learn from: it does what is asked, its statements are right as
far as you can tell, and it is complete and clear.

Request:
{{question}}

Response:
{{response}}

Is the response good enough to learn from? Explain briefly, and end with one line, "Judgement: Yes" or "Judgement: No".\
"""


class ModelJudge(Rubric, StreamFilter):
    """Keep traces whose response the judge of the recipe accepts."""

    prompt: str = Field(
        PROMPT,
        description="text that the judge is asked: {{question}} is the prompt, {{answer}} the gold answer and "
        "{{response}} the response without its reasoning",
    )

    name = "judge"
    version = 2  # scores on another scale, labels within quotes
    passing = "accepted"
    reasons: ClassVar[Mapping[str, str]] = {
        "accepted": "the judge accepts the response",
        "rejected": "it does not",
        "unverifiable": "there is no verdict, for the reason named",
    }
    examples = (
        Example("accepted", "<think>a</think>b", outcome=Grade("correct", "judged", {"said": "Yes"})),
        Example("rejected", "<think>a</think>b", outcome=Grade("wrong", "judged", {"said": "No"})),
        Example("unverifiable: no verdict", "<think>a</think>b", outcome=Grade("unverifiable", "no verdict")),
    )

    def check(self, resources: Resources) -> None:
        """Raise UserError when the judge's card, directory or key is missing."""
        resources.judge()

    @contextmanager
    def opened(self, resources: Resources) -> Iterator[Judging]:
        """Open the judge. Outcomes are grades. Errors: UserError when it cannot be used."""
        with resources.judge() as judge:
            assert judge is not None, "the recipe refuses filter.judge without a judge"
            answer_judge = judge

            def judging(candidates: Iterable[tuple[K, Candidate]]) -> Iterator[tuple[K, object]]:
                items = ((key, each.trace.prompt, each.trace.answer) for key, each in candidates)
                return answer_judge.grade(items, self)

            yield judging

    def verdict_on(self, outcome: object) -> Verdict:
        """Turn the grade into a verdict. The evidence has what the judge said, and the end of its judgement."""
        assert isinstance(outcome, Grade)
        reasons = {"correct": "accepted", "wrong": "rejected", "unverifiable": f"unverifiable: {outcome.reason}"}
        shown = {key: outcome.evidence[key] for key in ("said", "judgement", "refusal") if key in outcome.evidence}
        return self.verdict(reasons[outcome.verdict], **shown)
