"""Scores on the disk, and what they say in words, for the terminal and the report: one model beside another, ours
beside the published.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.artefacts import Comparison, PublishedScores, Scores
from distill.errors import UserError
from distill.traces.ledger import Ledger

GRADED = {"prompt", "sample", "verdict"}


def grades(part: Path) -> Iterator[dict[str, Any]]:
    """The rows of `part`/grades.jsonl, none where there is no file. UserError where one is not what was written."""
    path = part / "grades.jsonl"
    for row in Ledger(path).rows():
        if not row.keys() >= GRADED:
            raise UserError(f"{path}: damaged; delete it and evaluate again: the samples are kept, and graded anew")
        yield row


def scores_of(part: Path) -> Scores:
    """The content of `part`/scores.json. UserError where it is not what was written."""
    return Scores.read(part / "scores.json", "delete it and evaluate again: the samples are kept")


def difference(made: Comparison) -> str:
    """One line: how far apart two models are, and in how many problems."""
    one, two = made.models
    apart = made.difference
    return (
        f"{one} − {two}: {100 * apart.value:+.1f} points (95 %: {100 * apart.low:+.1f} to "
        f"{100 * apart.high:+.1f}); better in {len(made.gained):,} problems, worse in {len(made.lost):,}, "
        f"sign test p = {made.p:.2g}"
    )


def beside_published(other: PublishedScores, row: Scores) -> str:
    """One line: what was published, and whether a pass@1 falls inside our interval."""
    said = []
    if (value := other.scores.get("pass@1")) is not None:
        where = "inside" if row.pass_at_1.low <= value <= row.pass_at_1.high else "outside"
        said.append(f"pass@1 {value:.1%}, {where} the interval of {row.model}")
    said += [f"{key} {value:.1%}" for key, value in other.scores.items() if key != "pass@1"]
    return f"published for {other.model}: {', '.join(said)}"
