"""Trainings one after the other: `train.phases`, each in a run directory of its own inside the run's.

    phases/1-cold-start/    base: the recipe's student                    ─▶ student/
    phases/2-rl/            base: phases/1-cold-start/student             ─▶ student/
    phases/3-rejection/     base: phases/2-rl/student, also the teacher
                            of traces/, which filtered/ keeps             ─▶ student/, which is the run's

A phase is the recipe with other values (`phase_recipe`) in a `Run`: it is recognised as finished, resumes and is
verified like any other training, and `distill report`, `distill traces` and a later recipe read its directory. Nothing
below this file knows of phases. Rejected: one training whose settings change at given steps. Its checkpoints would need
the phase, and rejection sampling, which is a `generate` and a `filter`, has no place in a training loop.

The run's own settings are those of all phases, so a change of any is refused before the first one starts. The base of a
later phase is not among them, because it follows from the others.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.artefacts import Artefact, FilterSummary, RunPaths, Settings, TrainSummary
from distill.catalog import training_template
from distill.console import say
from distill.durable import write_whole
from distill.errors import UserError
from distill.fingerprint import digest
from distill.models import Models
from distill.prompts import Prompt
from distill.recipe import Phase, Recipe
from distill.recipe.sources import MixedKept, MixedOwn, MixedRun, MixedSource
from distill.record import StageFiles
from distill.run import Run
from distill.stage import Stage
from distill.train.ranks import environment
from distill.train.stage import TrainStage

if TYPE_CHECKING:
    from distill.train.ranks.join import Announcements

SUMMED = (  # of a summary, over the phases
    *("steps", "rows", "held_out_rows", "dropped_rows", "dropped_tokens", "truncated_rows", "truncated_tokens"),
    *("supervised_tokens", "supervised_tokens_per_epoch", "rollouts", "rollout_tokens"),
)
README = "README.md"  # the one file of the student that is not that of the last phase


class PhasesStage(TrainStage):
    """The student, trained once or in phases. sampling: the stages by which a phase makes traces of its own, in
    order."""

    outputs = (*TrainStage.outputs, "phases")

    def __init__(self, sampling: Sequence[Stage[Any]] = ()) -> None:
        self._sampling = tuple(sampling)

    def settings(self, run: Run) -> Settings:
        """As the base; with phases those of each, `phases.1.learning_rate`."""
        recipe = run.recipe
        if not recipe.train.phases:
            return super().settings(run)
        settings = self.recipe_settings(recipe)
        for number, phase in enumerate(recipe.train.phases):
            alone = recipe.model_copy(update={"train": phase.training(phase.data)})
            inner = super().settings(_Inside(run, run.directory, alone))
            if phase.own is not None:
                inner |= self._own_settings(run, _answering(alone, phase.own, str(run.models.base.directory)))
            if number:
                del inner["student"]
            settings |= {f"phases.{number}.{key}": value for key, value in inner.items()}
        return settings

    def _own_settings(self, run: Run, recipe: Recipe) -> Settings:
        """What decides a phase's own answers besides its base. recipe: of which only the base is not the phase's."""
        settings: Settings = {
            f"{stage.name}.{key}": value
            for stage in self._sampling
            for key, value in stage.recipe_settings(recipe).items()
            if key != "student"  # a path
        }
        from distill.backends.device import device_type

        prompts = digest([prompt.id for prompt in run.prompts])
        return settings | {"generate.prompts": prompts, "generate.engine.device": device_type(recipe.engine.device)}

    def work(self, run: Run, begin: Callable[[], None]) -> TrainSummary:
        """As the base; with phases one after the other. Errors: as those of the phases."""
        phases = run.recipe.train.phases
        if not phases:
            return super().work(run, begin)
        begun: list[bool] = []

        def begin_once() -> None:
            if not begun:
                begin()
                begun.append(True)

        summaries = {}
        for number, phase in enumerate(phases):
            directory = phase_directory(run.directory, run.recipe, number)
            with _Inside(run, directory, phase_recipe(run.recipe, run.directory, number), begin_once) as inner:
                title = f"phase {number + 1} of {len(phases)}, {phase.name}"
                finished = inner.is_finished(self.name)
                say(f"{title}: finished before" if finished else f"{title}: {directory}")
                try:
                    summaries[phase.name] = self._perform(inner, number, phase)
                except UserError:
                    if not inner.begun(self.name):  # refused: the phase may be corrected, those before it are kept
                        run.forget(self)
                    raise
        begin_once()
        summary = combined(summaries)
        _take_over(run, directory / "student", summary)
        return summary

    def _perform(self, run: Run, number: int, phase: Phase) -> TrainSummary:
        """Run the stages of one phase."""
        before = self._sampling if phase.own is not None else ()
        done: list[Stage[Artefact]] = []
        for stage in before:
            stage.perform(run, [earlier for earlier in done if earlier.name in stage.reads])
            done.append(stage)
        training = _OnePhase(number, self.announcements)
        return training.perform(run, [earlier for earlier in done if earlier.name in self.reads])


class _OnePhase(TrainStage):
    """The training of one phase. number: counted from 0. announcements: of the stage that performs it."""

    def __init__(self, number: int, announcements: "Announcements | None") -> None:
        self.number, self.announcements = number, announcements

    def perform(self, run: Run, inputs: Sequence[Stage[Artefact]] = ()) -> TrainSummary:
        """As every stage: the other ranks wait for all phases together."""
        return Stage.perform(self, run, inputs)

    def settings(self, run: Run) -> Settings:
        """As the base, without where the run is whose kept traces are read: it may be moved."""
        return {key: value for key, value in super().settings(run).items() if not _is_place(run.recipe, key)}


def _is_place(recipe: Recipe, key: str) -> bool:
    return any(key == f"data.{n}.path" and source.kind == "run" for n, source in enumerate(recipe.train.data))


class _Inside(Run):
    """A run inside a run. begin_outer: called before its first stage begins."""

    def __init__(
        self, outer: Run, directory: Path, recipe: Recipe, begin_outer: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(directory, recipe, outer.verify, outer.on)
        self._outer, self._begin_outer = outer, begin_outer

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Those of the outer run, which has read them."""
        return self._outer.prompts

    def begin(self, stage: StageFiles[Artefact], settings: Settings, extent: Settings) -> None:
        """As the base, once the outer stage has begun."""
        self._begin_outer()
        super().begin(stage, settings, extent)


