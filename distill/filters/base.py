"""The two kinds of filter, and what they share.

A `TraceFilter` judges one trace at a time, and judges every trace, also one that another filter drops: so the verdicts
show what each filter does alone, and an ablation is a count, not another run. A `ChoosingFilter` chooses among the
traces that all filters before it have kept, or it would prefer a duplicate of something dropped.

A filter is an instance of its settings. Rejected: a settings class beside a function in a registry, which names every
setting twice and leaves room for a filter whose settings are another's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from distill.filters.judged import Judged, Key
from distill.grading.grade import Grade
from distill.section import Section
from distill.traces.trace import FinishReason, Trace, Verdict

OK = "ok"


@dataclass(frozen=True)
class Candidate:
    """What a trace is judged by. grade: of its answer, None unless the `correct` filter is on."""

    trace: Trace
    grade: Grade | None = None


class Example(NamedTuple):
    """A completion and the reason that a filter gives for it; every one is a test. settings: fields of the filter."""

    reason: str
    text: str
    settings: Mapping[str, object] = {}
    finish_reason: FinishReason = "stop"
    tokens: int | None = None
    grade: Grade | None = None


class Group(NamedTuple):
    """Completions of one prompt, in order of their sample numbers, and the reason for each; every one is a test.

    tokens: the length of each; none: they are counted in words.
    """

    reasons: tuple[str, ...]
    texts: tuple[str, ...]
    settings: Mapping[str, object] = {}
    tokens: tuple[int, ...] = ()


class AnyFilter(Section, ABC):
    """What both kinds share.

    name: the key in the recipe and in verdicts. reasons: reason → what it means; a reason may be followed by `: ` and
    details. passing: the reason of the traces that are kept.
    """

    name: ClassVar[str]
    reasons: ClassVar[Mapping[str, str]]
    passing: ClassVar[str] = OK

    @property
    def draws(self) -> bool:
        """Whether its verdicts depend on the recipe's seed."""
        return False

    def verdict(self, reason: str, **evidence: object) -> Verdict:
        """This filter's verdict; the reason decides whether the trace is kept."""
        assert reason.partition(": ")[0] in self.reasons, f"{self.name}: {reason} is none of its reasons"
        return Verdict(self.name, reason == self.passing, reason, evidence)


class TraceFilter(AnyFilter):
    """Judges traces one by one."""

    examples: ClassVar[Sequence[Example]]

    @abstractmethod
    def judge(self, candidate: Candidate) -> Verdict:
        """The verdict on one trace. Fast: it runs in the stage's own process."""


class ChoosingFilter(AnyFilter):
    """Chooses among traces. Runs after all filters of the other kind."""

    examples: ClassVar[Sequence[Group]]

    @abstractmethod
    def choose(self, survivors: Sequence[Judged], seed: int) -> dict[Key, Verdict]:
        """The verdict on every one of the traces that no filter has dropped yet. seed: the recipe's."""
