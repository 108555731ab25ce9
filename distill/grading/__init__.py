"""Is this answer right? Correct, wrong and unverifiable are three different verdicts.

Unverifiable is what cannot be said: no answer in the text, no gold answer, a parser that failed, a comparison that did
not end in time. Calling it wrong would be a lie about the answerer, calling it correct one about the data.

    with Grader(workers=2, timeout=5.0) as grader:
        for key, grade in grader.grade((i, prompt, response) for …):

Graders by task stand in one table; a task that is not in it is refused before any work starts (`require_grader`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from distill.errors import UserError
from distill.grading.choice import judge_choice, letter
from distill.grading.math import Answer, final_answer, gold_answer, quick_judge
from distill.grading.pool import MEMORY, Lost, WorkerPool

if TYPE_CHECKING:  # the worker imports this package too, and must stay light
    from distill.prompts.prompt import Prompt

K = TypeVar("K")

GRADABLE = ("math", "choice")


@dataclass(frozen=True)
class Grade:
    """One verdict.

    reason: short and countable ("identical", "not equal", "timeout", …).
    evidence: `extracted` and `gold` as compared, and `method`, how the answer was found (see `distill.grading.math`).
    """

    verdict: Literal["correct", "wrong", "unverifiable"]
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)


def require_grader(task: str, where: str, remedy: str = "leave such prompts out") -> None:
    """Raise UserError when no grader knows this task. `where`: the setting that asks for it; `remedy`: what to do."""
    if task not in GRADABLE:
        raise UserError(f"{where}: task {task!r} has no grader yet (only {', '.join(GRADABLE)} have); {remedy}")


class Grader:
    """Grades answers in `workers` processes. timeout: seconds of processor time on one comparison."""

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory: int = MEMORY) -> None:
        self.pool = WorkerPool(workers, timeout, memory)

    def __enter__(self) -> "Grader":
        self.pool.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.__exit__(*exc)

    def grade(self, items: "Iterable[tuple[K, Prompt, str]]") -> Iterator[tuple[K, Grade]]:
        """Yield (key, grade) for every (key, prompt, response), in order of completion. Lazy in `items`.

        Finding the answer and comparing strings happen here, in linear time; only what needs a parser goes to a worker.
        Raises UserError at a task without a grader, WorkError when no process can be started.
        """
        finished: list[tuple[K, Grade]] = []

        def questions() -> Iterator[tuple[tuple[K, dict[str, Any]], dict[str, Any]]]:
            for key, prompt, response in items:
                require_grader(prompt.task, f"prompt {prompt.id}")
                gold = gold_answer(prompt.answer or "")
                answer = final_answer(response)
                evidence = {
                    "extracted": answer.text if answer else None,
                    "gold": gold or None,
                    "method": answer.method if answer else None,
                }
                if not gold or answer is None:
                    reason = "no answer found" if gold else "no gold answer"
                    finished.append((key, Grade("unverifiable", reason, evidence)))
                elif prompt.task == "choice":
                    evidence["extracted"] = letter(answer.text) or answer.text  # so that votes are for letters
                    finished.append((key, _grade(judge_choice(gold, answer), evidence)))
                elif verdict := quick_judge(gold, answer):
                    finished.append((key, _grade(verdict, evidence)))
                else:
                    yield (key, evidence), {"gold": gold, "answer": answer.text, "marked": answer.marked}

        for (key, evidence), result in self.pool.map(questions()):
            yield from finished
            finished.clear()
            if isinstance(result, Lost):
                evidence["exit_code"] = result.exit_code
                result = ("unverifiable", result.reason)
            yield key, _grade(result, evidence)
        yield from finished

    def same(self, pairs: Iterable[tuple[K, str, str]]) -> Iterator[tuple[K, bool]]:
        """Yield (key, whether two answers are one) for every (key, answer, answer), in order of completion. What a
        parser cannot read, or not in time, is not the same."""
        finished: list[tuple[K, bool]] = []

        def questions() -> Iterator[tuple[K, dict[str, Any]]]:
            for key, one, other in pairs:
                if verdict := quick_judge(one, Answer(other, "boxed")):
                    finished.append((key, verdict[0] == "correct"))
                else:
                    yield key, {"gold": one, "answer": other, "marked": True}

        for key, result in self.pool.map(questions()):
            yield from finished
            finished.clear()
            yield key, not isinstance(result, Lost) and result[0] == "correct"
        yield from finished


def _grade(verdict: tuple[str, str], evidence: dict[str, Any]) -> Grade:
    name, reason = verdict
    assert name in get_args(Grade.__annotations__["verdict"]), name
    return Grade(name, reason, evidence)  # type: ignore[arg-type]
