"""Grade answers as correct, wrong or unverifiable.

An answer is unverifiable if the response has no answer, there is no gold answer, the parser failed, or the comparison
was not decided in time. Grading it wrong would blame the model for a limit of the grader; grading it correct would let
errors into the data.

    with Grader(workers=2, timeout=5.0) as grader:
        for key, grade in grader.grade((i, prompt, response) for …):

`GRADERS` maps tasks to graders; a task without a grader is refused before any work starts (`require_grader`).
"""

from distill.grading.grade import Answer, Grade, TaskGrader
from distill.grading.grader import Grader, readable, require_grader, unreadable_golds
from distill.grading.graders import GRADERS

__all__ = [
    "GRADERS",
    "Answer",
    "Grade",
    "Grader",
    "TaskGrader",
    "readable",
    "require_grader",
    "unreadable_golds",
]
