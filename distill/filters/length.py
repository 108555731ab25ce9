"""Length in the teacher's own tokens, or in words where a trace came without a token count; or in the student's.

Small students learn better from shorter reasoning (arXiv 2502.12143), so the limits are the recipe's, per student. What
fits into a training row is decided by the student's tokenizer, whose counts differ from the teacher's by a third and
more: `unit: student` counts with it, in traces of any origin. It costs some 5 ms for a trace of 8,000 tokens.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distill.filters.base import OK, Candidate, Example, Resources, TraceFilter
from distill.section import Later
from distill.traces.trace import Verdict


class Length(TraceFilter):
    """Keep traces that are neither too short nor too long."""

    min_tokens: int | None = Field(
        None, ge=1, description="shortest completion, in teacher tokens (words, for traces without a token count)"
    )
    max_tokens: int | None = Field(None, ge=1, description="longest completion, in the same unit")

    unit: Annotated[Literal["teacher", "student"], Later] = Field(
        "teacher", description="tokenizer that counts the tokens: the teacher's as sampled, or the student's"
    )

    name = "length"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "within the limits",
        "too_short": "below min_tokens",
        "too_long": "above max_tokens",
    }
    examples = (
        Example("too_short", "", {"min_tokens": 10, "max_tokens": 20}, tokens=9),
        Example(OK, "", {"min_tokens": 10, "max_tokens": 20}, tokens=10),
        Example(OK, "", {"min_tokens": 10, "max_tokens": 20}, tokens=20),
        Example("too_long", "", {"min_tokens": 10, "max_tokens": 20}, tokens=21),
        Example("too_short", "three words only", {"min_tokens": 4}),
        Example("too_long", "three words only", {"max_tokens": 2}),
        Example(OK, "42", {"max_tokens": 2, "unit": "student"}, tokens=9),
    )

    @model_validator(mode="after")
    def _some_length_passes(self) -> "Length":
        if self.min_tokens is None and self.max_tokens is None:
            raise ValueError("min_tokens or max_tokens is needed; `length: null` turns the filter off")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is larger than max_tokens: nothing would be kept")
        return self

    @property
    def measures_student(self) -> bool:
        """Whether lengths are measured in the student's tokens."""
        return self.unit == "student"

    def check(self, resources: Resources) -> None:
        """Load the student's tokenizer, where it counts. Errors: UserError when it cannot be loaded."""
        if self.measures_student:
            resources.student_tokens("")

    def judge(self, candidate: Candidate) -> Verdict:
        """Compare the length, which is the evidence, with its unit."""
        count, unit = candidate.trace.length
        if self.measures_student:
            count, unit = candidate.resources.student_tokens(candidate.trace.text), "student tokens"
        if self.min_tokens is not None and count < self.min_tokens:
            reason = "too_short"
        elif self.max_tokens is not None and count > self.max_tokens:
            reason = "too_long"
        else:
            reason = OK
        return self.verdict(reason, length=count, unit=unit)
