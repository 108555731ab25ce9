"""Is this answer right? Correct, wrong and unverifiable are three different verdicts.

Unverifiable means that it cannot be said: no answer in the text, no gold answer, a parser that failed, a comparison
that did not end in time. Calling it wrong would be a false statement about the answerer, calling it correct one about
the data.

    with Grader(workers=2, timeout=5.0) as grader:
        for key, grade in grader.grade((i, prompt, response) for …):

Graders by task are in one table, `GRADERS`; a task without one is refused before any work starts (`require_grader`).
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
