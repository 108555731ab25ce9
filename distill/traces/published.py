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

from distill.chat import split_reasoning
from distill.console import say
from distill.errors import UserError
from distill.fingerprint import digest
from distill.prompts.columns import listed
from distill.prompts.files import MEDIA, gold_text
from distill.prompts.hub import load_dataset, rows_of_dataset
from distill.prompts.prompt import Prompt
from distill.prompts.rows import Row, columns_of, has_column, rows_of_file, value_at
from distill.prompts.streams import opened, readable
from distill.traces.layouts import COLUMNS, HEADS, Answer, Columns, LeftOut, answers, no_layout
from distill.traces.store import read_traces
from distill.traces.trace import Trace

if TYPE_CHECKING:
    from distill.recipe.sources import FileTraces, HubTraces, TraceSource

GOLD = ("answer", "gtruth_answer", "ground_truth", "expected_answer", "reward_model.ground_truth")


def read_published(source: "TraceSource", note: Callable[[str], None] = say) -> Iterator[Trace]:
    """The traces of a source in the order they are published.

    note: takes the lines about what was left out, at the end. Errors: UserError naming the row, or saying that no
    answer of the source can be used.
    """
    if source.kind == "run":
        kept = Path(source.path) / "filtered" / "kept"
        if not kept.is_dir():
            raise UserError(f"{source.path}: no run directory with kept traces (no filtered/kept in it)")
        yield from (trace for trace, _ in read_traces(kept))
        return
    rows, name = _rows(source)
    yield from _Reader(source, name, note).traces(rows)


def _rows(source: "HubTraces | FileTraces") -> tuple[Iterator[Row], str]:
    """The rows and the source's name in a published data set: no home directory. Errors: UserError."""
    named = [name for name in (source.question, source.reasoning, source.response, source.answer) if name]
    if source.kind == "file":
        path = Path(source.path)
        rows = rows_of_file(path, [*COLUMNS, *MEDIA, *GOLD, *named], source.split)
        name, names = "/".join(path.absolute().parts[-2:]).lstrip("/"), columns_of(path, source.split)
        if names is None and source.answer and not _mentions(path, source.answer.partition(".")[0]):
            raise _no_gold_column(name, source.answer, next(rows, (name, {}))[1])
    else:
        dataset = load_dataset(source.dataset, source.subset, source.split, source.revision)
        whole, path = f"{source.dataset} ({source.split})", Path(source.dataset)
        rows, name = rows_of_dataset(dataset, whole), path.name if path.is_absolute() else source.dataset
        names = dataset.column_names
    if names is not None and not source.response and not any(head in names for head in HEADS):
        raise no_layout(names, name)
    for column in named if names is not None else ():
        if not has_column(dict.fromkeys(names or ()), column):
            raise (_no_gold_column if column == source.answer else _no_column)(name, column, names or ())
    return rows, name


def _mentions(path: Path, column: str) -> bool:
    """Whether a JSON file has the name of a column anywhere: cheap, and known before anything is written."""
    needle = json.dumps(column).encode()
    with opened(path) as file, readable(path):
        tail = b""
        while block := file.read(1 << 20):
            if needle in tail + block:
                return True
            tail = block[-len(needle) :]
    return False


def _no_column(name: str, column: str, names: Iterable[str]) -> UserError:
    return UserError(f"{name}: no column {column}; the columns are {listed(names)}: correct it in this source")


def _no_gold_column(name: str, column: str, names: Iterable[str]) -> UserError:
    return UserError(
        f"{name}: no column {column}; the columns are {listed(names)}: name the one with the gold answer as "
        f"`answer`, or leave `answer` out"
    )


class _Reader:
    """Rows → traces, and counts of what is left out."""

    def __init__(self, source: "HubTraces | FileTraces", name: str, note: Callable[[str], None]) -> None:
        self.source, self.name, self.note = source, name, note
        self.rows = self.taken = self.without_gold = 0
        self.gold_seen = source.answer is None
        self.columns: dict[str, None] = {}
        self.left_out: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason → place of the first such answer

    def traces(self, rows: Iterator[Row]) -> Iterator[Trace]:
        """The traces of the rows. Errors: UserError."""
        columns = Columns(self.source.question, self.source.reasoning, self.source.response)
        teacher, samples = digest({"published": self.name}), Counter[str]()
        for where, row in islice(rows, self.source.limit):
            self.rows += 1
            self.columns |= dict.fromkeys(row)
            self.gold_seen = self.gold_seen or has_column(row, self.source.answer or "")
            for answer in answers(row, columns, where):
                if isinstance(answer, LeftOut):
                    self.left_out[str(answer)] += 1
                    self.first.setdefault(str(answer), where)
                    continue
                trace = self._trace(row, answer, teacher)
                yield replace(trace, sample=samples[trace.prompt.id])
                samples[trace.prompt.id] += 1
                self.taken += 1
        self._finish()

    def _trace(self, row: dict[str, object], answer: Answer, teacher: str) -> Trace:
        prompt = Prompt(answer.messages, self.source.task, self._gold(row), self.name)
        reasoning, response = split_reasoning(answer.text)
        return Trace(prompt, 0, 0, answer.text, reasoning, response, answer.finish_reason, teacher)

    def _gold(self, row: dict[str, object]) -> str | None:
        names = (self.source.answer,) if self.source.answer else GOLD
        value = next((value for name in names if (value := value_at(row, name)) is not None), None)
        try:
            gold = gold_text(value, self.source.task)
        except ValueError:
            gold = None
        self.without_gold += gold is None
        return gold

    def _finish(self) -> None:
        reasons = ", ".join(
            f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in self.left_out.items()
        )
        if not self.rows:
            raise UserError(f"{self.name}: no rows; give a source with at least one trace")
        if not self.taken:
            raise UserError(f"{self.name}: no answer can be used: {reasons}; correct the rows or name another source")
        if not self.gold_seen:
            raise _no_gold_column(self.name, self.source.answer or "", self.columns)
        if self.left_out:
            total = self.left_out.total()
            self.note(f"note: {self.name}: {total:,} of {total + self.taken:,} answers are left out: {reasons}")
        if 0 < self.without_gold < self.taken or (self.without_gold and self.source.answer):
            self.note(f"note: {self.name}: {self.without_gold:,} of {self.taken:,} answers have no gold answer")
