"""What grading speaks of: a final answer, a ruling on it, a grade, and what a grader of one task provides.

A `TaskGrader` has two halves. Finding an answer and the comparisons that cannot fail run in the caller's process, in
linear time. Everything that needs a parser runs in a worker process that can be killed, for neither its time nor its
memory is bounded.

A grader has a `version`. Raise it with every change after which a verdict may be another: verdicts that are stored were
given by the version beside them, and those of another one are given again (`distill.grading.identity`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

if TYPE_CHECKING:  # the worker imports this module too, and must stay light
    from distill.prompts.prompt import Prompt
    from distill.recipe.rubric import Rubric

K = TypeVar("K")

Outcome = Literal["correct", "wrong", "unverifiable"]
Ruling = tuple[Outcome, str]  # with a short, countable reason
Detailed = tuple[Outcome, str, dict[str, object]]  # a ruling with details, which join the evidence: JSON values by name


GUESSES = ("last line", "sentence")  # methods that look for an answer in prose


@dataclass(frozen=True)
class Answer:
    """A final answer as written, and how it was found. `marked` is False for a mere guess from the last line."""

    text: str
    method: str

    @property
    def marked(self) -> bool:
        """Whether the answerer marked it as its answer: only then can it be wrong."""
        return self.method not in GUESSES


@dataclass(frozen=True)
class Grade:
    """The grade of one answer.

    reason: short and countable ("identical", "not equal", "timeout", …).
    evidence: `extracted` and `gold` as compared, and `method`, how the answer was found (see `distill.grading.math`).
    """

    verdict: Outcome
    reason: str
    evidence: dict[str, object] = field(default_factory=dict)


class AnswerJudge(Protocol):
    """A model that grades answers (`distill.grading.judge.JudgeModel`)."""

    def grade(
        self, items: "Iterable[tuple[K, Prompt, str]]", rubric: "Rubric | None" = None
    ) -> "Iterator[tuple[K, Grade]]":
        """Yield (key, grade) for every (key, prompt, response), in order of completion. Lazy in `items`."""


class TaskGrader(ABC):
    """Grades the answers of one task. `GRADERS` in `distill.grading.graders` is the only list of graders.

    lazy: whether a worker prepares it at its first question and not when it starts. votes: whether two answers can be
    equal, so that the samples of a prompt have a majority. seconds: of processor time for one comparison, in a worker.
    version: raised when a verdict may change. packages: distributions on which verdicts rest; `python` is Python.
    """

    version: ClassVar[int] = 1
    packages: ClassVar[Sequence[str]] = ()
    lazy: ClassVar[bool] = False
    votes: ClassVar[bool] = True
    seconds: float = 5.0

    def require(self, where: str) -> None:  # noqa: B027  most graders need nothing that may be missing
        """Raise UserError when a package that this grader needs is not installed. where: begins the message."""

    def prepare(self) -> None:  # noqa: B027  most graders have nothing to load
        """Load, in a worker, what `compare` and `reads` need, before the clock of a question runs."""

    @abstractmethod
    def gold(self, text: str) -> str:
        """The gold answer itself, in what a data set gives as its answer; empty where there is none."""

    @abstractmethod
    def find(self, response: str) -> Answer | None:
        """The final answer of a response. Linear time."""

    def gold_shown(self, gold: str) -> str:
        """The gold answer as evidence shows it."""
        return gold

    def limits(self, gold: str) -> int:
        """How many time limits a comparison with this gold answer may take."""
        return 1

    def shown(self, answer: Answer) -> str:
        """The answer as evidence shows it: answers that are equal without a parser look the same."""
        return answer.text

    @abstractmethod
    def rule(self, gold: str, answer: Answer) -> Ruling | None:
        """Compare without a parser, in linear time; None where that needs one."""

    def compare(self, gold: str, answer: str, marked: bool) -> Ruling | Detailed:
        """Compare with a parser. Runs in a worker that can be killed."""
        raise AssertionError(f"{type(self).__name__}.rule gave no ruling, and there is no parser")

    @abstractmethod
    def reads_plainly(self, gold: str) -> bool | None:
        """Whether another spelling of this gold answer can be recognised; None where that needs a parser."""

    def reads(self, gold: str) -> bool:
        """The same with a parser. Runs in a worker that can be killed."""
        raise AssertionError(f"{type(self).__name__}.reads_plainly gave no answer, and there is no parser")
