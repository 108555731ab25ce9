"""Other people's traces → ours: rows of a file or a data set, or the kept traces of another run.

How a row is read is `distill.traces.layouts`. What a row does not say is not made up: without a finish reason a text
counts as finished, because it was published as an answer, but a finish reason that is null stays unknown. Answers that
cannot be used are left out, and one line says how many, why, and where the first is.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.artefacts import FilterSummary, RunPaths
from distill.chat import split_reasoning
from distill.console import say
from distill.errors import UserError
from distill.fingerprint import digest, path_hash
from distill.prompts.code_tests import BESIDE
from distill.prompts.columns import listed, parsed
from distill.prompts.files import MEDIA
from distill.prompts.golds import ARGUMENTS, Extract, gold_of
from distill.prompts.hub import load_dataset, rows_of_dataset
from distill.prompts.prompt import Prompt
from distill.prompts.rows import Row, columns_of, has_column, rows_of_file, value_at
from distill.prompts.streams import opened, readable
from distill.record import StageRecord
from distill.traces.exported import MARK, is_exported, read_exported
from distill.traces.layouts import (
    ALIGNED,
    COLUMNS,
    REASONING,
    Answer,
    Columns,
    answers,
    columns_read,
    is_known,
    no_layout,
)
from distill.traces.store import read_traces, tasks_in
from distill.traces.tags import LeftOut
from distill.traces.trace import Trace, Verdict

if TYPE_CHECKING:
    from distill.recipe.sources import FileTraces, HubTraces, MixedSource, TraceSource

GOLD = ("answer", "gtruth_answer", "ground_truth", "expected_answer", "gt", "reward_model.ground_truth")
GOLD_OF_TASK = {  # columns that are looked for before these, and what is taken out of whichever there is
    "code": ("verification_info", "input_output", "private_test_cases", "test", "test_list", "tests", "test_cases"),
    "instructions": ("instruction_id_list",),
}
EXTRACT_OF_TASK: dict[str, Extract] = {"code": "tests", "instructions": "instructions"}
BESIDE_GOLD = {"code": BESIDE, "instructions": (ARGUMENTS,)}
CORRECT = (  # columns with a publisher's verdict, the most reliable first; no score, whose 1 may be the worst of 1 to 5
    *("correctness_math_verify", "correctness_llama", "is_correct", "correct"),
)
LABEL = "published"  # the filter under whose name an import stores what was published beside an answer
LONGEST = 200  # characters of a text that is stored so
IMPORTED = "import.json"  # in a directory that `distill import` made


def read_published(source: "TraceSource", note: Callable[[str], None] = say) -> Iterator[Trace]:
    """The traces of a source in the order they are published.

    note: takes the lines about what was left out, at the end. Errors: UserError naming the row, or saying that no
    answer of the source can be used.
    """
    if source.kind == "run":
        kept = _kept(Path(source.path))
        if not kept.is_dir():
            raise UserError(
                f"{source.path}: no run directory with kept traces (no filtered/kept in it), and not made by "
                f"`distill import`"
            )
        yield from (trace for trace, _ in read_traces(kept))
        return
    rows, name = _rows(source)
    yield from (trace for trace, _ in Reader(source, name, note).traces(rows))


def _kept(run: Path) -> Path:
    """The directory with the traces that a run kept, or that an import stored."""
    return run / "traces" if (run / IMPORTED).is_file() else run / "filtered" / "kept"


def kept_hash(run: Path) -> str:
    """What decides the traces that a run kept, or that an import stored: their number and a hash over them, from the
    record of the filter; a hash of the files of an import.

    Errors: UserError when the filter is not finished, or when the directory is neither.
    """
    if (run / IMPORTED).is_file():
        return path_hash(_kept(run))
    paths = RunPaths(run)
    record = StageRecord.read_if_there(paths.record("filter"), "run `distill filter --fresh filter` again")
    if record is None or record.finished is None or not paths.kept.is_dir():
        raise UserError(
            f"{paths.kept} is missing: run `distill filter` first, whose kept traces are read (or name a run, or what "
            f"`distill import` made)"
        )
    summary = FilterSummary.model_validate_json(json.dumps(record.summary))
    return f"{summary.kept:,} traces {summary.kept_hash}"


def notes_on_run(path: Path) -> list[str]:
    """A note for a run whose kept traces are not there yet. Errors: UserError for a directory that is neither a run nor
    an import."""
    if not path.is_dir():
        return [f"there is no run {path} yet, whose traces are read"]
    try:
        kept_hash(path)
    except UserError as error:
        if not RunPaths(path).identity.is_file():
            raise
        return [str(error)]
    return []


def content_of(source: "TraceSource | MixedSource") -> str | None:
    """A hash over what a source holds. None for a data set of the hub, which its revision names, and for traces that
    the run makes itself. Errors: UserError for a source that is not there, or a run that is not filtered."""
    match source.kind:
        case "run":
            kept, record = _kept(Path(source.path)), RunPaths(Path(source.path)).record("filter")
            return path_hash(kept) if kept.is_dir() and not record.exists() else kept_hash(Path(source.path))
        case "file":
            return path_hash(Path(source.path))
        case "hub":
            return path_hash(Path(source.dataset)) if source.local else None
    return None


def tasks_of_run(source: "TraceSource") -> set[str]:
    """The tasks of the traces that another run kept; none for other sources, and where that run is not there.

    Errors: UserError for a damaged file of traces.
    """
    return tasks_in(_kept(Path(source.path))) if source.kind == "run" else set()


def reader_of(source: "HubTraces | FileTraces", note: Callable[[str], None]) -> "tuple[Reader, Iterator[Row]]":
    """A reader of every column and the rows for it, for `distill import`. Errors: UserError."""
    rows, name = _rows(source, every=True)
    return Reader(source, name, note, whole=True), rows


def _rows(source: "HubTraces | FileTraces", every: bool = False) -> tuple[Iterator[Row], str]:
    """The rows and the source's name in a published data set: no home directory. every: with every column.

    Errors: UserError.
    """
    named = [name for name in (source.question, source.reasoning, source.response, source.answer) if name]
    if source.kind == "file":
        path = Path(source.path)
        golds = (*_gold_columns(source), *BESIDE_GOLD.get(source.task or "math", ()))
        rows = rows_of_file(path, None if every else [*COLUMNS, MARK, *MEDIA, *golds, *named], source.split)
        name, names = "/".join(path.absolute().parts[-2:]).lstrip("/"), columns_of(path, source.split)
        if names is None and source.answer and not _mentions(path, source.answer.partition(".")[0]):
            raise _no_gold_column(name, source.answer, next(rows, (name, {}))[1])
    else:
        dataset = load_dataset(source.dataset, source.subset, source.split, source.revision)
        whole, path = f"{source.dataset} ({source.split})", Path(source.dataset)
        rows, name = rows_of_dataset(dataset, whole), path.name if path.is_absolute() else source.dataset
        names = dataset.column_names
    if source.answer is not None and source.answer == source.response:
        raise UserError(
            f"{name}: column {source.answer} is named as the response and as the gold answer, so each trace "
            f"would be correct; leave the answer out, or name the column with the gold answer"
        )
    if names is not None and not source.response and not is_known(names):
        raise no_layout(names, name)
    for column in named if names is not None else ():
        if not has_column(dict.fromkeys(names or ()), column):
            raise (_no_gold_column if column == source.answer else _no_column)(name, column, names or ())
    return rows, name


def _gold_columns(source: "HubTraces | FileTraces") -> tuple[str, ...]:
    """The columns in which a gold answer is looked for, in order: the named one, else all but those that are named as
    something else."""
    taken = (source.question, source.reasoning, source.response)
    searched = (*GOLD_OF_TASK.get(source.task or "math", ()), *GOLD)
    return (source.answer,) if source.answer else tuple(name for name in searched if name not in taken)


def _mentions(path: Path, column: str) -> bool:
    """Whether a JSON file has the name of a column anywhere: cheap, and known before anything is written."""
    needles = [json.dumps(column, ensure_ascii=ascii_only).encode() for ascii_only in (True, False)]
    longest = max(map(len, needles))
    with opened(path) as file, readable(path):
        tail = b""
        while block := file.read(1 << 20):
            if any(needle in tail + block for needle in needles):
                return True
            tail = (tail + block)[-longest:]
    return False


def _no_column(name: str, column: str, names: Iterable[str]) -> UserError:
    return UserError(f"{name}: no column {column}; the columns are {listed(names)}: correct it in this source")


def _no_gold_column(name: str, column: str, names: Iterable[str]) -> UserError:
    return UserError(
        f"{name}: no column {column}; the columns are {listed(names)}: name the column with the gold "
        f"answer (`answer` of the source, or --answer), or leave it out"
    )


class Reader:
    """Rows → traces, and counts of what is left out.

    whole: keep empty answers too, which filters judge, and what was published beside an answer, as a verdict `LABEL`.
    """

    def __init__(
        self, source: "HubTraces | FileTraces", name: str, note: Callable[[str], None], whole: bool = False
    ) -> None:
        self.source, self.name, self.note, self.whole = source, name, note, whole
        self.rows = self.taken = self.without_gold = 0
        self.gold_seen = source.answer is None
        self.unreadable = ""  # the first gold answer that cannot be read, and why
        self.columns: dict[str, None] = {}
        self.stored: set[str] = set()  # columns with values in a verdict
        self.left_out: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason → place of the first such answer

    @property
    def left_behind(self) -> list[str]:
        """The columns of the rows that were read so far of which nothing is stored."""
        named = (self.source.question, self.source.reasoning, self.source.response, self.source.answer)
        used = {
            *columns_read(self.columns),
            *GOLD,
            *_gold_columns(self.source),
            *(name.partition(".")[0] for name in named if name),
            MARK,
            *self.stored,
        }
        return [name for name in self.columns if name not in used and name != "reward_model"]

    def traces(self, rows: Iterator[Row]) -> Iterator[tuple[Trace, list[Verdict]]]:
        """The traces of the rows, with the verdict `LABEL` if `whole`. Errors: UserError."""
        columns = Columns(self.source.question, self.source.reasoning, self.source.response)
        teacher, samples = digest({"published": self.name}), Counter[str]()
        for where, row in islice(rows, self.source.limit):
            self.rows += 1
            self.columns |= dict.fromkeys(row)
            self.gold_seen = self.gold_seen or has_column(row, self.source.answer or "")
            for trace, verdicts in self._row(row, columns, teacher, where):
                yield replace(trace, sample=samples[trace.prompt.id]), verdicts
                samples[trace.prompt.id] += 1
                self.taken += 1
        self._finish()

    def _row(
        self, row: dict[str, object], columns: Columns, teacher: str, where: str
    ) -> Iterator[tuple[Trace, list[Verdict]]]:
        if is_exported(row):
            self.gold_seen = True
            for number, trace in enumerate(read_exported(row, where, self.source.task)):
                yield trace, self._label(row, number)
            return
        for answer in answers(row, columns, where, self.whole):
            if isinstance(answer, LeftOut):
                self.left_out[str(answer)] += 1
                self.first.setdefault(str(answer), where)
            else:
                yield self._trace(row, answer, teacher, where), self._label(row, answer.number)

    def _label(self, row: dict[str, object], number: int) -> list[Verdict]:
        """What was published beside an answer: numbers, short texts, and the values of lists about the generations."""
        if not self.whole:
            return []
        generations = parsed(row.get("generations"))
        length = len(generations) if isinstance(generations, list) else 0
        evidence: dict[str, object] = {}
        golds = {*_gold_columns(self.source), *GOLD} & row.keys()  # the prompt has them
        for name, value in row.items():
            if name in (columns_read(row) - set(ALIGNED) - set(REASONING)) or name in (*MEDIA, MARK, *golds):
                continue
            if length and isinstance(values := parsed(value), list) and len(values) == length:
                value = values[number]
            if isinstance(value, bool | int | float) or (isinstance(value, str) and 0 < len(value) <= LONGEST):
                evidence[name] = value
        self.stored |= evidence.keys()
        said = next((evidence[name] for name in CORRECT if evidence.get(name) in (0, 1)), None)
        reason = "not labelled" if said is None else "labelled correct" if said else "labelled incorrect"
        return [Verdict(LABEL, True, reason, evidence)] if evidence else []

    def _trace(self, row: dict[str, object], answer: Answer, teacher: str, where: str) -> Trace:
        prompt = Prompt(answer.messages, self.source.task or "math", self._gold(row, where), self.name)
        reasoning, response = answer.parts or split_reasoning(answer.text)
        return Trace(prompt, 0, 0, answer.text, reasoning, response, answer.finish_reason, teacher)

    def _gold(self, row: dict[str, object], where: str) -> str | None:
        """The gold answer: of the first column that has one. What cannot be read is no gold answer, and is counted."""
        task = self.source.task or "math"
        extract = EXTRACT_OF_TASK.get(task, self.source.extract)
        for name in _gold_columns(self.source):
            try:
                gold = gold_of(value_at(row, name), task, extract, row)
            except ValueError as error:
                self.unreadable = self.unreadable or f"{where}: column {name} {error}"
                continue
            if gold is not None:
                return gold
        self.without_gold += 1
        return None

    def _finish(self) -> None:
        reasons = ", ".join(
            f"{reason} ({count:,}, first: {self.first[reason]})" for reason, count in self.left_out.items()
        )
        if not self.rows and not self.whole:
            raise UserError(f"{self.name}: no rows; give a source with at least one trace")
        if not self.taken and not self.whole:
            raise UserError(f"{self.name}: no answer can be used: {reasons}; correct the rows or name another source")
        if not self.gold_seen:
            raise _no_gold_column(self.name, self.source.answer or "", self.columns)
        if self.left_out:
            total = self.left_out.total()
            self.note(f"note: {self.name}: {total:,} of {total + self.taken:,} answers are left out: {reasons}")
        if self.without_gold and (self.without_gold < self.taken or self.source.answer or self.unreadable):
            first = f" (first: {self.unreadable})" if self.unreadable else ""
            self.note(f"note: {self.name}: {self.without_gold:,} of {self.taken:,} answers have no gold answer{first}")
