"""Commands that exchange traces and students with other tools: `import`, `export` and `push`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distill import interrupts
from distill.errors import UserError


class FormatName(StrEnum):
    """Layouts of an exported row."""

    messages = "messages"
    sharegpt = "sharegpt"
    prompt_completion = "prompt-completion"
    openr1 = "openr1"


class FileType(StrEnum):
    """Kinds of exported files."""

    jsonl = "jsonl"
    parquet = "parquet"


class TrainerName(StrEnum):
    """Trainers that a configuration is written for."""

    trl = "trl"
    axolotl = "axolotl"
    llama_factory = "llama-factory"


class TaskName(StrEnum):
    """Kinds of problems."""

    math = "math"
    code = "code"
    choice = "choice"
    instructions = "instructions"
    judge = "judge"
    chat = "chat"
    gym = "gym"


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="files, directories of files or of `save_to_disk`, or dataset ids on the hub"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="new directory for the traces")],
    question: Annotated[str | None, typer.Option("--question", metavar="COLUMN", help="column of the question")] = None,
    reasoning: Annotated[
        str | None, typer.Option("--reasoning", metavar="COLUMN", help="column of the reasoning, without tags")
    ] = None,
    response: Annotated[
        str | None, typer.Option("--response", metavar="COLUMN", help="column of the answer after the reasoning")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", metavar="COLUMN", help="column of the gold answer; default: recognized")
    ] = None,
    task: Annotated[
        TaskName | None,
        typer.Option(
            "--task",
            help="kind of problem, which selects the grader; default: math, and in rows that `distill export` wrote "
            "their own, but for code and gym, whose graders run what the file contains",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="split of a dataset; default: train")] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="configuration of a dataset on the hub")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="commit, tag or branch on the hub")] = None,
) -> None:
    """Store other people's traces in a directory that `distill traces`, `distill export` and recipes read.

    Example: `distill import open-r1/OpenR1-Math-220k --out openr1`
    """
    from distill.console import counted, say
    from distill.traces.imports import import_traces, sources_of

    columns = {"question": question, "reasoning": reasoning, "response": response, "answer": answer}
    summary = import_traces(sources_of(sources, columns, task.value if task else None, split, subset, revision), out)
    say(f"{counted(summary.traces, 'trace')} of {counted(summary.prompts, 'prompt')} → {out}")


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or what `distill import` made")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="the file: .jsonl or .parquet")],
    form: Annotated[FormatName, typer.Option("--format", help="layout of a row")] = FormatName.messages,
    file_type: Annotated[
        FileType | None, typer.Option("--file-type", help="kind of file, where its name does not say it")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="every trace, not only those that the filters kept")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace the files that exist")] = False,
    config: Annotated[
        list[TrainerName] | None,
        typer.Option("--config", help="write a configuration for this trainer beside the file; repeatable"),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option("--student", metavar="NAME", help="student of the configuration; default: the run's"),
    ] = None,
) -> None:
    """Write the traces of a run, or imported ones, as a file that other tools train on.

    Example: `distill export runs/tiny --format messages --out traces.jsonl --config trl`
    """
    from distill.catalog import load_recipe, load_student, local_weights, training_template
    from distill.console import counted, say
    from distill.traces.configs import check_readable, config_files, template_of, write_config
    from distill.traces.exports import export_traces, file_type_of, stored_traces

    kind = file_type_of(out, file_type.value if file_type else None)
    traces = stored_traces(source, every)
    trainers = list(dict.fromkeys(config or ()))
    for trainer in trainers:
        check_readable(trainer.value, form.value)
    recipe = load_recipe(str(source / "recipe.yaml")) if (source / "recipe.yaml").is_file() else None
    length = max(training.max_length for training in recipe.train.trainings) if recipe else None
    card, weights, template = None, None, ""
    if trainers:
        if student is None and recipe is None:
            raise UserError("--config needs a student: name it with --student; `distill students list` shows them")
        name = student or (recipe.student if recipe else "")
        card, weights = load_student(name), local_weights("student", name)
        named = training_template(recipe) if recipe and name == recipe.student else card.chat_template
        template = template_of(card, named, weights)
    files = [out, *(path for trainer in trainers for path in config_files(trainer.value, out))]
    if out.is_dir() or (not force and any(path.exists() for path in files)):
        there = next(path for path in files if path.exists())
        fix = "name a file in it" if there.is_dir() else "choose another --out, or replace it with --force"
        raise UserError(f"{there}: exists already; {fix}")
    if special := next((path for path in files if path.exists() and not path.is_file()), None):
        raise UserError(f"{special}: not a regular file; choose another --out")
    taken, rows = export_traces(traces, form.value, out, kind)
    say(f"{counted(taken, 'trace')} in {counted(rows, 'row')} → {out}")
    written: dict[Path, None] = {}  # TRL and axolotl share a template
    for trainer in trainers:
        assert card is not None
        model = str(weights or card.weights)
        written |= dict.fromkeys(write_config(trainer.value, out, form.value, kind, card, model, template, length))
    for path in written:
        say(f"  {path}")


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="USER/NAME", help="repository for the kept traces")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="USER/NAME", help="repository for the trained student")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="create the repositories as private")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="add to a repository that holds something else than this run")
    ] = False,
) -> None:
    """Publish a run's kept traces and its student on the Hugging Face Hub; rerun it to resume. Needs HF_TOKEN.

    Example: `distill push runs/tiny --dataset me/tiny-traces --model me/tiny-student --private`
    """
    interrupts.mark_resumable()
    from distill.console import say
    from distill.push import push as push_run

    for url in push_run(run, dataset, model, private=private, force=force):
        say(url)
