"""The student's model card: what it came from and what it was made of, from the run's own figures.

The front matter has the hub's keys, scores as `model-index` once the student has been scored (`add_scores`). Nothing in
it is written by hand: what the run does not know is not said.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import JsonValue

from distill.artefacts import FilterSummary, RunPaths, Scores, TrainSummary
from distill.durable import write_whole
from distill.recipe import Recipe, StudentCard
from distill.recipe.sources import HubPrompts, HubTraces
from distill.record import StageRecord

# "We recommend 0.6 … top-p 0.95 … to prevent endless repetitions": DeepSeek-R1's model card, usage recommendations.
TEMPERATURE, TOP_P = 0.6, 0.95
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(recipe: Recipe, card: StudentCard, summary: TrainSummary, filtered: FilterSummary | None) -> str:
    """summary: of the training; filtered: of the filter stage, where there was one."""
    front = {
        "base_model": card.weights if HUB_ID.fullmatch(card.weights) else card.name,
        "datasets": published(recipe),
        "library_name": "transformers",
        "license": card.license,
        "model_name": recipe.name,
        "tags": ["distillation", "reasoning", "sft"],
    }
    header = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    settings = recipe.train
    learnt = "reasoning and answer" if settings.content == "reasoning" else "the answer alone"
    method = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[settings.method]
    if settings.method != "full":
        method += f", rank {settings.lora_r}, alpha {settings.lora_alpha}, merged"
    rows = [
        ("traces", f"{summary.rows:,} ({summary.dropped_rows:,} dropped for length)"),
        *_filters(filtered),
        (
            "supervised tokens",
            f"{summary.supervised_tokens:,} in {summary.steps:,} steps, {summary.epochs:.2f} epochs",
        ),
        ("loss, first → last", f"{summary.first_loss:.3f} → {summary.last_loss:.3f} nats a token"),
        ("trained", method),
        ("learning rate", f"{settings.learning_rate:g}, {settings.lr_scheduler_type}"),
        *_context(recipe),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{header}---

# {recipe.name}

`{card.name}`, fine-tuned on traces of `{recipe.teacher}` ({learnt}).

| | |
|---|---|
{table}

Sample at temperature {TEMPERATURE} and top-p {TOP_P} (`generation_config.json` says so), with the chat template of this
directory: it is the one that was trained. The licence is the base's.
"""


def published(recipe: Recipe) -> list[str]:
    """The data sets of the hub that problems or traces came from."""
    sources = (*recipe.prompts, *recipe.traces, *recipe.train.data)
    names = [source.dataset for source in sources if isinstance(source, HubPrompts | HubTraces)]
    return sorted({name for name in names if HUB_ID.fullmatch(name)})


def _filters(filtered: FilterSummary | None) -> list[tuple[str, str]]:
    if not filtered:
        return []
    dropped = ", ".join(f"{step.filter} {step.dropped:,}" for step in filtered.funnel if step.dropped)
    kept = f"{filtered.kept:,} of {filtered.total:,} traces"
    return [("filtered", kept + (f" (dropped: {dropped})" if dropped else ""))]


def _context(recipe: Recipe) -> list[tuple[str, str]]:
    """A context that was extended is said: a student whose RoPE was changed silently cannot be compared."""
    settings = recipe.train
    if not settings.max_position_embeddings:
        return []
    base = f", RoPE base {settings.rope_theta:g}" if settings.rope_theta else ""
    return [("context extended to", f"{settings.max_position_embeddings:,} tokens{base}")]


def add_scores(student: Path, scores: Sequence[Scores]) -> None:
    """Write the student's scores into the front matter of its card, as the hub's `model-index`. scores: of all models.

    A directory without a card is left alone.
    """
    path = student / "README.md"
    own = [row for row in scores if row.model == "student"]
    if not path.exists() or not own:
        return
    _, header, body = path.read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(header)
    front["model-index"] = [{"name": front["model_name"], "results": [_result(row) for row in own]}]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    if (text := f"---\n{header}---\n{body}") != path.read_text(encoding="utf-8"):
        write_whole(path, text)


def _result(scores: Scores) -> dict[str, JsonValue]:
    estimate = scores.pass_at_1
    interval = f"95 %: {100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    how = f"pass@1, {scores.problems} problems × {scores.samples_per_problem} ({interval})"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": scores.benchmark, "type": scores.benchmark},
        "metrics": [{"type": "pass@1", "name": how, "value": round(100 * estimate.value, 1)}],
    }


def filter_summary(directory: Path) -> FilterSummary | None:
    """The filter stage's summary of a run directory, None where it never ran."""
    record = StageRecord.read_if_there(RunPaths(directory).record("filter"), "--fresh filter starts it over")
    if record is None or record.summary is None:
        return None
    return FilterSummary.model_validate_json(json.dumps(record.summary))
