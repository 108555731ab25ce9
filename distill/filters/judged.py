"""What is recorded of a trace: its verdicts, and the few figures that later filters and the summary need.

One row of the verdict ledger. The text itself is not part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from pydantic import JsonValue

from distill.traces.ledger import Row
from distill.traces.trace import TOKENS, WORDS, Trace, Verdict

Key = tuple[str, int]


@dataclass
class Judged:
    """The figures of one trace.

    digest: `Trace.digest`. tokens: None where their number is not known. characters, reasoning_characters: of the whole
    text and of its reasoning. verdicts: in the funnel's order. notes: filter → what it noted of the trace. judged_by:
    digest of the versions of the filters and graders (`distill.filters.resources.judges_identity`).
    """

    key: Key
    digest: str
    tokens: int | None
    words: int
    characters: int
    reasoning_characters: int
    verdicts: list[Verdict] = field(default_factory=list)
    notes: dict[str, JsonValue] = field(default_factory=dict)
    judged_by: str = ""

    @classmethod
    def of(cls, trace: Trace, verdicts: list[Verdict], notes: dict[str, JsonValue] | None = None) -> "Judged":
        """The figures of a trace with the verdicts and notes on it."""
        return cls(
            trace.key,
            trace.digest,
            trace.tokens if trace.counted else None,
            len(trace.text.split()),
            len(trace.text),
            len(trace.reasoning or ""),
            verdicts,
            notes or {},
        )

    @property
    def kept(self) -> bool:
        """Whether no filter has dropped it so far."""
        return all(verdict.keep for verdict in self.verdicts)

    def length(self, unit: str) -> int:
        """The length of the whole completion, in a unit that `common_unit` gave."""
        return self.words if unit == WORDS else self.tokens or 0

    def reasoning(self, unit: str) -> int:
        """The reasoning's part of `length`, by its share of the characters: no tokenizer is loaded to filter."""
        return round(self.length(unit) * self.reasoning_characters / self.characters) if self.characters else 0

    def to_row(self) -> Row:
        """The figures as a JSON object."""
        return vars(self) | {"key": list(self.key), "verdicts": [verdict.to_dict() for verdict in self.verdicts]}

    @classmethod
    def from_row(cls, row: Row) -> "Judged | None":
        """The figures that `to_row` described; None for a row that an earlier version wrote with other figures."""
        if row.keys() != {f.name for f in fields(cls)}:
            return None
        prompt, sample = row["key"]
        return cls(**(row | {"key": (prompt, sample), "verdicts": [Verdict(**v) for v in row["verdicts"]]}))


def common_unit(traces: Sequence[Judged]) -> str:
    """The unit in which all of these can be measured: teacher tokens, or words if one of them came without a count."""
    return TOKENS if all(trace.tokens is not None for trace in traces) else WORDS
