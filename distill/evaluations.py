"""Evaluations on the disk: the files of one model on one benchmark, and how they are read.

    <benchmark>/<model>/settings.json    how the samples were drawn (`DrawnWith`)
                        traces/          the samples, a TraceStore
                        grading.json     which grader, or judge, gave the verdicts (`GradedWith`)
                        grades.jsonl     one verdict a sample, and its lengths in the model's tokens (`GradeRow`)
                        votes.jsonl      which answers to a problem are equal (`VoteRow`)
                        scores.json      pass@1 with its interval, the rates, and all it takes to repeat them (`Scores`)
                        record.json      which problems and samples scores.json counts, and a hash of every file

record.json is written last and removed first: an evaluation is finished while it is there. It is what makes a score
more than a number in a file: `read_results` demands exactly the grades that were counted, each once, in files that hold
what was hashed. Grades that are half gone, or more than were counted because fewer samples were asked for later, cannot
change a comparison or a picture.

A room of its own because `eval` writes these files and `report` reads them, and stages do not know one another.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from distill.artefacts import Artefact, Comparison, PublishedScores, RunPaths, Scores, Settings
from distill.errors import UserError
from distill.integrity import FileRecord
from distill.traces.ledger import Ledger

Key = tuple[str, int]  # prompt id, sample number
Outcome = Literal["correct", "wrong", "unverifiable"]


@dataclass(frozen=True)
class EvaluationPaths:
    """The files of one model on one benchmark. root: their directory."""

    root: Path

    @property
    def settings(self) -> Path:
        """`settings.json`, a `DrawnWith`."""
        return self.root / "settings.json"

    @property
    def traces(self) -> Path:
        """`traces/`: the samples."""
        return self.root / "traces"

    @property
    def grading(self) -> Path:
        """`grading.json`, a `GradedWith`."""
        return self.root / "grading.json"

    @property
    def grades(self) -> Path:
        """`grades.jsonl`: a ledger of `GradeRow`."""
        return self.root / "grades.jsonl"

    @property
    def votes(self) -> Path:
        """`votes.jsonl`: a ledger of `VoteRow`; only where problems have several samples."""
        return self.root / "votes.jsonl"

    @property
    def scores(self) -> Path:
        """`scores.json`: `Scores`."""
        return self.root / "scores.json"

    @property
    def record(self) -> Path:
        """`record.json`: an `EvaluationRecord`, there while the evaluation is finished."""
        return self.root / "record.json"

    def products(self) -> list[Path]:
        """The files that are there and that a finished evaluation vouches for."""
        files = [self.settings, self.grading, self.grades, self.votes, self.scores, *self.traces.glob("part-*.parquet")]
        return sorted(path for path in files if path.exists())


class DrawnWith(Artefact):
    """`settings.json`: everything that decided the samples. Other settings are refused, never mixed. versions: of the
    packages that drew them."""

    settings: Settings
    versions: dict[str, str] = Field(default_factory=dict)


class GradedWith(Artefact):
    """`grading.json`: everything that decided the grades besides the samples. Grades of another grader are replaced,
    never mixed. versions: of distill and Python, for the record."""

    settings: Settings
    versions: dict[str, str]


class EvaluationRecord(Artefact):
    """`record.json`. prompts: ids of the problems that were counted, in order. samples: of each, the first so many.
    files: by path relative to the directory."""

    prompts: tuple[str, ...]
    samples: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class GradeRow:
    """One graded sample.

    evidence: `extracted` and `gold` as compared, and `method`, how the answer was found. completion_tokens: None where
    a server does not say. reasoning_tokens: in the model's tokens, or in words where its tokenizer is not known; the
    reasoning of a sample that was cut off while thinking counts too.
    """

    prompt: str
    sample: int
    verdict: Outcome
    reason: str
    evidence: Mapping[str, object]
    finish_reason: str | None
    completion_tokens: int | None
    reasoning_tokens: int

    @property
    def key(self) -> Key:
        """(prompt id, sample number)."""
        return self.prompt, self.sample

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.verdict == "correct"

    @property
    def answer(self) -> str | None:
        """The final answer, None where none was found."""
        answer = self.evidence.get("extracted")
        return None if answer is None else str(answer)

    @property
    def followed(self) -> tuple[list[bool], list[bool]] | None:
        """Whether each instruction was followed, strictly and loosely; None where they were not checked."""
        match self.evidence:
            case {"strict": list(strict), "loose": list(loose)}:
                return strict, loose
        return None

    def to_row(self) -> dict[str, object]:
        """The row as a JSON object."""
        return dict(vars(self))

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> "GradeRow":
        """Read what `to_row` gave. Errors: ValueError when it is something else."""
        match row:
            case {
                "prompt": str(prompt),
                "sample": int(sample),
                "verdict": "correct" | "wrong" | "unverifiable" as verdict,
                "reason": str(reason),
                "evidence": dict(evidence),
                "finish_reason": None | str() as finish,
                "completion_tokens": None | int() as completion,
                "reasoning_tokens": int(reasoning),
            }:
                return cls(prompt, sample, verdict, reason, evidence, finish, completion, reasoning)
        raise ValueError("not a graded sample")


@dataclass(frozen=True)
class VoteRow:
    """Which answers to one problem are equal: answer → number of its class. A later row of a problem replaces it."""

    prompt: str
    answers: Mapping[str, int]

    def to_row(self) -> dict[str, object]:
        """The row as a JSON object."""
        return dict(vars(self))

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> "VoteRow":
        """Read what `to_row` gave. Errors: ValueError when it is something else."""
        match row:
            case {"prompt": str(prompt), "answers": dict(answers)} if all(
                isinstance(number, int) for number in answers.values()
            ):
                return cls(prompt, answers)
        raise ValueError("not the answers of a problem")


def read_grades(path: Path) -> dict[Key, GradeRow]:
    """The graded samples of a ledger; none where there is no file. Errors: UserError for a row that was not written
    by an evaluation, or a sample that is graded twice."""
    rows: dict[Key, GradeRow] = {}
    for number, content in enumerate(Ledger(path).rows(), 1):
        try:
            row = GradeRow.from_row(content)
        except ValueError:
            raise UserError(f"{path}, row {number}: damaged") from None
        if row.key in rows:
            raise UserError(f"{path}, row {number}: damaged (sample {row.sample} of {row.prompt} is graded twice)")
        rows[row.key] = row
    return rows


def read_votes(path: Path) -> dict[str, Mapping[str, int]]:
    """Prompt id → answer → number of its class. Errors: UserError for a row that was not written by an evaluation."""
    classes: dict[str, Mapping[str, int]] = {}
    for number, content in enumerate(Ledger(path).rows(), 1):
        try:
            row = VoteRow.from_row(content)
        except ValueError:
            raise UserError(f"{path}, row {number}: damaged") from None
        classes[row.prompt] = row.answers
    return classes


# ---- a finished evaluation


@dataclass(frozen=True)
class Results:
    """A finished evaluation. samples: prompt id → its graded samples, in order: exactly those that `scores` counts."""

    scores: Scores
    samples: Mapping[str, tuple[GradeRow, ...]]

    @property
    def correct(self) -> dict[str, list[bool]]:
        """Prompt id → whether each of its samples is right."""
        return {prompt: [row.correct for row in rows] for prompt, rows in self.samples.items()}


def read_results(directory: Path) -> Results:
    """Read a finished evaluation. Errors: UserError naming a file that is missing or damaged, or how many grades are
    missing, and the command that recreates them."""
    paths, remedy = EvaluationPaths(directory), remedy_of(directory)
    record = EvaluationRecord.read(paths.record, remedy)
    for path in (paths.scores, paths.grades):
        file = record.files.get(path.name)
        if (damage := "is not in record.json" if file is None else file.damage(path)) is not None:
            raise UserError(f"{path} {damage}; {remedy}")
    rows = read_grades(paths.grades)
    samples = {
        prompt: tuple(rows[prompt, n] for n in range(record.samples) if (prompt, n) in rows)
        for prompt in record.prompts
    }
    scores = Scores.read(paths.scores, remedy)
    count, wanted = sum(map(len, samples.values())), len(record.prompts) * record.samples
    if not count == wanted == scores.samples:
        raise UserError(
            f"{paths.grades} has {count:,} of the {scores.samples:,} grades that {paths.scores} counts; {remedy}"
        )
    return Results(scores, samples)


def remedy_of(directory: Path) -> str:
    """How an evaluation is made again: the command for one inside a run, else its kind."""
    out, run = (Path(os.path.normpath(directory / above)) for above in ("../..", "../../.."))
    if os.path.basename(os.path.abspath(out)) == RunPaths(run).eval.name and RunPaths(run).recipe.exists():
        return f"`distill eval {RunPaths(run).recipe} --run-dir {run} --verify` recreates it"
    return f"the `distill eval --model` command with --out {out} recreates it"


def finished_evaluations(root: Path) -> dict[str, dict[str, Path]]:
    """Benchmark → model → directory of the finished evaluations below `root`, by name."""
    evaluations: dict[str, dict[str, Path]] = {}
    for record in sorted(root.glob("*/*/record.json")):
        evaluations.setdefault(record.parent.parent.name, {})[record.parent.name] = record.parent
    return evaluations


# ---- in words, for the terminal and the report


def difference_line(comparison: Comparison) -> str:
    """How far apart two models are, and on how many problems."""
    first, second = comparison.models
    difference = comparison.difference
    return (
        f"{first} − {second}: {100 * difference.value:+.1f} points (95 %: {100 * difference.low:+.1f} to "
        f"{100 * difference.high:+.1f}); better on {len(comparison.gained):,} problems, worse on "
        f"{len(comparison.lost):,}, sign test p = {comparison.p:.2g}"
    )


LABELS = (  # what the rates of a table of scores mean
    "no answer: no final answer was found in the response",
    "unverifiable: no verdict, because there is no answer or it cannot be compared",
)


def judge_line(scores: Scores) -> str | None:
    """Which judge gave the verdicts; None where programs did."""
    settings = scores.settings | scores.grading  # an earlier version had the judge among the settings of the samples
    judge = {key: value for key, value in settings.items() if key.startswith("judge.model.")}
    if not judge:
        return None
    name = judge.get("judge.model.model") or f"the model with weights {judge.get('judge.model.weights')}"
    return f"{scores.benchmark} is graded by a judge, {name}; another judge may give other scores"


def published_line(published: PublishedScores, scores: Scores) -> str:
    """Published scores, and whether a published pass@1 is inside our interval, where both are of the same problems."""
    parts = []
    if (value := published.scores.get("pass@1")) is not None:
        place = "inside" if scores.pass_at_1.low <= value <= scores.pass_at_1.high else "outside"
        relation = f"{place} the interval of {scores.model}"
        if published.problems not in (None, scores.problems):
            relation = f"for all {published.problems:,} problems, of which {scores.problems:,} were asked here"
        parts.append(f"pass@1 {value:.1%}, {relation}")
    parts += [f"{name} {value:.1%}" for name, value in published.scores.items() if name != "pass@1"]
    return f"published for {published.model}: {', '.join(parts)}"


def counts_by_problem(samples: Mapping[str, Iterable[GradeRow]]) -> list[tuple[int, int]]:
    """(correct, all) samples of each problem."""
    rows = {prompt: list(of_prompt) for prompt, of_prompt in samples.items()}
    return [(sum(row.correct for row in of_prompt), len(of_prompt)) for of_prompt in rows.values()]
