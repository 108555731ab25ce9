"""The kinds of filter, and what they share.

A `TraceFilter` judges one trace at a time, and judges every trace, also one that another filter drops: so the verdicts
show what each filter does alone, and an ablation is a count, not another run. A `StreamFilter` does the same for a
judgement that is made elsewhere and takes long, by worker processes or a server: it is handed the traces as a stream
and answers in order of completion.

A `ChoosingFilter` compares traces with one another. It runs after all filters of the other kinds, in the funnel's
order, and decides only on traces that every filter before it has kept, or it would prefer a duplicate of something
dropped. A `GroupFilter` sees the traces of one prompt at a time, a `CorpusFilter` all survivors.

The texts pass by once, so a choosing filter says then what it will need (`note`): a hash, a signature, an answer. Notes
are stored with the verdicts; neither they nor the texts are held in memory, whose size does not depend on the number of
traces. Judging is a function of a trace, the settings and the seed: it may happen in any process, in any order, and
again after a crash.

A filter is an instance of its settings. Rejected: a settings class beside a function in a registry, which names every
setting twice and leaves room for a filter whose settings are another's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, TypeVar, cast

from pydantic import JsonValue

from distill.filters.judged import Judged, Key
from distill.filters.overlap import Item
from distill.grading.grade import AnswerJudge
from distill.section import Section
from distill.traces.trace import FinishReason, Trace, Verdict

OK = "ok"

K = TypeVar("K")
T = TypeVar("T")


class Resources:
    """What filters may use besides a trace and their settings; one in every process that judges.

    seed: the recipe's. tasks: those of the traces. What a run adds (the student's tokenizer, benchmarks, …) is in
    `distill.filters.resources`.
    """

    def __init__(self, seed: int = 0, tasks: Iterable[str] = ()) -> None:
        self.seed = seed
        self.tasks = frozenset(tasks)
        self._made: dict[str, object] = {}

    def judge(self) -> "AbstractContextManager[AnswerJudge | None]":
        """The judge of the recipe, for as long as the block lasts; None where no filter of the recipe asks one."""
        return nullcontext()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of `make()`, which is called once in this process for each name."""
        if name not in self._made:
            self._made[name] = make()
        return cast(T, self._made[name])

    def student_tokens(self, text: str) -> int:
        """The number of tokens of a text by the student's tokenizer. Errors: LookupError outside of a run."""
        raise LookupError("only a run has a student")

    def benchmark_items(self, benchmarks: Sequence[str]) -> list[Item]:
        """The problems of benchmarks, of which each is a card or a file; of none, those of the recipe's evaluation.

        Errors: LookupError outside of a run, UserError when one cannot be read.
        """
        raise LookupError("only a run has benchmarks")


@dataclass(frozen=True)
class Candidate:
    """A trace to be judged, and what it may be judged with."""

    trace: Trace
    resources: Resources = field(default_factory=Resources)


class Example(NamedTuple):
    """A completion and the reason that a filter gives for it; every example is a test. settings: fields of the filter.

    outcome: of a `StreamFilter`, the outcome that `verdict_on` is given.
    """

    reason: str
    text: str
    settings: Mapping[str, object] = {}
    finish_reason: FinishReason = "stop"
    tokens: int | None = None
    outcome: object = None


class Group(NamedTuple):
    """Completions, in order of their sample numbers, and the reason for each; every group is a test.

    tokens: the length of each; none: they are counted in words. questions: the question that each answers; none: all
    answer the same one. earlier: verdicts that each got before, such as those of `correct`; none: none. gold: the gold
    answer of the prompt.
    """

    reasons: tuple[str, ...]
    texts: tuple[str, ...]
    settings: Mapping[str, object] = {}
    tokens: tuple[int, ...] = ()
    questions: tuple[str, ...] = ()
    earlier: tuple[tuple[Verdict, ...], ...] = ()
    gold: str | None = "42"


