"""Stage 3: the kept traces are taught to the student.

    kept traces ─▶ data: template, mask ─▶ gate: prove it ─▶ loop: learn, save, resume ─▶ student: a model directory

The files follow that line. What the stage rests on is decided here, before torch is imported, so that a finished stage
answers at once: the training settings, the template, the student's weights and the kept traces make the fingerprint.
The traces belong to it, and not to what may grow: a schedule and a data order are made for one set of rows, and a run
that continued on another would be neither the old training nor the new one.
"""

import hashlib
from typing import TYPE_CHECKING, Any

from distill import catalog
from distill.chat import read_template
from distill.errors import UserError
from distill.fingerprint import digest, weights_hash
from distill.traces.store import read_traces

if TYPE_CHECKING:
    from pathlib import Path

    from distill.run import Run

OUTPUTS = ("checkpoints", "student")


def train(run: "Run") -> dict[str, Any]:
    """Fine-tune the student of the run's recipe on `filtered/kept`; write `checkpoints/` and `student/`.

    Returns the summary that is stored with the stage: counts of rows and tokens, first and last loss, seconds. A
    finished stage returns it without training; an interrupted one goes on from its newest checkpoint, with the same
    losses as if it had never stopped.

    Raises UserError for what the user can mend (no kept traces, a template that deletes the reasoning, broken weights…)
    and WorkError when a loss is not finite or a checkpoint cannot be written.
    """
    recipe = run.recipe
    kept = run.directory / "filtered" / "kept"
    card = catalog.load_student(recipe.student)
    weights = catalog.resolve_weights("student", recipe.student)
    template = recipe.train.chat_template or card.chat_template
    settings = recipe.train.settings() | {
        "chat_template": template,
        "chat_template_text": digest(read_template(template)) if template else None,
        "student": weights_hash(weights),
        "kept_traces": traces_hash(kept),
    }
    if (finished := run.finished("train", settings, {})) is not None:
        return finished

    from distill.train.loop import fit, prepare

    prepared = prepare(kept, recipe.train, weights, template)
    stage = run.stage("train", settings, {}, OUTPUTS)
    summary = fit(prepared, run.directory, recipe, card)
    stage.finish(summary)
    return summary


def traces_hash(kept: "Path") -> str:
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
