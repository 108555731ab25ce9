"""Correctness: the grade of the answer, as a verdict. Unverifiable is dropped like wrong, but under its own reasons."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from distill.filters.base import Candidate, Example, TraceFilter
from distill.grading.grade import Grade
from distill.section import Free
from distill.traces.trace import Verdict


class Correct(TraceFilter):
    """Keep traces whose answer equals the gold one. Unverifiable answers are dropped too, and counted apart."""

    timeout: float = Field(5.0, gt=0, description="processor seconds for one comparison; a longer one is unverifiable")
    workers: Annotated[int, Free] = Field(2, ge=1, description="number of grading processes")

    name = "correct"
    passing = "correct"
    reasons: ClassVar[Mapping[str, str]] = {
        "correct": "the answer equals the gold one",
        "wrong": "it does not",
        "unverifiable": "it cannot be decided, for the reason named",
    }
    examples = (
        Example("correct", "<think>a</think>42", grade=Grade("correct", "equal", {"gold": "42"})),
        Example("wrong", "<think>a</think>41", grade=Grade("wrong", "not equal")),
        Example("unverifiable: timeout", "<think>a</think>9^{9^9}", grade=Grade("unverifiable", "timeout")),
    )

    def judge(self, candidate: Candidate) -> Verdict:
        """Turn the grade into a verdict. The evidence has what was compared, and how."""
        grade = candidate.grade
        assert grade is not None, "the pipeline grades where this filter is on"
        reason = f"unverifiable: {grade.reason}" if grade.verdict == "unverifiable" else grade.verdict
        return self.verdict(reason, **{"judged": grade.reason, **grade.evidence})
