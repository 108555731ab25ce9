"""`GRADERS`: the table of graders. A new grader is a file with a `TaskGrader`, and a line here."""

from distill.grading.choice import ChoiceGrader
from distill.grading.code import CodeGrader
from distill.grading.grade import TaskGrader
from distill.grading.gym import GymGrader
from distill.grading.instructions import InstructionsGrader
from distill.grading.judged import JUDGE, JudgedTask
from distill.grading.math import MathGrader

GRADERS: dict[str, TaskGrader] = {  # task of a prompt → its grader
    "math": MathGrader(),
    "choice": ChoiceGrader(),
    "code": CodeGrader(),
    "gym": GymGrader(),
    "instructions": InstructionsGrader(),
    JUDGE: JudgedTask(),
}
