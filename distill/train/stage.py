"""Stage 3: the kept traces are taught to the student.

    kept traces ─▶ data: template, mask ─▶ gate: prove it ─▶ fit ─▶ loop: learn, save, resume ─▶ student: a directory

What the stage rests on is decided here, before torch is imported, so that a finished stage answers at once: the
training settings, the template, the student's weights and the traces make the fingerprint. The traces belong to it, and
not to what may grow: a schedule and a data order are made for one set of rows, and a run that continued on another
would be neither the old training nor the new one.

Several processes: this one encodes, proves, starts them (`launch`) and waits. Under torchrun it is one of them already:
the first rank does all of that, and the others wait for its word (`follow`).
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import catalog
from distill.chat import read_template
from distill.errors import UserError
from distill.fingerprint import digest, file_hash, weights_hash
from distill.traces.store import read_traces

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run
    from distill.train.world import World

OUTPUTS = ("checkpoints", "student")


def train(run: "Run") -> dict[str, Any]:
    """Fine-tune the student of the run's recipe on `filtered/kept`; write `checkpoints/` and `student/`.

    Returns the summary that is stored with the stage: counts of rows and tokens, first and last loss, seconds. A
    finished stage returns it without training; an interrupted one goes on from its newest checkpoint, with the same
    losses as if it had never stopped.

    Raises UserError for what the user can mend (no kept traces, a template that deletes the reasoning, broken weights…)
    and WorkError when a loss is not finite or a checkpoint cannot be written.
    """
    from distill.train import launch

    world = _join(run) if several() else None
    nothing_to_do = True
    try:
        processes = launch.processes(run.recipe.train)
        settings = stage_settings(run, processes)
        if (finished := run.finished("train", settings, {})) is not None:
            return finished

        from distill.train.prepare import prepare

        prepare(run.recipe, run.directory, rows_fingerprint(settings), processes)
        stage = run.stage("train", settings, {}, OUTPUTS)
        nothing_to_do = False
    finally:
        if world is not None:
            world.any(nothing_to_do)
    if world is None and processes > 1:
        summary = launch.start(run.directory, processes)
    else:
        from distill.train.ranks import train_rank

        summary = train_rank(run.recipe, run.directory, world)
    stage.finish(summary)
    return summary


def rows_fingerprint(settings: dict[str, Any]) -> str:
    """Of what decides the rows: with another learning rate they are the same, and are not made again."""
    decides = (
        *("chat_template_text", "student", "kept_traces", "content", "max_length", "max_position_embeddings"),
        *("overlong", "val_size", "seed"),
    )
    teaching = ("objective", "teacher", "logits_top_k")
    return digest({key: value for key, value in settings.items() if key in (*decides, *teaching) or key[:5] == "data."})


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


def stage_settings(run: "Run", processes: int) -> dict[str, Any]:
    """All that decides the student."""
    recipe = run.recipe
    template = catalog.training_template(recipe)
    settings = recipe.train.settings() | {
        "chat_template_text": digest(read_template(template)) if template else None,
        "student": weights_hash(catalog.resolve_weights("student", recipe.student)),
    }
    for number, source in enumerate(recipe.train.data):
        if source.kind == "kept":
            settings["kept_traces"] = traces_hash(run.directory / "filtered" / "kept")
        elif source.kind == "run":
            settings[f"data.{number}.traces"] = traces_hash(Path(source.path) / "filtered" / "kept")
        elif source.kind == "file":
            settings[f"data.{number}.file"] = file_hash(Path(source.path))
    if recipe.train.objective == "logits":
        settings["teacher"] = weights_hash(catalog.resolve_weights("teacher", recipe.teacher))
    if processes > 1 and recipe.train.train_batch_size is None:
        settings["world_size"] = processes  # a step has as many more batches
    return settings


def traces_hash(kept: Path) -> str:
    """Their number and a hash over (prompt id, sample, text) of every kept trace, whatever order they are stored in.

    Raises UserError when there is no trace.
    """
    if not kept.is_dir():
        raise UserError(f"{kept} is not there: run `distill filter` first, training reads the traces it kept")
    digests = sorted(
        hashlib.sha256(f"{trace.prompt.id}\0{trace.sample}\0{trace.text}".encode(errors="surrogatepass")).digest()
        for trace, _ in read_traces(kept)
    )
    if not digests:
        raise UserError(f"{kept} holds no trace: see why in filtered/dropped, and loosen `filter` or generate more")
    return f"{len(digests):,} traces {hashlib.sha256(b''.join(digests)).hexdigest()[:16]}"
