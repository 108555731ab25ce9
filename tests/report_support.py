"""A made-up run directory, finished up to a stage, as its stages would leave it."""

import hashlib
import math
import random
from datetime import UTC, datetime, timedelta

from distill.artefacts import (
    Artefact,
    EvalSummary,
    FilterSummary,
    FunnelStep,
    GenerateSummary,
    RunPaths,
    Scores,
    TrainSummary,
)
from distill.eval import EvalStage
from distill.eval.statistics import Sample, summarise
from distill.evaluations import DrawnWith, EvaluationPaths, EvaluationRecord, GradeRow
from distill.fingerprint import digest
from distill.integrity import record_files
from distill.prompts import Prompt
from distill.prompts.arithmetic import draw_problem
from distill.recipe import Recipe
from distill.record import FORMAT, Identity, StageRecord
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, write_traces
from distill.traces.trace import Trace, Verdict

STAGES = ("generate", "filter", "train", "eval")
PRODUCTS = {"filter": ("filtered/*/*.parquet",), "train": ("checkpoints/log.jsonl",), "eval": EvalStage.products}
RIGHT = {"base": 0.06, "student": 0.95, "teacher": 0.99}


def begin_run(directory, recipe):
    """A run directory of this recipe before its first stage."""
    paths, text = RunPaths(directory), recipe.to_yaml()
    (directory / "stages").mkdir(parents=True)
    paths.recipe.write_text(text, encoding="utf-8")
    checksum = hashlib.sha256(text.encode()).hexdigest()
    Identity(format=FORMAT, recipe="tiny", created="2026-03-01", recipe_sha256=checksum).write(paths.identity)


def make_run(directory, upto="eval", traces=60, problems=40, seed=0):
    """A run directory as the stages leave it, finished up to and with the stage `upto`."""
    rng = random.Random(seed)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "description": "embedded: the whole way in a few minutes on a laptop",
            "teacher": "tiny-r1",
            "student": "tiny-qwen",
            "prompts": [{"kind": "procedural", "name": "arithmetic", "limit": traces}],
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
    )
    begin_run(directory, recipe)
    last = STAGES.index(upto)
    summary = GenerateSummary(
        traces=traces,
        content_hash="0",
        prompts=traces,
        truncated=2,
        completion_tokens=traces * 90,
        median_completion_tokens=90,
        made=traces,
        seconds=90.0,
    )
    finish(directory, "generate", summary)
    if last >= 1:
        _filter(directory, traces, rng)
    if last >= 2:
        _train(directory)
    if last >= 3:
        _evaluate(directory, problems, rng)
    return directory


def finish(directory, stage, summary: Artefact, minute=0):
    """The record of a finished stage, with its products."""
    begun = datetime(2026, 3, 1, 10, minute, tzinfo=UTC)
    files = [path for pattern in PRODUCTS.get(stage, ()) for path in directory.glob(pattern)]
    record = StageRecord(
        settings={},
        extent={},
        begun=begun.isoformat(),
        resumed=None,
        seconds=94.0,
        finished=(begun + timedelta(seconds=94)).isoformat(),
        summary=summary.to_json(),
        files=record_files(directory, files),
    )
    record.write(RunPaths(directory).record(stage))


def record_again(directory, stage):
    """The record of a stage whose products a test has changed, as if the stage had written them so."""
    path = RunPaths(directory).record(stage)
    files = [file for pattern in PRODUCTS[stage] for file in directory.glob(pattern)]
    StageRecord.read(path, "").model_copy(update={"files": record_files(directory, files)}).write(path)


def make_trace(rng, split, right=True, sample=0, think=True):
    problem = draw_problem(rng, split)
    prompt = Prompt.from_question(problem.question, problem.answer)
    reasoning = "\n".join(problem.steps) if think else None
    response = f"The answer is {problem.answer if right else 'unclear'}."
    text = f"<think>\n{reasoning}\n</think>\n{response}" if think else response
    ids = tuple(range(20 * len(problem.steps) + rng.randint(0, 30)))
    return Trace(prompt, sample, 0, text, reasoning, response, "stop", "f" * 16, (1, 2), ids)


