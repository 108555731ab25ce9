"""What stages leave for one another, for the report and for people: one model a file, one reader, one writer.

Every small JSON file of a run is an `Artefact`: a frozen pydantic model that `write` puts on the disk whole and `read`
returns or refuses with one line. A file carries a checksum of its own content (`"sha256"`, the last key), because these
files are what everything else is judged by: a single flipped digit in a score or a setting would otherwise be read as a
result. The checksum covers values and not spelling, so a file may be pretty-printed anew; a value that is edited by
hand is refused, as it should be.

`RunPaths` is the only list of names inside a run directory.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from distill.durable import write_whole
from distill.errors import UserError

CHECKSUM = "sha256"
Settings = dict[str, JsonValue]  # flat: dotted key → JSON value


@dataclass(frozen=True)
class RunPaths:
    """The places inside a run directory. root: the run directory itself."""

    root: Path

    @property
    def identity(self) -> Path:
        """`run.json`: the format, the recipe's name and the checksum of recipe.yaml."""
        return self.root / "run.json"

    @property
    def recipe(self) -> Path:
        """`recipe.yaml`: the recipe as resolved, every default written out."""
        return self.root / "recipe.yaml"

    def record(self, stage: str) -> Path:
        """`stages/STAGE.json`: a stage's settings, summary and the files that it wrote."""
        return self.root / "stages" / f"{stage}.json"

    @property
    def old(self) -> Path:
        """`old/`: what `--fresh` moved aside, and files that were found damaged."""
        return self.root / "old"

    @property
    def traces(self) -> Path:
        """`traces/`: everything the teacher answered."""
        return self.root / "traces"

    @property
    def failed_attempts(self) -> Path:
        """`traces/failed.jsonl`: the tokens of requests that failed after their answer had begun, under a budget."""
        return self.traces / "failed.jsonl"

    @property
    def server_log(self) -> Path:
        """`logs/server.log`: the output of the servers that distill started."""
        return self.root / "logs" / "server.log"

    @property
    def filtered(self) -> Path:
        """`filtered/`: the traces with their verdicts."""
        return self.root / "filtered"

    @property
    def judgements(self) -> Path:
        """`judgements/`: what the judge of the recipe wrote, by user; shared by filters and evaluations."""
        return self.root / "judgements"

    @property
    def kept(self) -> Path:
        """`filtered/kept/`: the traces that training reads."""
        return self.filtered / "kept"

    @property
    def dropped(self) -> Path:
        """`filtered/dropped/`: the others, with the reason."""
        return self.filtered / "dropped"

    @property
    def funnel(self) -> Path:
        """`filtered/funnel.json`: how many traces each filter dropped, and why."""
        return self.filtered / "funnel.json"

    @property
    def verdicts(self) -> Path:
        """`filtered/verdicts.jsonl`: the ledger of per-trace verdicts, by which filtering resumes."""
        return self.filtered / "verdicts.jsonl"

    @property
    def tokens(self) -> Path:
        """`tokens/`: the training rows, encoded."""
        return self.root / "tokens"

    @property
    def scored(self) -> Path:
        """`scored/`: traces with the teacher's log-probabilities, for the `logits` objective."""
        return self.root / "scored"

    @property
    def rollouts(self) -> Path:
        """`rollouts/`: what the student wrote while it was trained, for objectives that need it."""
        return self.root / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`: the state of the training, and its log."""
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        """`checkpoints/log.jsonl`: loss and learning rate by step."""
        return self.checkpoints / "log.jsonl"

    @property
    def student(self) -> Path:
        """`student/`: the trained model, as `transformers` loads it."""
        return self.root / "student"

    def phase(self, number: int, name: str) -> Path:
        """`phases/1-NAME`: the run directory of a phase of the training. number: from 0."""
        return self.root / "phases" / f"{number + 1}-{name}"

    @property
    def eval(self) -> Path:
        """`eval/`: samples, grades and scores, by benchmark and model."""
        return self.root / "eval"

    @property
    def plan(self) -> Path:
        """`plan.json`: the last estimate of `distill plan`, which the report shows beside what was measured."""
        return self.root / "plan.json"

    @property
    def report(self) -> Path:
        """`report.html`."""
        return self.root / "report.html"

    @property
    def pictures(self) -> Path:
        """`report/`: the report's figures as SVG and PNG."""
        return self.root / "report"


class Artefact(BaseModel):
    """A small JSON file. Frozen; unknown keys and values that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, strict=True)

    def write(self, path: Path) -> None:
        """Replace `path` in one step. Errors: OSError."""
        content = self.to_json()
        write_whole(path, json.dumps(content | {CHECKSUM: _checksum(content)}, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self:
        """Read what `write` wrote. remedy: what to do when that is not possible, as the end of the error's sentence.

        Errors: UserError naming the file when it is missing, damaged or of another format.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {remedy}") from None
        try:
            content = json.loads(data)
            if not isinstance(content, dict) or content.pop(CHECKSUM, None) != _checksum(content):
                raise ValueError
            return cls.model_validate_json(json.dumps(content))
        except (ValueError, RecursionError, ValidationError):
            raise UserError(f"{path} is damaged; {remedy}") from None

    @classmethod
    def read_if_there(cls, path: Path, remedy: str) -> Self | None:
        """As `read`; None where there is no such file."""
        return cls.read(path, remedy) if path.exists() else None

    def to_json(self) -> dict[str, JsonValue]:
        """The content as JSON values."""
        return self.model_dump(mode="json", by_alias=True)


def _checksum(content: Mapping[str, JsonValue]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---- generate


class Drafts(Artefact):
    """Tokens that the multi-token-prediction layer proposed, and how many of them were accepted."""

    proposed: int
    accepted: int


class GenerateSummary(Artefact):
    """What `traces/` holds, and how fast the last session made it.

    content_hash: over (prompt id, sample, text) of all traces, whatever their order. tasks: of the prompts; None in
    summaries of earlier versions. completion_tokens: 0 where the traces have no token counts, like the other counts of
    tokens; cached tokens are among those of the prompts, reasoning tokens among those of the completions. forms: how
    the reasoning came (`Trace.form`) → traces. made, seconds, tokens_per_second, drafts: of the last session alone; the
    rate is without the start of a server. numerics: what produced the numbers, None for published traces. counted:
    traces whose completion tokens are counted; None in summaries of earlier versions.
    """

    traces: int
    content_hash: str
    prompts: int
    tasks: tuple[str, ...] | None = None
    truncated: int
    completion_tokens: int
    median_completion_tokens: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    forms: dict[str, int] = {}
    made: int
    seconds: float
    tokens_per_second: int | None = None
    drafts: Drafts | None = None
    numerics: dict[str, str] | None = None
    counted: int | None = None

    @property
    def tokens(self) -> int | None:
        """Completion tokens of all traces; None where some were not counted."""
        if self.counted is None:
            return self.completion_tokens or None
        return self.completion_tokens if self.counted == self.traces else None


# ---- filter


class FunnelStep(Artefact):
    """One filter: traces that entered it, that it dropped and kept, and the reasons with their counts."""

    filter: str
    entered: int
    dropped: int
    kept: int
    reasons: dict[str, int]


class FilterSummary(Artefact):
    """The funnel in figures.

    funnel: the filters that ran, in order. verdicts: filter → reason → count over all traces that it judged, so that
    the effect of each filter alone can be read off. tokens_kept, reasoning_*: in `unit`. kept_hash: a hash over
    (prompt id, sample, text) of the kept traces, whatever their order: training is bound to it.
    """

    total: int
    kept: int
    dropped: int
    prompts: int
    prompts_kept: int
    funnel: tuple[FunnelStep, ...]
    verdicts: dict[str, dict[str, int]]
    unit: str
    tokens_kept: int
    reasoning_median: float | None
    reasoning_mean: float | None
    kept_hash: str


# ---- train


class TrainSummary(Artefact):
    """Counts of rows and tokens, losses in nats per token, and the rate. student: directory inside the run. rollouts,
    rollout_tokens: what the student wrote, 0 for objectives that need none; rows: without them. phases: of a training
    in phases, by name and in order; the other figures are then their sums, and the first and the last loss.
    padded_rows: why the rows of a batch were padded; None where they were concatenated."""

    steps: int
    epochs: float
    rows: int
    held_out_rows: int
    dropped_rows: int
    dropped_tokens: int
    truncated_rows: int
    truncated_tokens: int
    tokens: int
    supervised_tokens: int
    supervised_tokens_per_epoch: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    seconds: float
    tokens_per_second: int
    processes: int
    student: str
    rollouts: int = 0
    rollout_tokens: int = 0
    padded_rows: str | None = None
    phases: dict[str, "TrainSummary"] = {}


# ---- eval


class Interval(Artefact):
    """A share (or a difference of shares) with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class ConsensusScore(Interval):
    """cons@k. ties: problems whose most frequent answers include a right and a wrong one. silent: without a vote."""

    ties: int
    silent: int


class InstructionScores(Artefact):
    """IFEval's accuracies: the share of prompts whose instructions are all followed, and the share of all instructions
    that are, each strict (the response as it stands) and loose (a variant of it). prompt_strict is pass@1."""

    prompt_strict: Interval
    prompt_loose: Interval
    instruction_strict: Interval
    instruction_loose: Interval


class PartScore(Artefact):
    """pass@1 on the problems of one source of a benchmark."""

    problems: int
    pass_at_1: Interval = Field(alias="pass@1")


class Scores(Artefact):
    """`scores.json`: one model on one benchmark, and what it takes to repeat it.

    Rates are shares of all samples. pass_at_k, consensus_at_k: by k, empty where a problem has one sample. Lengths are
    in the model's tokens (`reasoning_unit` says where reasoning is counted in words). instructions: None where the
    problems are not instructions. parts: by source, for a benchmark of several. settings: how the samples were drawn.
    grading: which grader or judge gave the verdicts, empty where an earlier version did not record it. versions: of the
    packages that a score may depend on.
    """

    benchmark: str
    model: str
    problems: int
    samples_per_problem: int
    samples: int
    correct: int
    pass_at_1: Interval = Field(alias="pass@1")
    effective_trials: float
    pass_at_k: dict[int, Interval] = Field(alias="pass@k")
    consensus_at_k: dict[int, ConsensusScore] = Field(alias="cons@k")
    instructions: InstructionScores | None = None
    parts: dict[str, PartScore] = {}
    truncated_rate: float
    no_answer_rate: float
    unverifiable_rate: float
    mean_completion_tokens: float | None
    median_completion_tokens: float | None
    mean_reasoning_tokens: float
    median_reasoning_tokens: float
    reasoning_unit: str
    interval: str
    source: dict[str, JsonValue]
    prompts_hash: str
    settings: Settings
    grading: Settings = {}
    versions: dict[str, str]


class Comparison(Artefact):
    """Two models on the problems that both answered.

    difference: the first model's pass@1 less the second's. gained, lost: ids of the problems that the first solved more
    or less often. p: of the exact two-sided sign test. left_out: problems that only one of the two has. differing:
    settings that were not the same, as `key: first, second`.
    """

    benchmark: str
    models: tuple[str, str]
    problems: int
    first: float
    second: float
    difference: Interval
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    p: float
    left_out: int = 0
    differing: tuple[str, ...] = ()


class PublishedScores(Artefact):
    """Published scores of a model: name (`pass@1`, `cons@64`) → share. problems: of the benchmark; None where its card
    does not say."""

    benchmark: str
    model: str
    scores: dict[str, float]
    problems: int | None = None


class EvalSummary(Artefact):
    """All scores of an evaluation, the student compared with each other model, and published scores."""

    scores: tuple[Scores, ...]
    comparisons: tuple[Comparison, ...] = ()
    published: tuple[PublishedScores, ...] = ()


# ---- report


class ReportSummary(Artefact):
    """page: its file's name inside the run directory. bytes: its size."""

    page: str
    bytes: int
