"""Pass rate: how often the teacher solves a prompt says how hard it is.

A prompt that every sample solves teaches little that the student does not learn from one of them, and a prompt that
nearly none solves is often wrong itself, or solved by luck. The rate is taken over all samples of the prompt, also over
those that other filters drop: a truncated answer is a failure to solve it. One that the server refused is no sample.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from distill.filters.base import OK, Group, GroupFilter, PromptGroup, Resources
from distill.grading.grade import UNGRADABLE
from distill.traces.trace import REFUSED, Verdict

RIGHT, WRONG = (Verdict("correct", True, "correct"),), (Verdict("correct", False, "wrong"),)
GONE = (Verdict("finish", False, REFUSED), *WRONG)


class PassRate(GroupFilter):
    """Keep the traces of prompts that the teacher solves neither too seldom nor too often. Needs `correct`."""

    min_rate: float = Field(0.0, ge=0, le=1, description="lowest share of correct samples of a prompt")
    max_rate: float = Field(1.0, ge=0, le=1, description="highest share of correct samples of a prompt")
    min_samples: int = Field(4, ge=1, description="samples that a rate is taken from; prompts with fewer are kept")

    name = "pass_rate"
    reasons: ClassVar[Mapping[str, str]] = {
        OK: "within the band, or too few samples to say",
        "too_hard": "solved less often than min_rate",
        "too_easy": "solved more often than max_rate",
    }
    examples = (
        Group((OK, OK, OK, OK), ("a",) * 4, {"min_rate": 0.5}, earlier=(RIGHT, RIGHT, WRONG, WRONG)),
        Group(("too_hard",) * 4, ("a",) * 4, {"min_rate": 0.5}, earlier=(RIGHT, WRONG, WRONG, WRONG)),
        Group(("too_easy",) * 4, ("a",) * 4, {"max_rate": 0.9}, earlier=(RIGHT, RIGHT, RIGHT, RIGHT)),
        Group((OK,) * 3, ("a",) * 3, {"max_rate": 0.9}, earlier=(RIGHT, RIGHT, RIGHT)),
        Group((OK,) * 4, ("a",) * 4, {"min_rate": 0.9, "min_samples": 3}, earlier=(RIGHT, RIGHT, RIGHT, GONE)),
    )

    @model_validator(mode="after")
    def _some_rate_passes(self) -> "PassRate":
        if self.min_rate > self.max_rate:
            raise ValueError("min_rate is larger than max_rate: nothing would be kept")
        if (self.min_rate, self.max_rate) == (0.0, 1.0):
            raise ValueError("min_rate or max_rate is needed; `pass_rate: null` turns the filter off")
        return self

    def judge_group(self, group: PromptGroup, resources: Resources) -> Sequence[Verdict]:
        """Compare the share of correct samples, which is the evidence, with the band."""
        answered = (trace.verdicts for trace in group.traces if all(each.reason != REFUSED for each in trace.verdicts))
        grades = [verdict.reason for verdicts in answered for verdict in verdicts if verdict.filter == "correct"]
        passed, samples = grades.count("correct"), sum(grade != UNGRADABLE for grade in grades)
        rate = passed / samples if samples else None
        if rate is None or samples < self.min_samples:
            reason = OK
        else:
            reason = "too_hard" if rate < self.min_rate else "too_easy" if rate > self.max_rate else OK
        return [self.verdict(reason, passed=passed, samples=samples, rate=rate) for _ in group.survivors]