def _filter(directory, count, rng):
    traces = [make_trace(rng, "train", right=i % 15 != 0) for i in range(count)]
    verdicts = {}
    for i, trace in enumerate(traces):
        said = [Verdict("format", i % 20 != 3, "ok" if i % 20 != 3 else "think block not closed", {"think": 1})]
        evidence = {"extracted": trace.response, "gold": trace.prompt.answer}
        said.append(Verdict("correct", i % 15 != 0, "ok" if i % 15 else "wrong", evidence))
        verdicts[trace.key] = said
    kept = [t for t in traces if all(v.keep for v in verdicts[t.key])]
    dropped = [t for t in traces if t not in kept]
    write_traces(directory / "filtered" / "kept", kept, verdicts)
    write_traces(directory / "filtered" / "dropped", dropped, verdicts)
    unclosed = sum(not verdicts[t.key][0].keep for t in dropped)
    wrong = len(dropped) - unclosed
    funnel = (
        _step("format", count, {"think block not closed": unclosed}),
        _step("finish", count - unclosed, {}),
        _step("correct", count - unclosed, {"wrong": wrong}),
    )
    summary = FilterSummary(
        total=count,
        kept=len(kept),
        dropped=len(dropped),
        prompts=count,
        prompts_kept=len(kept),
        funnel=funnel,
        verdicts={},
        unit="teacher tokens",
        tokens_kept=90 * len(kept),
        reasoning_median=80,
        reasoning_mean=80,
        kept_hash="0",
    )
    finish(directory, "filter", summary, 2)


def _step(name, entered, reasons):
    dropped = sum(reasons.values())
    return FunnelStep(filter=name, entered=entered, dropped=dropped, kept=entered - dropped, reasons=reasons)


def _train(directory):
    (directory / "checkpoints").mkdir()
    with Ledger(directory / "checkpoints" / "log.jsonl") as log:
        rate = (
            3e-3 * min(1, step / 30) * (0.55 + 0.45 * math.cos(math.pi * step / 360)) for step in range(10, 361, 10)
        )
        for step, learning_rate in zip(range(10, 361, 10), rate, strict=True):
            loss = 0.03 + 1.6 * math.exp(-step / 60)
            log.append([{"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": 1.0}])
    summary = TrainSummary(
        steps=360,
        epochs=7.0,
        rows=52,
        held_out_rows=0,
        dropped_rows=0,
        dropped_tokens=0,
        truncated_rows=0,
        truncated_tokens=0,
        tokens=300_000,
        supervised_tokens=250_000,
        supervised_tokens_per_epoch=36_000,
        first_loss=1.4,
        last_loss=0.03,
        eval_loss=None,
        seconds=90.0,
        tokens_per_second=9_100,
        processes=1,
        student="student",
    )
    finish(directory, "train", summary, 4)


def _evaluate(directory, problems, rng):
    exam = [make_trace(rng, "heldout") for _ in range(problems)]
    scores = []
    for model, share in RIGHT.items():
        paths = EvaluationPaths(directory / "eval" / "tiny-arithmetic" / model)
        samples, rows = [], []
        with TraceStore(paths.traces) as store:
            for trace in exam:
                right, think = rng.random() < share, model != "base"
                response = f"The answer is {trace.prompt.answer if right else 7}."
                reasoning = trace.reasoning if think else None
                text = f"<think>\n{reasoning}\n</think>\n{response}" if think else response
                fields = (trace.prompt, 0, 1, text, reasoning, response, "stop", model, (1, 2), tuple(range(50)))
                store.append([Trace(*fields)])
                verdict, length = "correct" if right else "wrong", 44 if think else 0
                rows.append(GradeRow(trace.prompt.id, 0, verdict, "", {}, "stop", 50, length))
                samples.append(Sample(trace.prompt.id, verdict, True, False, 50, length))
        store.compact()
        with Ledger(paths.grades) as grades:
            grades.append([row.to_row() for row in rows])
        scores.append(_score(paths, model, samples))
    finish(directory, "eval", EvalSummary(scores=tuple(scores)), 6)


def _score(paths, model, samples):
    prompts = tuple(sample.problem for sample in samples)
    scores = Scores(
        benchmark="tiny-arithmetic",
        model=model,
        samples_per_problem=1,
        reasoning_unit="tokens",
        interval="",
        source={},
        prompts_hash=digest(list(prompts)),
        settings={},
        versions={},
        **vars(summarise(samples)),
    )
    DrawnWith(settings={}).write(paths.settings)
    scores.write(paths.scores)
    record = EvaluationRecord(prompts=prompts, samples=1, files=record_files(paths.root, paths.products()))
    record.write(paths.record)
    return scores
