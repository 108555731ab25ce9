"""Grade many answers: by spelling in this process, with a parser in worker processes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast, get_args

from distill.errors import UserError
from distill.grading.grade import NO_GOLD, Answer, Detailed, Grade, Outcome, TaskGrader
from distill.grading.graders import GRADERS
from distill.grading.pool import MEMORY, Lost, Question, WorkerPool

if TYPE_CHECKING:  # the worker imports this package too and must start fast
    from distill.grading.sandbox.levels import Level
    from distill.prompts.prompt import Prompt

K = TypeVar("K")
T = TypeVar("T")

CHECKED = 2000  # distinct gold answers that are checked before generating: about ten seconds of parsing


def require_grader(task: str, where: str, remedy: str = "leave such prompts out") -> TaskGrader:
    """Look up the grader of a task. where: the setting that needs it; remedy: the user's alternative.

    Errors: UserError if the task has no grader, or a package that the grader needs is not installed.
    """
    if task not in GRADERS:
        raise UserError(f"{where}: task {task!r} has no grader yet (only {', '.join(GRADERS)} have); {remedy}")
    GRADERS[task].require(where)
    return GRADERS[task]


class Grader:
    """Grades answers with `workers` processes.

    timeout: seconds of processor time for one comparison. memory: bytes of address space of a worker. level: the least
    isolation for the programs of answers; on a machine with less, no program is run and grading ends with a WorkError.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory: int = MEMORY, level: "Level" = "full") -> None:
        self.pool: WorkerPool[int] = WorkerPool(workers, timeout, memory, level)

    def __enter__(self) -> "Grader":
        self.pool.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.__exit__(*exc)

    def grade(self, items: "Iterable[tuple[K, Prompt, str]]") -> Iterator[tuple[K, Grade]]:
        """Yield (key, grade) for each (key, prompt, response), in order of completion. Reads `items` lazily.

        This process finds answers and compares strings, in linear time; comparisons that need a parser go to a worker.
        Errors: UserError for a task without a grader; WorkError if no process can be started, or its machine isolates
        programs less than `level`.
        """

        def questions() -> "Iterator[tuple[tuple[K, Grade], Question | None]]":
            for key, prompt, response in items:
                grade, question = _graded(prompt, response)
                yield (key, grade), question

        for (key, grade), result in self._answered(questions()):
            if isinstance(result, Lost):
                evidence = grade.evidence | {"exit_code": result.exit_code}
                grade = replace(grade, verdict="unverifiable", reason=result.reason, evidence=evidence)
            elif result is not None:
                outcome, reason, details = _ruling(result)
                grade = replace(grade, verdict=outcome, reason=reason, evidence=grade.evidence | details)
            yield key, grade

    def same(self, pairs: Iterable[tuple[K, str, str]]) -> Iterator[tuple[K, bool]]:
        """Yield (key, whether two answers are equal) for each (key, answer, answer), in order of completion.

        Answers that the parser cannot read, or not in time, count as different.
        """
        grader = GRADERS["math"]

        def questions() -> "Iterator[tuple[tuple[K, bool], Question | None]]":
            for key, one, other in pairs:
                if ruling := grader.rule(one, Answer(other, "boxed")):
                    yield (key, ruling[0] == "correct"), None
                else:
                    yield (key, False), {"task": "math", "gold": one, "answer": other, "marked": True}

        for (key, equal), result in self._answered(questions()):
            yield key, equal or (isinstance(result, list) and result[0] == "correct")

    def readable(self, golds: Iterable[tuple[K, str, str]]) -> Iterator[tuple[K, bool]]:
        """Yield (key, whether the grader can read the gold answer) for each (key, task, gold), in order of completion.

        If a gold answer is unreadable, only the same spelling of it is graded correct. A timeout counts as unreadable.
        Errors: UserError for a task without a grader.
        """

        def questions() -> "Iterator[tuple[tuple[K, bool], Question | None]]":
            for key, task, gold in golds:
                grader = require_grader(task, f"gold answer {gold!r}")
                answer = grader.gold(gold)
                verdict = grader.reads_plainly(answer) if answer else False
                yield (key, bool(verdict)), {"task": task, "gold": answer} if verdict is None else None

        for (key, verdict), result in self._answered(questions()):
            yield key, verdict or result is True

    def _answered(self, items: "Iterable[tuple[T, Question | None]]") -> "Iterator[tuple[T, object]]":
        """Yield each item with the workers' answer to its question; None if it has no question."""
        waiting: dict[int, T] = {}
        settled: list[T] = []

        def questions() -> Iterator[tuple[int, Question]]:
            for number, (item, question) in enumerate(items):
                if question is None:
                    settled.append(item)
                else:
                    waiting[number] = item
                    yield number, question

        for number, result in self.pool.map(questions()):
            yield from ((item, None) for item in settled)
            settled.clear()
            yield waiting.pop(number), result
        yield from ((item, None) for item in settled)


def readable(task: str, gold: str) -> bool:
    """Whether the grader of a task can read a gold answer, so that other spellings of it are recognised.

    For many gold answers, use `Grader.readable`, which starts its processes once. Errors: UserError for a task without
    a grader.
    """
    with Grader(workers=1) as grader:
        ((_, answer),) = grader.readable([(None, task, gold)])
    return answer


def unreadable_golds(prompts: "Iterable[Prompt]", workers: int, timeout: float) -> tuple[list[str], int]:
    """Return the distinct gold answers that cannot be read, in order, and the number of those that were checked.

    At most `CHECKED` are checked. Prompts without a gold answer, or of a task without a grader, are skipped.
    """
    golds: dict[tuple[str, str], None] = {}
    for prompt in prompts:
        if prompt.answer and prompt.task in GRADERS:
            golds[prompt.task, prompt.answer] = None
            if len(golds) == CHECKED:
                break
    with Grader(workers, timeout) as grader:
        read = dict(grader.readable(((task, gold), task, gold) for task, gold in golds))
    return [gold for task, gold in golds if not read[task, gold]], len(golds)


def _graded(prompt: "Prompt", response: str) -> tuple[Grade, Question | None]:
    """Grade without a parser as far as possible; the question for a worker is None if the grade is final."""
    grader = require_grader(prompt.task, f"prompt {prompt.id}")
    gold = grader.gold(prompt.answer or "")
    answer = grader.find_for(gold, response)
    evidence: dict[str, object] = {
        "extracted": answer and grader.shown(answer),
        "gold": grader.gold_shown(gold) if gold else None,
        "method": answer and answer.method,
    }
    if not gold or answer is None:
        return Grade("unverifiable", "no answer found" if gold else NO_GOLD, evidence), None
    if not answer.other and (ruling := grader.rule(gold, answer)):
        return Grade(*ruling, evidence), None
    question: Question = {"task": prompt.task, "gold": gold, "answer": answer.text, "marked": answer.marked}
    if answer.other:
        question["other"] = answer.other
        evidence["other"] = grader.shown(replace(answer, text=answer.other))
    return Grade("unverifiable", "not compared", evidence), question


def _ruling(result: object) -> Detailed:
    """Parse a worker's answer to a comparison."""
    assert isinstance(result, list) and result[0] in get_args(Outcome), result
    details = result[2] if len(result) > 2 else {}
    assert isinstance(details, dict), result
    return cast(Outcome, result[0]), str(result[1]), details
