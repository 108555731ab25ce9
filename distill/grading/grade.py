"""The types of grading: a final answer, a ruling on it, a grade, and the interface of a grader.

A `TaskGrader` has two halves. Finding an answer and comparing without a parser run in the caller's process, in linear
time. Everything that needs a parser runs in a worker process that can be killed, because neither its time nor its
memory is bounded.

A grader has a `version`. Raise it with every change after which a verdict may be another: verdicts that are stored were
given by the version beside them, and those of another one are given again (`distill.grading.identity`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

if TYPE_CHECKING:  # the worker imports this module too, and must stay light
    from distill.grading.sandbox.levels import Level
    from distill.prompts.prompt import Prompt
    from distill.recipe.rubric import Rubric

K = TypeVar("K")

Outcome = Literal["correct", "wrong", "unverifiable"]
Ruling = tuple[Outcome, str]  # with a short, countable reason
Detailed = tuple[Outcome, str, dict[str, object]]  # a ruling with details (JSON values) for the evidence

NO_GOLD = "no gold answer"  # the reason of a grade
UNGRADABLE = f"unverifiable: {NO_GOLD}"  # that of the filter's verdict: says nothing about the model
TAKEN_BACK = "taken back"  # the method of an answer that the response says is wrong
GUESSES = ("last line", "sentence", TAKEN_BACK)  # methods whose answer a response does not mark as its own


@dataclass(frozen=True)
class Answer:
    """A final answer as written, and the method that found it. other: another answer that the response gives, which may
    put the verdict in doubt (`TaskGrader.doubted`)."""

    text: str
    method: str
    other: str = ""

    @property
    def marked(self) -> bool:
        """Whether the response marks it as its answer. Otherwise it is a guess, which is never graded wrong."""
        return self.method not in GUESSES


@dataclass(frozen=True)
class Grade:
    """The grade of one answer.

    reason: short and countable ("identical", "not equal", "timeout", …).
    evidence: `extracted` and `gold` as compared, and the `method` that found the answer
    (`distill.grading.math.extraction`).
    """

    verdict: Outcome
    reason: str
    evidence: dict[str, object] = field(default_factory=dict)


def agreed(first: Ruling | Detailed, other: Ruling | Detailed) -> Ruling | Detailed:
    """The ruling on an answer beside another one: none where only one of them is right."""
    if {first[0], other[0]} == {"correct", "wrong"}:
        return "unverifiable", "two answers"
    return first


class AnswerJudge(Protocol):
    """A model that grades answers (`distill.grading.judge.JudgeModel`)."""

    def grade(
        self, items: "Iterable[tuple[K, Prompt, str]]", rubric: "Rubric | None" = None
    ) -> "Iterator[tuple[K, Grade]]":
        """Yield (key, grade) for each (key, prompt, response), in order of completion. Reads `items` lazily."""


class TaskGrader(ABC):
    """Grades the answers of one task. `distill.grading.graders.GRADERS` is the table of graders.

    lazy: a worker prepares this grader at its first question instead of at its start. votes: answers can be compared
    with one another, so the samples of a prompt have a majority. seconds: processor time for one comparison in a
    worker. level: the least isolation for the programs of answers, where a grader runs them. version: raised when a
    verdict may change. packages: distributions on which verdicts rest; `python` is Python. doubted: the outcomes that
    another answer of the response may put in doubt.
    """

    version: ClassVar[int] = 1
    packages: ClassVar[Sequence[str]] = ()
    lazy: ClassVar[bool] = False
    votes: ClassVar[bool] = True
    doubted: ClassVar[Sequence[Outcome]] = ("correct", "wrong")
    seconds: float = 5.0
    level: "Level" = "full"

    def conditions(self) -> Mapping[str, str]:
        """What else decides verdicts on this machine, besides the version and the packages; a part of the identity."""
        return {}

    def require(self, where: str) -> None:  # noqa: B027  most graders need nothing that may be missing
        """Raise UserError if a package that this grader needs is not installed. where: the start of the message."""

    def prepare(self) -> None:  # noqa: B027  most graders have nothing to load
        """Load what `compare` and `reads` need. Called in a worker, before the time limit of a question starts.

        Errors: WorkError if this machine cannot grade; the pool then stops with its message.
        """

    @abstractmethod
    def gold(self, text: str) -> str:
        """Extract the gold answer from a data set's answer field; empty if there is none."""

    @abstractmethod
    def find(self, response: str) -> Answer | None:
        """Find the final answer of a response, in linear time."""

    def find_for(self, gold: str, response: str) -> Answer | None:
        """Find the final answer of a response to a problem with this gold answer, in linear time."""
        return self.find(response)

    def gold_shown(self, gold: str) -> str:
        """The gold answer as shown in the evidence."""
        return gold

    def limits(self, gold: str) -> int:
        """The time limit of a comparison with this gold answer, in units of `seconds`."""
        return 1

    def shown(self, answer: Answer) -> str:
        """The answer as shown in the evidence. Answers that are equal without a parser are shown alike."""
        return answer.text

    @abstractmethod
    def rule(self, gold: str, answer: Answer) -> Ruling | None:
        """Compare without a parser, in linear time; None if a parser is needed."""

    def compare(self, gold: str, answer: str, marked: bool) -> Ruling | Detailed:
        """Compare with a parser. Called in a worker."""
        raise AssertionError(f"{type(self).__name__}.rule returned None, and compare is not implemented")

    @abstractmethod
    def reads_plainly(self, gold: str) -> bool | None:
        """Whether other spellings of this gold answer are recognised; None if a parser is needed to decide."""

    def reads(self, gold: str) -> bool:
        """Whether other spellings of this gold answer are recognised. Called in a worker."""
        raise AssertionError(f"{type(self).__name__}.reads_plainly returned None, and reads is not implemented")
