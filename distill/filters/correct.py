"""Correctness: the grade of the answer, as a verdict. Unverifiable is dropped like wrong, but under its own reasons."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

from pydantic import Field

from distill.filters.base import Candidate, Example, Judging, Resources, StreamFilter
from distill.grading.grade import Grade
from distill.grading.judged import JUDGE
from distill.grading.sandbox.levels import Level
from distill.section import Free
from distill.traces.trace import Verdict

if TYPE_CHECKING:
    from distill.grading.grader import Grader
    from distill.prompts.prompt import Prompt

K = TypeVar("K")

AHEAD = 256  # traces that were read and have no grade yet


class Correct(StreamFilter):
    """Keep traces whose answer equals the gold one. Unverifiable answers are dropped too, and counted apart."""

    timeout: float = Field(
        5.0,
        gt=0,
        description="processor seconds for one comparison, or one test of a program; a longer comparison is "
        "unverifiable, a longer program is wrong",
    )
    sandbox: Annotated[Level, Free] = Field(
        "full", description="isolation that programs need at least; a machine that gives less is refused"
    )
    workers: Annotated[int, Free] = Field(2, ge=1, description="number of grading processes")

    name = "correct"
    passing = "correct"
    reasons: ClassVar[Mapping[str, str]] = {
        "correct": "the answer equals the gold one",
        "wrong": "it does not",
        "unverifiable": "it cannot be decided, for the reason named",
    }
    examples = (
        Example("correct", "<think>a</think>42", outcome=Grade("correct", "equal", {"gold": "42"})),
        Example("wrong", "<think>a</think>41", outcome=Grade("wrong", "not equal")),
        Example("unverifiable: timeout", "<think>a</think>9^{9^9}", outcome=Grade("unverifiable", "timeout")),
    )

    @contextmanager
    def opened(self, resources: Resources) -> Iterator[Judging]:
        """Start the grading processes, and open the judge if there are traces for it. Outcomes are grades.

        Errors: UserError when the judge cannot be used; WorkError when a process does not start, or gives programs less
        isolation than `sandbox`.
        """
        from distill.grading.grader import Grader  # a recipe is read without graders
        from distill.grading.mixed import graded

        opened = resources.judge() if JUDGE in resources.tasks else nullcontext()
        with Grader(self.workers, self.timeout, level=self.sandbox) as grader, opened as judge:

            def judging(candidates: Iterable[tuple[K, Candidate]]) -> Iterator[tuple[K, object]]:
                items = ((key, each.trace.prompt, each.trace.answer) for key, each in candidates)
                return _bounded(grader, items) if judge is None else graded(grader, judge, items)

            yield judging

    def verdict_on(self, outcome: object) -> Verdict:
        """Turn the grade into a verdict. The evidence has what was compared, and how."""
        assert isinstance(outcome, Grade)
        reason = f"unverifiable: {outcome.reason}" if outcome.verdict == "unverifiable" else outcome.verdict
        return self.verdict(reason, **{"judged": outcome.reason, **outcome.evidence})


def _bounded(grader: "Grader", items: "Iterator[tuple[K, Prompt, str]]") -> Iterator[tuple[K, Grade]]:
    """The grades of items, at most `AHEAD` of which wait at a time.

    A grader holds the grades that need no worker until one that does is finished, which may be never.
    """
    waiting = 0
    ended = False

    def some() -> "Iterator[tuple[K, Prompt, str]]":
        nonlocal waiting, ended
        while waiting < AHEAD:
            if (item := next(items, None)) is None:
                ended = True
                return
            waiting += 1
            yield item

    while not ended:
        for result in grader.grade(some()):
            waiting -= 1
            yield result
