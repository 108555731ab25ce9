"""Which grader or judge gives the grades of an evaluation, and which one gave those that are on the disk.

`grading.json` names it beside `grades.jsonl`. Grades of another one, or of another version, are removed and made again,
also those of a finished evaluation: this costs no sample, and a judge's answers are still in its ledger. Rejected:
refusing them, as other samples are, because the remedy would always be the same; and keeping those of a finished
evaluation, because its score would then be compared with that of another grader.
"""

import platform

from distill import __version__
from distill.artefacts import Settings
from distill.console import say
from distill.errors import UserError
from distill.evaluations import EvaluationPaths, GradedWith
from distill.grading import GRADERS
from distill.grading.identity import changes, graders_identity, installed
from distill.grading.judged import JUDGE


class Grading:
    """The grader of one evaluation. judge: what decides the verdicts of a judge, where the task needs one.

    settings: everything that decides the grades besides the samples.
    """

    def __init__(self, paths: EvaluationPaths, task: str, judge: Settings | None = None) -> None:
        self._paths = paths
        self._tasks = {task, "math"} if GRADERS[task].votes else {task}  # votes are compared as mathematics
        self.settings = graders_identity(self._tasks)
        if task == JUDGE and judge is not None:
            self.settings |= {f"judge.{key}": value for key, value in judge.items()}

    def stored(self) -> GradedWith | None:
        """What decided the grades on the disk; None where that is not known."""
        try:
            return GradedWith.read_if_there(self._paths.grading, "")
        except UserError:
            return None

    def is_stored(self) -> bool:
        """Whether the grades on the disk, if any, are those of this grader."""
        return (stored := self.stored()) is not None and stored.settings == self.settings

    def begin(self, name: str) -> None:
        """Remove the grades and votes of another grader and record this one. name: of the evaluation, for the note."""
        stored = self.stored()
        if self._paths.grades.exists():
            what = changes(stored.settings if stored else None, self.settings)
            say(f"note: {name}: its grades are of another grader ({what}); grading its samples again")
        for path in (self._paths.votes, self._paths.grades):
            path.unlink(missing_ok=True)
        names = {package for task in self._tasks for package in GRADERS[task].packages}
        packages = {name: number for name in sorted(names) if (number := installed(name)) is not None}
        versions = {"distill": __version__, "python": platform.python_version()} | packages
        GradedWith(settings=self.settings, versions=versions).write(self._paths.grading)
