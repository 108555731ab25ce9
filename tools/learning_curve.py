"""Learning curves of the tiny pair: scores, what they cost so far, and how they compare.

The library trains, by the recipe; only `Loop.step` is wrapped, to count after each step and to evaluate after some.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.eval.statistics import Difference, compare, pass_at_1  # needs the path

BAR = 0.85
BENCHMARKS = ("tiny-arithmetic", "tiny-arithmetic-hard")
AXES = ("seconds", "teacher", "produced", "scored", "trained")
Point = dict[str, Any]


def processor_seconds() -> float:
    """Processor seconds of this process and of its children, running or ended."""
    total = 0.0
    for process in (this := psutil.Process(), *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it has ended, and is among its parent's `children_user`
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def with_interval(correct: list[list[bool]]) -> dict[str, float]:
    """pass@1 with its 95 % interval. correct: of each problem, its samples."""
    estimate = pass_at_1(correct)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def answered(model: Path, benchmark: str, seed: int = 1) -> list[bool]:
    """Whether each problem of a benchmark is answered correctly, in the problems' order."""
    from distill import backends
    from distill.backends import Job, SamplingParams
    from distill.catalog import load_benchmark
    from distill.chat import split_reasoning
    from distill.grading import Grader
    from distill.models import Model
    from distill.prompts import load_prompts
    from distill.recipe import LocalEngine

    card = load_benchmark(benchmark)
    prompts = list(load_prompts(card.sources))
    sampling = SamplingParams(**card.sampling.model_dump())
    with backends.open(Model("student", model), LocalEngine(dtype="float32")) as backend, Grader() as grader:
        answers = backend.complete((Job(prompt, (0,)) for prompt in prompts), sampling, seed=seed)
        items = ((done.prompt.id, done.prompt, split_reasoning(done.text)[1]) for done in answers)
        verdicts = {prompt: grade.verdict == "correct" for prompt, grade in grader.grade(items)}
    return [verdicts[prompt.id] for prompt in prompts]


def scores(model: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[bool]]]:
    """By benchmark: pass@1 with its interval, and which problems were right."""
    right = {name: answered(model, name) for name in BENCHMARKS}
    return {name: with_interval([[each] for each in verdicts]) for name, verdicts in right.items()}, right


def base_point(model: Path) -> Point:
    """The point at which every curve begins."""
    return dict.fromkeys(AXES, 0) | scores(model)[0]


def reached(points: list[Point], axis: str, bar: float = BAR) -> float | None:
    """What it took until pass@1 first reached the bar, between two points by a straight line; None if it did not."""
    x, y = 0.0, 0.0
    for point in points:
        score = point[BENCHMARKS[0]]["value"]
        if score >= bar:
            return x + (bar - y) / (score - y) * (point[axis] - x)
        x, y = point[axis], score
    return None


def difference(first: list[list[bool]], second: list[list[bool]]) -> Difference:
    """The score of the first less that of the second, problem by problem; the seeds are samples of a problem."""
    samples = ({str(i): list(right) for i, right in enumerate(zip(*seeds, strict=True))} for seeds in (first, second))
    return compare(*samples)


