"""`distill import`: other people's traces → a directory that `distill traces`, `distill export` and a recipe's
`traces: [{kind: run, path: DIR}]` read.

    import.json                  what was read, and how much of it
    traces/part-00000.parquet    the traces, each with the verdict `published`: what its publisher says of it

Everything that is an answer is stored, empty ones too: filters judge. The directory takes its name when it is complete.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.artefacts import Artefact
from distill.console import say
from distill.durable import remove_leftovers, replacing_directories
from distill.errors import UserError
from distill.prompts.rows import SAVED, TEXTS
from distill.recipe.sources import FileTraces, HubTraces, PublishedTask
from distill.traces.parts import GROUP_ROWS, PartWriter
from distill.traces.published import IMPORTED, reader_of
from distill.traces.rows import VERDICTS, table_of, verdict_column
from distill.traces.store import JUDGED_SCHEMA
from distill.traces.trace import Trace, Verdict

if TYPE_CHECKING:
    from distill.traces.published import Reader

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SUFFIXES = (*(text + packed for text in TEXTS for packed in ("", ".gz", ".zst")), ".parquet")


class ImportSummary(Artefact):
    """What an import read."""

    sources: tuple[str, ...]
    traces: int
    prompts: int
    left_out: dict[str, int]
    columns_left_behind: tuple[str, ...]


def sources_of(
    names: Sequence[str],
    columns: dict[str, str | None],
    task: PublishedTask | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> list[FileTraces | HubTraces]:
    """The sources by name: files, directories of them, directories of `save_to_disk`, ids on the hub.

    columns: question, reasoning, response and answer, where they are named. task: of all rows; None: mathematics, and
    in rows that `distill export` wrote their own. Errors: UserError.
    """
    sources: list[FileTraces | HubTraces] = []
    for name in names:
        path = Path(name)
        fields = columns | ({"task": task} if task else {})
        if path.is_dir() and not any((path / saved).is_file() for saved in SAVED):
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            if not files:
                raise UserError(f"{name}: no file of traces in it; expected {', '.join(SUFFIXES)}")
            sources += [FileTraces.model_validate({"kind": "file", "path": str(file)} | fields) for file in files]
        elif path.exists() or not HUB_ID.fullmatch(name) or name.endswith(SUFFIXES):
            sources.append(FileTraces.model_validate({"kind": "file", "path": name, "split": split} | fields))
        else:
            place = {"kind": "hub", "dataset": name, "split": split or "train", "subset": subset, "revision": revision}
            sources.append(HubTraces.model_validate(place | fields))
    return sources


def import_traces(
    sources: Sequence[FileTraces | HubTraces], out: Path, note: Callable[[str], None] = say
) -> ImportSummary:
    """Store the traces of the sources in the directory `out`, which must not exist or be empty.

    Errors: UserError for a source that cannot be read, or when nothing in any of them is an answer.
    """
    if out.resolve() == Path.cwd():
        raise UserError(f"{out}: the current directory, which cannot be replaced; name a new directory as --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another --out")
    created = next((path for path in reversed([out, *out.parents]) if not path.exists()), out)
    remove_leftovers(out)
    try:
        with replacing_directories(out) as (new,):
            summary = _write(sources, new, note)
    except BaseException:
        for path in out.parents:
            if created in (path, *path.parents) and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    if summary.columns_left_behind:
        note(f"note: not stored: the columns {', '.join(summary.columns_left_behind)}")
    return summary


def _write(sources: Sequence[FileTraces | HubTraces], new: Path, note: Callable[[str], None]) -> ImportSummary:
    readers: list[Reader] = []
    samples = Counter[str]()
    judged = _judged(sources, note, readers, samples)
    with PartWriter(new / "traces", JUDGED_SCHEMA, columns_at_least=True) as writer:
        (new / "traces").mkdir()
        while group := list(islice(judged, GROUP_ROWS)):
            table = table_of(trace for trace, _ in group)
            writer.write(table.append_column(VERDICTS, verdict_column(said for _, said in group)))
    traces = sum(reader.taken for reader in readers)
    left_out: dict[str, int] = {}
    for reader in readers:
        for reason, number in reader.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + number
    if not traces:
        reasons = ", ".join(f"{reason} ({number:,})" for reason, number in left_out.items()) or "no rows"
        raise UserError(f"{readers[0].name}: no answer can be used: {reasons}; name another source")
    summary = ImportSummary(
        sources=tuple(reader.name for reader in readers),
        traces=traces,
        prompts=len(samples),
        left_out=left_out,
        columns_left_behind=tuple(dict.fromkeys(name for reader in readers for name in reader.left_behind)),
    )
    summary.write(new / IMPORTED)
    return summary


def _judged(
    sources: Sequence[FileTraces | HubTraces],
    note: Callable[[str], None],
    readers: "list[Reader]",
    samples: Counter[str],
) -> Iterator[tuple[Trace, list[Verdict]]]:
    """The traces of all sources, numbered by prompt. Adds to `readers` and `samples`, which are complete at the end."""
    for source in sources:
        reader, rows = reader_of(source, note)
        readers.append(reader)
        for trace, said in reader.traces(rows):
            yield replace(trace, sample=samples[trace.prompt.id]), said
            samples[trace.prompt.id] += 1
