"""What the report tells, read from the files of a run directory and nothing else.

A run may have stopped after any stage, so everything but the recipe may be missing; the page says so in its place.
Large runs are not put into a page: lengths are counted over all traces, texts are shown of some, chosen by rule (the
first kept ones, the first of each reason for dropping, as long as there is room), never by how well they look.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.artefacts import (
    Artefact,
    EvalSummary,
    FilterSummary,
    GenerateSummary,
    PublishedScores,
    RunPaths,
    Scores,
    TrainSummary,
)
from distill.config import parse, read_yaml
from distill.console import progress
from distill.recipe import Recipe
from distill.record import StageRecord, read_recipe
from distill.scores import beside_published, difference, grades, scores_of
from distill.traces.browse import KEPT, verdict_of
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, count_traces, read_traces
from distill.traces.trace import Trace, Verdict

KEPT_SHOWN = 60  # kept traces in the page
DROPPED_SHOWN = 15  # dropped traces of each reason
REASONS_SHOWN = 12
ROOM = 500_000  # characters of kept traces, and as many of dropped ones: the page stays below 3 MB
MANY = 20_000  # traces that take some seconds to read
TEXT_SHOWN = 20_000  # characters of one text; an R1 trace may have ten times as many
MODELS = ("base", "student", "teacher")

Solved = tuple[int, int]  # (right, drawn) samples of one prompt


@dataclass(frozen=True)
class StageTime:
    """One stage that was begun. `seconds` that it was worked on, where they are known. tokens: that it generated or
    learnt; None where it has none. cost: in the recipe's currency; None where it names no price."""

    name: str
    begun: str
    finished: bool
    seconds: float | None
    tokens: int | None
    cost: float | None


@dataclass(frozen=True)
class Shown:
    """One trace in the page. `verdict` is a short word for it: "kept", a reason for dropping, a grade."""

    who: str
    verdict: str
    good: bool
    question: str
    gold: str | None
    reasoning: str | None
    response: str
    tokens: int
    evidence: list[tuple[str, str, str]] = field(default_factory=list)  # (filter, reason, evidence) of its verdicts


@dataclass(frozen=True)
class Contents:
    """Everything the page needs. Empty where a stage has not come so far."""

    name: str
    recipe: Recipe
    recipe_text: str
    stages: list[StageTime]
    price: float | None  # of an hour
    generated: GenerateSummary | None
    filtered: FilterSummary | None
    trained: TrainSummary | None
    log: list[dict[str, Any]]
    kept_lengths: list[int]
    dropped_lengths: list[int]
    solved: list[Solved]  # of each prompt, by the teacher; empty where one sample a prompt was drawn or none graded
    traces: list[Shown]
    scores: list[Scores]
    solved_of: dict[str, dict[str, list[Solved]]]  # benchmark → model → of each problem; those with several samples
    published: list[PublishedScores]
    beside: list[str]  # lines under the scores: differences between models, published scores
    answers: list[Shown]  # to one problem of the first benchmark, by each model

    @property
    def worked(self) -> float:
        """Seconds of all stages that are finished."""
        return sum(stage.seconds or 0 for stage in self.stages)

    @property
    def cost(self) -> float:
        return sum(stage.cost or 0 for stage in self.stages)


STAGES: dict[str, type[Artefact]] = {  # as the cost table lists them
    "generate": GenerateSummary,
    "filter": FilterSummary,
    "train": TrainSummary,
    "eval": EvalSummary,
}