class AnyFilter(Section, ABC):
    """What all kinds share.

    name: the key in the recipe and in verdicts. reasons: reason → what it means; a reason may be followed by `: ` and
    details. passing: the reason of the traces that are kept. version: raised with every change after which a verdict or
    a note may be another, because stored ones of another version are not used. packages: distributions on which
    verdicts rest.
    """

    name: ClassVar[str]
    reasons: ClassVar[Mapping[str, str]]
    passing: ClassVar[str] = OK
    version: ClassVar[int] = 1
    packages: ClassVar[Sequence[str]] = ()

    @property
    def draws(self) -> bool:
        """Whether its verdicts depend on the recipe's seed."""
        return False

    @property
    def measures_student(self) -> bool:
        """Whether its verdicts depend on the student's tokenizer."""
        return False

    def check(self, resources: Resources) -> None:
        """Load what the filter needs, before anything is written. Errors: UserError when it is missing."""

    def verdict(self, reason: str, **evidence: object) -> Verdict:
        """This filter's verdict; the reason decides whether the trace is kept. evidence: JSON values."""
        assert reason.partition(": ")[0] in self.reasons, f"{self.name}: {reason} is none of its reasons"
        return Verdict(self.name, reason == self.passing, reason, evidence)


# ---- filters that judge each trace


class TraceFilter(AnyFilter):
    """Judges traces one by one."""

    examples: ClassVar[Sequence[Example]]

    @abstractmethod
    def judge(self, candidate: Candidate) -> Verdict:
        """The verdict on one trace. Fast, and in linear time: it runs in the process that reads the traces.

        What takes long to load is loaded by `candidate.resources.once`.
        """


class Judging(Protocol):
    """Judges a stream of candidates. May be called again when the stream of an earlier call has ended."""

    def __call__(self, candidates: Iterable[tuple[K, Candidate]]) -> Iterator[tuple[K, object]]:
        """Yield (key, outcome) for every (key, candidate), in any order.

        Lazy in `candidates`: reads a bounded number ahead, and holds no candidate that it has answered.
        """


class StreamFilter(AnyFilter):
    """Judges traces one by one, several at a time, outside of this process."""

    examples: ClassVar[Sequence[Example]]

    @abstractmethod
    def opened(self, resources: Resources) -> AbstractContextManager[Judging]:
        """Start what judges, for as long as the block lasts. Errors: UserError, WorkError."""

    @abstractmethod
    def verdict_on(self, outcome: object) -> Verdict:
        """The verdict that follows from an outcome."""


# ---- filters that compare traces


class ChoosingFilter(AnyFilter):
    """What `GroupFilter` and `CorpusFilter` share."""

    examples: ClassVar[Sequence[Group]]

    def note(self, candidate: Candidate) -> JsonValue:
        """What this filter needs of a trace later: a short JSON value, taken while the text passes by."""
        return None

    def noted(self, judged: Judged) -> JsonValue:
        """The note that this filter took of a trace."""
        return judged.notes.get(self.name)


@dataclass(frozen=True)
class PromptGroup:
    """The traces of one prompt, in order of their sample numbers.

    traces: all, with the verdicts on each so far. survivors: those among them that no filter has dropped yet.
    """

    traces: Sequence[Judged]

    @property
    def survivors(self) -> list[Judged]:
        """The traces that no filter has dropped yet."""
        return [trace for trace in self.traces if trace.kept]


class GroupFilter(ChoosingFilter):
    """Chooses among the traces of one prompt."""

    @abstractmethod
    def judge_group(self, group: PromptGroup, resources: Resources) -> Sequence[Verdict]:
        """The verdict on each of the group's survivors, in their order. Called only where there is one."""


class Corpus(Protocol):
    """The traces that no filter has dropped yet, in order of (prompt id, sample), read from the disk each time."""

    scratch: Path
    """An empty directory for the filter's own files (see `distill.filters.index`); deleted afterwards."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Judged]: ...


class CorpusFilter(ChoosingFilter):
    """Chooses among all traces."""

    @abstractmethod
    def judge_corpus(self, corpus: Corpus, resources: Resources) -> Iterator[tuple[Key, Verdict]]:
        """Yield (key, verdict) for every trace of the corpus once, in any order.

        In memory at most some 50 bytes a trace; the rest goes to `corpus.scratch`.
        """
