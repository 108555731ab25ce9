"""Streams of answers, some of which a judge model grades and the others programs."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from distill.errors import UserError
from distill.grading.grade import AnswerJudge, Grade
from distill.grading.grader import Grader
from distill.grading.judged import JUDGE
from distill.prompts.prompt import Prompt

K = TypeVar("K")

TOGETHER = 256  # answers of a mixed stream that are graded together


def require_judge(tasks: Iterable[str], has_judge: bool, where: str) -> None:
    """Raise UserError when prompts need a judge and there is none. where: begins the message."""
    if not has_judge and JUDGE in tasks:
        raise UserError(
            f"{where}: task judge needs a model that judges; set `judge:` in the recipe, such as `judge: {{teacher: "
            f"NAME}}` (without a recipe: --set judge.teacher=NAME), or leave such prompts out"
        )


def graded(
    grader: Grader, judge: AnswerJudge | None, items: Iterable[tuple[K, Prompt, str]]
) -> Iterator[tuple[K, Grade]]:
    """Yield (key, grade) for every (key, prompt, response): those of task `judge` by the judge, the others by programs.

    Lazy in `items`. Errors: as `Grader.grade` and `AnswerJudge.grade`.
    """
    if judge is None:
        yield from grader.grade(items)
        return
    source = iter(items)
    while together := list(islice(source, TOGETHER)):
        yield from grader.grade(item for item in together if item[1].task != JUDGE)
        yield from judge.grade(item for item in together if item[1].task == JUDGE)