def read_contents(directory: Path, price_per_hour: float | None = None) -> Contents:
    """price_per_hour: of the machine; the recipe's by default. Raises UserError when this is no run directory, or a
    file in it is damaged."""
    text, paths = read_recipe(directory), RunPaths(directory)
    recipe = parse(Recipe, read_yaml(paths.recipe), str(paths.recipe))
    records = {name: record for name in STAGES if (record := _record(paths, name))}
    summaries: dict[str, Artefact] = {
        name: STAGES[name].model_validate_json(json.dumps(record.summary))
        for name, record in records.items()
        if record.finished
    }
    generated, filtered = summaries.get("generate"), summaries.get("filter")
    trained, evaluated = summaries.get("train"), summaries.get("eval")
    assert isinstance(generated, GenerateSummary | None) and isinstance(filtered, FilterSummary | None)
    assert isinstance(trained, TrainSummary | None) and isinstance(evaluated, EvalSummary | None)
    price = recipe.price_per_hour if price_per_hour is None else price_per_hour
    solved: dict[str, Solved] = {}
    kept_lengths, kept = _filtered(paths.kept, solved)
    dropped_lengths, dropped = _filtered(paths.dropped, solved)
    scores = _scores(paths.eval)
    return Contents(
        name=recipe.name,
        recipe=recipe,
        recipe_text=text,
        stages=[_stage_time(name, record, summaries.get(name), price) for name, record in records.items()],
        price=price,
        generated=generated,
        filtered=filtered,
        trained=trained,
        log=[row for row in Ledger(paths.log).rows() if "loss" in row],
        kept_lengths=kept_lengths,
        dropped_lengths=dropped_lengths,
        solved=_several(solved),
        traces=kept + dropped,
        scores=scores,
        solved_of=_solved_of(paths.eval, scores),
        published=list(evaluated.published) if evaluated else [],
        beside=_beside(evaluated, scores) if evaluated else [],
        answers=_answers(paths.eval / scores[0].benchmark) if scores else [],
    )


def _record(paths: RunPaths, name: str) -> StageRecord | None:
    return StageRecord.read_if_there(paths.record(name), f"run the stage again with --fresh {name}")


def _stage_time(name: str, record: StageRecord, summary: Artefact | None, price: float | None) -> StageTime:
    begun = datetime.fromisoformat(record.begun).astimezone(UTC)
    seconds = record.seconds if record.finished else None
    cost = None if seconds is None or price is None else seconds / 3600 * price
    return StageTime(name, f"{begun:%Y-%m-%d %H:%M} UTC", record.finished is not None, seconds, _tokens(summary), cost)


def _tokens(summary: Artefact | None) -> int | None:
    match summary:
        case GenerateSummary():
            return summary.completion_tokens
        case TrainSummary():
            return summary.supervised_tokens
        case EvalSummary():
            return round(sum(row.samples * (row.mean_completion_tokens or 0) for row in summary.scores))
    return None


def _filtered(directory: Path, solved: dict[str, Solved]) -> tuple[list[int], list[Shown]]:
    """The completion lengths of all traces, and the few that are shown. Adds to `solved` what was graded, by prompt."""
    lengths: list[int] = []
    room = ROOM
    shown: dict[str, list[Shown]] = defaultdict(list)
    for trace, verdicts in _told_of(directory) if directory.is_dir() else ():
        lengths.append(trace.tokens)
        for right in (verdict.keep for verdict in verdicts if verdict.filter == "correct"):
            solved[trace.prompt.id] = _with_one(solved.get(trace.prompt.id), right)
        said = verdict_of(verdicts)
        kept = said == KEPT
        wanted = len(shown[said]) < (KEPT_SHOWN if kept else DROPPED_SHOWN)
        if wanted and (room > 0 or not shown[said]):  # one of each reason, however long
            shown[said].append(_shown("teacher", said, kept, trace, verdicts))
            room -= len(trace.text) + len(trace.prompt.messages[-1]["content"])
    return lengths, [one for of_reason in list(shown.values())[:REASONS_SHOWN] for one in of_reason]


def _told_of(directory: Path) -> Iterator[tuple[Trace, list[Verdict]]]:
    """All traces; with a progress bar where they are many."""
    total = count_traces(directory)
    bar = progress("report", total, f"{directory.name} traces") if total >= MANY else nullcontext(lambda _: None)
    with bar as told:
        for one in read_traces(directory, ids=False):
            yield one
            told(1)


