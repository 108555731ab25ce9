"""One model on one benchmark: draw the missing samples, grade the ungraded ones, compute the scores.

Every step looks at what is on the disk and does the rest, so that a kill at any moment costs the sample being written.
Which samples exist is decided by (prompt, sample number); how they were drawn, by settings.json, which is compared
before a sample is added. The numerics are only known once the model is loaded, so they are put into that file when the
first samples are drawn, and compared when more are.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import __version__
from distill.backends import Backend, Job, Sampling
from distill.backends.collect import check_all, collect, missing
from distill.chat import THINK
from distill.console import progress
from distill.durable import write_whole
from distill.errors import UserError
from distill.eval.models import Contender
from distill.eval.statistics import Sample, summarise
from distill.fingerprint import digest
from distill.prompts import Prompt, load_prompts
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.grading import Grade, Grader
    from distill.recipe import BenchmarkCard, Eval

FLUSH_SECONDS = 0.5  # of grading may be lost and done again: an fsync a grade would cost more than most gradings
PACKAGES = ("torch", "transformers", "math-verify")  # whose versions a score may depend on


@dataclass(frozen=True)
class Exam:
    """A benchmark as one recipe asks for it: `limit` problems at most, `samples` answers of each."""

    card: "BenchmarkCard"
    samples: int
    limit: int | None
    seed: int

    @classmethod
    def of(cls, card: "BenchmarkCard", recipe: "Eval") -> "Exam":
        return cls(card, recipe.samples or card.samples, recipe.limit, recipe.seed)

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.card.sampling.model_dump())

    @cached_property
    def prompts(self) -> list[Prompt]:
        found = list(islice(load_prompts([self.card.prompts]), self.limit))
        if not found:
            raise UserError(f"benchmark {self.name} has no problems: check `prompts` in its card")
        return found

    def settings(self) -> dict[str, Any]:
        """What decides the samples beside the model: dotted keys → JSON values."""
        settings = {f"prompts.{key}": value for key, value in self.card.prompts.settings().items()}
        settings |= {f"sampling.{key}": value for key, value in self.card.sampling.settings().items()}
        return settings | {"prompt_suffix": self.card.prompt_suffix, "seed": self.seed}


class Part:
    """The directory `eval/<benchmark>/<model>`."""

    def __init__(self, root: Path, exam: Exam, contender: Contender) -> None:
        self.exam = exam
        self.contender = contender
        self.name = f"{exam.name}/{contender.name}"
        self.directory = root / exam.name / contender.name
        self.settings = exam.settings() | _of_model(contender.identity)
        self.store = TraceStore(self.directory / "traces")

    @cached_property
    def wanted(self) -> list[tuple[str, int]]:
        """(prompt id, sample number) of every sample that is scored. The store may hold more."""
        return [(prompt.id, sample) for prompt in self.exam.prompts for sample in range(self.exam.samples)]

    def refuse_other_settings(self) -> None:
        """Raise UserError when the samples on the disk were drawn with other settings. Writes nothing."""
        drawn = self._drawn_with()
        if drawn is not None:
            self._refuse({key: value for key, value in drawn.items() if key in self.settings}, self.settings)

    def missing(self) -> list[Job]:
        return missing(self.exam.prompts, self.exam.samples, self.store.keys())

    def sample(self, backend: Backend, jobs: Sequence[Job]) -> None:
        """Draw the samples of `jobs`; each is on the disk before the next one is looked at."""
        sampling, suffix = self.exam.sampling, self.exam.card.prompt_suffix
        settings = self.settings | _of_model(backend.identity)
        drawn = self._drawn_with()
        if drawn is not None:
            self._refuse(drawn, settings)
        check_all(backend, jobs, sampling, suffix)
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / "settings.json", settings)
        done = len(self.wanted) - sum(len(job.samples) for job in jobs)
        with self.store, progress(f"eval {self.name}", len(self.wanted), "samples", done) as advance:
            collect(backend, self.store, jobs, sampling, self.exam.seed, digest(settings), advance, suffix)
        self.store.compact()

    def grade(self, grader: "Grader", tokenizer: Callable[[], Callable[[str], int]]) -> None:
        """Grade the wanted samples that have no grade yet. `tokenizer` is only loaded when there is one."""
        graded = {(row["prompt"], row["sample"]) for row in self._grades()}
        ungraded = set(self.wanted) - graded
        if not ungraded:
            return
        count = tokenizer()
        items = ((trace, trace.prompt, trace.response) for trace in self.store if trace.key in ungraded)
        done = len(self.wanted) - len(ungraded)
        with (
            Ledger(self.directory / "grades.jsonl") as ledger,
            progress(f"grade {self.name}", len(self.wanted), "samples", done) as advance,
        ):
            rows: list[dict[str, Any]] = []
            flushed = time.monotonic()
            for trace, grade in grader.grade(items):
                rows.append(_graded(trace, grade, count))
                advance(1)
                if time.monotonic() - flushed >= FLUSH_SECONDS:
                    ledger.append(rows)
                    rows, flushed = [], time.monotonic()
            ledger.append(rows)

    def score(self) -> dict[str, Any]:
        """Write scores.json, and return it."""
        grades = {(row["prompt"], row["sample"]): row for row in self._grades()}
        scores = {
            "benchmark": self.exam.name,
            "model": self.contender.name,
            "samples_per_problem": self.exam.samples,
            **summarise(_sample(grades[key]) for key in self.wanted),
            "interval": "95 %: Wilson's score interval with the effective trials of problems as clusters",
            "prompts_hash": digest([prompt.id for prompt in self.exam.prompts]),
            "settings": self._drawn_with(),
            "versions": {
                "distill": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
        }
        _write(self.directory / "scores.json", scores)
        return scores

    def _grades(self) -> Iterator[dict[str, Any]]:
        return Ledger(self.directory / "grades.jsonl").rows()

    def _drawn_with(self) -> dict[str, Any] | None:
        path = self.directory / "settings.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _refuse(self, drawn: dict[str, Any], now: dict[str, Any]) -> None:
        now = json.loads(json.dumps(now))  # as it would read from the disk
        changed = [f"{key}: {drawn.get(key)!r} → {now.get(key)!r}" for key in now if drawn.get(key) != now.get(key)]
        if changed:
            raise UserError(
                f"{self.directory}: its samples were drawn with other settings ({', '.join(changed)}); --fresh eval "
                f"moves all evaluations of this run aside, or choose another --run-dir"
            )


def _of_model(identity: dict[str, Any]) -> dict[str, Any]:
    return {f"model.{key}": value for key, value in identity.items()}


def _graded(trace: Trace, grade: "Grade", count: Callable[[str], int]) -> dict[str, Any]:
    """One row of grades.jsonl. Thinking that was cut off counts as reasoning: all that was written of it."""
    thought = trace.text.partition(THINK)[2] if trace.reasoning is None else trace.reasoning
    return {
        "prompt": trace.prompt.id,
        "sample": trace.sample,
        "verdict": grade.verdict,
        "reason": grade.reason,
        "evidence": grade.evidence,
        "finish_reason": trace.finish_reason,
        "completion_tokens": len(trace.completion_token_ids),
        "reasoning_tokens": count(thought) if thought else 0,
    }


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        problem=row["prompt"],
        verdict=row["verdict"],
        answered=row["evidence"].get("extracted") is not None,
        truncated=row["finish_reason"] == "length",
        completion_tokens=row["completion_tokens"],
        reasoning_tokens=row["reasoning_tokens"],
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
