"""What the pipeline remembers of a trace: its verdicts and the few figures that later filters and the summary need.

The text itself stays on the disk. One of these is one row of the verdict ledger.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from distill.filters.length import length, reasoning_length
from distill.traces.trace import Trace, Verdict

Key = tuple[str, int]


@dataclass
class Judged:
    """digest: of the text, white space normalised. length, reasoning: in `unit`. verdicts: in the funnel's order."""

    key: Key
    digest: str
    length: int
    reasoning: int
    unit: str
    verdicts: list[Verdict] = field(default_factory=list)

    @classmethod
    def of(cls, trace: Trace, verdicts: list[Verdict]) -> "Judged":
        count, unit = length(trace)
        return cls(trace.key, digest(trace), count, reasoning_length(trace), unit, verdicts)

    @property
    def kept(self) -> bool:
        return all(verdict.keep for verdict in self.verdicts)

    def to_row(self) -> dict[str, Any]:
        return vars(self) | {"key": list(self.key), "verdicts": [verdict.to_dict() for verdict in self.verdicts]}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Judged":
        prompt, sample = row["key"]
        return cls(**(row | {"key": (prompt, sample), "verdicts": [Verdict(**v) for v in row["verdicts"]]}))


def digest(trace: Trace) -> str:
    """128 bits of SHA-256, in hex, of the text with every run of white space as one space."""
    return hashlib.sha256(" ".join(trace.text.split()).encode(errors="surrogatepass")).hexdigest()[:32]
