"""Stage 3: the student is fine-tuned on the kept traces.

    kept traces ─▶ rows: encode, prove, store ─▶ learn: build, train, save, resume ─▶ student: a model directory

The settings of the stage are decided here, before torch is imported, so that a finished stage is recognised at once:
the training settings, the template, the student's weights and the traces make the fingerprint. The traces belong to it,
and not to the extent, because schedule and data order are made for one set of rows: a run that continued on another
would be neither the old training nor the new one.

Several processes: this one encodes, proves, starts them (`ranks.launch`) and waits. Under torchrun it is one of them
already: the first rank does all of that, and the others wait for it (`ranks.join`).

A recipe with phases has several of these trainings (`distill.train.phases`); here there is one.

Missing or damaged files of a finished student are written again from the last checkpoint; without one the training is
repeated.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distill.artefacts import Artefact, Settings, TrainSummary
from distill.chat import TODAY, read_template, reads_date
from distill.errors import UserError
from distill.fingerprint import digest
from distill.stage import Stage
from distill.traces.published import content_of, kept_hash
from distill.train.ranks import environment

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run
    from distill.train.ranks.join import Announcements


class TrainStage(Stage[TrainSummary]):
    """The student, fine-tuned on the kept traces."""

    name = "train"
    outputs: tuple[str, ...] = ("checkpoints", "rollouts", "student")
    products = (
        *(f"student/*.{ending}" for ending in ("json", "safetensors", "jinja", "txt", "model")),
        "checkpoints/log.jsonl",
        "rollouts/part-*.parquet",
        "rollouts/rewards.jsonl",
        "checkpoints/adapter/*.safetensors",
        "checkpoints/adapter/*.json",
    )
    irreplaceable = ("rollouts/*",)
    reads = ("filter",)
    summary = TrainSummary
    number = 0  # among the trainings of the command
    announcements: "Announcements | None" = None  # to the other ranks that torchrun started

    def recipe_settings(self, recipe: "Recipe") -> Settings:
        """`train:` without its `Free` fields."""
        return recipe.train.settings()

    def settings(self, run: "Run") -> Settings:
        """Everything that decides the student. Errors: UserError when there are no kept traces."""
        from distill.train.ranks import launch

        settings = run.recipe.train.settings() | row_settings(run) | teacher_settings(run) | rollout_settings(run)
        processes = launch.processes(run.recipe.train)
        train = run.recipe.train
        if processes > 1 and train.train_batch_size is None and train.objective.rollout_settings is None:
            settings["world_size"] = processes  # a step has this many times the batches
        return settings

    def perform(self, run: "Run", inputs: "Sequence[Stage[Artefact]]" = ()) -> TrainSummary:
        """As every stage; under torchrun the other ranks wait until nothing is left to train."""
        if not environment.several():
            return super().perform(run, inputs)
        from distill.train.ranks.join import leading

        with leading() as self.announcements:
            return super().perform(run, inputs)

    def work(self, run: "Run", begin: Callable[[], None]) -> TrainSummary:
        """Encode, prove, train, save. Errors: UserError for what the user can correct (no kept traces, a template that
        deletes the reasoning, …); WorkError when a loss is not finite or a checkpoint cannot be written."""
        from distill.train.ranks import launch
        from distill.train.rows.prepare import check_student, prepare

        launch.refuse_too_many(run.recipe.train)
        processes, objective = launch.processes(run.recipe.train), run.recipe.train.objective
        questions = None
        if objective.rollout_settings is not None:
            from distill.train.rollouts import setup
            from distill.train.rollouts.questions import questions_of

            check_student(run.recipe, run.models)
            questions = questions_of(run.recipe, run.models.base.chat, run.prompts)
            setup.check(run.recipe, run.models, questions)
        if objective.reads_data:
            prepare(run.recipe, run.models, run.paths, row_settings(run), teacher_settings(run), processes)
        if questions is not None and self.announcements is None and processes == 1:  # several check it themselves
            from distill.train.ranks.join import layout

            layout(run.recipe, run.models, run.paths, questions)
        had_begun = run.begun(self.name)
        begin()
        with _forgotten_if_refused(run, self, had_begun):
            if self.announcements is None and processes > 1:
                return launch.start(run.directory, processes)
            from distill.train.ranks.join import train_rank

            if self.announcements is None:
                return train_rank(run.recipe, run.directory, questions)
            self.announcements.begin(self.number)
            summary = train_rank(run.recipe, run.directory, questions)
            self.announcements.finish()
            return summary

    def headline(self, summary: TrainSummary) -> str:
        """Steps, tokens and loss."""
        return f"{summary.steps:,} steps, {summary.supervised_tokens:,} supervised tokens, loss {summary.last_loss:.3f}"


STAGE = TrainStage()


@contextmanager
def _forgotten_if_refused(run: "Run", stage: TrainStage, had_begun: bool) -> Iterator[None]:
    """Take the beginning of the stage back when it is refused before its first step, as the gate of rollouts does: the
    recipe may then be corrected. had_begun: in an earlier session, which is kept."""
    try:
        yield
    except UserError:
        if not had_begun and not _has_steps(run):
            for directory in (run.paths.checkpoints, run.paths.rollouts):
                shutil.rmtree(directory, ignore_errors=True)
            run.forget(stage)
        raise


def _has_steps(run: "Run") -> bool:
    """Whether a training has a checkpoint, a log of its steps, or rollouts of a later set than its first."""
    from distill.traces.store import TraceStore

    rollouts = run.recipe.train.objective.rollout_settings
    stored = TraceStore(run.paths.rollouts).keys()
    later = rollouts is not None and any(rollouts.set_of(sample) for _, sample in stored)
    return later or run.paths.log.exists() or any(run.paths.checkpoints.glob("step-*"))


def row_settings(run: "Run") -> Settings:
    """Everything that decides the encoded rows, but the teacher: with another learning rate they are the same, and are
    not made again. The recipe's fields among them are marked (`recipe.train.DecidesRows`)."""
    template = run.models.training_template
    settings = run.recipe.train.row_settings() | {
        "chat_template_text": digest(read_template(template)) if template else None,
        "student": run.models.base.weights,
    }
    if reads_date(run.models.base.directory, template):
        settings["chat_template_date"] = TODAY
    for number, source in enumerate(run.recipe.train.data if run.recipe.train.objective.reads_data else ()):
        if source.kind == "kept":
            settings["kept_traces"] = kept_hash(run.directory)
        elif source.kind == "run":
            settings[f"data.{number}.traces"] = content_of(source)
        elif source.kind == "file":
            settings[f"data.{number}.file"] = content_of(source)
    return settings


