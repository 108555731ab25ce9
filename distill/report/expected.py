"""What `distill plan` expected of each stage, beside what was measured.

Money is the price of the teacher's tokens in `generate`, at the price that the plan was made with. Where the traces
have no counts of prompt tokens (from a server without usage), the measured cost has those of the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.artefacts import RunPaths
from distill.planned import Expected, Plan

DIRECTORIES = {  # patterns of the directories of each stage
    "generate": ("traces",),
    "filter": ("filtered",),
    "rollouts": ("rollouts", "phases/*/rollouts"),
    "eval": ("eval",),
}


@dataclass(frozen=True)
class ExpectedRow:
    """One quantity of one stage. expected: with its interval, as text. measured: empty while it is unknown."""

    stage: str
    quantity: str
    expected: str
    measured: str


def compare_with_plan(
    plan: Plan,
    paths: RunPaths,
    tokens: Mapping[str, int | None],
    seconds: Mapping[str, float | None],
    prompt_tokens: int | None = None,
) -> list[ExpectedRow]:
    """A row for each quantity that the plan has.

    tokens, seconds: of the finished stages. prompt_tokens: of all traces, None or 0 where they are not known.
    """
    rows = []
    for stage in plan.stages:
        name, done = stage.stage, stage.stage in seconds
        count, time = tokens.get(name), seconds.get(name)
        spent = _spent(plan, prompt_tokens, count) if name == "generate" else None
        size = _size(paths, name) if done else None
        quantities: tuple[tuple[str, Expected | None, float | None, str], ...] = (
            ("tokens", stage.tokens, count, ",.0f"),
            ("hours", stage.hours, None if time is None else time / 3600, ",.3f"),
            (plan.currency or "money", stage.money, spent, ",.2f"),
            ("MB", stage.disk and stage.disk.times(1e-6), None if size is None else size / 1e6, ",.1f"),
        )
        for quantity, expected, measured, form in quantities:
            if expected is not None:
                shown = "" if measured is None else format(measured, form)
                rows.append(ExpectedRow(name, quantity, _shown(expected, form), shown))
    return rows


def _spent(plan: Plan, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
    if completion_tokens is None or plan.input_price is None or plan.output_price is None:
        return None
    return ((prompt_tokens or plan.prompt_tokens) * plan.input_price + completion_tokens * plan.output_price) / 1e6


def _shown(expected: Expected, form: str) -> str:
    value = format(expected.value, form)
    if expected.low is None or expected.high is None:
        return value
    return f"{value} ({expected.low:{form}} – {expected.high:{form}})"


def _size(paths: RunPaths, stage: str) -> int | None:
    """Bytes that the stage's directories take; None for a stage without any."""
    names = DIRECTORIES.get(stage, ())
    places = [place for name in names for place in paths.root.glob(name)]
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) if names else None