def _with_one(solved: Solved | None, right: bool) -> Solved:
    before = solved or (0, 0)
    return before[0] + right, before[1] + 1


def _several(solved: dict[str, Solved]) -> list[Solved]:
    """Nothing where no prompt has two samples: then the rate of each is 0 or 1, and their mean says all."""
    return list(solved.values()) if any(drawn > 1 for _, drawn in solved.values()) else []


def _solved_of(directory: Path, scores: list[Scores]) -> dict[str, dict[str, list[Solved]]]:
    found: dict[str, dict[str, list[Solved]]] = {}
    for row in scores:
        solved: dict[str, Solved] = {}
        for grade in grades(directory / row.benchmark / row.model):
            if grade["sample"] < row.samples_per_problem:
                solved[grade["prompt"]] = _with_one(solved.get(grade["prompt"]), grade["verdict"] == "correct")
        if rates := _several(solved):
            found.setdefault(row.benchmark, {})[row.model] = rates
    return found


def _shown(who: str, verdict: str, good: bool, trace: Trace, verdicts: Iterable[Verdict] = ()) -> Shown:
    return Shown(
        who=who,
        verdict=verdict,
        good=good,
        question=_cut(trace.prompt.messages[-1]["content"]),
        gold=trace.prompt.answer,
        reasoning=None if trace.reasoning is None else _cut(trace.reasoning),
        response=_cut(trace.text if trace.reasoning is None else trace.response),
        tokens=trace.tokens,
        evidence=[(v.filter, v.reason, _told(v.evidence)) for v in verdicts],
    )


def _told(evidence: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_cut(str(value))}" for key, value in evidence.items() if value is not None)


def _cut(text: str) -> str:
    """Long texts keep their beginning and, where the answer is, their end."""
    if len(text) <= TEXT_SHOWN:
        return text
    half = TEXT_SHOWN // 2
    return f"{text[:half]}\n\n[… {len(text) - TEXT_SHOWN:,} characters left out …]\n\n{text[-half:]}"


def _scores(directory: Path) -> list[Scores]:
    """The scores.json of every part, benchmarks by name, models from base to teacher."""
    found = [scores_of(path.parent) for name in MODELS for path in directory.glob(f"*/{name}/scores.json")]
    return sorted(found, key=lambda row: (row.benchmark, MODELS.index(row.model)))


def _beside(summary: EvalSummary, scores: list[Scores]) -> list[str]:
    lines = [f"{made.benchmark}: {difference(made)}" for made in summary.comparisons]
    for other in summary.published:
        row = next((r for r in scores if (r.benchmark, r.model) == (other.benchmark, "student")), None)
        if row is not None:
            lines.append(f"{other.benchmark}: {beside_published(other, row)}")
    return lines


def _answers(directory: Path) -> list[Shown]:
    """What each model answered to one problem: one that the student learnt (right, base wrong), else the first."""
    graded = {
        model: {(row["prompt"], row["sample"]): row for row in grades(directory / model)}
        for model in MODELS
        if (directory / model / "grades.jsonl").is_file()
    }
    common = set.intersection(*(set(of_model) for of_model in graded.values())) if graded else set()

    def learnt(key: tuple[str, int]) -> bool:
        verdicts = {model: of_model[key]["verdict"] for model, of_model in graded.items()}
        return verdicts.get("student", "correct") == "correct" and verdicts.get("base", "wrong") != "correct"

    key = next(iter(sorted(common, key=lambda k: (not learnt(k), k))), None)
    return list(_to_one_problem(directory, graded, key)) if key else []


def _to_one_problem(directory: Path, graded: dict[str, Any], key: tuple[str, int]) -> Iterator[Shown]:
    for model, of_model in graded.items():
        trace = next((trace for trace in TraceStore(directory / model / "traces") if trace.key == key), None)
        if trace is not None:
            verdict = of_model[key]["verdict"]
            yield _shown(model, verdict, verdict == "correct", trace)
