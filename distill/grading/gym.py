"""Grade answers to reasoning-gym problems. The verdict is that of the problem's own `score_answer`.

`correct` is a score of 1. A lower score is `wrong`, unless the form of the answer may be the cause rather than its
value: an answer with LaTeX commands, an answer that contains the reference answer within more text, and an answer that
is not marked as one are `unverifiable`. Partial scores, which many datasets give for a well-formed answer, are ignored:
a trace is either kept or dropped.

Several scorers evaluate the answer as Python (`eval`, `sympy.parse_expr`), and the answer comes from a model. While an
answer is scored, an audit hook ends the worker at the first attempt to start a process, open a file for writing, change
the file system or use the network; the verdict is then `unverifiable`. An audit hook does not stop malicious native
code: it is a second line of defense behind a worker with bounded time and memory, and nothing more.
"""

import os
import re
import sys
from contextlib import suppress

from distill.grading.grade import Answer, Ruling, TaskGrader
from distill.grading.math import FONT, final_answer
from distill.prompts.boxes import boxed
from distill.prompts.gym import entry_of, read_gold, require_gym
from distill.prompts.prompt import outside_blocks

HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}  # imports list directories
HARMFUL = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "fcntl.", "webbrowser.", "urllib.", "ftplib.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN_EXIT = 3


class GymGrader(TaskGrader):
    """Scores answers with the generator of the problem."""

    lazy = True  # importing the generators takes seconds, and few runs need them
    packages = ("reasoning-gym", "sympy")

    def __init__(self) -> None:
        self._scoring = False

    def require(self, where: str) -> None:
        """Raise UserError when reasoning-gym is not installed."""
        require_gym(where)

    def prepare(self) -> None:
        """Import the generators and install the audit hook."""
        import reasoning_gym  # noqa: F401
        import sympy  # noqa: F401  the scorers import it

        sys.dont_write_bytecode = True
        sys.addaudithook(self._guard)

    def gold(self, text: str) -> str:
        """The stored reference; empty if it does not name a problem."""
        return text if read_gold(text) else ""

    def find(self, response: str) -> Answer | None:
        """Find the content of the last `<answer>`, else of the last box, else the answer that the math grader finds,
        else the whole text after the reasoning, as a guess."""
        scope = outside_blocks(response).strip()
        if "<answer>" in scope:
            tagged = scope.rpartition("<answer>")[2].partition("</answer>")[0].strip()
            return Answer(_plain(tagged), "tag") if tagged else None
        if (box := boxed(scope)) is not None:
            return Answer(_plain(box), "boxed")
        answer = final_answer(scope)
        if answer is None or answer.marked:
            return answer
        return Answer(scope, "last line")

    def rule(self, gold: str, answer: Answer) -> Ruling | None:
        """None: scoring needs the generator, in a worker."""
        return None

    def compare(self, gold: str, answer: str, marked: bool) -> Ruling:
        """Regenerate the problem and score the answer."""
        reference = read_gold(gold)
        assert reference is not None, "`gold` accepted it"
        problem = entry_of(reference)
        if problem is None:
            return "unverifiable", "another version of reasoning-gym made the problem"
        dataset, entry = problem
        self._scoring = True
        try:
            score = dataset.score_answer(answer, entry)
        finally:
            self._scoring = False
        if score >= 1:
            return "correct", "full score"
        if not marked:
            return "unverifiable", "no marked answer"
        if "\\" in answer and "\\" not in (reference["answer"] or ""):
            return "unverifiable", "answer in LaTeX"
        if _is_inside(reference["answer"], answer):
            return "unverifiable", "more text around the answer"
        return "wrong", "below full score"

    def reads_plainly(self, gold: str) -> bool:
        """Whether the reference names a problem."""
        return read_gold(gold) is not None

    def _guard(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._scoring:
            return
        harmful = event.startswith(HARMFUL) and event not in HARMLESS
        if event == "open":
            harmful = isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
        if harmful:
            with suppress(OSError):
                sys.stderr.write(f"scoring an answer raised the audit event {event}\n")
            os._exit(FORBIDDEN_EXIT)


def _plain(text: str) -> str:
    """The text without a box or a font around it."""
    return FONT.sub(r"\1", boxed(text) or text).strip()


def _is_inside(reference: str | None, answer: str) -> bool:
    """Whether an answer contains the reference answer as whole words, and other text."""
    if not reference or reference == answer:
        return False
    return re.search(rf"(?<![\w.+-]){re.escape(reference)}(?![\w]|\.\d)", answer) is not None
