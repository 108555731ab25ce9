"""The main program of a grading process: answer questions, each a line of JSON, until the input ends.

`distill.grading.pool` starts it as `python -m distill.grading.worker MEMORY_BYTES SECONDS LEVEL`, a fresh interpreter
that imports the graders and little else. It writes the line `{"ready": true}`, then one line per question, in order:

    {"task", "gold", "answer", "marked", "other"}
                                           → [outcome, reason] or [outcome, reason, details], see `TaskGrader.compare`
    {"task", "gold"}                       → whether the grader can read this gold answer, see `TaskGrader.reads`

or `{"error": message}` when this machine cannot grade the task, see `TaskGrader.prepare`. The pool then stops.
"""

import json
import logging
import math
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING

from distill.errors import WorkError
from distill.grading.grade import Detailed, Ruling, agreed

if TYPE_CHECKING:
    from distill.grading.sandbox.levels import Level

PREPARE_SECONDS = 60.0  # processor time for the imports of a lazy grader


def main(memory: int, seconds: float, level: "Level") -> None:
    """Answer questions until the input ends.

    memory: bytes of address space. seconds: processor time for one question. level: minimum isolation for programs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes our stdin
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of a parser must not mix with the answers
    logging.disable(logging.CRITICAL)  # nobody reads the warnings of libraries
    from distill.grading.graders import GRADERS

    waiting = {task for task, grader in GRADERS.items() if grader.lazy}
    for task in GRADERS.keys() - waiting:
        GRADERS[task].prepare()
    for each in GRADERS.values():
        each.seconds, each.level = seconds, level
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if question["task"] in waiting:
            _limit_cpu(PREPARE_SECONDS)
            try:
                GRADERS[question["task"]].prepare()
            except WorkError as error:
                print(json.dumps({"error": str(error)}), file=answers, flush=True)
                continue
            waiting.remove(question["task"])
        grader, gold = GRADERS[question["task"]], question["gold"]
        other = question.get("other", "")
        _limit_cpu(seconds * grader.limits(gold) * (2 if other else 1))
        answer: Ruling | Detailed | bool
        try:
            if "answer" in question:
                answer = grader.compare(gold, question["answer"], question["marked"])
                if other and answer[0] in grader.doubted:
                    answer = agreed(answer, grader.compare(gold, other, marked=True))
            else:
                answer = grader.reads(gold)
        except MemoryError:
            os._exit(1)  # the state of the process is unknown
        except Exception as error:  # sympy raises exceptions of any type on odd input; the verdict names the type
            answer = ("unverifiable", f"parser failed: {type(error).__name__}") if "answer" in question else False
        print(json.dumps(answer), file=answers, flush=True)


def _limit_cpu(seconds: float) -> None:
    """Make the kernel end this process (SIGXCPU) after this much more processor time, even if the parent has ended."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = usage.ru_utime + usage.ru_stime
    limit, hard = math.ceil(spent + seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]  # the pool passes a Level
