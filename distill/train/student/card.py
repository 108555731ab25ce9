"""The student's model card: its origin and its training, from the run's own figures.

The front matter has the hub's keys; once the student has been scored, its scores are there as `model-index`. Every word
is a function of the run's records (`refresh`), so that a card that was lost, or that is older than the scores, is
written again whenever the recipe runs. Figures that the run does not know are not mentioned.
"""

import json
import re
from collections.abc import Sequence
from typing import TypeVar

import yaml
from pydantic import JsonValue

from distill.artefacts import Artefact, EvalSummary, FilterSummary, RunPaths, Scores, TrainSummary
from distill.durable import write_whole
from distill.recipe import Recipe, StudentCard, Train, Training
from distill.recipe.sources import HubPrompts, HubTraces
from distill.record import StageRecord

S = TypeVar("S", bound=Artefact)

# "We recommend 0.6 … top-p 0.95 … to prevent endless repetitions": DeepSeek-R1's model card, usage recommendations.
TEMPERATURE, TOP_P = 0.6, 0.95
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def refresh(recipe: Recipe, card: StudentCard, paths: RunPaths) -> None:
    """Write the card of a run's student anew from the records of its stages, if it differs from the one that is there.

    Does nothing before training has finished. card: of the base. Errors: UserError when a record is damaged.
    """
    trained = summary(paths, "train", TrainSummary)
    if trained is None or not paths.student.is_dir():
        return
    scored = summary(paths, "eval", EvalSummary)
    scores = [row for row in scored.scores if row.model == "student"] if scored else []
    text = model_card(recipe, card, trained, summary(paths, "filter", FilterSummary), scores)
    path = paths.student / "README.md"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)


def summary(paths: RunPaths, stage: str, model: type[S]) -> S | None:
    """The summary of a finished stage of a run; None where it is not finished. Errors: UserError."""
    record = StageRecord.read_if_there(paths.record(stage), f"--fresh {stage} starts it over")
    if record is None or record.finished is None:
        return None
    return model.model_validate_json(json.dumps(record.summary))


def model_card(
    recipe: Recipe,
    card: StudentCard,
    trained: TrainSummary,
    filtered: FilterSummary | None,
    scores: Sequence[Scores] = (),
) -> str:
    """The text. card: of the base. filtered: None for a run without a filter stage. scores: of the student."""
    trainings = recipe.train.trainings
    tags = ["distillation", "reasoning", *(training.objective.tag for training in trainings)]
    tags += [training.adapter.tag for training in trainings if training.adapter is not None]
    front = {
        "base_model": card.weights if HUB_ID.fullmatch(card.weights) else card.name,
        "datasets": published(recipe),
        "library_name": "transformers",
        "license": card.license,
        "model_name": recipe.name,
        "tags": list(dict.fromkeys(tags)),
        "model-index": [{"name": recipe.name, "results": [_result(row) for row in scores]}] if scores else None,
    }
    header = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    rows = [
        ("traces", f"{trained.rows:,} ({trained.dropped_rows:,} dropped for length)"),
        *_filters(filtered),
        *(_phases(recipe.train, trained) if recipe.train.phases else _training(recipe.train, trained)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{header}---

# {recipe.name}

{_sentence(recipe, card)}

| | |
|---|---|
{table}

Sample at temperature {TEMPERATURE} and top-p {TOP_P} (as in `generation_config.json`), with the chat template of this
directory: it is the one that was used in training. The licence is that of the base.
"""


def _sentence(recipe: Recipe, card: StudentCard) -> str:
    """What was done to the base."""
    if recipe.train.phases:
        names = ", ".join(f"`{phase.name}`" for phase in recipe.train.phases)
        return f"`{card.name}`, trained in {len(recipe.train.phases)} phases, each from the student before: {names}."
    if not recipe.reads_traces:
        return f"`{card.name}`, trained with the objective `{recipe.train.objective.kind}`."
    content = "reasoning and answer" if recipe.train.content == "reasoning" else "the answer alone"
    return f"`{card.name}`, fine-tuned on traces of `{recipe.teacher}` ({content})."


def _training(settings: Training, trained: TrainSummary) -> list[tuple[str, str]]:
    """The rows of the only training."""
    return [
        (
            "supervised tokens",
            f"{trained.supervised_tokens:,} in {trained.steps:,} steps, {trained.epochs:.2f} epochs",
        ),
        ("loss, first → last", f"{trained.first_loss:.3f} → {trained.last_loss:.3f} nats per token"),
        ("trained", "all weights" if settings.adapter is None else settings.adapter.describe()),
        ("learning rate", f"{settings.learning_rate:g}, {settings.lr_scheduler_type}"),
        *_context(settings),
    ]


def _phases(settings: Train, trained: TrainSummary) -> list[tuple[str, str]]:
    """A row for each phase."""
    rows = []
    for number, phase in enumerate(settings.phases, 1):
        what = [phase.objective.kind, *(["its own answers"] if phase.own else [])]
        if (summary := trained.phases.get(phase.name)) is not None:
            what += [f"{key} {value}" for key, value in _training(phase, summary)]
        rows.append((f"phase {number}, {phase.name}", "; ".join(what)))
    return rows


def published(recipe: Recipe) -> list[str]:
    """The hub's data sets that problems or traces came from."""
    mixed = (source for training in recipe.train.trainings for source in training.data)
    sources = (*recipe.prompts, *recipe.traces, *mixed)
    names = [source.dataset for source in sources if isinstance(source, HubPrompts | HubTraces)]
    return sorted({name for name in names if HUB_ID.fullmatch(name)})


def _filters(filtered: FilterSummary | None) -> list[tuple[str, str]]:
    if not filtered:
        return []
    dropped = ", ".join(f"{step.filter} {step.dropped:,}" for step in filtered.funnel if step.dropped)
    kept = f"{filtered.kept:,} of {filtered.total:,} traces"
    return [("filtered", kept + (f" (dropped: {dropped})" if dropped else ""))]


def _context(settings: Training) -> list[tuple[str, str]]:
    """An extended context is mentioned: students with different RoPE settings cannot be compared otherwise."""
    if not settings.max_position_embeddings:
        return []
    base = f", RoPE base {settings.rope_theta:g}" if settings.rope_theta else ""
    return [("context extended to", f"{settings.max_position_embeddings:,} tokens{base}")]


def _result(scores: Scores) -> dict[str, JsonValue]:
    estimate = scores.pass_at_1
    interval = f"95 %: {100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    how = f"pass@1, {scores.problems} problems × {scores.samples_per_problem} ({interval})"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": scores.benchmark, "type": scores.benchmark},
        "metrics": [{"type": "pass@1", "name": how, "value": round(100 * estimate.value, 1)}],
    }
