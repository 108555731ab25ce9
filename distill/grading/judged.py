"""The place of a judge model in `GRADERS`.

A judge has an address, a price and a budget, so the table cannot hold it: the caller brings one (`AnswerJudge`), and
without one an answer is unverifiable. That a recipe has a judge where it needs one is checked before any work
(`distill.grading.mixed.require_judge`). Its `version` is that of reading verdicts (`distill.grading.verdicts`) and of
what is put into the judge's prompt.
"""

from typing import ClassVar

from distill.grading.grade import Answer, Ruling, TaskGrader

JUDGE = "judge"  # the task


class JudgedTask(TaskGrader):
    """Answers that only a judge model can grade."""

    version = 2  # scores on another scale, labels within quotes
    votes: ClassVar[bool] = False

    def gold(self, text: str) -> str:
        """The reference answer, as the judge reads it."""
        return text.strip()

    def find(self, response: str) -> Answer | None:
        """The whole response."""
        return Answer(response, "response") if response.strip() else None

    def rule(self, gold: str, answer: Answer) -> Ruling:
        """Unverifiable: there is no judge here."""
        return "unverifiable", "no judge"

    def reads_plainly(self, gold: str) -> bool:
        """True: a judge reads any text."""
        return True
