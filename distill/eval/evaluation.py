"""One model on one benchmark: draw the missing samples, grade the ungraded ones, compute the scores.

Every step looks at what is on the disk and does the rest, so that a kill at any moment costs the sample being written.
Which samples exist is decided by (prompt, sample number); how they were drawn, by settings.json, which is compared
before a sample is added. The numerics are only known once the model is loaded, so they are put into that file when the
first samples are drawn, and compared when more are. Every sample carries a hash of those settings: where settings.json
is lost, the model is loaded, and its samples are kept if the hash is the same.

Which grader or judge gave the grades is in grading.json. Grades of another one, or of another version, are made again,
which costs no sample: no score mixes two graders.

A finished evaluation has a record of its files (`distill.evaluations`). Files that are not as recorded are moved to
`damaged-<n>/` and recreated: samples are drawn anew, and so are their grades; everything else follows from them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from distill.artefacts import Interval, PartScore, Scores, Settings
from distill.backends import Backend, Job, SamplingParams
from distill.backends.collect import asked, check_all, collect, missing
from distill.chat import THINK
from distill.console import progress, say
from distill.durable import sync_directory, write_whole
from distill.errors import UserError
from distill.eval.benchmark import Benchmark
from distill.eval.grading import Grading
from distill.eval.models import length_function, length_unit
from distill.eval.samples import sample_of, vote_of
from distill.eval.statistics import pass_at_1, summarise
from distill.evaluations import (
    DrawnWith,
    EvaluationPaths,
    EvaluationRecord,
    GradeRow,
    Key,
    VoteRow,
    read_grades,
    read_votes,
)
from distill.fingerprint import digest
from distill.grading import GRADERS
from distill.grading.mixed import graded
from distill.grading.votes import classes
from distill.integrity import record_files
from distill.models import Model, Server
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.grading import Grade, Grader
    from distill.grading.grade import AnswerJudge

PACKAGES = ("torch", "transformers")  # on whose versions samples may depend
LONGEST = "sampling.max_new_tokens"  # as it was used
ASKED = "sampling.max_new_tokens_asked"  # where the model's context has less room than the benchmark asks for
IN_A_RUN = "--fresh eval moves all evaluations of this run aside, or choose another --run-dir"


class Evaluation:
    """The directory `<benchmark>/<model>` below `root`. remedy: how to get rid of samples that were drawn otherwise.
    judge: what decides the verdicts of a judge, where the benchmark needs one.

    settings: what decides the samples. grading: the grader, or the judge.
    """

    def __init__(
        self,
        root: Path,
        benchmark: Benchmark,
        model: Model,
        remedy: str = IN_A_RUN,
        judge: "Settings | None" = None,
    ) -> None:
        self.benchmark, self.model, self.remedy = benchmark, model, remedy
        self.name = f"{benchmark.name}/{model.name}"
        self.paths = EvaluationPaths(root / benchmark.name / model.name)
        self.settings = benchmark.settings() | _of_model(model.identity)
        self.grading = Grading(self.paths, benchmark.card.task, judge)
        self.store = TraceStore(self.paths.traces)

    @cached_property
    def wanted(self) -> list[Key]:
        """(prompt id, sample number) of every sample that is scored. The store may hold more."""
        return [(prompt.id, sample) for prompt in self.benchmark.prompts for sample in range(self.benchmark.samples)]

    # ---- before the work

    def refuse_other_settings(self) -> None:
        """Raise UserError when the samples on the disk were drawn with other settings. Writes nothing."""
        if (drawn := self._drawn_with()) is not None:
            self._refuse(drawn, self.settings)

    def set_damage_aside(self) -> None:
        """Move files of a finished evaluation that are not as recorded to `damaged-<n>/`, so that they are recreated.

        Files of an evaluation that is not finished have no record; a ledger that cannot be read is moved as well.
        """
        damaged = dict(self._damage())
        if not damaged:
            return
        number = 1
        while (aside := self.paths.root / f"damaged-{number}").exists():
            number += 1
        for path, what in damaged.items():
            if path.exists() or self.remedy != IN_A_RUN:  # in a run, the run has moved it and said so
                say(f"{path} {what}; regenerating it")
            if path.exists():
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
        self._unfinish()
        sync_directory(self.paths.root)

    def _damage(self) -> list[tuple[Path, str]]:
        try:
            record = EvaluationRecord.read_if_there(self.paths.record, "")
        except UserError:
            return [(self.paths.record, "is damaged")]
        if record is not None:
            files = {self.paths.root / name: file for name, file in record.files.items()}
            damaged = [(path, what) for path, file in files.items() if (what := file.damage(path)) is not None]
            return damaged + [(path, "was not written by it") for path in self.paths.products() if path not in files]
        damaged = []
        for read, path in ((read_grades, self.paths.grades), (read_votes, self.paths.votes)):
            try:
                read(path)
            except UserError:
                damaged.append((path, "is damaged"))
        return damaged

    # ---- the work

    def missing(self) -> list[Job]:
        """The samples that are still to be drawn."""
        return missing(self.benchmark.prompts, self.benchmark.samples, self.store.keys())

    def needs_model(self) -> bool:
        """Whether samples are missing, or it is not known how those that are there were drawn."""
        return bool(self.missing()) or (self._drawn_with() is None and not self.store.is_empty())

    def check(self, backend: Backend) -> None:
        """Errors: UserError when a problem cannot be answered, such as one that is longer than the model's context."""
        sampling = self._fitting(backend, self._drawn_with())
        check_all(backend, self.missing(), sampling, self.benchmark.card.prompt_suffix)

    def sample(self, backend: Backend) -> None:
        """Draw the missing samples; each is on the disk before the next one is looked at.

        Errors: UserError when a problem cannot be answered, or the samples on the disk were drawn with other settings.
        """
        jobs, suffix = self.missing(), self.benchmark.card.prompt_suffix
        drawn = self._drawn_with()
        sampling = self._fitting(backend, drawn)
        settings = self._settings_of(backend, sampling)
        if drawn is not None:
            self._refuse(drawn, settings, exactly=True)
        self._refuse_other_samples(settings)
        check_all(backend, jobs, sampling, suffix)
        if sampling.max_new_tokens < self.benchmark.max_new_tokens:
            say(
                f"note: {self.name}: max_new_tokens is reduced from {self.benchmark.max_new_tokens:,} to "
                f"{sampling.max_new_tokens:,}, which with the longest prompt fills the model's context of "
                f"{backend.max_context:,} tokens"
            )
        self.paths.root.mkdir(parents=True, exist_ok=True)
        self._unfinish()
        self._forget_grades({(job.prompt.id, sample) for job in jobs for sample in job.samples})
        DrawnWith(settings=settings, versions=self._versions_with_earlier()).write(self.paths.settings)
        done = len(self.wanted) - sum(len(job.samples) for job in jobs)
        label = f"eval {self.name}"
        with self.store, progress(label, len(self.wanted), "samples", done, stored=True) as advance:
            collect(backend, self.store, jobs, sampling, self.benchmark.seed, digest(settings), advance, suffix)
        self.store.compact()

    def grade(self, grader: "Grader", judge: "AnswerJudge | None" = None) -> None:
        """Grade the wanted samples that have no grade of this grader yet. The tokenizer is loaded only when there are
        any."""
        if not self.grading.is_stored():
            self._unfinish()
            self.grading.begin(self.name)
        ungraded = set(self.wanted) - read_grades(self.paths.grades).keys()
        if not ungraded:
            return
        self._unfinish()
        length = length_function(self.model)
        items = ((trace, trace.prompt, trace.answer) for trace in self.store if trace.key in ungraded)
        done = len(self.wanted) - len(ungraded)
        with (
            Ledger(self.paths.grades) as ledger,
            progress(f"grade {self.name}", len(self.wanted), "samples", done) as advance,
        ):
            for trace, grade in graded(grader, judge, items):
                ledger.add(_row(trace, grade, length).to_row())
                advance(1)

    def vote(self, grader: "Grader") -> None:
        """Find out which of a problem's answers are equal, where that is not known yet."""
        if self.benchmark.samples < 2 or not GRADERS[self.benchmark.card.task].votes:
            return
        answers: dict[str, dict[str, None]] = {}
        for row in self._counted():
            if (vote := vote_of(row)) is not None:
                answers.setdefault(row.prompt, {})[vote] = None
        known = read_votes(self.paths.votes)
        new = {prompt: texts for prompt, texts in answers.items() if not texts.keys() <= known.get(prompt, {}).keys()}
        if not new:
            return
        self._unfinish()
        with (
            Ledger(self.paths.votes) as ledger,
            progress(f"vote {self.name}", len(new), "problems") as advance,
        ):
            for prompt, numbers in classes(grader, new):
                ledger.append([VoteRow(prompt, numbers).to_row()])
                advance(1)

    def score(self) -> Scores:
        """Write scores.json and then record.json; returns the scores."""
        known, counted = read_votes(self.paths.votes), self._counted()
        samples = [sample_of(row, known.get(row.prompt, {})) for row in counted]
        statistics = summarise(samples, GRADERS[self.benchmark.card.task].votes)
        drawn, graded_with = self._drawn(), self.grading.stored()
        assert drawn is not None, "samples are graded only when it is known how they were drawn"
        assert graded_with is not None, "written before the first grade"
        scores = Scores(
            benchmark=self.benchmark.name,
            model=self.model.name,
            problems=statistics.problems,
            samples_per_problem=self.benchmark.samples,
            samples=statistics.samples,
            correct=statistics.correct,
            pass_at_1=statistics.pass_at_1,
            effective_trials=statistics.effective_trials,
            pass_at_k=statistics.pass_at_k,
            consensus_at_k=statistics.consensus_at_k,
            instructions=statistics.instructions,
            parts=self._parts(counted),
            truncated_rate=statistics.truncated_rate,
            no_answer_rate=statistics.no_answer_rate,
            unverifiable_rate=statistics.unverifiable_rate,
            mean_completion_tokens=statistics.mean_completion_tokens,
            median_completion_tokens=statistics.median_completion_tokens,
            mean_reasoning_tokens=statistics.mean_reasoning_tokens,
            median_reasoning_tokens=statistics.median_reasoning_tokens,
            reasoning_unit=length_unit(self.model),
            interval="95 %: Wilson's score interval with the effective trials of problems as clusters",
            source=self.benchmark.described(),
            prompts_hash=digest([prompt.id for prompt in self.benchmark.prompts]),
            settings=drawn.settings,
            grading=graded_with.settings,
            versions=graded_with.versions | drawn.versions,
        )
        self._unfinish()
        scores.write(self.paths.scores)
        prompts, root = tuple(prompt.id for prompt in self.benchmark.prompts), self.paths.root
        record = EvaluationRecord(
            prompts=prompts, samples=self.benchmark.samples, files=record_files(root, self.paths.products())
        )
        record.write(self.paths.record)
        return scores

    def correct(self) -> dict[str, list[bool]]:
        """Prompt id → whether each of its samples is right."""
        return _correct(self._counted())

    def _parts(self, counted: Sequence[GradeRow]) -> dict[str, PartScore]:
        """pass@1 by source, for a benchmark of several."""
        correct, parts = _correct(counted), {}
        for label, prompts in self.benchmark.parts.items():
            estimate = pass_at_1([correct[prompt] for prompt in prompts])
            interval = Interval(value=estimate.value, low=estimate.low, high=estimate.high)
            parts[label] = PartScore(problems=len(prompts), pass_at_1=interval)
        return parts

    def _counted(self) -> list[GradeRow]:
        grades = read_grades(self.paths.grades)
        return [grades[key] for key in self.wanted]

    def _unfinish(self) -> None:
        """Remove the record: files are about to change."""
        self.paths.record.unlink(missing_ok=True)

    def _forget_grades(self, keys: set[Key]) -> None:
        """Remove the grades of samples that are drawn again: their texts may be others."""
        grades = read_grades(self.paths.grades)
        if not grades.keys() & keys:
            return
        write_whole(self.paths.grades, "")
        with Ledger(self.paths.grades) as ledger:
            ledger.append([row.to_row() for key, row in grades.items() if key not in keys])

    # ---- settings

    def _drawn_with(self) -> Settings | None:
        """How the samples on the disk were drawn; None without any, and where settings.json is missing or damaged."""
        return None if (drawn := self._drawn()) is None else drawn.settings

    def _drawn(self) -> DrawnWith | None:
        if not self.paths.settings.exists() or self.store.is_empty():
            return None
        try:
            return DrawnWith.read(self.paths.settings, "")
        except UserError:
            return None

    def _versions_with_earlier(self) -> dict[str, str]:
        """The versions of the packages that draw samples, each after those that drew the samples on the disk."""
        drawn = self._drawn()
        earlier = drawn.versions if drawn is not None else {}
        versions = {}
        for name in PACKAGES:
            all_ = [each for each in earlier.get(name, "").split(", ") if each]
            versions[name] = ", ".join(dict.fromkeys([*all_, version(name)]))
        return versions

    def _settings_of(self, backend: Backend, sampling: SamplingParams) -> Settings:
        numerics: dict[str, JsonValue] = dict(backend.numerics)
        settings = self.settings | _of_model(backend.identity) | _of_model(numerics, "model.numerics")
        if sampling.max_new_tokens != self.benchmark.max_new_tokens:
            settings |= {LONGEST: sampling.max_new_tokens, ASKED: self.benchmark.max_new_tokens}
        return settings

    def _fitting(self, backend: Backend, drawn: Settings | None) -> SamplingParams:
        """The benchmark's sampling, with max_new_tokens reduced to the room in the model's context beside the longest
        problem. Where samples on the disk were drawn with a reduced number that still fits, theirs."""
        sampling, context = self.benchmark.sampling, backend.max_context
        if context is None or isinstance(self.model.place, Server):
            return sampling
        suffix = self.benchmark.card.prompt_suffix
        prompts = (asked(prompt, suffix).messages for prompt in self.benchmark.prompts)
        room = context - max(map(len, self.model.chat.prompts_ids(prompts)))
        before = drawn[LONGEST] if drawn and ASKED in drawn else None
        if isinstance(before, int) and before <= room:
            return replace(sampling, max_new_tokens=before)
        return replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, room)))

    def _refuse(self, drawn: Settings, settings: Settings, exactly: bool = False) -> None:
        """UserError naming the settings that differ. exactly: compare the max_new_tokens that was used; otherwise a
        reduced one equals the one that was asked for."""
        if not exactly and settings[LONGEST] == drawn.get(ASKED):
            drawn = drawn | {LONGEST: settings[LONGEST]}
        changed = [
            f"{key}: {drawn.get(key)!r} → {value!r}"
            for key, value in settings.items()
            if key != ASKED and drawn.get(key) != value
        ]
        if changed:
            raise UserError(
                f"{self.paths.root}: its samples were drawn with other settings ({', '.join(changed)}); {self.remedy}"
            )

    def _refuse_other_samples(self, settings: Settings) -> None:
        """UserError where samples carry another hash of settings: possible only where settings.json was lost."""
        if self._drawn_with() is not None or self.store.is_empty():
            return
        if any(trace.teacher != digest(settings) for trace in self.store):
            raise UserError(
                f"{self.paths.settings} is missing or damaged, and the samples beside it were drawn with other "
                f"settings than these; {self.remedy}"
            )


def _of_model(identity: Mapping[str, JsonValue], prefix: str = "model") -> Settings:
    return {f"{prefix}.{key}": value for key, value in identity.items()}


def _row(trace: Trace, grade: "Grade", length: Callable[[str], int]) -> GradeRow:
    """One row of grades.jsonl. Reasoning that was cut off counts as reasoning, all of it."""
    reasoning = trace.text.partition(THINK)[2] if trace.reasoning is None else trace.reasoning
    return GradeRow(
        prompt=trace.prompt.id,
        sample=trace.sample,
        verdict=grade.verdict,
        reason=grade.reason,
        evidence=grade.evidence,
        finish_reason=trace.finish_reason,
        completion_tokens=trace.completion_tokens,
        reasoning_tokens=length(reasoning) if reasoning else 0,
    )


def _correct(rows: Iterable[GradeRow]) -> dict[str, list[bool]]:
    correct: dict[str, list[bool]] = {}
    for row in rows:
        correct.setdefault(row.prompt, []).append(row.correct)
    return correct