def follow(recipe: Recipe, directory: Path) -> bool:
    """Under torchrun, on any rank but the first: train with it. Returns whether this is such a rank."""
    if environment.rank() == 0:
        return False
    from distill.train.ranks import join

    def training(number: int) -> tuple[Recipe, Path]:
        if not recipe.train.phases:
            return recipe, directory
        return phase_recipe(recipe, directory, number), phase_directory(directory, recipe, number)

    join.follow(training)
    return True


# ---- recipes and places


def phase_directory(run: Path, recipe: Recipe, number: int) -> Path:
    """The run directory of a phase, counted from 0: `phases/1-NAME` for the first."""
    return RunPaths(run).phase(number, recipe.train.phases[number].name)


def phase_recipe(recipe: Recipe, run: Path, number: int) -> Recipe:
    """The recipe of a phase, counted from 0. run: the outer run directory.

    The run's kept traces are those of another run here, and the base's own answers are the kept ones.
    """
    phase = recipe.train.phases[number]
    base = str(phase_directory(run, recipe, number - 1) / "student") if number else recipe.student
    data = tuple(_of_phase(source, recipe, run) for source in phase.data) if phase.objective.reads_data else phase.data
    train = phase.training(data)
    if phase.own is not None and not number:  # a teacher is a model here, and a model does not know its card's template
        models = Models(recipe, run)
        base, template = str(models.base.directory), phase.chat_template or models.student_card.chat_template
        train = train.model_copy(update={"chat_template": template})
    changes = {"name": f"{recipe.name}.{phase.name}", "description": "", "student": base, "train": train}
    if number and Models(recipe, run).teaches_itself:  # here teacher and student are two directories
        changes["teacher_template"] = recipe.teacher_template or training_template(recipe)
    inner = recipe.model_copy(update=changes)
    return inner if phase.own is None else _answering(inner, phase.own, base)


def _answering(recipe: Recipe, own: MixedOwn, base: str) -> Recipe:
    """The recipe with a base that answers in the teacher's place. base: a model directory."""
    generate = recipe.generate.model_copy(
        update={
            "samples": own.samples,
            "sampling": own.sampling or recipe.generate.sampling,
            "budget": None,
            "logprobs": None,
        }
    )
    return recipe.model_copy(update={"teacher": base, "teacher_template": None, "server": None, "generate": generate})


def _of_phase(source: MixedSource, recipe: Recipe, run: Path) -> MixedSource:
    if isinstance(source, MixedOwn):
        return MixedKept(kind="kept", weight=source.weight, plain=source.plain, wrap=source.wrap)
    if isinstance(source, MixedKept):
        plain = not source.wrap and (source.plain or not recipe.filter.format)
        return MixedRun(kind="run", path=str(run), weight=source.weight, plain=plain, wrap=source.wrap)
    return source


# ---- the result


def combined(phases: dict[str, TrainSummary]) -> TrainSummary:
    """The summary of all phases: sums, the first loss of the first phase, the last one of the last."""
    each = list(phases.values())
    seconds, tokens = sum(one.seconds for one in each), sum(one.tokens for one in each)
    sums = {name: sum(getattr(one, name) for one in each) for name in SUMMED}
    return TrainSummary(
        **sums,
        epochs=round(sum(one.epochs for one in each), 4),
        tokens=tokens,
        first_loss=each[0].first_loss,
        last_loss=each[-1].last_loss,
        eval_loss=each[-1].eval_loss,
        seconds=round(seconds, 1),
        tokens_per_second=round(tokens / max(seconds, 1e-9)),
        processes=max(one.processes for one in each),
        student=each[-1].student,
        padded_rows=each[-1].padded_rows,
        phases=phases,
    )


def _take_over(run: Run, student: Path, summary: TrainSummary) -> None:
    """Make the last phase's student the run's, in one step: by hard links where the file system has them, because a
    large one would take its size twice."""
    from distill.train.ranks.checkpoint import writing
    from distill.train.student import card

    filtered = run.stored_summary("filter", FilterSummary)
    with writing(run.paths.student) as scratch:
        for file in sorted(path for path in student.iterdir() if path.name != README):
            try:
                os.link(file, scratch / file.name)
            except OSError:
                shutil.copy2(file, scratch / file.name)
        write_whole(scratch / README, card.model_card(run.recipe, run.models.student_card, summary, filtered))