def teacher_settings(run: "Run") -> Settings:
    """Everything that decides the teacher's probabilities: its weights, template and mode, how the engine computes, and
    on what kind of device. Empty for an objective that needs no teacher."""
    recipe = run.recipe
    if recipe.train.objective.teacher_top_k is None:
        return {}
    from distill.backends.device import device_type

    identity = {f"teacher.{key}": value for key, value in run.models.teacher.identity.items()}
    for task, model in run.models.teachers.items():
        identity |= {f"teachers.{task}.{key}": value for key, value in model.identity.items()}
    return identity | recipe.engine_settings() | {"engine.device": device_type(recipe.engine.device)}


def rollout_settings(run: "Run") -> Settings:
    """Everything that decides what the student writes, besides itself and `train:`. Empty for an objective without
    rollouts."""
    objective = run.recipe.train.objective
    if objective.rollout_settings is None:
        return {}
    from distill.backends.device import device_type
    from distill.filters.correct import Correct
    from distill.objectives import Grpo
    from distill.train.rollouts.judge import judge_settings

    prompts = digest([[prompt.id, prompt.answer] for prompt in run.prompts])
    suffix = run.recipe.generate.prompt_suffix
    settings: Settings = {"rollout_prompts": prompts, "generate.prompt_suffix": suffix}
    if isinstance(objective, Grpo) and objective.rewards.correct:
        settings["filter.correct.timeout"] = (run.recipe.filter.correct or Correct()).timeout
    if objective.needs_reference:
        settings |= run.recipe.engine_settings() | {"engine.device": device_type(run.recipe.engine.device)}
    return settings | judge_settings(run)
