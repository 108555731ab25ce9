"""What the report shows of a training in phases: of each phase's run directory what it shows of the run's training."""

from dataclasses import dataclass
from pathlib import Path

from distill.artefacts import FilterSummary, GenerateSummary, RunPaths, TrainSummary
from distill.recipe import Recipe, Training
from distill.report.records import STAGES, LogRow, Place, read_log, read_record, read_summary, refuse_damage
from distill.report.rollouts import Rollouts, read_rollouts


@dataclass(frozen=True)
class PhaseContents:
    """One phase of the training. generated, filtered: of its base's own answers, where it trains on them.
    rollouts: what the student wrote during the training, where it did."""

    number: int
    name: str
    training: Training
    trained: TrainSummary | None
    log: list[LogRow]
    generated: GenerateSummary | None
    filtered: FilterSummary | None
    rollouts: Rollouts | None


def read_phases(directory: Path, recipe: Recipe) -> list[PhaseContents]:
    """The phases of the training, as far as they have come. Errors: UserError when a file of one is damaged."""
    phases = []
    for number, phase in enumerate(recipe.train.phases):
        outer = RunPaths(directory)
        place = Place(RunPaths(outer.phase(number, phase.name)), outer)
        records = {name: record for name in STAGES if (record := read_record(place, name))}
        refuse_damage(place, records)
        summaries = {name: read_summary(place, name, record) for name, record in records.items() if record.finished}
        trained, generated, filtered = (summaries.get(name) for name in ("train", "generate", "filter"))
        assert isinstance(trained, TrainSummary | None) and isinstance(generated, GenerateSummary | None)
        assert isinstance(filtered, FilterSummary | None)
        log = read_log(place.paths.log)
        rollouts = read_rollouts(place.paths, phase, log, trained, f"phase {number + 1}, ")
        phases.append(PhaseContents(number + 1, phase.name, phase, trained, log, generated, filtered, rollouts))
    return phases