class Recorder:
    """The points of one training, whose phases each have a `Loop` of their own. evaluations: of a phase.

    traces: what a token of a kept trace cost: processor seconds, and tokens generated. sources: kinds of the data of
    each phase, as the recipe has them: inside a phase, `own` is the kept traces of its directory.
    """

    def __init__(
        self, run: Path, base: Path, evaluations: int, traces: tuple[float, float], sources: Sequence[Sequence[str]]
    ) -> None:
        self.run, self.base, self.evaluations, self.traces, self.sources = run, base, evaluations, traces, sources
        self.points: list[Point] = []
        self.right: dict[str, list[bool]] = {}
        self.seen: set[tuple[str, int]] = set()  # traces of the teacher that were trained on
        self.kept = self.scored = self.trained = 0  # tokens
        self.phase = -1
        self.loop: object = None
        self.begun = processor_seconds()
        self.uncounted = 0.0  # seconds of evaluations

    def count(self, loop: Any, rows: list[Any]) -> None:
        """Take the rows of a step into account."""
        if loop is not self.loop:
            self.loop, self.phase = loop, self.phase + 1
        for row in rows:
            self.trained += row.supervised
            if row.sampled is not None:
                self.scored += row.supervised if row.teacher is not None else 0
            elif self.sources[self.phase][row.source] == "kept" and row.key not in self.seen:
                self.seen.add(row.key)
                self.kept += row.supervised

    def due(self, loop: Any) -> bool:
        """Whether the student is evaluated after this step."""
        step, total = loop.position.step, loop.total
        return step * self.evaluations // total > (step - 1) * self.evaluations // total

    def evaluate(self, loop: Any) -> None:
        """Add a point. The time of it does not count."""
        before = processor_seconds()
        per_token, generated_per_token = self.traces
        produced = self.kept * generated_per_token
        place = self.run / "point"
        save(loop, self.base, place)
        measured, self.right = scores(place)
        shutil.rmtree(place)
        point = {
            "phase": self.phase,
            "step": loop.position.step,
            "seconds": before - self.begun - self.uncounted + self.kept * per_token,
            "produced": produced,
            "scored": self.scored,
            "teacher": produced + self.scored,
            "trained": self.trained,
            **measured,
        }
        self.points.append({key: round(value) if key in AXES else value for key, value in point.items()})
        shown = ", ".join(f"{name} {measured[name]['value']:.1%}" for name in BENCHMARKS)
        print(f"  phase {self.phase}, step {loop.position.step}: {point['seconds']:.0f} s, {shown}", flush=True)
        self.uncounted += processor_seconds() - before


def save(loop: Any, base: Path, place: Path) -> None:
    """Write the student that a loop trains as a model directory. base: of its architecture."""
    from distill.chat import Chat
    from distill.train.student import model

    tensors = {name: p.detach().clone() for name, p in loop.learner.model.named_parameters()}
    model.save(place, model.empty(base, loop.settings, torch.float32), tensors, Chat.load(base), "")


def cost_of_traces(run: Path) -> tuple[float, float]:
    """Processor seconds and generated tokens per token of a kept trace. run: with finished generate and filter."""
    from distill.artefacts import RunPaths
    from distill.traces.store import read_traces

    paths = RunPaths(run)
    generated, kept = (
        sum(trace.completion_tokens or 0 for trace, *_ in read_traces(place)) for place in (paths.traces, paths.kept)
    )
    seconds = json.loads((run / "cost.json").read_text())["seconds"]
    return seconds / kept, generated / kept


def train(settings: list[str], run: Path, evaluations: int) -> dict[str, Any]:
    """Train as the recipe `tiny` with these settings says, in a run directory that has traces: the learning curve.

    A training that stops itself, because its rollouts have collapsed, ends with the student that it has then.
    """
    from distill.catalog import load_recipe
    from distill.errors import WorkError
    from distill.models import Models
    from distill.pipeline import run_recipe
    from distill.train.learn.loop import Loop

    recipe = load_recipe("tiny", settings)
    sources = [[source.kind for source in each.data] for each in recipe.train.phases or (recipe.train,)]
    base = Models(recipe, run).base.directory
    recorder = Recorder(run, base, evaluations, cost_of_traces(run), sources)
    step = Loop.step

    def counted(loop: Loop) -> None:
        asked, rows = loop.feed.step, []

        def remembered(number: int) -> Any:
            batches = asked(number)
            rows.extend(row for batch in batches for row in batch)
            return batches

        with patch.object(loop.feed, "step", remembered):
            step(loop)
        recorder.count(loop, rows)
        if recorder.due(loop):
            recorder.evaluate(loop)

    stopped = None
    with patch.object(Loop, "step", counted):
        try:
            run_recipe(recipe, run, ["train"])
        except WorkError as error:
            stopped = str(error)
            print(f"  stopped: {stopped}", flush=True)
            recorder.evaluate(recorder.loop)
    return {
        "points": recorder.points,
        "stopped": stopped,
        "to_85": {axis: reached(recorder.points, axis) for axis in AXES},
        "right": recorder.right,
    }
