"""Does a response follow its instructions? IFEval's strict and loose accuracy (arXiv:2311.07911, section 3).

A response is correct where it follows all instructions of the prompt as it stands: the strict accuracy at prompt level,
which reports call the score of IFEval. The evidence has the outcome for each instruction, strict and loose, from which
the other three figures follow (`distill.eval.statistics`). Loose means that one of eight variants of the response
follows the instruction, so that an introduction or Markdown does not count against it; it is a bound from above. An
empty response follows nothing, in either sense.

The response is the whole text after the reasoning. The checks run in a worker process: some of them are searches whose
time grows with the square of the text's length.
"""

import json
from importlib.util import find_spec
from typing import ClassVar

from distill.errors import UserError
from distill.grading.grade import Answer, Detailed, Ruling, TaskGrader
from distill.grading.instruction_checks import CHECKS, DISTRIBUTIONS, PACKAGES, variants

SHOWN = 200  # characters of a response in the evidence


class InstructionsGrader(TaskGrader):
    """Checks instructions by program."""

    lazy: ClassVar[bool] = True
    votes: ClassVar[bool] = False
    packages = DISTRIBUTIONS

    def require(self, where: str) -> None:
        """Raise UserError when the packages of the extra `ifeval` are not installed."""
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise UserError(
                f"{where}: checking instructions needs {', '.join(missing)}; install them with "
                f"`pip install 'distill[ifeval]'`"
            )

    def prepare(self) -> None:
        """Load the sentence model and the language profiles."""
        from distill.grading.instruction_checks import capital_words, is_in_language

        capital_words("One. TWO.")
        is_in_language("This is a sentence in the English language.", "en")

    def gold(self, text: str) -> str:
        """The instructions as JSON text (`distill.prompts.golds.instructions_of`)."""
        return text

    def find(self, response: str) -> Answer | None:
        """The whole response."""
        return Answer(response, "response") if response.strip() else None

    def shown(self, answer: Answer) -> str:
        """The beginning of the response."""
        return answer.text if len(answer.text) <= SHOWN else f"{answer.text[: SHOWN - 1]}…"

    def rule(self, gold: str, answer: Answer) -> Ruling | None:
        """None: the checks run in a worker."""
        return None

    def compare(self, gold: str, answer: str, marked: bool) -> Ruling | Detailed:
        """Check every instruction, strictly and loosely; the outcomes are details."""
        if (problem := problem_of(gold)) is not None:
            return "unverifiable", problem
        strict, loose = [], []
        texts = variants(answer)
        for instruction in json.loads(gold):
            follows = CHECKS[instruction["id"]].follows
            strict.append(follows(answer, instruction))
            loose.append(strict[-1] or any(text.strip() and follows(text, instruction) for text in texts[1:]))
        details: dict[str, object] = {"strict": strict, "loose": loose}
        return ("correct", "all followed", details) if all(strict) else ("wrong", "not all followed", details)

    def reads_plainly(self, gold: str) -> bool:
        """Whether every instruction is known and has its arguments."""
        return problem_of(gold) is None


def problem_of(gold: str) -> str | None:
    """What makes instructions uncheckable, as a short reason; None where nothing does."""
    try:
        instructions = json.loads(gold)
    except ValueError:
        return "instructions are not JSON"
    if not isinstance(instructions, list) or not instructions:
        return "no instructions"
    for instruction in instructions:
        name = instruction.get("id") if isinstance(instruction, dict) else None
        if not isinstance(name, str) or name not in CHECKS:
            return f"unknown instruction {name}"
        for argument, kind in CHECKS[name].needs.items():
            value = instruction.get(argument)
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if (isinstance(value, bool) or not whole) if kind is int else not isinstance(value, kind):
                return f"{name} lacks {argument}"
            if argument.endswith("relation") and value not in ("less than", "at least"):
                return f"{name} has an unknown {argument}"
    return None


def number_of_instructions(gold: str) -> int:
    """How many instructions a gold answer has, unknown ones too; 0 where it is no list."""
    try:
        instructions = json.loads(gold)
    except ValueError:
        return 0
    return len(instructions) if isinstance(instructions, list) else 0
