"""Scores on the disk, and what they say in words, for the terminal and the report: one model beside another, ours
beside the published.
"""

import json
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.traces.ledger import Ledger

GRADED = {"prompt", "sample", "verdict"}
NUMBERS = ("pass@1", "pass@1_low", "pass@1_high", "truncated_rate", "no_answer_rate", "unverifiable_rate")


def grades(part: Path) -> Iterator[dict[str, Any]]:
    """The rows of `part`/grades.jsonl, none where there is no file. UserError where one is not what was written."""
    path = part / "grades.jsonl"
    for row in Ledger(path).rows():
        if not row.keys() >= GRADED:
            raise UserError(f"{path}: damaged; delete it and evaluate again: the samples are kept, and graded anew")
        yield row


def scores_of(part: Path) -> dict[str, Any]:
    """The content of `part`/scores.json. UserError where it is not what was written."""
    path = part / "scores.json"
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        whole = row.keys() >= {"benchmark", "model", "problems", "samples", "samples_per_problem"}
        if whole and all(isfinite(row[name]) for name in NUMBERS):
            return row  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: damaged; delete it and evaluate again: the samples are kept")


def difference(made: dict[str, Any]) -> str:
    """One line: how far apart two models are, and in how many problems."""
    one, two = made["models"]
    return (
        f"{one} − {two}: {100 * made['difference']:+.1f} points (95 %: {100 * made['low']:+.1f} to "
        f"{100 * made['high']:+.1f}); better in {len(made['gained']):,} problems, worse in {len(made['lost']):,}, "
        f"sign test p = {made['p']:.2g}"
    )


def beside_published(other: dict[str, Any], row: dict[str, Any]) -> str:
    """One line: what was published, and whether a pass@1 falls inside our interval."""
    said = []
    if (value := other.get("pass@1")) is not None:
        where = "inside" if row["pass@1_low"] <= value <= row["pass@1_high"] else "outside"
        said.append(f"pass@1 {value:.1%}, {where} the interval of {row['model']}")
    said += [f"{key} {other[key]:.1%}" for key in other if key.startswith(("cons@", "pass@")) and key != "pass@1"]
    return f"published for {other['model']}: {', '.join(said)}"
