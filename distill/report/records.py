"""The records and the log of a run or of one of its phases, checked before anything of them is shown."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from distill.artefacts import Artefact, EvalSummary, FilterSummary, GenerateSummary, RunPaths, TrainSummary
from distill.errors import UserError
from distill.record import StageRecord
from distill.traces.ledger import Ledger

READ = ("filtered/kept/", "filtered/dropped/", "eval/", "rollouts/", "checkpoints/log.jsonl")  # that the page shows
LogRow = Mapping[str, object]  # one line of checkpoints/log.jsonl: numbers, lists of numbers, or null
Points = list[tuple[float, float]]  # (optimiser step, value)

STAGES: dict[str, type[Artefact]] = {  # in the order of the table of times
    "generate": GenerateSummary,
    "filter": FilterSummary,
    "train": TrainSummary,
    "eval": EvalSummary,
}


@dataclass(frozen=True)
class Place:
    """A run directory, or that of a phase. outer: the run of a phase, whose training is repeated as a whole."""

    paths: RunPaths
    outer: RunPaths | None = None

    def remedy(self, stage: str, option: str) -> str:
        """What recreates a file of a stage, as the end of an error's sentence."""
        if self.outer is not None:
            command = f"distill train {self.outer.recipe} --run-dir {self.outer.root} --fresh train"
            return f"restore it; `{command}` repeats all phases"
        return f"`distill {stage} {self.paths.recipe} --run-dir {self.paths.root} {option}` recreates it"


def read_record(place: Place, name: str) -> StageRecord | None:
    """The record of a stage; None where it was never begun. Errors: UserError when it is damaged."""
    return StageRecord.read_if_there(place.paths.record(name), place.remedy(name, f"--fresh {name}"))


def read_summary(place: Place, name: str, record: StageRecord) -> Artefact:
    """The summary of a finished stage. Errors: UserError when it is damaged."""
    try:
        return STAGES[name].model_validate_json(json.dumps(record.summary))
    except ValueError:
        path = place.paths.record(name)
        raise UserError(f"{path} is damaged; {place.remedy(name, f'--fresh {name}')}") from None


def refuse_damage(place: Place, records: Mapping[str, StageRecord]) -> None:
    """UserError naming the first file of a finished stage that the page shows and that is not as it was written."""
    for stage, record in records.items():
        for name, file in record.files.items():
            path = place.paths.root / name
            if name.startswith(READ) and (damage := file.damage(path)) is not None:
                raise UserError(f"{path} {damage}; {place.remedy(stage, '--verify')}")


def read_log(path: Path) -> list[LogRow]:
    """The rows with a loss. Errors: UserError for a row that training did not write."""
    rows: list[LogRow] = []
    for number, row in enumerate(Ledger(path).rows(), 1):
        if "loss" in row:
            if not all(isinstance(row.get(key), int | float) for key in ("step", "loss", "learning_rate")):
                raise UserError(f"{path}, row {number}: damaged; restore the file, or remove the row")
            rows.append(row)
    return rows


def points(log: Iterable[LogRow], key: str, scale: float = 1.0) -> Points:
    """(step, scale · value) of the rows that have a number there."""
    pairs = ((row["step"], row.get(key)) for row in log)
    return [(step, scale * value) for step, value in pairs if _is_number(step) and _is_number(value)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
