"""Stage 3: the kept traces are taught to the student.

    kept traces ─▶ data: template, mask ─▶ gate: prove it ─▶ fit ─▶ loop: learn, save, resume ─▶ student: a directory

What the stage rests on is decided here, before torch is imported, so that a finished stage answers at once: the
training settings, the template, the student's weights and the traces make the fingerprint. The traces belong to it, and
not to what may grow: a schedule and a data order are made for one set of rows, and a run that continued on another
would be neither the old training nor the new one.

Several processes: this one encodes, proves, starts them (`launch`) and waits. Under torchrun it is one of them already:
the first rank does all of that, and the others wait for its word (`follow`).
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill import catalog
from distill.artefacts import Artefact, FilterSummary, RunPaths, Settings, TrainSummary
from distill.chat import read_template
from distill.errors import UserError
from distill.fingerprint import digest, file_hash
from distill.record import StageRecord
from distill.stage import Stage

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run
    from distill.train.world import World


class TrainStage(Stage[TrainSummary]):
    """The student, fine-tuned on the kept traces."""

    name = "train"
    outputs = ("checkpoints", "student")
    products = ("student/*.json", "student/*.safetensors", "student/*.jinja", "student/*.txt", "checkpoints/log.jsonl")
    reads = ("filter",)
    summary = TrainSummary

    def recipe_settings(self, recipe: "Recipe") -> Settings:
        """`train:` without what may change freely."""
        return recipe.train.settings()

    def settings(self, run: "Run") -> Settings:
        """All that decides the student."""
        from distill.train import launch

        return stage_settings(run, launch.processes(run.recipe.train))

    def perform(self, run: "Run", inputs: "Sequence[Stage[Artefact]]" = ()) -> TrainSummary:
        """Under torchrun the other ranks wait to be told whether there is something to do."""
        world = _join(run) if several() else None
        self._world, self._nothing_to_do = world, True
        try:
            return super().perform(run, inputs)
        finally:
            if world is not None and self._nothing_to_do:
                world.any(True)

    def work(self, run: "Run", begin: Callable[[], None]) -> TrainSummary:
        """Encode, prove, train, save. Errors: UserError for what the user can correct (no kept traces, a template that
        deletes the reasoning, …); WorkError when a loss is not finite or a checkpoint cannot be written."""
        from distill.train import launch
        from distill.train.prepare import prepare

        processes = launch.processes(run.recipe.train)
        prepare(run.recipe, run.directory, rows_fingerprint(stage_settings(run, processes)), processes)
        begin()
        self._nothing_to_do = False
        if self._world is not None:
            self._world.any(False)
        if self._world is None and processes > 1:
            return launch.start(run.directory, processes)
        from distill.train.ranks import train_rank

        return train_rank(run.recipe, run.directory, self._world)

    def headline(self, summary: TrainSummary) -> str:
        """Steps, tokens and loss."""
        return f"{summary.steps:,} steps, {summary.supervised_tokens:,} supervised tokens, loss {summary.last_loss:.3f}"


STAGE = TrainStage()


def rows_fingerprint(settings: Settings) -> str:
    """Of what decides the rows: with another learning rate they are the same, and are not made again."""
    decides = (
        *("chat_template_text", "student", "kept_traces", "content", "max_length", "max_position_embeddings"),
        *("overlong", "val_size", "seed"),
    )
    teaching = ("objective", "engine.dtype", "logits_top_k")
    prefixes = ("data.", "teacher.")
    return digest(
        {key: value for key, value in settings.items() if key in (*decides, *teaching) or key.startswith(prefixes)}
    )


def several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def follow(recipe: "Recipe", directory: Path) -> bool:
    """Under torchrun, on any rank but the first: train with it. Gives whether this is such a rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        return False
    from distill.train import ranks

    ranks.follow(recipe, directory)
    return True


def _join(run: "Run") -> "World":
    from distill.train import ranks

    return ranks.join(run.recipe, run.directory)


def stage_settings(run: "Run", processes: int) -> Settings:
    """All that decides the student."""
    recipe = run.recipe
    template = catalog.training_template(recipe)
    settings = recipe.train.settings() | {
        "chat_template_text": digest(read_template(template)) if template else None,
        "student": run.models.base.weights,
    }
    for number, source in enumerate(recipe.train.data):
        if source.kind == "kept":
            settings["kept_traces"] = kept_hash(run.directory)
        elif source.kind == "run":
            settings[f"data.{number}.traces"] = kept_hash(Path(source.path))
        elif source.kind == "file":
            settings[f"data.{number}.file"] = file_hash(Path(source.path))
    if recipe.train.objective == "logits":
        settings |= {f"teacher.{key}": value for key, value in run.models.teacher.identity.items()}
        settings["engine.dtype"] = recipe.engine.dtype
    if processes > 1 and recipe.train.train_batch_size is None:
        settings["world_size"] = processes  # a step has as many more batches
    return settings


def kept_hash(run: Path) -> str:
    """The number of traces that a run's filter kept, and a hash over them, from its record.

    Raises UserError when the filter is not finished.
    """
    paths = RunPaths(run)
    record = StageRecord.read_if_there(paths.record("filter"), "run `distill filter --fresh filter` again")
    if record is None or record.finished is None or not paths.kept.is_dir():
        raise UserError(f"{paths.kept} is not there: run `distill filter` first, training reads the traces it kept")
    summary = FilterSummary.model_validate_json(json.dumps(record.summary))
    return f"{summary.kept:,} traces {summary.kept_hash}"
