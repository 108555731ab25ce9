"""`GRADERS`: the only list of graders. A new one is a file with its `TaskGrader`, and a line here."""

from distill.grading.choice import ChoiceGrader
from distill.grading.grade import TaskGrader
from distill.grading.gym import GymGrader
from distill.grading.instructions import InstructionsGrader
from distill.grading.judged import JUDGE, JudgedTask
from distill.grading.math import MathGrader

GRADERS: dict[str, TaskGrader] = {  # task of a prompt → its grader
    "math": MathGrader(),
    "choice": ChoiceGrader(),
    "gym": GymGrader(),
    "instructions": InstructionsGrader(),
    JUDGE: JudgedTask(),
}
