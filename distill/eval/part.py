"""One model on one benchmark: draw the missing samples, grade the ungraded ones, compute the scores.

Every step looks at what is on the disk and does the rest, so that a kill at any moment costs the sample being written.
Which samples exist is decided by (prompt, sample number); how they were drawn, by settings.json, which is compared
before a sample is added. The numerics are only known once the model is loaded, so they are put into that file when the
first samples are drawn, and compared when more are.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import __version__
from distill.artefacts import Scores
from distill.backends import Backend, Job, Sampling
from distill.backends.collect import check_all, collect, missing
from distill.chat import THINK
from distill.console import progress, say
from distill.durable import write_whole
from distill.errors import UserError
from distill.eval.models import Contender
from distill.eval.statistics import Sample, summarise
from distill.eval.votes import classes
from distill.fingerprint import digest
from distill.grading import require_grader
from distill.prompts import Prompt, PromptCounts, load_prompts
from distill.prompts.rows import rows_of_file
from distill.recipe.sources import FilePrompts, ProceduralPrompts
from distill.scores import grades
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.grading import Grade, Grader
    from distill.recipe import BenchmarkCard, Eval
    from distill.recipe.sources import PromptSource

PACKAGES = ("torch", "transformers", "math-verify")  # whose versions a score may depend on


@dataclass(frozen=True)
class Exam:
    """A benchmark as one recipe asks for it: `limit` problems at most of `source`, `samples` answers of each."""

    card: "BenchmarkCard"
    samples: int
    limit: int | None
    seed: int
    source: "PromptSource"
    max_new_tokens: int

    @classmethod
    def of(cls, card: "BenchmarkCard", recipe: "Eval") -> "Exam":
        """UserError where nobody can grade it, or the file that is named for it has other columns."""
        task = "math" if isinstance(card.prompts, ProceduralPrompts) else card.prompts.task
        require_grader(task, f"benchmark {card.name}", f"leave {card.name} out")
        path = recipe.sources.get(card.name)
        source = card.prompts if path is None else local_source(card, Path(path))
        longest = recipe.max_new_tokens or card.sampling.max_new_tokens
        return cls(card, recipe.samples or card.samples, recipe.limit, recipe.seed, source, longest)

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def sampling(self) -> Sampling:
        return Sampling(**self.card.sampling.model_dump() | {"max_new_tokens": self.max_new_tokens})

    @cached_property
    def prompts(self) -> list[Prompt]:
        counts = PromptCounts()
        try:
            found = list(islice(load_prompts([self.source], counts), self.limit))
        except UserError as error:
            hint = f"; or read {self.name} from a file: --source {self.name}=FILE, in a recipe eval.sources"
            raise UserError(f"{error}{hint if self.source is self.card.prompts else ''}") from error
        if not found:
            raise UserError(f"benchmark {self.name} has no problems: check `prompts` in its card")
        if unanswered := [prompt for prompt in found if not prompt.answer]:
            raise UserError(
                f"benchmark {self.name}: {len(unanswered):,} of its problems have no answer to compare with, the first "
                f"is {unanswered[0].messages[-1]['content'][:40]!r}…: leave them out of its file"
            )
        expected = self.card.problems
        if expected is not None and (self.limit is None or self.limit >= expected) and counts.seen.total() != expected:
            raise UserError(
                f"benchmark {self.name} has {counts.seen.total():,} problems where its card says {expected:,}: another "
                f"version of the data set; name the right revision or file, or set eval.limit to take the first ones"
            )
        return found

    def settings(self) -> dict[str, Any]:
        """What decides the samples beside the model: dotted keys → JSON values.

        Not where a file lies: a problem's samples go by its text, and the file may move, or grow.
        """
        settings = {f"prompts.{key}": value for key, value in self.source.settings().items() if key != "path"}
        settings |= {f"sampling.{key}": value for key, value in self.card.sampling.settings().items()}
        settings["sampling.max_new_tokens"] = self.max_new_tokens
        return settings | {"prompt_suffix": self.card.prompt_suffix, "seed": self.seed}


QUESTIONS = ("problem", "question", "prompt")  # what copies of a benchmark call their questions


def local_source(card: "BenchmarkCard", path: Path) -> FilePrompts:
    """A file in place of the card's source: its columns are the card's, or those that copies usually have."""
    prompts = card.prompts
    if isinstance(prompts, ProceduralPrompts):
        raise UserError(f"eval.sources: {card.name} is made by a generator and read from no file; leave it out")
    rows = rows_of_file(path)
    where, row = next(rows, (str(path), None))
    if row is None:
        raise UserError(f"{path}: no rows; give a file with at least one problem")
    count = 1 + sum(1 for _ in rows)
    if card.problems not in (None, count):
        say(f"note: {path} has {count:,} rows, {card.name} has {card.problems:,} problems: is it the right file?")
    question = next((name for name in (prompts.question, *QUESTIONS) if name in row), None)
    if question is None:
        raise UserError(f"{where}: no column {prompts.question} with the question; the columns are {', '.join(row)}")
    columns = prompts.model_dump(include={"answer", "choices", "date", "since", "until", "task"})
    return FilePrompts(kind="file", path=str(path), question=question, **columns)


OF_A_RUN = "--fresh eval moves all evaluations of this run aside, or choose another --run-dir"


class Part:
    """The directory `eval/<benchmark>/<model>`."""

    def __init__(self, root: Path, exam: Exam, contender: Contender, advice: str = OF_A_RUN) -> None:
        """advice: how to get rid of samples that were drawn otherwise."""
        self.exam, self.advice = exam, advice
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
        settings = (
            self.settings
            | _of_model(backend.identity)
            | {f"model.numerics.{key}": value for key, value in backend.numerics.items()}
        )
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
            for trace, grade in grader.grade(items):
                ledger.add(_graded(trace, grade, count))
                advance(1)

    def vote(self, grader: "Grader") -> None:
        """Find out which of a problem's marked answers are one, where that is not known yet."""
        if self.exam.samples < 2:
            return
        answers: dict[str, dict[str, None]] = {}
        for row in self._wanted_grades():
            if (answer := _marked(row)) is not None:
                answers.setdefault(row["prompt"], {})[answer] = None
        known = self._classes()
        new = {
            prompt: of_one for prompt, of_one in answers.items() if not of_one.keys() <= known.get(prompt, {}).keys()
        }
        if not new:
            return
        with (
            Ledger(self.directory / "votes.jsonl") as ledger,
            progress(f"vote {self.name}", len(new), "problems") as advance,
        ):
            for prompt, found in classes(grader, new):
                ledger.append([{"prompt": prompt, "answers": found}])
                advance(1)

    def score(self) -> Scores:
        """Write scores.json, and return it."""
        known = self._classes()
        content = {
            "benchmark": self.exam.name,
            "model": self.contender.name,
            "samples_per_problem": self.exam.samples,
            **summarise(_sample(row, known.get(row["prompt"], {})) for row in self._wanted_grades()),
            "reasoning_unit": self.contender.counted_in,
            "interval": "95 %: Wilson's score interval with the effective trials of problems as clusters",
            "source": self.exam.source.model_dump(mode="json"),
            "prompts_hash": digest([prompt.id for prompt in self.exam.prompts]),
            "settings": self._drawn_with(),
            "versions": {
                "distill": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
        }
        scores = Scores.model_validate_json(json.dumps(content))
        scores.write(self.directory / "scores.json")
        return scores

    def correct(self) -> dict[str, list[bool]]:
        """Prompt id → whether each of its samples is right."""
        found: dict[str, list[bool]] = {}
        for row in self._wanted_grades():
            found.setdefault(row["prompt"], []).append(row["verdict"] == "correct")
        return found

    def _grades(self) -> Iterator[dict[str, Any]]:
        return grades(self.directory)

    def _wanted_grades(self) -> list[dict[str, Any]]:
        grades = {(row["prompt"], row["sample"]): row for row in self._grades()}
        return [grades[key] for key in self.wanted]

    def _classes(self) -> dict[str, dict[str, int]]:
        """Prompt id → answer → which of the problem's different answers it is; later rows know more answers."""
        return {row["prompt"]: row["answers"] for row in Ledger(self.directory / "votes.jsonl").rows()}

    def _drawn_with(self) -> dict[str, Any] | None:
        """None where nothing has been drawn yet, whatever it was to be drawn with."""
        path = self.directory / "settings.json"
        if not path.exists() or self.store.is_empty():
            return None
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(settings, dict):
                return settings
        except ValueError:
            pass
        raise UserError(f"{path}: damaged: restore it, or delete {self.directory} and evaluate again")

    def _refuse(self, drawn: dict[str, Any], now: dict[str, Any]) -> None:
        now = json.loads(json.dumps(now))  # as it would read from the disk
        changed = [f"{key}: {drawn.get(key)!r} → {now.get(key)!r}" for key in now if drawn.get(key) != now.get(key)]
        if changed:
            raise UserError(
                f"{self.directory}: its samples were drawn with other settings ({', '.join(changed)}); {self.advice}"
            )


def _of_model(identity: Mapping[str, Any]) -> dict[str, Any]:
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
        "completion_tokens": trace.tokens or None,  # a server need not say
        "reasoning_tokens": count(thought) if thought else 0,
    }


def _marked(row: dict[str, Any]) -> str | None:
    """The answer that a sample votes with."""
    evidence = row["evidence"]
    return None if evidence.get("method") == "last line" else evidence.get("extracted")


def _sample(row: dict[str, Any], numbers: dict[str, int]) -> Sample:
    marked = _marked(row)
    return Sample(
        problem=row["prompt"],
        verdict=row["verdict"],
        answered=row["evidence"].get("extracted") is not None,
        truncated=row["finish_reason"] == "length",
        completion_tokens=row["completion_tokens"],
        reasoning_tokens=row["reasoning_tokens"],
        vote=None if marked is None else numbers.get(marked),
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
