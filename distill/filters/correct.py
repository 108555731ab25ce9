"""Correctness: what the grader said, as a verdict. Unverifiable is dropped like wrong, but under reasons of its own."""

from distill.grading import Grade
from distill.traces.trace import Verdict


def check_correct(grade: Grade) -> Verdict:
    """Reasons: correct, wrong, `unverifiable: timeout` and the like. The evidence has what was compared, and how."""
    reason = f"unverifiable: {grade.reason}" if grade.verdict == "unverifiable" else grade.verdict
    return Verdict("correct", grade.verdict == "correct", reason, {"judged": grade.reason, **grade.evidence})
