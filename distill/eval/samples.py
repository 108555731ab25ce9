"""A graded row as statistics count it: its vote, and the instructions that it follows."""

from collections.abc import Mapping

from distill.eval.statistics import Followed, Sample
from distill.evaluations import GradeRow
from distill.grading.grade import GUESSES
from distill.grading.instructions import number_of_instructions


def _followed(row: GradeRow) -> Followed | None:
    """Which instructions a sample follows. One without a response, or whose check was not made, follows none."""
    if (outcomes := row.followed) is not None:
        return Followed(*map(tuple, outcomes))
    count = number_of_instructions(str(row.evidence.get("gold")))
    return Followed((False,) * count, (False,) * count) if count else None


def vote_of(row: GradeRow) -> str | None:
    """The answer that a sample votes with: one that it marked as final, not a guess from its prose."""
    return None if row.evidence.get("method") in GUESSES else row.answer


def sample_of(row: GradeRow, classes: Mapping[str, int]) -> Sample:
    """A graded row as statistics count it. classes: answer → the number of its class among the problem's answers."""
    return Sample(
        problem=row.prompt,
        verdict=row.verdict,
        answered=row.answer is not None,
        truncated=row.finish_reason == "length",
        completion_tokens=row.completion_tokens,
        reasoning_tokens=row.reasoning_tokens,
        vote=None if (vote := vote_of(row)) is None else classes.get(vote),
        followed=_followed(row),
    )
