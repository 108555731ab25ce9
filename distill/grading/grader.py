"""Grading many answers: by spelling in this process, by parser in worker processes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast, get_args

from distill.errors import UserError
from distill.grading.grade import Answer, Detailed, Grade, Outcome, TaskGrader
from distill.grading.graders import GRADERS
from distill.grading.pool import MEMORY, Lost, Question, WorkerPool

if TYPE_CHECKING:  # the worker imports this package too, and must stay light
    from distill.grading.sandbox.levels import Level
    from distill.prompts.prompt import Prompt

K = TypeVar("K")
T = TypeVar("T")

TRIED = 2000  # different gold answers that are tried before generating: some ten seconds of parsing, and enough to see


def require_grader(task: str, where: str, remedy: str = "leave such prompts out") -> TaskGrader:
    """The grader of a task. `where`: the setting that asks for it; `remedy`: what to do without one.

    Errors: UserError when no grader knows this task, or a package that it needs is not installed.
    """
    if task not in GRADERS:
        raise UserError(f"{where}: task {task!r} has no grader yet (only {', '.join(GRADERS)} have); {remedy}")
    GRADERS[task].require(where)
    return GRADERS[task]


class Grader:
    """Grades answers in `workers` processes.

    timeout: seconds of processor time on one comparison. level: isolation that the programs of answers need at least;
    where a worker's machine gives less, none is run and grading ends with a WorkError.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory: int = MEMORY, level: "Level" = "full") -> None:
        self.pool: WorkerPool[int] = WorkerPool(workers, timeout, memory, level)

    def __enter__(self) -> "Grader":
        self.pool.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.__exit__(*exc)

    def grade(self, items: "Iterable[tuple[K, Prompt, str]]") -> Iterator[tuple[K, Grade]]:
        """Yield (key, grade) for every (key, prompt, response), in order of completion. Lazy in `items`.

        Finding the answer and comparing strings happen here, in linear time; only what needs a parser goes to a worker.
        Raises UserError at a task without a grader, WorkError when no process can be started or its machine gives
        programs less isolation than `level`.
        """

        def questions() -> "Iterator[tuple[tuple[K, Grade], Question | None]]":
            for key, prompt, response in items:
                grade, question = _graded(prompt, response)
                yield (key, grade), question

        for (key, grade), result in self._asked(questions()):
            if isinstance(result, Lost):
                evidence = grade.evidence | {"exit_code": result.exit_code}
                grade = replace(grade, verdict="unverifiable", reason=result.reason, evidence=evidence)
            elif result is not None:
                outcome, reason, details = _ruling(result)
                grade = replace(grade, verdict=outcome, reason=reason, evidence=grade.evidence | details)
            yield key, grade

    def same(self, pairs: Iterable[tuple[K, str, str]]) -> Iterator[tuple[K, bool]]:
        """Yield (key, whether two answers are equal) for every (key, answer, answer), in order of completion.

        Answers that a parser cannot read, or not in time, are not equal.
        """
        grader = GRADERS["math"]

        def questions() -> "Iterator[tuple[tuple[K, bool], Question | None]]":
            for key, one, other in pairs:
                if ruling := grader.rule(one, Answer(other, "boxed")):
                    yield (key, ruling[0] == "correct"), None
                else:
                    yield (key, False), {"task": "math", "gold": one, "answer": other, "marked": True}

        for (key, equal), result in self._asked(questions()):
            yield key, equal or (isinstance(result, list) and result[0] == "correct")

    def readable(self, golds: Iterable[tuple[K, str, str]]) -> Iterator[tuple[K, bool]]:
        """Yield (key, whether its grader can read a gold answer) for every (key, task, gold), in order of completion.

        Of a gold answer that cannot be read only the same spelling is recognised as correct. Not in time counts as no.
        Raises UserError at a task without a grader.
        """

        def questions() -> "Iterator[tuple[tuple[K, bool], Question | None]]":
            for key, task, gold in golds:
                grader = require_grader(task, f"gold answer {gold!r}")
                itself = grader.gold(gold)
                plainly = grader.reads_plainly(itself) if itself else False
                yield (key, bool(plainly)), {"task": task, "gold": itself} if plainly is None else None

        for (key, plainly), result in self._asked(questions()):
            yield key, plainly or result is True

    def _asked(self, items: "Iterable[tuple[T, Question | None]]") -> "Iterator[tuple[T, object]]":
        """Yield every first half with the workers' answer to the second, None where there is no question."""
        waiting: dict[int, T] = {}
        settled: list[T] = []

        def questions() -> Iterator[tuple[int, Question]]:
            for number, (what, question) in enumerate(items):
                if question is None:
                    settled.append(what)
                else:
                    waiting[number] = what
                    yield number, question

        for number, result in self.pool.map(questions()):
            yield from ((what, None) for what in settled)
            settled.clear()
            yield waiting.pop(number), result
        yield from ((what, None) for what in settled)


def readable(task: str, gold: str) -> bool:
    """Whether the grader of a task can read a gold answer, so that other spellings of it are recognised.

    For many gold answers use `Grader.readable`, which starts its processes once. Errors: UserError for a task without a
    grader.
    """
    with Grader(workers=1) as grader:
        ((_, answer),) = grader.readable([(None, task, gold)])
    return answer


def unreadable_golds(prompts: "Iterable[Prompt]", workers: int, timeout: float) -> tuple[list[str], int]:
    """The different gold answers that no grader can read, in order, among the first `TRIED`; and how many were tried.

    Prompts without a gold answer or of a task without a grader are left out.
    """
    golds: dict[tuple[str, str], None] = {}
    for prompt in prompts:
        if prompt.answer and prompt.task in GRADERS:
            golds[prompt.task, prompt.answer] = None
            if len(golds) == TRIED:
                break
    with Grader(workers, timeout) as grader:
        read = dict(grader.readable(((task, gold), task, gold) for task, gold in golds))
    return [gold for task, gold in golds if not read[task, gold]], len(golds)


def _graded(prompt: "Prompt", response: str) -> tuple[Grade, Question | None]:
    """The grade as far as it can be given without a parser, and the question to a worker where that is not enough."""
    grader = require_grader(prompt.task, f"prompt {prompt.id}")
    gold = grader.gold(prompt.answer or "")
    answer = grader.find(response)
    evidence: dict[str, object] = {
        "extracted": answer and grader.shown(answer),
        "gold": grader.gold_shown(gold) if gold else None,
        "method": answer and answer.method,
    }
    if not gold or answer is None:
        return Grade("unverifiable", "no answer found" if gold else "no gold answer", evidence), None
    if ruling := grader.rule(gold, answer):
        return Grade(*ruling, evidence), None
    question: Question = {"task": prompt.task, "gold": gold, "answer": answer.text, "marked": answer.marked}
    return Grade("unverifiable", "not compared", evidence), question


def _ruling(result: object) -> Detailed:
    """A worker's answer to a comparison."""
    assert isinstance(result, list) and result[0] in get_args(Outcome), result
    details = result[2] if len(result) > 2 else {}
    assert isinstance(details, dict), result
    return cast(Outcome, result[0]), str(result[1]), details
